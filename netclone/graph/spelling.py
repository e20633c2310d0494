"""spell(graph): decompose operators without a rule into operators that have rules.

``torch.hstack`` is ``cat``, and ``F.cosine_similarity`` is a few sums and products. No list says so: torch itself
computes them from other operators, which are recorded while it does. Each operator is decomposed until all its parts
have rules. One that cannot be decomposed so far stays whole and keeps its channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

from netclone.graph.batching import BATCH, is_free
from netclone.graph.calls import is_composite
from netclone.graph.functionalizing import IN_PLACE, is_view
from netclone.graph.operators import KEPT_WHOLE, kind_of
from netclone.graph.purity import functional_twin, may_be_archived

aten = torch.ops.aten


class _NoSpelling(Exception):
    """An operator cannot be decomposed into others."""


def spell(graph: fx.Graph) -> dict[str, str]:
    """Decompose operators of no known kind, in place; returns the names that are gone with those that replace them.

    Parameters
    ----------
    graph
        A graph of functional operators whose nodes have their value in ``meta["val"]``.
    """
    moved: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or kind_of(node.target) is not None:
            continue
        if is_composite(node.target) or node.target in _AS_OTHERS:
            moved |= _spelled(graph, node)
    return moved


def _spelled(graph: fx.Graph, node: fx.Node) -> dict[str, str]:
    recording = _Recording(graph, node)
    try:
        result = recording.of(node)
        several = isinstance(result, (list, tuple))
        parts: list[Any] = [recording.node_of(part) for part in (result if several else [result])]
        if not _is_better(node, recording.made):
            raise _NoSpelling
    except (_NoSpelling, RuntimeError, NotImplementedError, TypeError):  # torch cannot decompose it either
        for made in reversed(recording.made):
            graph.erase_node(made)
        return {}
    if several:
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(parts[index])
            graph.erase_node(user)
        graph.erase_node(node)
        return {}
    [part] = parts
    node.replace_all_uses_with(part)
    graph.erase_node(node)
    if part not in recording.made:
        return {node.name: part.name}
    part.name = node.name  # a position stays where it was
    part.meta = {**node.meta, "val": part.meta["val"]}
    if len(recording.made) > 1:
        part.meta.pop(IN_PLACE, None)
    return {}


def _is_better(node: fx.Node, made: Sequence[fx.Node]) -> bool:
    """Whether all parts have rules or, failing that, a file may hold the parts but not the whole."""
    kinds = [kind_of(part.target) for part in made if part.all_input_nodes]  # all others are folded into constants
    if all(kind not in (None, KEPT_WHOLE) for kind in kinds):
        return True
    return not may_be_archived(node.target) and all(may_be_archived(part.target) for part in made)


class _Recording(TorchDispatchMode):
    """Records the operators that torch computes a node from, in the graph before that node."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.graph = graph
        self.before = node
        self.made: list[fx.Node] = []
        self.known: dict[int, tuple[Tensor, fx.Node]] = {}  # by identity; the tensors are held, so that ids stay unique

    def of(self, node: fx.Node) -> Any:
        """Compute a node's value from other operators."""
        given: list[fx.Node] = node.all_input_nodes
        for source in given:
            value = source.meta["val"]
            if isinstance(value, Tensor):
                self.known[id(value)] = (value, source)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        fake = detect_fake_mode([source.meta["val"] for source in given])
        if fake is None:
            raise _NoSpelling
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), fake, self:
            return self._parts(node.target, args, kwargs)

    def node_of(self, value: Any) -> fx.Node:
        """The node whose value is this tensor."""
        if not isinstance(value, Tensor) or id(value) not in self.known:
            raise _NoSpelling
        return self.known[id(value)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # such as a query of a tensor's device
            return func(*args, **kwargs)
        if kind_of(func) is None and (is_composite(func) or func in _AS_OTHERS):
            with self:
                return self._parts(func, args, kwargs)
        written = func
        if func._schema.is_mutable:
            written = self._functional(func, args)
        value = func(*args, **kwargs)
        if func in (aten.detach.default, aten.alias.default):
            self.known[id(value)] = (value, self.node_of(args[0]))
            return value
        if func is aten.sym_size.int or not isinstance(value, (Tensor, list, tuple)):
            return value
        self._note(written, args, kwargs, value)
        return value

    def _functional(self, func: Any, args: Any) -> Any:
        """The functional twin of an in-place operator that overwrites a new tensor, which nothing has read yet."""
        twin = functional_twin(func)
        changed = self.node_of(args[0])
        makes = isinstance(changed.target, torch._ops.OpOverload) and changed in self.made
        if twin is None or not makes or changed.users or is_view(changed):
            raise _NoSpelling
        return twin

    def _parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = _AS_OTHERS.get(func, func.decompose)(*args, **kwargs)
        if value is NotImplemented:
            raise _NoSpelling
        return value

    def _note(self, func: Any, args: Any, kwargs: Any, value: Any) -> None:
        node = self._add(func, self._written(args), self._written(kwargs), value)
        if isinstance(value, Tensor):
            self.known[id(value)] = (value, node)
            return
        for index, item in enumerate(value):
            self.known[id(item)] = (item, self._add(operator.getitem, (node, index), {}, item))

    def _add(self, func: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(func, args, kwargs)
        node.meta = {**self.before.meta, "val": value}
        node.meta.pop(IN_PLACE, None)
        self.made.append(node)
        return node

    def _written(self, value: Any) -> Any:
        """Arguments with nodes in place of tensors and of sizes that depend on the batch."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.SymInt):
            return self._size(value.node.expr)
        if type(value) is int and BATCH // 2 <= value < 2**62:
            return self._batches(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise _NoSpelling
        if isinstance(value, dict):
            return {key: self._written(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._written, value))
        return value

    def _batches(self, number: int) -> fx.Node:
        """A multiple of the batch size of a graph that was recorded."""
        times = number // BATCH
        if not is_free(number):
            raise _NoSpelling
        [source, *_] = self.graph.find_nodes(op="placeholder")
        size = self._add(aten.sym_size.int, (source, 0), {}, BATCH)
        return size if times == 1 else self._add(operator.mul, (times, size), {}, times * BATCH)

    def _size(self, size: Any) -> Any:
        """A size, as sums and products of the inputs' sizes."""
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            for source in self.graph.find_nodes(op="placeholder"):
                for axis, own in enumerate(source.meta["val"].shape):
                    if isinstance(own, torch.SymInt) and own.node.expr == size:
                        return self._add(aten.sym_size.int, (source, axis), {}, own)
        if not size.is_Add and not size.is_Mul:
            raise _NoSpelling
        combine = operator.add if size.is_Add else operator.mul
        first, *others = map(self._size, size.args)
        for other in others:
            values = [part.meta["val"] if isinstance(part, fx.Node) else part for part in (first, other)]
            first = self._add(combine, (first, other), {}, combine(*values))
        return first


def _assigned(source: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """``source[mask] = number`` as a choice by the mask, which may lack axes before and after its own."""
    masks = [index for index in indices if index is not None]
    if accumulate or len(masks) != 1 or masks[0].dtype != torch.bool or values.numel() != 1 or values.dim() > 1:
        return NotImplemented
    [mask] = masks
    for _ in range(next(axis for axis, index in enumerate(indices) if index is not None)):
        mask = aten.unsqueeze.default(mask, 0)
    while mask.dim() < source.dim():
        mask = aten.unsqueeze.default(mask, mask.dim())
    return aten.where.self(mask, values, source)


def _sloped(source: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any) -> Any:
    """``rrelu``, which draws its slopes at random only in training."""
    return NotImplemented if training else aten.leaky_relu.default(source, (lower + upper) / 2)


_AS_OTHERS: dict[Any, Callable[..., Any]] = {
    aten.index_put.default: _assigned,
    aten.rrelu.default: _sloped,
    aten.unsafe_chunk.default: aten.chunk.default,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
"""Decompositions that torch itself does not have; they return NotImplemented for arguments that they cannot take."""
