"""Residual blocks are found by what is left without their groups."""

import pytest
import timm
import torch
from architectures import Net
from torch import nn

import netclone
from netclone.channels.blocks import Block, flags_without, residual_blocks
from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def inverted(net, x):
    """A block with a gate of its own, one whose last layer pads, one layer whose output is read twice, and no block."""
    x = net.stem(x)
    hidden = net.spatial(net.expand(x).relu()).relu()
    x = x + net.project(hidden * net.up(net.down(hidden.mean((2, 3), keepdim=True)).relu()).sigmoid())
    x = x + net.third(net.second(net.first(x)).relu())
    twice = net.outer(net.inner(x).relu())
    x = (x + twice) * twice
    return net.head(net.plain(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def groups():
    net = Net(
        inverted,
        stem=nn.Conv2d(3, 4, 3, padding=1),
        expand=nn.Conv2d(4, 8, 1),
        spatial=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        down=nn.Conv2d(8, 2, 1),
        up=nn.Conv2d(2, 8, 1),
        project=nn.Conv2d(8, 4, 1),
        first=nn.Conv2d(4, 3, 1),
        second=nn.Conv2d(3, 5, 1),
        third=nn.Conv2d(5, 4, 3, padding=1),
        inner=nn.Conv2d(4, 6, 1),
        outer=nn.Conv2d(6, 4, 1),
        plain=nn.Conv2d(4, 7, 1),
        head=nn.Linear(7, 5),
    )
    return channel_groups(net, IMAGES)


def test_a_block_is_all_groups_that_have_no_layer_left_without_it(groups):
    assert residual_blocks(groups) == (
        Block("add", ("expand", "down"), "conv2d_5", "conv2d", 1),
        Block("add_1", ("first", "second"), "conv2d_8", "add", 1),
    )


def test_a_network_without_some_blocks(groups):
    flags = flags_without(groups, residual_blocks(groups)[1:])
    kept = {group.name: flag.tolist() for group, flag in zip(groups.groups, flags, strict=True)}
    assert {name for name, own in kept.items() if not all(own)} == {"first", "second"}
    module = netclone.extract(groups, ChannelMask.from_kept(groups, kept))
    assert module.certificate < 1e-14
    names = {name.split(".")[1] for name in module.state_dict()}
    assert not names & {"first", "second", "third"}


def test_a_transformers_layer_is_two_branches():
    groups = channel_groups(timm.create_model("test_vit", num_classes=4))
    blocks = residual_blocks(groups)
    assert {block.axis for block in blocks} == {2}
    found = [block.groups for block in blocks]
    branches = [("attn.qkv", "attn.qkv.dims", "attn.qkv.dims#2"), ("mlp.fc1",)]
    assert found == [tuple(f"blocks.{i}.{part}" for part in parts) for i in range(6) for parts in branches]
