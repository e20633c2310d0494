"""Normalisation over channels of which some are masked: its statistics are those of the channels that stay.

LayerNorm, RMSNorm and GroupNorm of one group mix all channels. So masking a channel differs from removing it, unless
the masked network leaves it out of the statistics too. Then the slim network's norm is a plain, narrower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from netclone.graph.calls import arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """A normalisation: its operands, the axis of its channels, and the axes of its statistics."""

    source: Any
    weight: Any
    bias: Any
    eps: float | None
    axis: int
    over_positions: bool
    centred: bool


def norm_over_channels(node: fx.Node) -> Norm | None:
    """The normalisation of a node that normalises over all of one axis of channels; else None."""
    given = arguments(node)
    if node.kwargs or node.op != "call_function":
        return None
    if node.target is aten.layer_norm.default and len(given[1]) == 1:
        weight, bias, eps = _filled(given[2:5], (None, None, 1e-5))
        return Norm(given[0], weight, bias, eps, -1, over_positions=False, centred=True)
    if node.target is aten.rms_norm.default and len(given[1]) == 1:
        weight, eps = _filled(given[2:4], (None, None))
        return Norm(given[0], weight, None, eps, -1, over_positions=False, centred=False)
    if node.target is aten.group_norm.default and given[1] == 1:
        weight, bias, eps = _filled(given[2:5], (None, None, 1e-5))
        return Norm(given[0], weight, bias, eps, 1, over_positions=True, centred=True)
    return None


def _filled(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """A node's arguments, completed by the defaults."""
    return (*given, *defaults[len(given) :])


def leave_out(graph_module: fx.GraphModule, node: fx.Node, kept: Tensor) -> None:
    """Restrict a norm to the channels flagged in ``kept``, in place; the others become zero."""
    norm = norm_over_channels(node)
    assert norm is not None
    if not bool(kept.any()):
        with graph_module.graph.inserting_before(node):
            nothing = graph_module.graph.call_function(aten.zeros_like.default, (norm.source,))
        node.replace_all_uses_with(nothing)
        return
    some = next((tensor for tensor in graph_module.parameters()), kept)
    where = kept.nonzero().flatten().to(some.device)
    back = torch.full((len(kept),), len(where), device=where.device)  # all others read the last entry, which is zero
    back[where] = torch.arange(len(where), device=where.device)
    names = [f"{node.name}_kept", f"{node.name}_back"]
    for name, index in zip(names, (where, back), strict=True):
        graph_module.register_buffer(name, index, persistent=False)
    graph = graph_module.graph
    with graph.inserting_before(node):
        chosen, places = (graph.get_attr(name) for name in names)
        source = graph.call_function(aten.index_select.default, (norm.source, norm.axis, chosen))
        affine = [
            None if operand is None else graph.call_function(aten.index_select.default, (operand, 0, chosen))
            for operand in (norm.weight, norm.bias)
        ]
    size: Any = 1 if norm.over_positions else [len(where)]
    rest = (affine[0], norm.eps) if node.target is aten.rms_norm.default else (*affine, norm.eps)
    with graph.inserting_after(node):
        zero = graph.call_function(aten.narrow.default, (node, norm.axis, 0, 1))
    with graph.inserting_after(zero):
        zero = graph.call_function(aten.mul.Tensor, (zero, 0))
    with graph.inserting_after(zero):
        wide = graph.call_function(aten.cat.default, ([node, zero], norm.axis))
    with graph.inserting_after(wide):
        result = graph.call_function(aten.index_select.default, (wide, norm.axis, places))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (zero, *zero.all_input_nodes, wide))
    node.args = (source, size, *rest)


def gated(source: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor, norm: Norm) -> Tensor:
    """The norm with every channel weighted by its gate ``(C,)``, differentiable in the gate."""
    view = [1] * source.dim()
    view[norm.axis] = -1
    gate = gate.to(source.dtype).reshape(view)
    axes = list(range(1, source.dim())) if norm.over_positions else [source.dim() - 1]
    total = gate.sum().clamp_min(1e-12) * (source[0, 0].numel() if norm.over_positions else 1)
    mean = (gate * source).sum(axes, keepdim=True) / total if norm.centred else 0
    centred = source - mean
    variance = (gate * centred.square()).sum(axes, keepdim=True) / total
    eps = torch.finfo(source.dtype).eps if norm.eps is None else norm.eps
    out = centred * (variance + eps).rsqrt()
    for operand, combine in ((weight, torch.mul), (bias, torch.add)):
        if operand is not None:
            out = combine(out, operand.reshape(view))
    return out
