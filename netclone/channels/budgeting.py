"""Budgets: which share of the channels, or which channels, leave a share of a network's parameters, MACs or time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from netclone.arguments import Budget, check_choice, check_number
from netclone.channels.approaching import approached
from netclone.channels.blocks import residual_blocks
from netclone.channels.grouping import ChannelGroup, ChannelGroups, unused_outputs
from netclone.channels.slimming import slim
from netclone.errors import ArgumentError
from netclone.graph.counting import MacCounter
from netclone.graph.folding import fold_batch_norms
from netclone.graph.functionalizing import in_place_again
from netclone.graph.operators import WEIGHTS, kind_of
from netclone.graph.timing import relative_time, seconds_of_nodes
from netclone.graph.tracing import shape_of
from netclone.runtime.sharing import ALONE, Workers

BREADTH = 0.85
"""The least width of a group that all features pass through, as a share of that of equally narrow groups."""


@dataclass(frozen=True)
class Measure:
    """What a budget counts: ``"params"``, ``"macs"``, ``"channels"``, or ``"latency"`` for a batch of images.

    Widths are kept in multiples of ``round_to``: see :func:`rounded` for equal shares, and :meth:`Allocation.flags` for
    others. Of several ``workers`` the
    first one's clock counts.
    """

    budget: Budget
    round_to: int = 1
    latency_batch: int = 1
    workers: Workers = ALONE

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number(self.round_to, "round_to", 1)
        check_number(self.latency_batch, "latency_batch", 1)


def channel_share(groups: ChannelGroups, keep: float, measure: Measure, classes: Sequence[int] | None = None) -> float:
    """The largest share of every group's units, in (0, 1], that stays within ``keep`` of the budget.

    The slim network counts with the outputs of ``classes`` only (None: all), the full one with all its outputs.

    Raises
    ------
    ArgumentError
        If even one unit in every group is too much.

    Examples
    --------
    >>> import timm, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> 0.5 < channel_share(groups, 0.5, Measure("params")) < 0.8
    True
    """
    budget = measure.budget
    if budget == "channels" or keep == 1:
        return keep
    sizes = Allocation(groups, measure, classes)

    def size(share: float) -> int:
        if budget != "macs":  # known in closed form
            return sizes.size([units_kept(group, share, measure.round_to) for group in groups.groups])
        return sizes.measured(_first(groups, share, measure))

    whole = sizes.whole if budget != "macs" else sizes.measured(_first(groups, 1.0, measure), every_class=True)

    def largest(keep: float) -> float:
        low, high = 0.0, 1.0
        if budget != "latency":  # of time this is a model, and a clock has the word
            _check_reachable(size(low) / whole, keep, budget)
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if size(middle) <= keep * whole else (low, middle)
        return max(low, 1e-6)

    if budget != "latency":
        return largest(keep)
    shares: list[float] = []

    def chosen(asked: float) -> list[Tensor]:
        shares.append(largest(asked))
        return _first(groups, shares[-1], measure)

    return shares[sizes.timed(chosen, keep)[0]]


def check_budget(budget: Budget) -> None:
    """Raise unless there is such a budget."""
    check_choice(budget, Budget, "budget")


def units_kept(group: ChannelGroup, share: float, round_to: int = 1) -> int:
    """The number of a group's units that a share keeps: at least one, and all that ``round_to`` asks for."""
    return rounded(group, max(1, round(share * group.size)), round_to)


def step_of(group: ChannelGroup, round_to: int) -> int:
    """How many units make ``round_to`` channels; 1 in a group of less than twice that many, whose width is free."""
    step = round_to if group.dims else round_to // math.gcd(round_to, *(slices for _, _, slices in group.members))
    return 1 if group.size < 2 * step else step


def rounded(group: ChannelGroup, count: int, round_to: int) -> int:
    """A number of a group's units near ``count`` with which it is a multiple of ``round_to`` channels wide.

    A group of less than twice that many channels, or left with less than half of that, stays as it was asked for, so
    that small shares can be had. The width of a head is its dimensions.

    Examples
    --------
    >>> import timm, netclone
    >>> group = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4)).groups[0]
    >>> group.size, rounded(group, 13, 8), rounded(group, 5, 8), rounded(group, 3, 8), rounded(group, 13, 1)
    (16, 16, 8, 3, 13)
    """
    step = step_of(group, round_to)
    if step == 1 or 2 * count < step:
        return count
    return min(group.size, max(step, step * round(count / step)))


class Allocation:
    """Divides a budget among all groups: the units with the highest scores stay, whatever their group.

    The size of the slim network follows from how many units of each group are kept: a weight has as many entries as
    the product of the lengths of its axes, and as many MACs as entries times positions. The time of an operator goes
    with the entries of its weight, or of the weight before it. Only the outputs of ``classes`` (None: all) are kept.
    ``whole`` is the size of the full network. The groups named in ``without`` keep no unit.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> allocation = Allocation(groups, Measure("params"))
    >>> scores = [torch.arange(group.size).float() for group in groups.groups]
    >>> 0.4 < allocation.size([int(f.sum()) for f in allocation.flags(scores, 0.5)]) / allocation.whole <= 0.5
    True
    """

    def __init__(self, groups: ChannelGroups, measure: Measure, classes: Sequence[int] | None = None) -> None:
        self.groups = groups
        self.measure = measure
        self.budget = measure.budget
        self.without: frozenset[str] = frozenset()
        self._gone = unused_outputs(groups, range(groups.outputs) if classes is None else classes)
        self._fixed, weights = self._weights()
        sliced = _slices(groups)
        self._unused: dict[str, list[tuple[int, int]]] = {}
        self._tensors = [
            (name, tuple(parameter.shape), 1 if weights is None else weights.get(name, 0), sliced.get(name, []))
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

    def doing_without(self, names: Iterable[str]) -> Allocation:
        """The same, with some groups that keep no unit."""
        other = copy.copy(self)
        other.without = frozenset(names)
        return other

    def size(self, kept: Sequence[int], every_class: bool = False) -> int:
        """What this many units of each group take: parameters, MACs of convolutions and linear layers, picoseconds."""
        return int(self.amount(kept, every_class))

    def amount(self, kept: Sequence[Any], every_class: bool = False) -> Any:
        """As :meth:`size`, not rounded; tensors instead of numbers carry their gradients through."""
        total: Any = self._fixed
        for name, shape, weight, sliced in self._tensors:
            left: list[Any] = list(shape)
            for axis, count in () if every_class else self._unused.get(name, ()):
                left[axis] -= count
            for axis, slices, numbers in sliced:
                whole = math.prod(self.groups.groups[number].size for number in numbers)
                left[axis] -= slices * (whole - math.prod(kept[number] for number in numbers))
            total = total + weight * math.prod(left)
        return total

    def _weights(self) -> tuple[float, dict[str, float] | None]:
        """What is the same at any width, and by tensor what each of its entries takes; None: one each."""
        if self.budget != "latency":
            return 0, _positions(self.groups) if self.budget == "macs" else None
        images = _batch(self.groups, self.measure)
        seconds = self.measure.workers.told(seconds_of_nodes(self.groups.graph_module, images))[0]
        fixed, by_tensor = _attributed(self.groups.graph_module, seconds)
        sizes = {name: parameter.numel() for name, parameter in self.groups.graph_module.named_parameters()}
        return 1e12 * fixed, {name: 1e12 * time / sizes[name] for name, time in by_tensor.items()}

    def flags(self, scores: Sequence[Tensor], keep: float) -> list[Tensor]:
        """Per group, True for the units of the highest scores that fit into ``keep`` of the budget.

        The best unit of every group that is not in ``without`` always stays, and more of a group that all features pass
        through (see :meth:`least`). Ties go to the first. Widths are then brought to multiples of ``round_to``, those
        first that gain the highest scores.
        """
        sizes = [len(score) for score in scores]
        order = torch.sort(torch.cat([score.detach().cpu() for score in scores]), descending=True, stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        ranks = rank.split(sizes)
        places = [part.argsort().argsort() for part in ranks]  # among the units of the same group

        least = self.least(keep)

        def widths(count: int) -> list[int]:
            chosen = [int((part < count).sum()) for part in ranks]
            return [max(fewest, many) if fewest else 0 for fewest, many in zip(least, chosen, strict=True)]

        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(widths(middle)) <= keep * self.whole else (low, middle - 1)
        kept = self._in_steps(widths(low), scores, keep)
        return [place < count for place, count in zip(places, kept, strict=True)]

    def least(self, keep: float) -> list[int]:
        """The fewest units of each group that stay when ``keep`` of the budget does.

        In a residual branch it is one, since the stream goes past it. Through any other group all features pass, and a
        few channels of it are a bottleneck, whatever their single scores: it keeps at least most (``BREADTH``) of the
        width that every group would have if all were equally narrow. Where even that is too much, it is one for all.
        """
        share = math.sqrt(keep) * BREADTH  # parameters, MACs and time go with the square of the width
        numbers = [
            1 if group.name in self._in_branches else max(1, round(share * group.size)) for group in self.groups.groups
        ]
        if self.size(numbers) > keep * self.whole:
            numbers = [1] * len(numbers)
        pairs = zip(numbers, self.groups.groups, strict=True)
        return [0 if group.name in self.without else number for number, group in pairs]

    @cached_property
    def _in_branches(self) -> frozenset[str]:
        """The groups that only residual branches have."""
        return frozenset(name for block in residual_blocks(self.groups) for name in block.groups)

    def _in_steps(self, kept: list[int], scores: Sequence[Tensor], keep: float) -> list[int]:
        """Widths in multiples of ``round_to``: first all rounded down, then one after another a step up while it fits.

        A group that keeps less than one step stays as narrow as it is, unless it gains a step, too.
        """
        steps = [step_of(group, self.measure.round_to) for group in self.groups.groups]
        if all(step == 1 for step in steps):
            return kept
        kept = [count if count < step else count - count % step for count, step in zip(kept, steps, strict=True)]
        best = [score.detach().cpu().sort(descending=True).values for score in scores]
        open_to = {number for number, group in enumerate(self.groups.groups) if group.name not in self.without}
        while open_to:
            wider = {
                number: min(len(best[number]), kept[number] - kept[number] % steps[number] + steps[number])
                for number in sorted(open_to)
            }
            open_to = {number for number in open_to if wider[number] > kept[number]}
            gains = {number: float(best[number][kept[number] : wider[number]].mean()) for number in sorted(open_to)}
            for number in sorted(gains, key=lambda number: -gains[number]):
                other = [*kept[:number], wider[number], *kept[number + 1 :]]
                if self.size(other) <= keep * self.whole:
                    kept = other
                    break
                open_to.discard(number)  # it will not fit later, with less left, either
        return kept

    def exact_flags(self, scores: Sequence[Tensor], keep: float) -> list[Tensor]:
        """As :meth:`flags`, checked on the slim network itself, whose attention has MACs of its own.

        Raises
        ------
        ArgumentError
            If even one unit in every group is too much.
        """
        if self.budget == "latency":
            return self.timed(lambda asked: self.flags(scores, asked), keep)[1]
        whole = self.measured(_first(self.groups, 1.0, self.measure), every_class=True)
        asked = keep
        while True:
            flags = self.flags(scores, asked)
            size = self.measured(flags)
            if size <= keep * whole:
                return flags
            if all(int(flag.sum()) <= 1 for flag in flags):
                _check_reachable(size / whole, keep, self.budget)
            asked *= 0.99 * keep * whole / size

    def timed(self, choose: Callable[[float], list[Tensor]], keep: float) -> tuple[int, list[Tensor]]:
        """The number of the try, and what it chose, whose slim network takes ``keep`` of the full one's time, or less.

        A model of the time says what to ask for, a clock what comes of it. The slim network's BatchNorms are folded.

        Raises
        ------
        ArgumentError
            If even one unit in every group is too much.
        """

        def refuse(least: float) -> None:
            _check_reachable(least, keep, self.budget)

        return approached(choose, self.share, keep, refuse)

    def share(self, flags: Sequence[Tensor]) -> float:
        """The share of the budget that the slim network takes, by measurement; for time it is made as a clone is."""
        if self.budget == "channels":
            return sum(int(flag.sum()) for flag in flags) / sum(len(flag) for flag in flags)
        if self.budget != "latency":
            return self.measured(flags) / self.measured(
                _first(self.groups, 1.0, Measure(self.budget)), every_class=True
            )
        slimmed = self.slimmed(flags)
        fold_batch_norms(slimmed)
        in_place_again(slimmed)
        images = _batch(self.groups, self.measure)
        share: float = self.measure.workers.told(relative_time(slimmed, self._in_place, images))[0]
        return share

    @cached_property
    def _in_place(self) -> fx.GraphModule:
        """The full network as fast as its model: what works in place there does so."""
        copied = copy.deepcopy(self.groups.graph_module)
        in_place_again(copied)
        return copied

    def slimmed(self, flags: Sequence[Tensor], every_class: bool = False) -> fx.GraphModule:
        """The slim network with the units that are flagged."""
        return slim(self.groups.labelling, self.removed(flags, every_class))

    def removed(self, flags: Sequence[Tensor], every_class: bool = False) -> Tensor:
        """All units that are not flagged, and those of the unused outputs."""
        removed = [
            unit
            for group, flag in zip(self.groups.groups, flags, strict=True)
            for unit, stays in zip(group.units, flag.tolist(), strict=True)
            if not stays
        ]
        units = torch.tensor(removed, dtype=torch.long)
        return (units if every_class else torch.cat([units, self._gone])).sort().values

    def measured(self, flags: Sequence[Tensor], every_class: bool = False) -> int:
        """Parameters, or MACs for one image, measured on the slim network itself."""
        slimmed = self.slimmed(flags, every_class)
        if self.budget == "params":
            return sum(parameter.numel() for parameter in slimmed.parameters())
        with MacCounter() as counter, torch.no_grad():
            slimmed(self.groups.example[:1])
        return int(counter.macs)


def _slices(groups: ChannelGroups) -> dict[str, list[tuple[int, int, tuple[int, ...]]]]:
    """Per parameter: an axis, the groups that its slices belong to (heads and their dimensions), and how often.

    There are as many slices for each unit of the one group with each unit of the other.
    """
    labelling = groups.labelling
    group_of = torch.full((len(labelling.labels),), -1)
    for number, group in enumerate(groups.groups):
        group_of[list(group.units)] = number
    found: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for (name, axis), labels in labelling.slots.items():
        pairs, counts = group_of[labelling.labels.parts(labelling.labels.roots(labels))].unique(
            dim=1, return_counts=True
        )
        for pair, count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            numbers = tuple(number for number in pair if number >= 0)
            if numbers:
                units = math.prod(groups.groups[number].size for number in numbers)
                found.setdefault(name, []).append((axis, count // units // labelling.repeats(name, axis), numbers))
    return found


def _check_reachable(least: float, keep: float, budget: Budget) -> None:
    if least > keep:
        raise ArgumentError(
            f"keep: {keep:.3g} of the {budget} cannot be reached by removing channels: one unit in every group leaves "
            f"{least:.2g}; keep at least that, or see channel_groups(source).unprunable for what always stays"
        )


def _first(groups: ChannelGroups, share: float, measure: Measure) -> list[Tensor]:
    """Keep the first units of every group: within a group all units have the same size."""
    return [torch.arange(group.size) < units_kept(group, share, measure.round_to) for group in groups.groups]


def _batch(groups: ChannelGroups, measure: Measure) -> Tensor:
    """As many images as latency is measured for."""
    return torch.cat([groups.example[:1]] * measure.latency_batch)


def _attributed(graph_module: fx.GraphModule, seconds: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The time that goes with no weight, and by weight that which goes with it.

    That of an operator without weights, such as an activation, goes with the channels of the last layer before it.
    """
    parameters = dict(graph_module.named_parameters())
    fixed, found, channels = 0.0, dict[str, float](), dict[fx.Node, str]()
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        slots = WEIGHTS.get(kind_of(node.target) or "", ())
        given = [node.args[slot] for slot in slots if slot < len(node.args)]
        own = [
            str(weight.target) for weight in given if isinstance(weight, fx.Node) and str(weight.target) in parameters
        ]
        before = [channels[used] for used in node.all_input_nodes if used in channels]
        if own or before:
            charged = own[0] if own else before[0]
            found[charged] = found.get(charged, 0.0) + seconds[node.name]
            channels[node] = next((name for name in own if parameters[name].dim() == 1), charged)
        else:
            fixed += seconds[node.name]
    return fixed, found


def _positions(groups: ChannelGroups) -> dict[str, float]:
    """For each weight of a convolution or linear layer, how often every entry is used for one image."""
    found: dict[str, float] = {}
    for node in groups.graph_module.graph.nodes:
        if (kind := kind_of(node.target)) in ("convolution", "linear"):
            weight, shape = node.args[1], shape_of(node)
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and shape is not None:
                channels = shape[-1] if kind == "linear" else shape[0]
                name = str(weight.target)
                found[name] = found.get(name, 0) + math.prod(shape) // max(1, channels)
    return found
