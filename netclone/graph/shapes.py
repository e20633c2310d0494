"""BY_SHAPE: what frequent operators return for tensors without data.

Torch would take each of them apart to find out, which takes ten times as long. A function here returns None for
arguments that it leaves to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _like(source: Tensor, *rest: Any, **options: Any) -> Tensor | None:
    return torch.empty_like(source) if source.is_floating_point() else None


def _itself(source: Tensor, *rest: Any, **options: Any) -> Tensor:
    return source


def _in_eval_mode(source: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any) -> Any:
    return None if training else torch.empty_like(source)


def _together(first: Any, second: Any, **options: Any) -> Tensor | None:
    if not isinstance(first, Tensor) or options or not first.is_floating_point():
        return None
    if type(second) in (int, float) or (first.shape == second.shape and first.dtype == second.dtype):
        return torch.empty_like(first)
    return None


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    alike = source.dim() > 1 and weight.dim() == 2 and source.shape[-1] == weight.shape[1]
    return source.new_empty((*source.shape[:-1], weight.shape[0])) if alike else None


def _convolution(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor | None:
    sizes = []
    if source.dim() != weight.dim() or source.shape[1] != weight.shape[1] * groups:
        return None
    for axis, (size, kernel) in enumerate(zip(source.shape[2:], weight.shape[2:], strict=True)):
        step, pad, apart = (given[axis if len(given) > 1 else 0] for given in (stride, padding, dilation))
        sizes.append((size + 2 * pad - apart * (kernel - 1) - 1) // step + 1)
    return source.new_empty((source.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor | None:
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if alike else None


BY_SHAPE: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys(
        (getattr(aten, name).default for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish")),
        _like,
    ),
    **dict.fromkeys((getattr(aten, name).default for name in ("relu_", "silu_", "hardtanh_", "hardswish_")), _itself),
    **dict.fromkeys((aten.layer_norm.default, aten.group_norm.default), _like),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor), _together),
    aten.batch_norm.default: _in_eval_mode,
    aten.conv2d.default: _convolution,
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
}
"""By operator, a function of its arguments."""
