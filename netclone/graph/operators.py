"""The table of operators, by kind.

A kind says what an operator does with its elements. The rest follows: which labels its output has and how its literal
arguments change (:mod:`netclone.channels.oprules`), whether it has to be decomposed (:mod:`netclone.graph.spelling`),
which of its arguments are weights (:data:`WEIGHTS`), and so what is folded, refitted and counted against a budget. To
add an operator of an existing kind, add its name to :data:`KINDS`. Operators that torch's own tags call elementwise or
reductions need no entry.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from netclone.graph.calls import is_composite
from netclone.graph.purity import may_be_archived

aten = torch.ops.aten

KINDS: dict[str, str] = {
    "elementwise": """
        add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar
        div.Tensor_mode pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar maximum minimum where.self atan2
        lerp.Scalar lerp.Tensor addcmul addcdiv relu relu6 gelu silu mish sigmoid tanh hardtanh hardswish
        hardsigmoid leaky_relu elu selu celu softplus log_sigmoid softshrink hardshrink threshold exp expm1 log
        log2 log1p sqrt rsqrt square reciprocal neg abs sign erf sin cos tan clamp clamp.Tensor clamp_min
        clamp_max floor ceil round logical_not logical_and logical_or bitwise_not bitwise_and.Tensor
        bitwise_or.Tensor masked_fill.Scalar masked_fill.Tensor eq.Scalar ne.Scalar gt.Scalar ge.Scalar
        lt.Scalar le.Scalar eq.Tensor ne.Tensor gt.Tensor ge.Tensor lt.Tensor le.Tensor to.dtype to.device
        to.dtype_layout _to_copy type_as contiguous clone floor_divide
    """,
    "made": "zeros ones full new_zeros new_ones new_full",
    "like another": "zeros_like ones_like full_like fill.Scalar",
    "prelu": "prelu _prelu_kernel",
    "movement": """
        permute transpose.int t squeeze squeeze.dim squeeze.dims unsqueeze stack unbind.int pixel_shuffle
        pixel_unshuffle movedim.int swapaxes repeat reshape_as view_as expand_as repeat_interleave.self_int
        flatten.using_ints numpy_T mT adjoint
    """,
    "joined": "cat",
    "channel shuffle": "channel_shuffle",
    "view": "view reshape _unsafe_view expand",
    "unflatten": "unflatten.int",
    "split": "split.Tensor split_with_sizes split.sizes chunk tensor_split.indices tensor_split.sections",
    "slice": "slice.Tensor",
    "select": "select.int",
    "roll": "roll",
    "flip": "flip",
    "unfold": "unfold",
    "diagonal": "diagonal",
    "rotation": "rot90",
    "index": "index.Tensor",
    "index select": "index_select",
    "gather": "gather",
    "index fill": "index_fill.int_Scalar",
    "embedding": "embedding",
    "grid sample": "grid_sampler grid_sampler_2d grid_sampler_3d",
    "halves": "glu",
    "im2col": "im2col",
    "pad": "pad constant_pad_nd",
    "reduction": """
        mean.dim sum.dim_IntList amax amin var.dim var.correction std.dim std.correction max.dim min.dim
        prod.dim_int logsumexp argmax argmin all.dim any.dim median median.dim nanmedian nanmedian.dim mode
        kthvalue topk linalg_vector_norm norm.ScalarOpt_dim
    """,
    "along an axis": """
        softmax.int log_softmax.int _softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort
        sort.stable
    """,
    "triangle": "tril triu",
    "layer norm": "layer_norm rms_norm",
    "batch norm": "batch_norm instance_norm",
    "group norm": "group_norm",
    "spatial": """
        max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest1d.vec
        upsample_nearest2d upsample_nearest2d.vec upsample_nearest3d upsample_nearest3d.vec
        _upsample_nearest_exact1d _upsample_nearest_exact1d.vec _upsample_nearest_exact2d
        _upsample_nearest_exact2d.vec _upsample_nearest_exact3d _upsample_nearest_exact3d.vec upsample_linear1d
        upsample_linear1d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_trilinear3d
        upsample_trilinear3d.vec upsample_bicubic2d upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec
        _upsample_bicubic2d_aa.vec reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d
    """,
    "convolution": "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding",
    "transposed convolution": "conv_transpose1d conv_transpose2d.input conv_transpose3d.input",
    "linear": "linear",
    "addmm": "addmm",
    "product": "matmul bmm mm mv",
    "sum with product": "baddbmm",
    "einsum": "einsum",
    "attention": "scaled_dot_product_attention",
    # kept whole, though torch could decompose some of them: the channels that they touch stay
    "kept whole": """
        lstm.input gru.input rnn_tanh.input rnn_relu.input lstm.data gru.data rnn_tanh.data rnn_relu.data col2im
        scatter.src cross copy one_hot fill.Tensor
    """,
    "size": "sym_size.int",
}
"""Names of operators, such as ``conv2d`` for ``aten.conv2d.default``, by kind."""

KEPT_WHOLE = "kept whole"

WEIGHTS: dict[str, tuple[int, ...]] = {
    "convolution": (1, 2),
    "transposed convolution": (1, 2),
    "linear": (1, 2),
    "batch norm": (1, 2, 3, 4),
    "layer norm": (2, 3),
    "group norm": (2, 3),
}
"""By kind, where an operator's arguments hold its weights: the weight, the bias, running mean and variance."""

_SIZES = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv)


def _table() -> dict[Any, str]:
    found: dict[Any, str] = {}

    def add(kind: str, name: str) -> None:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(aten, packet, None), overload or "default", None)
        if function is not None:  # an operator that this torch lacks needs no kind
            found[function] = kind

    for kind, names in KINDS.items():
        for name in names.split():
            add(kind, name)
    for name in KINDS["elementwise"].split():
        packet, _, overload = name.partition(".")
        add("elementwise", f"{packet}_.{overload}")
    found |= dict.fromkeys((*_SIZES, math.floor), "size")
    found[operator.getitem] = "part"
    return found


_TABLE = _table()


@functools.cache
def kind_of(function: Any) -> str | None:
    """The kind of an operator, from the table or, for a pure one, from torch's own tags; None if it is not known.

    Examples
    --------
    >>> kind_of(torch.ops.aten.relu.default), kind_of(torch.ops.aten.sinc.default)
    ('elementwise', 'elementwise')
    >>> kind_of(torch.ops.aten.block_diag.default) is None
    True
    """
    if function in _TABLE or is_composite(function) or not may_be_archived(function):
        return _TABLE.get(function)
    if not isinstance(function, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise in function.tags and len(function._schema.returns) == 1:
        return "elementwise"
    return "reduction" if getattr(torch.Tag, "reduction", None) in function.tags else None  # torch 2.9 has no such tag


def operator_name(function: Any) -> str:
    """The name of an operator in messages and archives, such as ``"aten.conv2d.default"``.

    Examples
    --------
    >>> operator_name(torch.ops.aten.relu.default), operator_name(operator.getitem)
    ('aten.relu.default', 'operator.getitem')
    """
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    module = getattr(function, "__module__", "").lstrip("_")
    return f"{module}.{getattr(function, '__name__', function)}"


OPERATORS: dict[str, Callable[..., Any]] = {operator_name(function): function for function in _TABLE}
"""The operators of the table by name."""
