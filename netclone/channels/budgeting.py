"""Budgets: which share of the channels, or which channels, leave a share of a network's parameters or MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from netclone.arguments import Budget, check_choice
from netclone.channels.grouping import ChannelGroup, ChannelGroups, unused_outputs
from netclone.channels.slimming import slim
from netclone.errors import ArgumentError
from netclone.graph.counting import MacCounter
from netclone.graph.operators import kind_of
from netclone.graph.tracing import shape_of


def channel_share(groups: ChannelGroups, keep: float, budget: str, classes: Sequence[int] | None = None) -> float:
    """The largest share of every group's units, in (0, 1], that stays within ``keep`` of the budget.

    The slim network counts with the outputs of ``classes`` only (None: all), the full one with all its outputs.

    Raises
    ------
    ArgumentError
        If even one unit in every group is too much, or ``budget`` is unknown.

    Examples
    --------
    >>> import timm, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> 0.5 < channel_share(groups, 0.5, "params") < 0.8
    True
    """
    check_budget(budget)
    if budget == "channels" or keep == 1:
        return keep
    sizes = Allocation(groups, budget, classes)

    def size(share: float) -> int:
        if budget == "params":  # known in closed form
            return sizes.size([units_kept(group, share) for group in groups.groups])
        return sizes.measured(_first(groups, share))

    whole = sizes.whole if budget == "params" else sizes.measured(_first(groups, 1.0), every_class=True)
    low, high = 0.0, 1.0
    _check_reachable(size(low) / whole, keep, budget)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= keep * whole else (low, middle)
    return max(low, 1e-6)


def check_budget(budget: str) -> None:
    """Raise unless there is such a budget."""
    check_choice(budget, Budget, "budget")


def units_kept(group: ChannelGroup, share: float) -> int:
    """The number of a group's units that a share keeps: at least one."""
    return max(1, round(share * group.size))


class Allocation:
    """Divides a budget among all groups: the units with the highest scores stay, whatever their group.

    The size of the slim network follows from how many units of each group are kept: a weight has as many entries as
    the product of the lengths of its axes, and as many MACs as entries times positions. Only the outputs of ``classes``
    (None: all) are kept. ``whole`` is the size of the full network.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> allocation = Allocation(groups, "params")
    >>> scores = [torch.arange(group.size).float() for group in groups.groups]
    >>> 0.4 < allocation.size([int(f.sum()) for f in allocation.flags(scores, 0.5)]) / allocation.whole <= 0.5
    True
    """

    def __init__(self, groups: ChannelGroups, budget: str, classes: Sequence[int] | None = None) -> None:
        self.groups = groups
        self.budget = budget
        self._gone = unused_outputs(groups, range(groups.outputs) if classes is None else classes)
        members: dict[str, list[tuple[int, int, int]]] = {}
        for number, group in enumerate(groups.groups):
            for name, axis, slices in group.members:
                members.setdefault(name, []).append((number, axis, slices))
        positions = _positions(groups) if budget == "macs" else {}
        self._unused: dict[str, list[tuple[int, int]]] = {}
        self._tensors = [
            (name, tuple(parameter.shape), positions.get(name, 0) if budget == "macs" else 1, members.get(name, []))
            for name, parameter in groups.graph_module.named_parameters()
        ]
        labels, slots = groups.labelling.labels, groups.labelling.slots
        marked = labels.marked(self._gone)
        for (name, axis), own in slots.items() if len(self._gone) else ():
            if count := int(marked[labels.roots(own)].sum()):
                self._unused.setdefault(name, []).append((axis, count // groups.labelling.repeats(name, axis)))
        every = [group.size for group in groups.groups]
        self.whole = self.size(every, every_class=True)
        all_units = self.size(every)
        self.unit_costs = [
            max(1, all_units - self.size([n - (i == number) for i, n in enumerate(every)]))
            for number in range(len(every))
        ]
        """The saving of one unit of each group, while everything else is kept."""

    def size(self, kept: Sequence[int], every_class: bool = False) -> int:
        """Parameters, or MACs of convolutions and linear layers for one image, with this many units of each group."""
        total = 0
        for name, shape, weight, members in self._tensors:
            left = list(shape)
            for axis, count in () if every_class else self._unused.get(name, ()):
                left[axis] -= count
            for number, axis, slices in members:
                left[axis] -= slices * (self.groups.groups[number].size - kept[number])
            total += weight * math.prod(left)
        return total

    def flags(self, scores: Sequence[Tensor], keep: float) -> list[Tensor]:
        """Per group, True for the units of the highest scores that fit into ``keep`` of the budget.

        The best unit of every group always stays. Ties go to the first.
        """
        sizes = [len(score) for score in scores]
        order = torch.sort(torch.cat([score.detach().cpu() for score in scores]), descending=True, stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        ranks = rank.split(sizes)
        best = [int(part.argmin()) for part in ranks]

        def chosen(count: int) -> list[Tensor]:
            flags = [part < count for part in ranks]
            for flag, first in zip(flags, best, strict=True):
                flag[first] = True
            return flags

        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.size([int(flag.sum()) for flag in chosen(middle)]) <= keep * self.whole
            low, high = (middle, high) if fits else (low, middle - 1)
        return chosen(low)

    def exact_flags(self, scores: Sequence[Tensor], keep: float) -> list[Tensor]:
        """As :meth:`flags`, checked on the slim network itself, whose attention has MACs of its own.

        Raises
        ------
        ArgumentError
            If even one unit in every group is too much.
        """
        whole = self.measured(_first(self.groups, 1.0), every_class=True)
        asked = keep
        while True:
            flags = self.flags(scores, asked)
            size = self.measured(flags)
            if size <= keep * whole:
                return flags
            if all(int(flag.sum()) == 1 for flag in flags):
                _check_reachable(size / whole, keep, self.budget)
            asked *= 0.99 * keep * whole / size

    def measured(self, flags: Sequence[Tensor], every_class: bool = False) -> int:
        """Parameters, or MACs for one image, measured on the slim network itself."""
        removed = [
            unit
            for group, flag in zip(self.groups.groups, flags, strict=True)
            for unit, stays in zip(group.units, flag.tolist(), strict=True)
            if not stays
        ]
        units = torch.tensor(removed, dtype=torch.long)
        slimmed = slim(self.groups.labelling, (units if every_class else torch.cat([units, self._gone])).sort().values)
        if self.budget == "params":
            return sum(parameter.numel() for parameter in slimmed.parameters())
        with MacCounter() as counter, torch.no_grad():
            slimmed(self.groups.example[:1])
        return counter.macs


def _check_reachable(least: float, keep: float, budget: str) -> None:
    if least > keep:
        raise ArgumentError(
            f"keep: {keep:.3g} of the {budget} cannot be reached by removing channels: one unit in every group leaves "
            f"{least:.2g}; keep at least that, or see channel_groups(source).unprunable for what always stays"
        )


def _first(groups: ChannelGroups, share: float) -> list[Tensor]:
    """Keep the first units of every group: within a group all units have the same size."""
    return [torch.arange(group.size) < units_kept(group, share) for group in groups.groups]


def _positions(groups: ChannelGroups) -> dict[str, int]:
    """For each weight of a convolution or linear layer, how often every entry is used for one image."""
    found: dict[str, int] = {}
    for node in groups.graph_module.graph.nodes:
        if (kind := kind_of(node.target)) in ("convolution", "linear"):
            weight, shape = node.args[1], shape_of(node)
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and shape is not None:
                channels = shape[-1] if kind == "linear" else shape[0]
                name = str(weight.target)
                found[name] = found.get(name, 0) + math.prod(shape) // max(1, channels)
    return found
