"""Running an operator graph on labels: which channels must be kept or removed together, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from netclone.channels.labels import Event, Labelled, Labels, compact, expanded, place, varies
from netclone.channels.oprules import rule_of
from netclone.graph.batching import sizes_at
from netclone.graph.capturing import tensor_at
from netclone.graph.operators import operator_name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Summed:
    """A product that sums over units: its name, that of its first operand, and the labels along an axis of that."""

    node: str
    operand: str
    axis: int
    labels: Tensor


class Labelling:
    """The labels of every tensor of an operator graph, at batch size one.

    Attributes
    ----------
    labels
        Which labels form one unit, which are fixed, and why.
    values
        Node to label tensor (or tuple of them, or number).
    slots
        ``(parameter name, axis)`` to the label of each slice along that axis. For a grouped convolution in
        ``by_place``: to the label of each input channel, group after group.
    roles
        The same keys to ``"in"`` (the columns that masking zeroes), ``"out"`` (the rows of a producer) or
        ``"along"`` (biases, normalisation, depthwise and grouped weights).
    constants
        Name of a parameter or buffer that is combined with activations directly, to labels of its own shape.
    by_place
        Names of grouped convolutions whose units are the channels at one place in every group. The units of other
        grouped convolutions are whole groups.
    grouped
        Name of each other convolution with groups of several channels, to the labels of these.
    norms
        Name of a node that normalises over prunable channels, to the labels of these (with ``through_norms``).
    dims
        Whether products of activations unite what they repeat, so that units are dimensions of all heads. Else they
        unite what they sum over, so that units are heads.
    summed
        With ``dims``, the products that sum over units.
    operands
        With ``dims``, the labels of what is multiplied.
    by_dims
        The labelling with ``dims`` whose units were added to this one, if any were.
    fixed
        Nodes that do not depend on the input: parameters, buffers, and what is computed from these alone.
    without_rule
        ``(node, operator)`` of each operator that has no rule.

    Reference: docs/adr/0002-grouping-by-labels.md, docs/adr/0015-dimensions-of-heads.md.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        through_norms: bool = False,
        by_place: frozenset[str] = frozenset(),
        dims: bool = False,
    ) -> None:
        self.graph_module = graph_module
        self.through_norms = through_norms
        self.by_place = by_place
        self.dims = dims
        self.summed: list[Summed] = []
        self.by_dims: Labelling | None = None
        self.operands: list[Tensor] = []
        self.grouped: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.labels = Labels()
        self.values: dict[fx.Node, Labelled] = {}
        self.slots: dict[tuple[str, int], Tensor] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.constants: dict[str, Tensor] = {}
        self.without_rule: list[tuple[str, str]] = []
        self.fixed: set[fx.Node] = set()
        self._uses: dict[
            tuple[str, fx.Node], dict[int, str]
        ] = {}  # weight and reader to the sliced axes and their roles
        self._reader = next(iter(graph_module.graph.nodes))
        for node in graph_module.graph.nodes:
            self._reader = node
            self._label(node)
        self._agree_on_weights()
        for name in {name for name, _ in self.slots} & set(self.constants):
            event = Event(name, "is used both as a weight and as a plain tensor")
            self.labels.fix(self.constants[name], event)
            for key in [key for key in self.slots if key[0] == name]:
                self.labels.fix(self.slots[key], event)
        self._settle()

    # -- read by rules

    def value(self, node: fx.Node) -> Labelled:
        """The labels (or number) of an argument."""
        return self.data(node) if isinstance(node, fx.Node) and node.op == "get_attr" else self.values[node]

    def data(self, node: fx.Node) -> Tensor:
        """The label tensor of an argument; a parameter used as data gets one label per element."""
        if node.op != "get_attr":
            labels = self.values[node]
            assert isinstance(labels, Tensor), f"{node.name} is not one tensor"
            return labels
        name = str(node.target)
        if name not in self.constants:
            shape = self.tensor_of(node).shape
            self.constants[name] = self.labels.fresh(shape.numel()).reshape(shape)
        return self.constants[name]

    def tensor_of(self, node: fx.Node) -> Tensor:
        """The real tensor behind a parameter or buffer node."""
        return tensor_at(self.graph_module, str(node.target))

    def name(self, node: object) -> str | None:
        """The name of the parameter or buffer an argument is; None for anything computed."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def literal(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments with every node replaced by its labels or number."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        return args, kwargs

    def shapes(self, node: fx.Node) -> list[Shape]:
        """Shapes of the node's tensors at batch size one."""
        value = node.meta["val"]
        return [
            sizes_at(v, 1) if isinstance(v, Tensor) else ()
            for v in (value if isinstance(value, (list, tuple)) else [value])
        ]

    def is_list(self, node: fx.Node) -> bool:
        """Whether the node returns several tensors."""
        return isinstance(node.meta["val"], (list, tuple))

    def executed(self, function: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Labelled:
        """Data movement, executed on the labels."""
        assert callable(function)
        out = function(*args, **kwargs)
        return tuple(self.trim(t) for t in out) if isinstance(out, (list, tuple)) else self.trim(out)

    def trim(self, labels: Tensor) -> Tensor:
        """The same labels in expanded form."""
        return expanded(labels)

    def rows(self, weight: fx.Node, axis: int, groups: int = 1) -> Tensor:
        """The units that a producer makes along an axis of its weight: the same for every use of it and every group."""
        key = (str(weight.target), axis)
        self._note(weight, axis, "out")
        if key not in self.slots:
            self.slots[key] = self.labels.fresh(self.tensor_of(weight).size(axis) // groups).repeat(groups)
            self.roles[key] = "out"
        return self.slots[key]

    def slot(self, parameter: fx.Node, axis: int, labels: Tensor, role: str) -> None:
        """Record that slice ``i`` of a parameter along an axis belongs to the unit ``labels[i]``."""
        key = (str(parameter.target), axis)
        self._note(parameter, axis, role)
        if key in self.slots:
            self.labels.unite(self.slots[key], labels)
        else:
            self.slots[key] = labels
            self.roles[key] = role

    def merge(self, node: fx.Node, labels: Tensor, axes: list[int], why: str) -> Tensor:
        """Unite all labels along some axes; the result has size one there."""
        for axis in axes:
            first = labels.narrow(axis, 0, 1)
            if labels.size(axis) > 1 and labels.stride(axis) != 0:
                self.labels.unite(labels, first.expand(labels.shape), self._event(node, why))
            labels = first
        return labels

    def unite(self, node: fx.Node, a: Tensor, b: Tensor, why: str) -> None:
        """Unite the labels that a node combines element by element."""
        self.labels.unite(a, b, self._event(node, why))

    def balance(self, node: fx.Node, labels: Tensor, groups: int) -> None:
        """Unite until every unit has as many channels in one group as in any other, so that groups stay equally wide.

        Units that lie in a single group are joined in order, one from every group. The others are sorted into kinds by
        how many channels they have in each group, and joined into as many parts as divide the number of every kind.
        """
        units, numbers = torch.unique(self.labels.roots(labels), return_inverse=True)
        counts = torch.zeros(groups, len(units), dtype=torch.long)
        owner = torch.arange(groups).repeat_interleave(len(labels) // groups)
        counts.index_put_((owner, numbers), torch.ones_like(numbers), accumulate=True)
        uneven = (counts != counts[0]).any(0) & (units != 0)
        pure = uneven & ((counts > 0).sum(0) == 1)
        event = self._event(node, "lie in groups of equal width")
        for size in torch.unique(counts.amax(0)[pure]).tolist():
            alike = [units[pure & (counts[group] == size)] for group in range(groups)]
            pairs = min(len(own) for own in alike)
            for own in alike:
                self.labels.unite(alike[0][:pairs], own[:pairs], event)
                uneven &= ~torch.isin(units, own[:pairs])
        if not bool(uneven.any()):
            return
        widths = counts[:, uneven].sum(1)
        if bool((widths != widths[0]).any()):
            self.labels.fix(units[uneven], event)
            return
        _, kinds = torch.unique(counts[:, uneven], dim=1, return_inverse=True)
        members = [units[uneven][kinds == kind] for kind in range(int(kinds.max()) + 1)]
        parts = math.gcd(*(len(own) for own in members))
        for own in members:
            self.labels.unite(own, members[0][torch.arange(len(own)) % parts], event)

    def repeats(self, name: str, axis: int) -> int:
        """The number of groups in which a parameter's slices along an axis are labelled separately; usually one."""
        return len(self.slots[name, axis]) // max(1, tensor_at(self.graph_module, name).size(axis))

    def along(self, node: fx.Node, labels: Tensor, axis: int, why: str) -> Tensor:
        """One label per index of an axis; labels that differ along other axes are united."""
        others = [other for other in range(labels.dim()) if other != axis]
        return self.merge(node, labels, others, why).reshape(-1)

    def spread(self, labels: Tensor, axis: int, shape: Shape | torch.Size) -> Tensor:
        """A vector of labels along one axis of a shape."""
        view = [1] * len(shape)
        view[axis] = -1
        return labels.reshape(view).expand(shape)

    def meet(self, node: fx.Node, operands: list[fx.Node]) -> Tensor:
        """Labels of an elementwise operator, which unites those that it combines."""
        data = [n for n in operands if isinstance(n.meta.get("val"), Tensor)]
        data.sort(key=lambda n: n.op == "get_attr")
        out = self.data(data[0]).expand(self.data(data[0]).shape)
        for other in data[1:]:
            out = self.meet_labels(node, out, other)
        return out.expand(self.shapes(node)[0])

    def meet_labels(self, node: fx.Node, labels: Tensor, other: fx.Node) -> Tensor:
        """Unite labels with those of another operand, elementwise with broadcasting.

        An operand that is broadcast over several units would join them all. So it is fixed instead, unless it holds
        several units itself, which it then joins.
        """
        name = self.name(other)
        labels = self._apart(node, labels, self.shapes(other)[0])
        if name is not None and name not in self.constants:
            adopted = self._adopt(labels, self.tensor_of(other).shape)
            if adopted is not None:
                self.constants[name] = adopted
                shape = torch.broadcast_shapes(labels.shape, adopted.shape)
                return labels.expand(shape)
        a, b = self._aligned(labels, self._apart(node, self.data(other), labels.shape))
        return self._meet(node, a, b, b_is_constant=other in self.fixed)

    def contract(self, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a product of activations whose summed axes are merged already; combined labels are united."""
        a, b = self._aligned(a, b)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        self.labels.unite(a, b, self._event(node, "are multiplied with each other"))
        return b if _varied(b) >= _varied(a) else a

    def multiplied(
        self,
        node: fx.Node,
        a: fx.Node,
        b: fx.Node,
        axes: tuple[Sequence[str], Sequence[str]],
        out: Sequence[str],
        shape: Shape,
    ) -> Tensor:
        """Labels of a product of activations, by dimensions; all axes are named.

        What both sum over is united pair by pair, and is no longer seen in the result. What one of them adds is seen
        there, if the other adds nothing. All else is united.
        """
        labels = [self.data(a), self.data(b)]
        self.operands += map(compact, labels)
        for i, own in enumerate(axes):
            other = axes[1 - i]
            alone = [k for k, axis in enumerate(own) if (axis in other) == (axis in out)]
            labels[i] = self.merge(node, labels[i], alone, "is the same in every head or summed over")
        for axis in [axis for axis in axes[0] if axis in axes[1] and axis not in out]:
            k = [own.index(axis) for own in axes]
            if all(self.labels.varies(side, at) for side, at in zip(labels, k, strict=True)):
                vectors = [self.along(node, side, at, "is summed over") for side, at in zip(labels, k, strict=True)]
                self.unite(node, vectors[0], vectors[1], "are multiplied with each other")
                self.summed.append(Summed(node.name, a.name, k[0], vectors[0]))
                labels = [self.spread(vectors[i], k[i], labels[i].shape) for i in (0, 1)]
            else:
                labels = [self.merge(node, labels[i], [k[i]], "is summed over with what stays") for i in (0, 1)]
        added: Tensor | None = None
        for own, side in zip(axes, labels, strict=True):
            left = [axis for axis in own if axis in out and self.labels.varies(side, own.index(axis))]
            if left and added is None:
                vector = self.along(node, side, own.index(left[0]), "must stay rectangular")
                added = self.spread(vector, out.index(left[0]), shape)
            elif not any(self.labels.varies(side, at) for at in range(side.dim())) or left:
                self.labels.fix(side, self._event(node, "is multiplied with all that the other operand has"))
        return torch.zeros((), dtype=torch.long).expand(shape) if added is None else added

    def keep(self, node: fx.Node, operand: Any, why: str) -> None:
        """Keep every channel of an operand that the operator reads in a way of its own."""
        if self.name(operand) is None:
            self.labels.fix(self.data(operand), self._event(node, why))

    def opaque(self, node: fx.Node, why: str) -> Labelled:
        """Keep every channel that an operator touches, and record the operator as one without a rule."""
        event = self._event(node, why)
        for argument in node.all_input_nodes:
            value = self.value(argument)
            for labels in value if isinstance(value, tuple) else (value,):
                if isinstance(labels, Tensor):
                    self.labels.fix(labels, event)
        zeros = [torch.zeros((), dtype=torch.long).expand(shape) for shape in self.shapes(node)]
        return tuple(zeros) if self.is_list(node) else zeros[0]

    # -- the run

    def _label(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = torch.zeros((), dtype=torch.long).expand(self.shapes(node)[0])
        elif node.op == "get_attr":
            self.fixed.add(node)
        elif node.op == "call_function":
            if node.all_input_nodes and all(n in self.fixed for n in node.all_input_nodes):
                self.fixed.add(node)
            rule = rule_of(node.target)
            if rule is None or rule.label is None:
                self.without_rule.append((node.name, operator_name(node.target)))
                self.values[node] = self.opaque(node, f"operator {operator_name(node.target)} has no rule")
            else:
                self.values[node] = value = self._slimmed(rule.label(self, node))
                if self.by_place and isinstance(value, Tensor):  # balancing groups needs final units
                    self._along_one_axis(node.name, value)

    def _note(self, weight: fx.Node, axis: int, role: str) -> None:
        self._uses.setdefault((str(weight.target), self._reader), {})[axis] = role

    def _agree_on_weights(self) -> None:
        """Weights that several nodes read: sliced if all of them read the same axes, else kept whole.

        One node may read a unit along the axis along which another makes it (a convolution and its transposed). Then it
        may be silenced there for both, since nothing else reads the other's output of it.
        """
        sliced = {name for name, _ in self.slots}
        uses: dict[str, list[dict[int, str]]] = {}
        for node in self.graph_module.graph.nodes:
            for name in {self.name(read) for read in node.all_input_nodes} & sliced:
                uses.setdefault(str(name), []).append(self._uses.get((str(name), node), {}))
        for name, found in uses.items():
            if all(use == found[0] for use in found):
                continue
            dense = all(set(use.values()) <= {"in", "out"} for use in found)
            if dense and all(use.keys() == found[0].keys() for use in found):
                self.roles.update({(name, axis): "in" for axis in found[0]})
                continue
            for key in [key for key in self.slots if key[0] == name]:
                self.labels.fix(self.slots[key], Event(name, "is used by several nodes in different ways"))

    def _slimmed(self, value: Labelled) -> Labelled:
        """Replace large label tensors by their units, which often vary along fewer axes."""
        if isinstance(value, Tensor) and _varied(value) > 4096:
            return self.trim(self.labels.roots(value))
        return value

    def _adopt(self, labels: Tensor, shape: torch.Size) -> Tensor | None:
        """Labels of a constant that is combined with ``labels``: these, or 0 where it is broadcast over units."""
        if len(shape) > labels.dim():
            return None
        narrowed = labels
        for axis in range(labels.dim()):
            own = axis - (labels.dim() - len(shape))
            if own < 0 or shape[own] == 1:
                if self.labels.varies(narrowed, axis):
                    return torch.zeros((), dtype=torch.long).expand(shape)
                narrowed = narrowed.narrow(axis, 0, 1)
            elif narrowed.size(axis) == 1 and shape[own] > 1:
                narrowed = narrowed.expand(*narrowed.shape[:axis], shape[own], *narrowed.shape[axis + 1 :])
        return narrowed.reshape(narrowed.shape[labels.dim() - len(shape) :])

    def _meet(self, node: fx.Node, a: Tensor, b: Tensor, b_is_constant: bool) -> Tensor:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a_spans, b_spans = self._spans(a, b), self._spans(b, a)
        if b_spans and (b_is_constant or self._units(b) < 2):
            self.labels.fix(b, self._event(node, "is broadcast over several channels"))
            return a.expand(shape)
        if a_spans and self._units(a) < 2:
            self.labels.fix(a, self._event(node, "is broadcast over several channels"))
            return b.expand(shape)
        self.labels.unite(a.expand(shape), b.expand(shape), self._event(node, "meet elementwise"))
        return b.expand(shape) if a_spans else a.expand(shape)

    def _apart(self, node: fx.Node, labels: Tensor, shape: Shape | torch.Size) -> Tensor:
        """Unite until units vary along axes that another operand has, or along such that it is broadcast over.

        Of heads and their dimensions, which come last, those stay that this labelling is about.
        """
        varying = [axis for axis in range(labels.dim()) if self.labels.varies(labels, axis)]
        sizes = (1,) * (labels.dim() - len(shape)) + tuple(shape)[-labels.dim() :]
        if len({sizes[axis] == 1 for axis in varying}) < 2:
            return labels
        merged = varying[:-1] if self.dims else varying[-1:]
        return self.merge(node, labels, merged, "is combined with what is the same along another axis").expand(
            labels.shape
        )

    def _spans(self, small: Tensor, large: Tensor) -> bool:
        """Whether one operand is broadcast along an axis on which the other holds different units."""
        return any(
            small.size(axis) == 1 and large.size(axis) > 1 and self.labels.varies(large, axis)
            for axis in range(small.dim())
        )

    def _units(self, labels: Tensor) -> int:
        units = torch.unique(self.labels.roots(compact(labels)))
        return int((units != 0).sum())

    @staticmethod
    def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rank = max(a.dim(), b.dim())
        return a.reshape((1,) * (rank - a.dim()) + a.shape), b.reshape((1,) * (rank - b.dim()) + b.shape)

    def _event(self, node: fx.Node, why: str) -> Event:
        return Event(node.name, why)

    def _settle(self) -> None:
        """Unite until the units of every tensor are a function of one axis.

        Then removing any units leaves rectangular tensors, and no removal has to be undone later.
        """
        tensors = [
            (node.name, labels)
            for node, value in self.values.items()
            for labels in (value if isinstance(value, tuple) else (value,))
            if isinstance(labels, Tensor)
        ]
        tensors += list(self.constants.items())
        tensors = list({place(labels): (name, labels) for name, labels in reversed(tensors)}.values())[::-1]
        changed = True
        while changed:
            changed = False
            for name, labels in tensors:
                changed |= self._along_one_axis(name, labels)

        final: dict[tuple[object, ...], Tensor] = {}  # nodes with the same labels get the same units
        for _, labels in tensors:
            final[place(labels)] = self._final(labels)
        for node, value in self.values.items():
            if isinstance(value, tuple):
                self.values[node] = tuple(final[place(v)] if isinstance(v, Tensor) else v for v in value)
            elif isinstance(value, Tensor):
                self.values[node] = final[place(value)]
        self.constants = {name: final[place(labels)] for name, labels in self.constants.items()}

    def _along_one_axis(self, name: str, labels: Tensor) -> bool:
        """Unite until the units of a tensor are a function of one axis; returns False if they were already."""
        small = compact(labels)
        if sum(size > 1 for size in small.shape) < 2:
            return False
        units = self.labels.roots(small)
        axes = [axis for axis in range(units.dim()) if varies(units, axis)]
        if len(axes) < 2:
            return False
        main = max(axes, key=lambda axis: (self._distinct(units, axis), axis))
        event = Event(name, "must stay rectangular")
        for axis in axes:
            if axis != main:
                self.labels.unite(small, small.narrow(axis, 0, 1).expand(small.shape), event)
        return True

    def _final(self, labels: Tensor) -> Tensor:
        """Units in place of labels; they vary along at most one axis."""
        return self.trim(self.labels.roots(labels))

    @staticmethod
    def _distinct(units: Tensor, axis: int) -> int:
        index = tuple(slice(None) if a == axis else -1 for a in range(units.dim()))
        return len(torch.unique(units[index]))


def _varied(labels: Tensor) -> int:
    return compact(labels).numel()
