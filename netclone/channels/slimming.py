"""Physical slimming of an operator graph: slice the tensors, and adapt the literal arguments."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Target

from netclone.channels.emptying import constant_name, emptied, size_of_batch, stored
from netclone.channels.evening import even_attention
from netclone.channels.labelling import Labelling, Shape
from netclone.channels.labels import compact, expanded, place
from netclone.channels.oprules import rule_of
from netclone.errors import CertificateError, MaskError
from netclone.graph.capturing import set_tensor, tensor_at
from netclone.graph.functionalizing import IN_PLACE


class Resizer:
    """Shapes before and after removing units, for the resize rules of :mod:`netclone.channels.oprules`."""

    def __init__(self, labelling: Labelling, removed: Tensor) -> None:
        self.labelling = labelling
        self._gone = labelling.labels.marked(removed)
        self._targets: dict[fx.Node, Target] = {}
        self._options: dict[fx.Node, dict[str, float]] = {}
        self._shapes: dict[fx.Node, list[Shape]] = {}
        self._kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # with the labels, so that places stay theirs

    def kept(self, labels: Tensor, axis: int) -> Tensor:
        """Which indices of an axis stay (True) once the units are removed."""
        if labels.size(axis) == 1 or labels.stride(axis) == 0:
            return torch.ones(labels.size(axis), dtype=torch.bool)
        key = (*place(labels), axis)
        if key not in self._kept:
            self._kept[key] = labels, self._kept_of(labels, axis)
        return self._kept[key][1]

    def _kept_of(self, labels: Tensor, axis: int) -> Tensor:
        units = compact(expanded(self.labelling.labels.roots(labels)))
        if units.size(axis) == 1:
            return torch.ones(labels.size(axis), dtype=torch.bool)
        gone = self._gone[units].movedim(axis, 0)
        return ~gone.reshape(len(gone), -1).all(1)  # units of another kind may lie along another axis

    def kept_slices(self, parameter: str, axis: int) -> Tensor:
        """Which slices of a parameter stay along an axis (``[True]`` if no unit lies along it)."""
        slot = self.labelling.slots.get((parameter, axis))
        return torch.ones(1, dtype=torch.bool) if slot is None else self.kept(slot, 0)

    def kept_along(self, node: fx.Node, axis: int) -> Tensor:
        """Which indices of a node's tensor stay along an axis."""
        return self.kept(self._labels(node)[0], axis)

    def tensor_shape(self, node: fx.Node) -> Shape:
        """Shape of a parameter before."""
        return tuple(self.labelling.tensor_of(node).shape)

    def old_shape(self, node: fx.Node) -> Shape:
        """Shape of a node's tensor at batch size one, before."""
        return self.old_shapes(node)[0]

    def shape(self, node: fx.Node) -> Shape:
        """Shape of a node's tensor at batch size one, after."""
        return self.shapes(node)[0]

    def old_shapes(self, node: fx.Node) -> list[Shape]:
        """As :meth:`old_shape`, for every tensor of a node that returns several."""
        return [tuple(labels.shape) for labels in self._labels(node)]

    def shapes(self, node: fx.Node) -> list[Shape]:
        """As :meth:`shape`, for every tensor of a node that returns several."""
        if node not in self._shapes:
            self._shapes[node] = [
                tuple(self._size(labels, axis) for axis in range(labels.dim())) for labels in self._labels(node)
            ]
        return self._shapes[node]

    def _size(self, labels: Tensor, axis: int) -> int:
        return labels.size(axis) if labels.stride(axis) == 0 else int(self.kept(labels, axis).sum())

    def vanishes(self, node: fx.Node) -> bool:
        """Whether every tensor of a node loses all of its channels."""
        if isinstance(self.labelling.values.get(node), (Tensor, tuple)):
            pairs = list(zip(self.old_shapes(node), self.shapes(node), strict=True))
            return bool(pairs) and all(0 in after and 0 not in before for before, after in pairs)
        return False

    def sliced(self, name: str) -> Tensor:
        """A copy of a parameter or buffer without the removed slices."""
        return _sliced(self, self.labelling, name)

    def kept_before(self, node: fx.Node, axis: int, index: int) -> int:
        """How many indices below ``index`` stay along an axis, which is the new position of that index."""
        return int(self.kept(self._labels(node)[0], axis)[:index].sum())

    def replace_target(self, node: fx.Node, target: Target) -> None:
        """Use another operator in the slim graph."""
        self._targets[node] = target

    def set_option(self, node: fx.Node, name: str, value: float) -> None:
        """Give an operator a keyword argument in the slim graph."""
        self._options.setdefault(node, {})[name] = value

    def options(self, node: fx.Node) -> dict[str, Any]:
        """The keyword arguments of a node in the slim graph."""
        return {**(node.kwargs if self.target(node) is node.target else {}), **self._options.get(node, {})}

    def target(self, node: fx.Node) -> Target:
        """The operator of a node in the slim graph."""
        return self._targets.get(node, node.target)

    def refuse(self, node: fx.Node, why: str) -> NoReturn:
        """Raise, because the literals of a node cannot be adapted."""
        raise CertificateError(
            f"node '{node.name}' ({node.target}) {why}; its channels cannot be removed. Please report this model; "
            "until then, keep the groups that reach this node whole (ChannelMask.from_kept)"
        )

    def _labels(self, node: fx.Node) -> list[Tensor]:
        value = self.labelling.value(node)
        return list(value) if isinstance(value, tuple) else [cast("Tensor", value)]


def slim(labelling: Labelling, removed: Tensor) -> fx.GraphModule:
    """A new operator graph without the removed units, which stores no masked weight.

    The units of every tensor have to be a function of one axis, which :class:`Labelling` ensures. Layers that lose all
    of their channels are left out; what they fed reads a constant, a parameter under the name ``constant_name(node)``.

    Raises
    ------
    MaskError
        If a layer loses all of its channels, and what is left is not constant or cannot be told.
    """
    source, new = labelling.graph_module, Resizer(labelling, removed)
    empty = emptied(new)
    if empty is not None and empty.refused is not None:
        raise MaskError(f"a layer would lose all of its channels: {empty.refused}")
    constants = {} if empty is None else empty.constants
    graph, root = fx.Graph(), nn.Module()
    copied: dict[fx.Node, fx.Node] = {}
    sliced: set[str] = set()
    images = next(node for node in source.graph.nodes if node.op == "placeholder")
    for node in source.graph.nodes:
        if node in constants:
            value = stored(constants[node], node)
            set_tensor(root, constant_name(node), nn.Parameter(value) if value.is_floating_point() else value)
            copied[node] = graph.create_node("get_attr", constant_name(node), name=node.name)
        if node in constants or not (empty is None or node in empty.live or node.op == "placeholder"):
            continue
        rule = rule_of(node.target) if node.op == "call_function" else None
        arguments = rule.resize(new, node) if rule is not None and rule.resize is not None else node.args
        if empty is not None and size_of_batch(new, node, constants):
            arguments = (images, 0)
        if node.op == "get_attr" and str(node.target) not in sliced:
            sliced.add(str(node.target))
            set_tensor(root, str(node.target), new.sliced(str(node.target)))
        args, kwargs = fx.node.map_arg((arguments, new.options(node)), copied.__getitem__)
        copied[node] = graph.create_node(node.op, new.target(node), args, kwargs, node.name)
        copied[node].meta = {"val": _described(new, node)} if node.op in ("placeholder", "call_function") else {}
        if IN_PLACE in node.meta:
            copied[node].meta[IN_PLACE] = True
    result = fx.GraphModule(root, graph, "OperatorGraph")
    result.meta = copy.copy(source.meta)
    even_attention(result)
    return result.eval()


def _described(new: Resizer, node: fx.Node) -> object:
    """The ``meta["val"]`` of a slim node: a tensor without data (batch size one), or the old number."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return torch.empty(new.shape(node), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return tuple(
            torch.empty(shape, dtype=v.dtype, device="meta") for shape, v in zip(new.shapes(node), value, strict=True)
        )
    return value


def _sliced(new: Resizer, labelling: Labelling, name: str) -> Tensor:
    tensor = tensor_at(labelling.graph_module, name)
    part = tensor.detach()
    for axis in range(tensor.dim()):
        labels = None
        if name in labelling.constants:
            labels, along = labelling.constants[name], axis
        elif (name, axis) in labelling.slots:
            labels, along = labelling.slots[name, axis], 0
        if labels is None:
            continue
        kept = new.kept(labels, along)
        if name not in labelling.constants and (groups := labelling.repeats(name, axis)) > 1:
            own = zip(part.chunk(groups), kept.reshape(groups, -1), strict=True)
            part = torch.cat([rows.index_select(axis, k.nonzero().flatten().to(part.device)) for rows, k in own])
        elif not bool(kept.all()):
            part = part.index_select(axis, kept.nonzero().flatten().to(tensor.device))
    part = part.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
