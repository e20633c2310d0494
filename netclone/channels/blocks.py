"""residual_blocks(groups): what can disappear as a whole, and leaves one addition of a constant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from netclone.channels.emptying import Emptied, emptied
from netclone.channels.grouping import ChannelGroup, ChannelGroups
from netclone.channels.slimming import Resizer

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A residual branch: the groups that go with it, and the node that adds what it computes to the stream."""

    at: str
    groups: tuple[str, ...]


def residual_blocks(groups: ChannelGroups) -> tuple[Block, ...]:
    """The residual branches of a network that can lose all of their groups, in the order of the network.

    A branch is found by emptying one group after another: what is left of it is a constant that a single addition
    reads. Groups without a layer in what is left belong to the branch too. The attention and the MLP of a transformer's
    layer are two branches.

    Examples
    --------
    >>> import timm, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> for block in residual_blocks(groups):
    ...     print(block.at, *block.groups)
    add layer1.0.conv1
    add_1 layer2.0.conv1
    add_2 layer3.0.conv1 layer3.0.conv2
    add_3 layer4.0.conv1
    """
    found: dict[str, set[str]] = {}
    for group in groups.groups:
        at, empty = _added(groups, [group])
        if at is not None and empty is not None:
            found.setdefault(at, set()).update({group.name, *_without_layers(groups, empty)})
    order = {node.name: place for place, node in enumerate(groups.graph_module.graph.nodes)}
    blocks = []
    for at in sorted(found, key=order.__getitem__):
        members = [group for group in groups.groups if group.name in found[at]]
        if _added(groups, members)[0] == at:
            blocks.append(Block(at, tuple(group.name for group in members)))
    return tuple(blocks)


def flags_without(groups: ChannelGroups, blocks: Iterable[Block]) -> list[Tensor]:
    """Per group, True for every unit, but for the groups of some blocks."""
    gone = {name for block in blocks for name in block.groups}
    return [torch.full((group.size,), group.name not in gone) for group in groups.groups]


def _added(groups: ChannelGroups, some: Iterable[ChannelGroup]) -> tuple[str | None, Emptied | None]:
    """The one addition that reads all that becomes constant without some groups, if there is one."""
    units = sorted(unit for group in some for unit in group.units)
    empty = emptied(Resizer(groups.labelling, torch.tensor(units)))
    if empty is None or empty.refused is not None or not empty.constants:
        return None, None
    readers = {node for node in empty.live if any(used in empty.constants for used in node.all_input_nodes)}
    if len(readers) != 1 or (reader := readers.pop()).target is not aten.add.Tensor:
        return None, None
    return reader.name, empty


def _without_layers(groups: ChannelGroups, empty: Emptied) -> list[str]:
    """The groups that slice no parameter of what is left."""
    left = {str(node.target) for node in empty.live if node.op == "get_attr"}
    return [group.name for group in groups.groups if not left & {name for name, _, _ in group.members}]
