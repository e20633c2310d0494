"""Masks: hard, frozen, tied to a structure; applying one is zeroing the columns that read what is masked."""

import copy
import dataclasses

import pytest
import timm
import torch
from architectures import Net, random_mask, relative_error, untouched
from torch import nn

from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.errors import MaskError
from netclone.graph.tracing import trace
from netclone.learning.localizing import localize

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width=6):
    parts = {"stem": nn.Conv2d(3, width, 3), "body": nn.Conv2d(width, 4, 3), "head": nn.Linear(4, 5)}
    return Net(lambda net, x: net.head(net.body(net.stem(x).relu()).relu().mean((2, 3))), **parts)


def by_hand():
    """The network, its groups, and a mask that removes channels 1, 4 of the stem and 0 of the body."""
    net = network()
    groups = channel_groups(net, IMAGES)
    flags = {"stem": [True, False, True, True, False, True], "body": [False, True, True, True]}
    return net, groups, ChannelMask.from_kept(groups, flags)


def test_what_a_mask_says():
    _, groups, mask = by_hand()
    assert mask.kept == (("stem", (True, False, True, True, False, True)), ("body", (False, True, True, True)))
    assert mask.summary() == (("stem", 4, 6), ("body", 3, 4))
    assert mask.share == 0.7
    assert mask.fingerprint == groups.fingerprint
    removed = [groups["stem"].units[1], groups["stem"].units[4], groups["body"].units[0]]
    assert mask.removed_units(groups).tolist() == sorted(removed)


def test_applying_a_mask_zeroes_the_columns_that_read_masked_channels_and_nothing_else():
    net, _, mask = by_hand()
    expected = copy.deepcopy(net)
    with torch.no_grad():
        expected.body.weight[:, [1, 4]] = 0
        expected.head.weight[:, 0] = 0
    with untouched(net):
        masked = mask.apply(net, IMAGES)
    for name, parameter in expected.named_parameters():
        assert torch.equal(masked.get_parameter(name), parameter), name
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(masked(x), expected(x))
    assert relative_error(masked(x), net(x)) > 1e-3


def test_masked_channels_do_not_matter():
    net, _, mask = by_hand()
    masked = mask.apply(net, IMAGES)
    before = masked(IMAGES)
    with torch.no_grad():
        masked.get_parameter("stem.weight")[[1, 4]] = 1e3
        masked.get_parameter("body.bias")[0] = 1e3
    assert torch.equal(masked(IMAGES), before)


@pytest.mark.slow
def test_a_mask_of_modules_is_a_mask_of_their_graphs():
    model = timm.create_model("test_resnet", num_classes=4).eval()
    groups = channel_groups(model)
    mask = random_mask(groups, 0.5)
    x = torch.randn(3, 3, 160, 160)
    want = mask.apply(model)(x)
    assert torch.equal(mask.apply(groups.graph_module)(x), want)
    with untouched(groups.graph_module):
        mask.apply(groups.graph_module)
    traced = trace(model)
    with untouched(traced):
        masked = localize(traced, method="magnitude", keep=0.5).apply(traced)
    torch.testing.assert_close(masked(x), localize(model, method="magnitude", keep=0.5).apply(model)(x))


def test_groups_that_are_not_named_are_kept_whole():
    net = network()
    groups = channel_groups(net, IMAGES)
    mask = ChannelMask.from_kept(groups, {"body": torch.tensor([1, 0, 0, 1]).bool()})
    assert mask.summary() == (("stem", 6, 6), ("body", 2, 4))
    assert ChannelMask.from_kept(groups, {}).share == 1


def test_a_mask_that_keeps_everything_changes_nothing():
    net = network().double()
    mask = ChannelMask.from_kept(channel_groups(net, IMAGES.double()), {})
    assert torch.equal(mask.apply(net, IMAGES.double())(IMAGES.double()), net(IMAGES.double()))


def test_a_mask_is_frozen_and_a_value():
    _, groups, mask = by_hand()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.kept = ()
    assert mask == ChannelMask.from_kept(groups, dict(mask.kept))
    assert len({mask, ChannelMask.from_kept(groups, dict(mask.kept))}) == 1


# ---------------------------------------------------------------- what is refused


def test_a_mask_of_another_model_is_refused():
    _, _, mask = by_hand()
    other = network(width=7)
    with untouched(other), pytest.raises(MaskError) as info:
        mask.apply(other, IMAGES)
    message = str(info.value)
    assert "made for another model" in message
    assert "stem:6, body:4" in message
    assert "stem:7, body:4" in message
    assert "netclone.localize" in message


def test_a_mask_of_the_same_sizes_but_another_structure_is_refused():
    _, _, mask = by_hand()
    other = network()
    other._function = lambda net, x: net.head(net.body(net.stem(x).sigmoid()).relu().mean((2, 3)))
    with pytest.raises(MaskError, match="made for another model"):
        mask.apply(other, IMAGES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"body": [False] * 4}, r"keeps no unit of group 'body' \(4 units\): keep at least one"),
        ({"nothing": [True]}, r"no channel group 'nothing'; the model's groups are \['body', 'stem'\]"),
        ({"body": [True] * 3}, "body:3.*body:4"),
    ],
    ids=["none", "unknown", "too few"],
)
def test_a_mask_that_does_not_fit_is_refused(flags, message):
    groups = channel_groups(network(), IMAGES)
    with pytest.raises(MaskError, match=message):
        ChannelMask.from_kept(groups, flags)


def test_a_mask_put_together_by_hand_is_checked_when_it_is_used():
    net, groups, mask = by_hand()
    empty = dataclasses.replace(mask, kept=tuple((name, (False,) * len(flags)) for name, flags in mask.kept))
    with untouched(net), pytest.raises(MaskError, match="keeps no unit of group 'stem'"):
        empty.apply(net, IMAGES)
    with pytest.raises(MaskError):
        empty.validate(groups)
