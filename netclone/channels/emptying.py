"""Groups without units: which nodes go with them, and what is constant without them.

A layer that reads only masked channels has a weight of zeros in the masked network, so it computes its bias, the same
at every place and for every image. What is computed from constants alone is constant too. So the slim network needs
none of these layers, only the last constant before something else is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from netclone.channels.labels import Event, compact, expanded
from netclone.channels.oprules import rule_of
from netclone.graph.batching import sizes_at
from netclone.graph.calls import argument
from netclone.graph.operators import kind_of, operator_name

if TYPE_CHECKING:
    from netclone.channels.slimming import Resizer

ALIKE = 1e-12  # relative: float64 sums the same numbers in another order at another place

_BIASES = {"convolution": 2, "transposed convolution": 2, "linear": 2, "addmm": 0, "product": None}
"""The kinds of layers that multiply what they read by a weight, and where their arguments have a bias."""


@dataclass(frozen=True)
class Emptied:
    """What a slim graph computes if tensors of the full one lose all of their channels.

    ``live`` are the nodes that it has. ``constants`` are the values, in float64, of other nodes that live ones read,
    with size one along axes on which they do not vary. ``refused`` says why the graph cannot be slimmed so.
    """

    live: frozenset[fx.Node] = frozenset()
    constants: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    refused: Event | None = None


def emptied(new: Resizer) -> Emptied | None:
    """What is left of a graph without the removed units; None if no tensor loses all of its channels."""
    nodes = new.labelling.graph_module.graph.nodes
    if not any(node.op == "call_function" and new.vanishes(node) for node in nodes):
        return None
    known = _Constants(new)
    for node in nodes:
        if node.op in ("call_function", "output") and (why := known.follow(node)) is not None:
            return Emptied(refused=Event(node.name, why))
    live, read = set[fx.Node](), dict[fx.Node, Tensor]()
    stack = [node for node in nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node in known.values:
            read[node] = known.values[node]
        elif node not in live and not (node.op == "call_function" and new.vanishes(node)):
            live.add(node)
            stack.extend(() if size_of_batch(new, node, known.values) else node.all_input_nodes)
    return Emptied(frozenset(live), read)


def constant_name(node: fx.Node) -> str:
    """The name under which a slim graph stores the constant that takes the place of a node."""
    return f"{node.name}_constant"


def stored(value: Tensor, node: fx.Node, dtype: torch.dtype | None = None) -> Tensor:
    """A constant as the slim graph stores it: without axes that broadcasting adds; in a dtype, or in the node's."""
    value = compact(value)
    while value.dim() and value.size(0) == 1:
        value = value.squeeze(0)
    return value.to(dtype or node.meta["val"].dtype, memory_format=torch.contiguous_format, copy=True)


def size_of_batch(new: Resizer, node: fx.Node, constants: Mapping[fx.Node, object]) -> bool:
    """Whether a node is the batch size, read off a tensor that a slim graph does not have."""
    if node.op != "call_function" or kind_of(node.target) != "size" or not isinstance(node.args[0], fx.Node):
        return False
    source = node.args[0]
    if source.op != "call_function" or not isinstance(source.meta["val"], Tensor):
        return False
    if source not in constants and not new.vanishes(source):
        return False
    axis, value = argument(node, "dim"), source.meta["val"]
    return [sizes_at(value, count)[axis] for count in (1, 2)] == [1, 2]


class _Constants:
    """Follows a graph in order, and computes the values of nodes that became constant."""

    def __init__(self, new: Resizer) -> None:
        self.new = new
        self.values: dict[fx.Node, Any] = {}
        self._fixed: dict[fx.Node, Any] = {}

    def follow(self, node: fx.Node) -> str | None:
        """Take the next node; says why it cannot be slimmed, if it cannot."""
        inputs = node.all_input_nodes
        lost = [n for n in inputs if n.op == "call_function" and self.new.vanishes(n)]
        constant = [n for n in inputs if n in self.values]
        if not (lost or constant) or (node.op == "call_function" and self.new.vanishes(node)):
            return None
        if node.op == "output":
            return "the output would not depend on the image"
        kind = kind_of(node.target)
        if kind == "size":
            return None if size_of_batch(self.new, node, self.values) else "would read the size of what is gone"
        rule = rule_of(node.target)
        if rule is None or rule.label is None:
            return f"operator {operator_name(node.target)} has no rule, and would read what is constant or gone"
        if (
            lost
            and kind in _BIASES
            and (kind == "addmm" or node.args[1] not in lost)
            and lost == [n for n in inputs if n.op != "get_attr"]
        ):
            self.values[node] = self._bias(node, kind)
            return None
        if lost == inputs and kind in ("product", "einsum"):  # of queries and keys without dimensions
            self.values[node] = self._zeros(node)
            return None
        if lost and kind != "joined":
            return "would read no channel, and is no layer with a weight"
        others = [n for n in inputs if n not in lost and n not in constant and not self._is_fixed(n)]
        if not others:
            return self._compute(node)
        shapes = [self.new.shape(n) for n in others if isinstance(n.meta.get("val"), Tensor)]
        if not constant or (kind == "elementwise" and torch.broadcast_shapes(*shapes) == self.new.shape(node)):
            return None
        return "would read a constant beside other channels, and does not combine them element by element"

    def _bias(self, node: fx.Node, kind: str) -> Tensor:
        """What a layer without inputs computes: its bias at every place, or zeros."""
        shape = self.new.shape(node)
        place = _BIASES[kind]
        bias = node.args[place] if place is not None and place < len(node.args) else None
        if not isinstance(bias, fx.Node):
            return self._zeros(node)
        value: Tensor = self._value(bias)
        weight = node.args[1]
        axis = -1
        if "conv" in kind and isinstance(weight, fx.Node):
            axis = 1 - self.new.labelling.tensor_of(weight).dim()  # before the axes that it moves along
        return value.reshape([-1 if other == axis + len(shape) else 1 for other in range(len(shape))]).expand(shape)

    def _zeros(self, node: fx.Node) -> Tensor:
        shape, device = self.new.shape(node), next(self.new.labelling.graph_module.parameters()).device
        return torch.zeros((1,) * len(shape), dtype=torch.float64, device=device).expand(shape)

    def _compute(self, node: fx.Node) -> str | None:
        """Compute a node from constants; says so if the result is not one value for each channel."""
        value = self._called(node)
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if sum(size > 1 for size in compact(one).shape) > 1:
                return "computes another value at the borders from what would be constant"
        self.values[node] = value
        return None

    def _called(self, node: fx.Node) -> Any:
        rule = rule_of(node.target)
        arguments = rule.resize(self.new, node) if rule is not None and rule.resize is not None else node.args
        target: Any = self.new.target(node)
        options = self.new.options(node)
        args, kwargs = fx.node.map_aggregate(fx.node.map_arg((arguments, options), self._value), double)
        with torch.no_grad():
            value = target(*args, **kwargs)
        return tuple(map(_alike, value)) if isinstance(value, (tuple, list)) else _alike(value)

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether a node depends on neither constants nor images: a tensor, what is computed from some, or a number."""
        return node.op == "get_attr" or node in self.new.labelling.fixed or kind_of(node.target) == "size"

    def _value(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            tensor = self.new.sliced(str(node.target)).detach()
            return tensor.to(double(tensor.dtype))
        if node not in self._fixed:
            number = self.new.labelling.values[node]
            self._fixed[node] = self._called(node) if isinstance(number, (Tensor, tuple)) else number
        return self._fixed[node]


def _alike(value: Tensor) -> Tensor:
    """The same tensor, expanded along the axes on which it does not vary up to rounding."""
    if not value.is_floating_point() or not value.numel():
        return expanded(value)
    near = ALIKE * float(value.abs().max())
    for axis in range(value.dim()):
        if value.size(axis) > 1 and value.stride(axis) != 0:
            first = value.narrow(axis, 0, 1)
            if bool(((value - first).abs() <= near).all()):
                value = first.expand(value.shape)
    return value


@overload
def double(value: torch.dtype) -> torch.dtype: ...
@overload
def double(value: Argument) -> Argument: ...
def double(value: Argument) -> Argument:
    """The float64 or complex128 counterpart of a floating or complex dtype; anything else unchanged.

    Examples
    --------
    >>> double(torch.float16), double(torch.int8)
    (torch.float64, torch.int8)
    """
    if not isinstance(value, torch.dtype):
        return value
    return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
