"""Which nodes of a graph have the batch as their first axis, as a clone's inputs and output must.

An operator graph tells, since its sizes are expressions of the batch size. A symbolic graph is run on one image as well
as on its example of two, and nodes whose shape does not follow are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

Shape = tuple[int, ...]
BATCH = 1_000_003
"""In an operator graph, a size that is a multiple of this prime is that multiple of the batch size."""


def is_free(size: Any) -> bool:
    """Whether a size of a tensor of an operator graph follows the batch size.

    Examples
    --------
    >>> is_free(3 * BATCH), is_free(64)
    (True, False)
    """
    return not isinstance(size, int) or (size > 0 and size % BATCH == 0)


class Sizes(fx.Interpreter):
    """Runs a graph and records the shape of every node whose value is one tensor, by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.seen[n.name] = tuple(out.shape)
        return out


def without_batch(one: Mapping[str, Shape], two: Mapping[str, Shape]) -> dict[str, tuple[Shape, Shape]]:
    """The nodes whose tensor is not ``(N, ...)`` for every batch size N, with its shapes for one image and two."""
    both = {name: (shape, two[name]) for name, shape in one.items() if name in two}
    return {name: shapes for name, shapes in both.items() if not _follows(*shapes)}


def why_no_batch(node: fx.Node, noted: Mapping[str, tuple[Shape, Shape]]) -> str | None:
    """Why a node's tensor is not ``(N, ...)`` for every batch size N; None if it is, or if that is not known.

    ``noted`` is the result of :func:`without_batch` for a symbolic graph.
    """
    shapes = noted.get(node.name)
    value = node.meta.get("val")
    if isinstance(value, Tensor) and _is_free(node.graph):
        one, two = (sizes_at(value, count) for count in (1, 2))
        shapes = None if _follows(one, two) else (one, two)
    if shapes is None:
        return None
    return f"its first axis is not the batch: for one image it has shape {shapes[0]}, for two {shapes[1]}"


def _follows(one: Shape, two: Shape) -> bool:
    return len(one) > 0 and one[:1] == (1,) and two[:1] == (2,) and one[1:] == two[1:]


def _is_free(graph: fx.Graph) -> bool:
    """Whether the sizes in an operator graph are expressions of a free batch size."""
    given = next(node for node in graph.nodes if node.op == "placeholder").meta.get("val")
    return isinstance(given, Tensor) and is_free(given.shape[0])


def sizes_at(value: Tensor, count: int) -> Shape:
    """The shape, at one batch size, of a tensor whose sizes are expressions of the batch size.

    Converting such a size to a number would fix the batch size of the whole graph.
    """
    return tuple(_size_at(size, count) if is_free(size) else size for size in value.shape)


def _size_at(size: Any, count: int) -> int:
    if isinstance(size, int):
        return size // BATCH * count
    expression = size.node.expr
    return int(expression.subs({symbol: count for symbol in expression.free_symbols}))
