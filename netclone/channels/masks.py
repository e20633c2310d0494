"""ChannelMask: which units of a network are kept. Binary, frozen, and tied to the structure it was made for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from netclone.channels.emptying import emptied
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.labelling import Labelling
from netclone.channels.normalising import leave_out
from netclone.channels.slimming import Resizer
from netclone.errors import MaskError
from netclone.graph.capturing import tensor_at

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelMask:
    """The units that are kept in each channel group.

    Made by :func:`netclone.localize`, or by hand with :meth:`from_kept`. ``kept`` holds ``(group name, flags)``.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> mask = netclone.localize(source, method="random", keep=0.5)
    >>> round(mask.share, 1)
    0.5
    >>> masked = mask.apply(source)
    >>> masked(torch.zeros(1, 3, 160, 160)).shape
    torch.Size([1, 4])
    """

    fingerprint: str
    kept: tuple[tuple[str, tuple[bool, ...]], ...]

    @classmethod
    def from_kept(cls, groups: ChannelGroups, kept: Mapping[str, Iterable[bool]]) -> ChannelMask:
        """A mask that keeps the flagged units of the named groups, and all units of the others.

        Raises
        ------
        MaskError
            If a group is unknown, has another number of units, or cannot lose all of them.
        """
        known = {group.name: group for group in groups.groups}
        for name in kept:
            if name not in known:
                raise MaskError(f"no channel group '{name}'; the model's groups are {sorted(known)[:5]}...")
        flags = tuple(
            (name, tuple(bool(flag) for flag in kept[name]) if name in kept else (True,) * group.size)
            for name, group in known.items()
        )
        mask = cls(groups.fingerprint, flags)
        mask.validate(groups)
        return mask

    @property
    def share(self) -> float:
        """Share of the prunable units that are kept (1 if nothing is prunable)."""
        flags = [flag for _, group in self.kept for flag in group]
        return sum(flags) / len(flags) if flags else 1.0

    def summary(self) -> tuple[tuple[str, int, int], ...]:
        """``(group, units kept, units)`` per group."""
        return tuple((name, sum(flags), len(flags)) for name, flags in self.kept)

    def validate(self, groups: ChannelGroups) -> None:
        """Check that the mask belongs to a model.

        Raises
        ------
        MaskError
            If it was made for another structure, or keeps no unit of groups that cannot lose their last one.
        """
        sizes = {group.name: group.size for group in groups.groups}
        if self.fingerprint != groups.fingerprint or {name: len(flags) for name, flags in self.kept} != sizes:
            ours = ", ".join(f"{name}:{len(flags)}" for name, flags in self.kept[:3])
            theirs = ", ".join(f"{group.name}:{group.size}" for group in groups.groups[:3])
            raise MaskError(
                f"this mask was made for another model (its groups: {ours}...; the model's: {theirs}...): make one "
                "for this model with netclone.localize"
            )
        without = [(name, len(flags)) for name, flags in self.kept if not any(flags)]
        empty = emptied(Resizer(groups.labelling, self._removed(groups))) if without else None
        if empty is not None and empty.refused is not None:
            named = " and ".join(f"group '{name}' ({count} units)" for name, count in without)
            raise MaskError(f"the mask keeps no unit of {named}: keep at least one, because {empty.refused}")

    def removed_units(self, groups: ChannelGroups) -> Tensor:
        """The units (roots of labels) that are not kept, sorted."""
        self.validate(groups)
        return self._removed(groups)

    def _removed(self, groups: ChannelGroups) -> Tensor:
        flags = dict(self.kept)
        removed = [
            unit
            for group in groups.groups
            for unit, keep in zip(group.units, flags[group.name], strict=True)
            if not keep
        ]
        return torch.tensor(sorted(removed), dtype=torch.long)

    def apply(
        self, source: nn.Module | ChannelGroups, example_inputs: Tensor | tuple[Tensor] | None = None
    ) -> fx.GraphModule:
        """A full-size copy of the source in which masked units are silenced.

        Weight columns that read masked units become zero, products over dimensions of heads read zeros there, and norms
        over prunable channels (``channel_groups(through_norms=True)``) leave masked ones out. This equals removal
        exactly.

        Raises
        ------
        MaskError
            If the mask was made for another model.
        """
        groups = channel_groups(source, example_inputs)
        return silence(copy.deepcopy(groups.graph_module), groups.labelling, self.removed_units(groups))


def silence(graph_module: fx.GraphModule, labelling: Labelling, removed: Tensor) -> fx.GraphModule:
    """Set weight columns that read removed units to zero, in place, in a copy of the labelled graph.

    Norms and products over units leave the removed ones out.
    """
    with torch.no_grad():
        for name, columns in silent_columns(labelling, removed).items():
            tensor = tensor_at(graph_module, name)
            tensor.copy_(silenced(tensor, columns))
    if leave_out_removed(graph_module, labelling, removed):
        graph_module.recompile()
    return graph_module


def silent_columns(labelling: Labelling, removed: Tensor) -> dict[str, list[tuple[int, Tensor]]]:
    """For each tensor that reads removed units: the axes, and True for the slices that read them."""
    gone = labelling.labels.marked(removed)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for (name, axis), labels in labelling.slots.items():
        if labelling.roles[name, axis] == "in":
            columns = gone[labelling.labels.roots(labels)]
            if columns.any():
                found.setdefault(name, []).append((axis, columns))
    return found


def silenced(tensor: Tensor, columns: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A copy of a tensor with some slices of its axes set to zero."""
    copied = tensor.clone()
    for axis, flags in columns:
        copied.masked_fill_(across(flags.to(tensor.device), tensor, axis), 0)
    return copied


def across(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """One value per slice of a tensor along an axis, shaped to broadcast against it.

    If there are more values than slices, each group of rows gets its own, as for the inputs of a grouped convolution.
    """
    shape = [1] * tensor.dim()
    shape[axis] = tensor.size(axis)
    groups = len(values) // tensor.size(axis)
    if groups == 1:
        return values.reshape(shape)
    shape[0] = groups
    return values.reshape(shape).repeat_interleave(tensor.size(0) // groups, 0)


def leave_out_removed(graph_module: fx.GraphModule, labelling: Labelling, removed: Tensor) -> bool:
    """Let norms and products over units see only those that stay, in place, in a copy of the labelled graph.

    Returns whether anything changed; then it has to be recompiled.
    """
    gone = labelling.labels.marked(removed)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    changed = False
    for name, labels in labelling.norms.items():
        kept = ~gone[labelling.labels.roots(labels)]
        if not bool(kept.all()):
            leave_out(graph_module, nodes[name], kept)
            changed = True
    for product in labelling.summed:
        lost = gone[labelling.labels.roots(product.labels)]
        if bool(lost.any()):
            _fill(graph_module, nodes[product.node], nodes[product.operand], product.axis, lost)
            changed = True
    return changed


def _fill(graph_module: fx.GraphModule, product: fx.Node, operand: fx.Node, axis: int, lost: Tensor) -> None:
    """Let a product read zeros in the flagged places of an operand."""
    some = next((tensor for tensor in graph_module.parameters()), lost)
    name = f"{product.name}_lost"
    graph_module.register_buffer(name, lost.nonzero().flatten().to(some.device), persistent=False)
    with graph_module.graph.inserting_before(product):
        index = graph_module.graph.get_attr(name)
        filled = graph_module.graph.call_function(aten.index_fill.int_Scalar, (operand, axis, index, 0))
    product.replace_input_with(operand, filled)
