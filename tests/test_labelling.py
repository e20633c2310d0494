"""Labels of a captured graph: which slices of which parameters are one unit, written down by hand."""

import pytest
import torch
from architectures import Net
from torch import nn

from netclone.channels.labelling import Labelling
from netclone.graph.capturing import capture

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def labelled(function, **parts):
    torch.manual_seed(0)
    return Labelling(capture(Net(function, **parts).eval(), X))


def units(labelling, name, axis):
    """The unit of every slice of a parameter; 0 for one that always stays."""
    return labelling.labels.roots(labelling.slots[name, axis]).tolist()


def pooled(net, x):
    return net.head(x.mean((2, 3)))


def test_a_channel_is_one_unit_where_it_is_made_normalised_and_read():
    found = labelled(
        lambda net, x: pooled(net, net.norm(net.stem(x)).relu()),
        **{"stem": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 5)},
    )
    made = units(found, "stem.weight", 0)
    assert len(set(made)) == 4 and 0 not in made
    assert made == units(found, "stem.bias", 0) == units(found, "norm.running_var", 0) == units(found, "head.weight", 1)
    assert units(found, "stem.weight", 1) == [0, 0, 0]  # the images' own channels
    assert [found.roles[key] for key in (("stem.weight", 0), ("stem.bias", 0), ("head.weight", 1))] == [
        *("out", "along", "in")
    ]
    assert found.without_rule == []


def test_what_is_added_is_one_unit_and_what_is_joined_is_two():
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1)}
    added = labelled(lambda net, x: pooled(net, net.a(x) + net.b(x)), **parts, head=nn.Linear(4, 5))
    assert units(added, "a.weight", 0) == units(added, "b.weight", 0)
    joined = labelled(lambda net, x: pooled(net, torch.cat([net.a(x), net.b(x)], 1)), **parts, head=nn.Linear(8, 5))
    assert units(joined, "head.weight", 1) == units(joined, "a.weight", 0) + units(joined, "b.weight", 0)
    assert len(set(units(joined, "head.weight", 1))) == 8


def test_heads_are_units_of_several_rows():
    def attend(net, x):
        q, k, v = net.qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return net.head(out.mean(1))

    rows = units(labelled(attend, qkv=nn.Linear(3, 12), head=nn.Linear(4, 5)), "qkv.weight", 0)
    first, second = rows[0], rows[2]
    assert rows == [first, first, second, second] * 3 and first != second


def test_an_operator_without_a_rule_keeps_what_it_touches_and_is_named():
    found = labelled(
        lambda net, x: pooled(net, torch.special.airy_ai(net.stem(x))), stem=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 5)
    )
    assert found.without_rule == [("special_airy_ai", "aten.special_airy_ai.default")]
    assert units(found, "stem.weight", 0) == [0, 0, 0, 0]
    [event] = {found.labels.why_fixed(label) for label in found.slots["stem.weight", 0].tolist()}
    assert event.node == "special_airy_ai" and "has no rule" in event.why


def test_a_parameter_that_meets_activations_gets_their_units():
    found = labelled(
        lambda net, x: pooled(net, net.stem(x) * net.scale),
        **{"stem": nn.Conv2d(3, 4, 1), "scale": nn.Parameter(torch.ones(4, 1, 1)), "head": nn.Linear(4, 5)},
    )
    assert found.labels.roots(found.constants["scale"]).flatten().tolist() == units(found, "stem.weight", 0)


def test_a_weight_that_two_layers_read_is_sliced_for_both_or_for_none():
    shared = nn.Conv2d(3, 3, 1)
    found = labelled(lambda net, x: pooled(net, net.shared(net.shared(x))), shared=shared, head=nn.Linear(3, 5))
    assert units(found, "shared.weight", 0) == units(found, "shared.weight", 1) == [0, 0, 0]


@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 4)])
def test_every_tensor_varies_along_one_axis_at_most(groups, size):
    found = labelled(
        lambda net, x: pooled(net, net.body(net.stem(x))),
        **{"stem": nn.Conv2d(3, 4, 1), "body": nn.Conv2d(4, 4, 1, groups=groups), "head": nn.Linear(size, 5)},
    )
    for value in found.values.values():
        assert sum(stride != 0 and width > 1 for stride, width in zip(value.stride(), value.shape, strict=True)) <= 1
