"""channel_groups(model) -> ChannelGroups: the prunable units of a network, and why the rest is not prunable."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from netclone.channels.crossing import cross
from netclone.channels.emptying import emptied
from netclone.channels.labelling import Labelling
from netclone.channels.labels import Event, compact
from netclone.channels.slimming import Resizer
from netclone.errors import ArgumentError, OutputError
from netclone.graph.capturing import FACTS, capture, fingerprint, tensor_at
from netclone.graph.class_names import ClassNames
from netclone.graph.operators import kind_of
from netclone.graph.outputs import Output
from netclone.graph.tracing import check_one_device_and_dtype, example_input, no_batch, shape_of
from netclone.runtime.entering import entered

_log = logging.getLogger(__package__)


@dataclass(frozen=True)
class ChannelGroup:
    """Units that appear in exactly the same tensors. Any of them may be kept.

    At least one stays, unless what the group feeds is constant without it, as the last layer of a residual branch is
    (see :meth:`ChannelGroups.last_units`).

    ``members`` are the sliced parameters, as ``(parameter name, axis, slices per unit)``. ``dims``: whether the units
    are dimensions of all heads of an attention. Its heads, if there are several, are another group of the same slices.
    """

    name: str
    size: int
    members: tuple[tuple[str, int, int], ...]
    units: tuple[int, ...] = field(repr=False)
    dims: bool = False


@dataclass(frozen=True)
class Unprunable:
    """Output channels of a layer that all stay, with the reason and the node that causes it."""

    name: str
    size: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.size} channels): {self.reason}" + (f" (node '{self.node}')" if self.node else "")


@dataclass(frozen=True)
class Explanation:
    """Why a channel can be removed, or always stays. Printed, it is a sentence and the chain of events.

    ``channel`` is an index along the first axis of the parameter ``name``. ``group`` is the name of its group, or None
    if it stays. ``because`` is the verdict in words. For a channel that an operator keeps, ``events`` lead from the
    channel to that operator. For any other, they are the events that joined slices into its unit.
    """

    name: str
    channel: int
    group: str | None
    because: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        verdict = "always stays" if self.group is None else "can be removed"
        return "\n".join([f"{self.name}[{self.channel}] {verdict}: {self.because}", *(f"  {e}" for e in self.events)])


@dataclass(frozen=True)
class ChannelGroups:
    """All prunable units of a network, in groups, and the layers that are not prunable.

    ``undivided`` are layers whose heads can be removed, while the dimensions of these stay together. ``fingerprint``
    identifies the network's structure. ``parameters`` counts all parameters, and ``prunable_parameters`` those that
    would go with all units.
    """

    groups: tuple[ChannelGroup, ...]
    unprunable: tuple[Unprunable, ...]
    undivided: tuple[Unprunable, ...]
    fingerprint: str
    parameters: int
    prunable_parameters: int
    graph_module: fx.GraphModule = field(repr=False, compare=False)
    labelling: Labelling = field(repr=False, compare=False)
    names: ClassNames = field(default=ClassNames({}, "source"), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def outputs(self) -> int:
        """How many classes (columns of output) the network has."""
        output = next(node for node in self.graph_module.graph.nodes if node.op == "output")
        shape = shape_of(output.args[0])
        if shape is None or len(shape) != 1:
            raise OutputError(f"the model's output has shape (N, {shape}); expected logits (N, classes)")
        if (why := no_batch(self.graph_module, output.args[0])) is not None:
            raise OutputError(f"the model's output is not logits (N, classes): {why}")
        return shape[0]

    @property
    def example(self) -> Tensor:
        """The input that the network was captured with."""
        example: Tensor = self.graph_module.meta[FACTS]["example"]
        return example

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group with a name, or the group that slices a parameter (``"blocks.0.attn.qkv.weight"``, axis 0)."""
        for group in self.groups:
            if group.name == name or any(parameter == name and axis == 0 for parameter, axis, _ in group.members):
                return group
        raise KeyError(name)

    def explain(self, name: str, channel: int) -> Explanation:
        """Explain why a channel can be removed or stays: the chain of events that joined it to others, or fixed it.

        Parameters
        ----------
        name
            A parameter, such as ``"layer1.0.conv1.weight"``.
        channel
            An index along its first axis.

        Raises
        ------
        ArgumentError
            If there is no such parameter or channel, or the parameter's first axis is not an axis of channels.

        Examples
        --------
        >>> import timm, netclone
        >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
        >>> print(groups.explain("layer2.0.conv2.weight", 5))
        layer2.0.conv2.weight[5] can be removed: it is one of the 48 units of group 'layer2.0.conv2'
          node 'add__1': meet elementwise
        >>> print(groups.explain("fc.weight", 1))
        fc.weight[1] always stays: it is one of the model's outputs
        """
        slots = {known: labels for (known, axis), labels in self.labelling.slots.items() if axis == 0}
        if name not in slots:
            near = difflib.get_close_matches(str(name), slots, n=3)
            raise ArgumentError(
                f"name: {name!r} is not a parameter with channels along its first axis; "
                + (
                    f"did you mean {' or '.join(map(repr, near))}?"
                    if near
                    else f"there are {', '.join(list(slots)[:3])}"
                )
            )
        size = tensor_at(self.graph_module, name).size(0)
        if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < size:
            raise ArgumentError(f"channel: got {channel!r}, expected an index of {name!r} from 0 to {size - 1}")
        labels = self.labelling.labels
        unit, dim = labels.parts(labels.roots(slots[name])[channel]).tolist()
        groups = [group for group in self.groups if unit in group.units or dim in group.units]
        group = groups[0] if groups else None
        if group is not None and group.dims:
            by_dims = self.labelling.by_dims
            assert by_dims is not None
            events = by_dims.labels.chain(int(by_dims.slots[name, 0][channel]))
        else:
            events = labels.chain(unit if dim else int(slots[name][channel]))
        if groups:
            because = " and ".join(f"it is one of the {each.size} units of group '{each.name}'" for each in groups)
        elif not unit and not events:
            because = "it reads channels that always stay, such as those of the input"
        elif not unit:
            because = "it is tied to channels that always stay" if len(events) > 1 else "an operator keeps it"
        elif unit in _output_units(self.labelling):
            because, events = "it is one of the model's outputs", ()
        else:
            because = "nothing would be left without it" + (", since it forms one unit with others" if events else "")
        return Explanation(name, channel, None if group is None else group.name, because, events)

    def last_units(self) -> tuple[Unprunable, ...]:
        """The groups that keep at least one unit unless others go with them, with reason and node.

        Any group that is not among them may lose all of its units. What it fed is then a constant.

        Examples
        --------
        >>> import timm, netclone
        >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
        >>> stay = {item.name for item in groups.last_units()}
        >>> [group.name for group in groups.groups if group.name not in stay]
        ['layer1.0.conv1', 'layer2.0.conv1', 'layer3.0.conv1', 'layer3.0.conv2', 'layer4.0.conv1']
        """
        found = []
        for group in self.groups:
            empty = emptied(Resizer(self.labelling, torch.tensor(sorted(group.units))))
            if empty is not None and empty.refused is not None:
                found.append(Unprunable(group.name, 1, empty.refused.node, empty.refused.why))
        return tuple(found)

    def __str__(self) -> str:
        share = self.prunable_parameters / max(self.parameters, 1)
        lines = [f"{len(self.groups)} groups, {sum(g.size for g in self.groups)} units, {share:.0%} of the parameters"]
        lines += [f"  {group.name}: {group.size} units" for group in self.groups]
        if self.unprunable:
            lines += ["not prunable:", *(f"  {item}" for item in self.unprunable)]
        if self.undivided:
            lines += ["prunable as whole heads only:", *(f"  {item}" for item in self.undivided)]
        return "\n".join(lines)


@entered()
def channel_groups(
    model: nn.Module | ChannelGroups,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    *,
    through_norms: bool = False,
    output: Output = None,
) -> ChannelGroups:
    """Find which channels must be kept or removed together, by running the network on integer labels.

    Residual streams, depthwise and grouped convolutions, concatenations, shuffles, attention heads and MLP widths are
    all found in this way. In attention, single dimensions of all heads are units too: those of queries and keys, and
    those of values. Operators without a rule keep their channels, and are listed with node and reason.

    Parameters
    ----------
    model
        A module or a traced graph. Groups are returned as they are.
    example_inputs
        As for :func:`netclone.trace`.
    through_norms
        Whether the channels that LayerNorm, RMSNorm or a GroupNorm of one group normalises over can be pruned, and with
        them the residual streams that they are in. The masked network then leaves masked channels out of the
        statistics. So its norm differs from the model's, and equals the slim network's. False: such channels stay.
    output
        Which part of what the model returns is its logits, as for :func:`netclone.trace`.

    Raises
    ------
    TraceError, OutputError
        If the model cannot be captured (see :func:`netclone.trace`).

    Examples
    --------
    >>> import timm, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_vit", num_classes=4))
    >>> groups["blocks.0.attn.qkv.weight"].size  # attention heads
    2
    >>> [(group.name, group.size) for group in groups.groups if group.dims][:2]  # of queries and keys, and of values
    [('blocks.0.attn.qkv.dims', 32), ('blocks.0.attn.qkv.dims#2', 32)]
    >>> groups["blocks.0.mlp.fc1.weight"].size
    192
    >>> through = netclone.channel_groups(timm.create_model("test_vit", num_classes=4), through_norms=True)
    >>> through["patch_embed.proj.weight"].size  # the residual stream
    64

    Reference: docs/adr/0002-grouping-by-labels.md.
    """
    if isinstance(model, ChannelGroups):
        return model
    check_one_device_and_dtype(model, "model")
    graph_module = capture(model, example_input(model, example_inputs), output=output)
    groups = _grouped(Labelling(graph_module, through_norms))
    if stuck := _stuck(groups.labelling):
        by_place = _grouped(Labelling(graph_module, through_norms, stuck))
        groups = max(groups, by_place, key=lambda groups: groups.prunable_parameters)
    if not groups.labelling.by_place and _multiplies(graph_module):
        groups = _with_dims(groups, Labelling(graph_module, through_norms, dims=True))
    _log.debug("%s: %s", type(model).__name__, groups)
    return replace(groups, names=ClassNames.of(model, "source"))


def _stuck(labelling: Labelling) -> frozenset[str]:
    """Convolutions of which no group can be removed, as behind a channel shuffle, where each group reads all others."""
    units = {name: torch.unique(labelling.labels.roots(labels)) for name, labels in labelling.grouped.items()}
    return frozenset(name for name, found in units.items() if int((found != 0).sum()) < 2)


def _multiplies(graph_module: fx.GraphModule) -> bool:
    """Whether a network multiplies activations with each other, as attention does."""
    return any(
        kind_of(node.target) in ("product", "sum with product", "einsum", "attention")
        for node in graph_module.graph.nodes
    )


def _grouped(labelling: Labelling) -> ChannelGroups:
    """The channel groups that follow from a network's labels."""
    return _summarised(labelling, _groups(labelling))


def _with_dims(groups: ChannelGroups, dims: Labelling) -> ChannelGroups:
    """The same groups and those of dimensions of heads, which cross them."""
    found = _groups(dims)
    units = cross(groups.labelling, [group.units for group in groups.groups], dims, [group.units for group in found])
    crossing = [
        replace(group, name=_of_dims(group.name), units=own, dims=True)
        for group, own in zip(found, units, strict=True)
        if own is not None
    ]
    whole = _summarised(groups.labelling, [*groups.groups, *crossing])
    return replace(whole, undivided=_undivided(whole, dims, {unit for group in found for unit in group.units}))


def _undivided(groups: ChannelGroups, dims: Labelling, found: set[int]) -> tuple[Unprunable, ...]:
    """Layers with heads of which no single dimension can be removed, with the reason."""
    labels, multiplied = (
        groups.labelling.labels,
        {unit for operand in dims.operands for unit in dims.labels.joined(operand).flatten().tolist()},
    )
    prunable = {unit for group in groups.groups for unit in group.units}
    listed = []
    for (name, axis), rows in dims.slots.items():
        if dims.roles[name, axis] != "out":
            continue
        heads = labels.roots(groups.labelling.slots[name, axis]).tolist()
        kept: dict[Event, int] = {}
        for label, unit, head in zip(rows.tolist(), dims.labels.joined(rows).tolist(), heads, strict=True):
            if unit in multiplied and unit not in found and head in prunable:
                event = dims.labels.why_joined(label) or dims.labels.why_fixed(label)
                if event is not None:
                    kept[event] = kept.get(event, 0) + 1
        listed += [
            Unprunable(name, size, event.node, f"{event.why}, so the dimensions of a head stay together")
            for event, size in kept.items()
        ]
    return tuple(listed)


def _groups(labelling: Labelling) -> list[ChannelGroup]:
    occurrences = _occurrences(labelling)
    protected = _output_units(labelling)
    by_tensors: dict[int, list[int]] = {}
    for unit, tensors in occurrences.items():
        if unit not in protected:
            by_tensors.setdefault(tensors, []).append(unit)
    members = _members(labelling, {units[0] for units in by_tensors.values()})
    groups: list[ChannelGroup] = []
    names: dict[str, int] = {}
    for units in by_tensors.values():
        slices = members.get(units[0], ())
        if len(units) < 2 or not slices:
            continue
        name = _group_name(slices, labelling)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        groups.append(ChannelGroup(name, len(units), slices, tuple(units)))
    return groups


def _summarised(labelling: Labelling, groups: Sequence[ChannelGroup]) -> ChannelGroups:
    graph_module = labelling.graph_module
    prunable = {unit for group in groups for unit in group.units}
    return ChannelGroups(
        groups=tuple(groups),
        unprunable=_unprunable(labelling, prunable, _output_units(labelling)),
        undivided=(),
        fingerprint=fingerprint(graph_module),
        parameters=sum(p.numel() for p in graph_module.parameters()),
        prunable_parameters=_count(labelling, prunable),
        graph_module=graph_module,
        labelling=labelling,
    )


def _occurrences(labelling: Labelling) -> dict[int, int]:
    """Unit to a fingerprint of the tensors it appears in (for parameters also how often), in order of units."""
    tensors = _tensors(labelling)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(tensors), dtype=np.uint64)
    prints = np.zeros(len(labelling.labels), dtype=np.uint64)
    activations = len(tensors) - len(labelling.slots) - len(labelling.constants)
    shared: dict[int, list[int]] = {}  # nodes with the same labels have the same tensor of them
    for place in range(activations):
        shared.setdefault(id(tensors[place]), []).append(place)
    for places in shared.values():  # large tensors: counting would need a sort
        there = labelling.labels.roots(compact(tensors[places[0]])).numpy()
        prints[np.unique(there)] += numbers[places].sum()
    for labels, number in zip(tensors[activations:], numbers[activations:], strict=True):
        units, counts = np.unique(labelling.labels.roots(compact(labels)).numpy(), return_counts=True)
        prints[units] += number * counts.astype(np.uint64)
    return {unit: int(prints[unit]) for unit in np.flatnonzero(prints).tolist() if unit}


def _tensors(labelling: Labelling) -> list[Tensor]:
    """The labels of every activation, of every axis of a parameter, and of every constant."""
    tensors = [
        labels
        for value in labelling.values.values()
        for labels in (value if isinstance(value, tuple) else (value,))
        if isinstance(labels, Tensor)
    ]
    return [*tensors, *labelling.slots.values(), *labelling.constants.values()]


def _output_units(labelling: Labelling) -> set[int]:
    output = next(node for node in labelling.graph_module.graph.nodes if node.op == "output").args[0]
    assert isinstance(output, fx.Node)
    return set(torch.unique(labelling.labels.roots(compact(labelling.data(output)))).tolist())


def unused_outputs(groups: ChannelGroups, classes: Sequence[int]) -> Tensor:
    """The units of all other classes' output columns, as far as they can be removed.

    None can be removed if columns are not units of their own. Nor can those that would leave a head, a parameter or any
    other tensor empty.
    """
    nothing = torch.empty(0, dtype=torch.long)
    units = _columns(groups)
    if len(classes) == groups.outputs or len(units.unique()) != len(units) or bool((units == 0).any()):
        return nothing
    labelling = groups.labelling
    unused = torch.ones(len(units), dtype=torch.bool)
    unused[list(classes)] = False
    gone = labelling.labels.marked(units[unused])
    for labels in _tensors(labelling):
        there = labelling.labels.parts(labelling.labels.roots(compact(labels)))[0]
        if bool(gone[there].all()):
            gone[there] = False
    return units[gone[units]]


def columns_without(groups: ChannelGroups, removed: Tensor) -> tuple[int, ...]:
    """The output columns that are left once some units are removed, in ascending order."""
    kept = ~groups.labelling.labels.marked(removed)[_columns(groups)]
    return tuple(kept.nonzero().flatten().tolist())


def _columns(groups: ChannelGroups) -> Tensor:
    """The unit of every output column."""
    labelling = groups.labelling
    output = next(node for node in labelling.graph_module.graph.nodes if node.op == "output").args[0]
    return labelling.labels.roots(labelling.data(output)).reshape(-1)


def _members(labelling: Labelling, wanted: set[int]) -> dict[int, tuple[tuple[str, int, int], ...]]:
    """Unit to the parameter axes it slices, with the number of slices, for some units."""
    asked = labelling.labels.marked(torch.tensor(sorted(wanted), dtype=torch.long))
    found: dict[int, list[tuple[str, int, int]]] = {}
    for (name, axis), labels in labelling.slots.items():
        units = labelling.labels.roots(labels)
        units, counts = torch.unique(units[asked[units]], return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            found.setdefault(unit, []).append((name, axis, count // labelling.repeats(name, axis)))
    return {unit: tuple(slices) for unit, slices in found.items()}


def _group_name(slices: tuple[tuple[str, int, int], ...], labelling: Labelling) -> str:
    producers = [name for name, axis, _ in slices if labelling.roles[name, axis] == "out"]
    name = (producers or [slices[0][0]])[0]
    return name.removesuffix(".weight").removesuffix(".weight_folded")


def _of_dims(name: str) -> str:
    """The name of a group of dimensions; a number stays at the end.

    Examples
    --------
    >>> _of_dims("attn.qkv"), _of_dims("attn.qkv#2")
    ('attn.qkv.dims', 'attn.qkv.dims#2')
    """
    plain, number, rest = name.partition("#")
    return f"{plain}.dims{number}{rest}"


def _unprunable(labelling: Labelling, prunable: set[int], protected: set[int]) -> tuple[Unprunable, ...]:
    found = []
    for (name, axis), labels in labelling.slots.items():
        if labelling.roles[name, axis] != "out":
            continue
        units = labelling.labels.roots(labels)
        stays = [
            i
            for i, parts in enumerate(zip(*labelling.labels.parts(units).tolist(), strict=True))
            if prunable.isdisjoint(parts)
        ]
        if not stays:
            continue
        label, unit = int(labels[stays[0]]), int(units[stays[0]])
        event = labelling.labels.why_fixed(label) if unit == 0 else labelling.labels.why_joined(label)
        if unit in protected and unit != 0:
            found.append(Unprunable(name, len(stays), "output", "these are the model's outputs"))
        elif event is None:
            found.append(Unprunable(name, len(stays), "", "a single channel"))
        else:
            reason = f"{event.why}, so all of them stay together" if unit else f"{event.why}, so all of them stay"
            found.append(Unprunable(name, len(stays), event.node, reason))
    return tuple(found)


def _count(labelling: Labelling, prunable: set[int]) -> int:
    """The number of parameters that lie on a prunable slice along some axis."""
    free = labelling.labels.marked(torch.tensor(sorted(prunable), dtype=torch.long))
    total = 0
    for name in dict(labelling.graph_module.named_parameters()):
        tensor = tensor_at(labelling.graph_module, name)
        stays = 1
        if name in labelling.constants:
            units = labelling.labels.roots(compact(labelling.constants[name]))
            total += int(free[units].double().mean() * tensor.numel())
            continue
        for axis in range(tensor.dim()):
            if (name, axis) in labelling.slots:
                kept = ~free[labelling.labels.roots(labelling.slots[name, axis])]
                stays *= int(kept.sum()) // labelling.repeats(name, axis)
            else:
                stays *= tensor.size(axis)
        total += tensor.numel() - stays
    return total
