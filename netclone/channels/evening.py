"""even_attention(graph): queries, keys and values as wide as each other, for the fast kernel of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, fx

from netclone.graph.operators import kind_of
from netclone.graph.shapes import aten


def even_attention(graph: fx.GraphModule) -> None:
    """Fill up the narrower of queries and values with zeros, in a slim graph, which is changed in place.

    torch's fast kernel on a processor wants queries, keys and values of one width ``D``. Zeros add nothing to the sums
    over ``D``, and what they add to the result is cut off again.

    Examples
    --------
    >>> import torch, netclone
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.nn.functional.scaled_dot_product_attention(x, x, x[..., :3])
    >>> graph = netclone.channel_groups(Attention(), torch.randn(2, 2, 4, 8)).graph_module
    >>> even_attention(graph)
    >>> [node.meta["val"].shape[-1] for node in graph.graph.nodes if node.op == "call_function"]
    [3, 8, 8, 3]
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or kind_of(node.target) != "attention":
            continue
        operands = [cast("fx.Node", operand) for operand in node.args[:3]]
        summed, given = (_width(operand) for operand in operands[1:])
        if summed == given or 0 in (summed, given):
            continue
        if node.kwargs.get("scale") is None:
            node.kwargs = {**node.kwargs, "scale": summed**-0.5}
        width = max(summed, given)
        with graph.graph.inserting_before(node):
            filled = [_filled(operand, width) for operand in operands]
        node.args = (*filled, *node.args[3:])
        if given < width:
            with graph.graph.inserting_after(node):
                _cut(node, given, width)
    graph.graph.lint()
    graph.recompile()


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _filled(operand: fx.Node, width: int) -> fx.Node:
    if _width(operand) == width:
        return operand
    amounts = [0, width - _width(operand)]
    return _added(operand, aten.constant_pad_nd.default, (operand, amounts), width)


def _cut(node: fx.Node, width: int, whole: int) -> None:
    """Have everything read the first columns of a node that has become wider."""
    readers = list(node.users)
    node.meta = {**node.meta, "val": _described(node, whole)}
    part = _added(node, aten.slice.Tensor, (node, -1, 0, width), width)
    for reader in readers:
        reader.replace_input_with(node, part)


def _added(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], width: int) -> fx.Node:
    added = node.graph.call_function(target, args)
    added.meta = {"val": _described(node, width)}
    return added


def _described(node: fx.Node, width: int) -> Tensor:
    described: Tensor = node.meta["val"]
    return described.new_empty((*described.shape[:-1], width))
