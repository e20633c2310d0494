"""residual_blocks(groups): what can disappear as a whole, and leaves one addition of a constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from netclone.channels.emptying import emptied
from netclone.channels.grouping import ChannelGroup, ChannelGroups
from netclone.channels.labels import compact
from netclone.channels.slimming import Resizer

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A residual branch: the groups that go with it, and the node that adds what it computes to the stream.

    ``branch`` and ``stream`` are the nodes that are added, and ``axis`` is that of their channels.
    """

    at: str
    groups: tuple[str, ...]
    branch: str
    stream: str
    axis: int


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
    add_ layer1.0.conv1
    add__1 layer2.0.conv1
    add__2 layer3.0.conv1 layer3.0.conv2
    add__3 layer4.0.conv1
    """
    found: dict[str, set[str]] = {}
    for group in groups.groups:
        block, without = _block(groups, [group])
        if block is not None:
            found.setdefault(block.at, set()).update({group.name, *without})
    blocks = [_block(groups, [g for g in groups.groups if g.name in members])[0] for members in found.values()]
    order = {node.name: place for place, node in enumerate(groups.graph_module.graph.nodes)}
    return tuple(sorted((block for block in blocks if block is not None), key=lambda block: order[block.at]))


def flags_without(groups: ChannelGroups, blocks: Iterable[Block]) -> list[Tensor]:
    """Per group, True for every unit, but for the groups of some blocks."""
    gone = {name for block in blocks for name in block.groups}
    return [torch.full((group.size,), group.name not in gone) for group in groups.groups]


def _block(groups: ChannelGroups, some: Sequence[ChannelGroup]) -> tuple[Block | None, list[str]]:
    """The block that goes with some groups, and the groups that have no layer left without it; None if there is none.

    It is one if a single addition reads all that becomes constant, beside one tensor that does not.
    """
    units = sorted(unit for group in some for unit in group.units)
    empty = emptied(Resizer(groups.labelling, torch.tensor(units)))
    if empty is None or empty.refused is not None or len(empty.constants) != 1:
        return None, []
    ((branch, value),) = empty.constants.items()
    readers = [node for node in empty.live if branch in node.all_input_nodes]
    others = [node for node in readers[0].all_input_nodes if node is not branch]
    if len(readers) != 1 or readers[0].target is not aten.add.Tensor or len(others) != 1:
        return None, []
    varied = [axis for axis, size in enumerate(compact(value).shape) if size > 1]
    axis = varied[0] if varied else (-1 if value.dim() == 3 else 1)
    block = Block(readers[0].name, tuple(group.name for group in some), branch.name, others[0].name, axis)
    left = {str(node.target) for node in empty.live if node.op == "get_attr"}
    return block, [group.name for group in groups.groups if not left & {name for name, _, _ in group.members}]
