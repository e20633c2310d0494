"""unstack(graph): let queries, keys and values that one layer makes be cut apart before they are given heads.

``qkv(x).reshape(N, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)`` holds all three in one tensor, in which they have
equally many dimensions. Cut apart first, each is a tensor of its own: the same elements, in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from netclone.graph.batching import sizes_at
from netclone.graph.calls import argument, arguments
from netclone.graph.operators import kind_of

aten = torch.ops.aten

_SPLITTING = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)


def unstack(graph: fx.Graph) -> None:
    """Move selections along an axis that a layer's channels are split into to the layer's output, in place.

    Nodes have their value in ``meta["val"]``. Those that are selected keep their names.
    """
    for node in list(graph.nodes):
        if node.target is aten.select.int:
            _move(graph, node, arguments(node)[1], [(node, arguments(node)[2])])
        elif node.target is aten.unbind.int:
            _move(graph, node, argument(node, "dim"), [(part, arguments(part)[1]) for part in node.users])
    graph.eliminate_dead_code()


def _move(graph: fx.Graph, before: fx.Node, axis: int, parts: Sequence[tuple[fx.Node, int]]) -> None:
    """Cut each part of an axis out of the layer's output first; does nothing if the axis is none of a layer's."""
    chain: list[fx.Node] = []
    view = arguments(before)[0]
    along: int | None = axis % len(view.meta["val"].shape)
    while along is not None and view.target not in _SPLITTING:
        along = _axis_before(view, along)
        chain.append(view)
        view = arguments(view)[0] if along is not None else view
    found = None if along is None else _split(view, along)
    if along is None or found is None:
        return
    channels, count, size = found

    def add(like: fx.Node, target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta = {**like.meta, "val": target(*fx.node.map_arg(args, lambda used: used.meta["val"]))}
        return new

    for part, index in parts:
        start = index % count * size
        with graph.inserting_before(before):
            piece = add(view, aten.slice.Tensor, arguments(view)[0], channels, start, start + size)
            piece = add(view, view.target, piece, *_with_one(view, along))
            for node in reversed(chain):
                piece = add(node, node.target, piece, *node.args[1:])
            piece = add(part, aten.select.int, piece, axis, 0)
        part.replace_all_uses_with(piece)
        name, part.name = part.name, f"{part.name}_stacked"
        piece.name = name  # a position stays where it was


def _axis_before(node: fx.Node, axis: int) -> int | None:
    """Which axis of an operator's source is this one of its result; None unless it does nothing but move axes."""
    if node.op != "call_function" or node.kwargs or not isinstance(node.meta["val"], Tensor):
        return None
    rank, given = node.meta["val"].dim(), arguments(node)
    if node.target is aten.permute.default:
        return int(given[1][axis]) % rank
    if node.target is aten.transpose.int:
        one, other = int(given[1]) % rank, int(given[2]) % rank
        return {one: other, other: one}.get(axis, axis)
    if node.target is aten.contiguous.default:
        return axis
    if node.target is aten.unsqueeze.default:
        added = int(given[1]) % rank
        return None if axis == added else axis - (axis > added)
    if node.target is aten.squeeze.dims:
        gone = {dim % (rank + len(given[1])) for dim in given[1]}
        return [dim for dim in range(rank + len(given[1])) if dim not in gone][axis]
    return None


def _split(view: fx.Node, axis: int) -> tuple[int, int, int] | None:
    """The axis of a layer's channels that a view splits, the first factor being ``axis``: that, its size, the rest."""
    layer = arguments(view)[0]
    if kind_of(layer.target) not in ("linear", "addmm", "convolution"):
        return None
    found = set()
    for batch in (2, 3):
        given, made = (sizes_at(node.meta["val"], batch) for node in (layer, view))
        before = math.prod(made[:axis])
        channels = next((dim for dim in range(len(given)) if math.prod(given[:dim]) == before and given[dim] > 1), None)
        if channels is None or made[axis] < 2:
            return None
        if all(math.prod(made[axis:end]) != given[channels] for end in range(axis + 1, len(made) + 1)):
            return None
        found.add((channels, made[axis], given[channels] // made[axis]))
    return found.pop() if len(found) == 1 else None


def _with_one(view: fx.Node, axis: int) -> list[Any]:
    """The further arguments of a view that gets only one of the parts along an axis."""
    given = [list(value) if isinstance(value, (list, tuple)) else value for value in arguments(view)[1:]]
    first = 0
    if view.target is aten.unflatten.int:
        first = given[0] % (view.meta["val"].dim() - len(given[1]) + 1)
    given[-1][axis - first] = 1
    return given
