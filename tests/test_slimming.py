"""Removing units from a captured graph: tensors are sliced, and literal arguments follow, as written by hand."""

import pytest
import torch
from architectures import Net, relative_error
from torch import nn

from netclone.channels.labelling import Labelling
from netclone.channels.slimming import Resizer, slim
from netclone.errors import CertificateError
from netclone.graph.capturing import capture

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def labelled(function, **parts):
    torch.manual_seed(0)
    return Labelling(capture(Net(function, **parts).eval(), X))


def channels(labelling, name, indices):
    """The units of some rows of a weight, ascending."""
    return labelling.labels.roots(labelling.slots[name, 0])[indices].unique()


def two_layers():
    return labelled(
        lambda net, x: net.head(net.norm(net.stem(x)).relu().flatten(1)),
        **{"stem": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), "head": nn.Linear(64, 5)},
    )


def test_no_trace_of_a_removed_channel_is_stored():
    labelling = two_layers()
    before = {name: tensor.clone() for name, tensor in labelling.graph_module.state_dict().items()}
    slimmed = slim(labelling, channels(labelling, "stem.weight", [0, 3]))
    kept, columns = [1, 2], [column for channel in (1, 2) for column in range(16 * channel, 16 * channel + 16)]
    by_hand = {name: before[name][kept] for name in before if name.startswith(("stem", "norm"))}
    by_hand |= {"head.weight": before["head.weight"][:, columns], "head.bias": before["head.bias"]}
    stored = slimmed.state_dict()
    assert stored.keys() == by_hand.keys()
    assert all(torch.equal(stored[name], by_hand[name]) for name in stored)


def test_the_source_is_not_changed_and_nothing_is_shared():
    labelling = two_layers()
    source = labelling.graph_module
    before = source.code, {name: tensor.clone() for name, tensor in source.state_dict().items()}
    slimmed = slim(labelling, torch.empty(0, dtype=torch.long))
    with torch.no_grad():
        for parameter in slimmed.parameters():
            parameter.zero_()
    assert source.code == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in source.state_dict().items())


def test_without_removals_it_computes_the_same():
    labelling = two_layers()
    assert torch.equal(slim(labelling, torch.empty(0, dtype=torch.long))(X), labelling.graph_module(X))


def test_literal_sizes_follow():
    """The 4 of a view becomes 2; nodes say their new shapes."""
    labelling = labelled(
        lambda net, x: net.head(net.stem(x).view(x.shape[0], 4, 16).mean(2)),
        **{"stem": nn.Conv2d(3, 4, 1), "head": nn.Linear(4, 5)},
    )
    slimmed = slim(labelling, channels(labelling, "stem.weight", [1, 2]))
    [view] = slimmed.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    assert list(view.args[1])[1:] == [2, 16]
    assert tuple(view.meta["val"].shape) == (1, 2, 16)
    full = labelling.graph_module
    with torch.no_grad():
        full.get_parameter("head.weight")[:, [1, 2]] = 0
    assert relative_error(slimmed(X), full(X)) <= 1e-6


def test_a_resizer_says_shapes_before_and_after():
    labelling = two_layers()
    new = Resizer(labelling, channels(labelling, "stem.weight", [0]))
    [relu] = labelling.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert (new.old_shape(relu), new.shape(relu)) == ((1, 4, 4, 4), (1, 3, 4, 4))
    assert new.kept_along(relu, 1).tolist() == [False, True, True, True]
    assert new.kept_before(relu, 1, 2) == 1
    assert int(new.kept_slices("head.weight", 1).sum()) == 48
    assert new.kept_slices("head.bias", 3).tolist() == [True]
    with pytest.raises(CertificateError, match=rf"node '{relu.name}'.*cannot be followed.*keep the groups"):
        new.refuse(relu, "cannot be followed")
