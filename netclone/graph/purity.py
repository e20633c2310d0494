"""Which operators a file may call: those that compute tensors from their arguments, and do nothing else.

An operator is *pure* if its schema and tags say that it writes into nothing and draws nothing at random, and if the
shape of its result follows from the shapes and numbers of its arguments. For some operators that depends on the
arguments, which :func:`impurity` checks. In-place operators are not pure. One of them may stand for its functional twin
if nothing else in the graph reads the memory that it overwrites (:func:`functional_twin`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tag, Tensor

aten = torch.ops.aten

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (operator.add, operator.sub, operator.mul, operator.floordiv)},
    **{f"operator.{f.__name__}": f for f in (operator.mod, operator.neg, operator.truediv)},
    "math.floor": math.floor,
}
"""Functions of sizes, by name. ``operator.getitem`` is allowed besides: it takes one tensor of several."""

_FUNCTIONS = {**SIZE_FUNCTIONS, "operator.getitem": operator.getitem}
_SIZES = ("sym_size.int", "sym_numel.default")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Private operators that torch.export writes for public functions.
_PRIVATE = _names("""
    _unsafe_view _to_copy _softmax _log_softmax _prelu_kernel _conj _neg_view _adaptive_avg_pool2d _adaptive_avg_pool3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _fft_r2c _fft_c2r _fft_c2c
""")

# Kinds of operators that no network's forward pass needs and whose arguments torch checks less: those of one backend,
# gradients, losses, other layouts than strided, uninitialised memory, memory beside a tensor's own view.
_BEGINNINGS = tuple(
    _names("""
    cudnn_ miopen_ mkldnn_ mps_ fbgemm_ quantize q_ fake_quantize choose_qparams sparse_ to_sparse to_mkldnn nested_
    empty new_empty resize set_ as_strided sym_ batch_norm_ thnn_ slow_conv conv_depthwise from_file special_airy
    special_chebyshev special_hermite special_laguerre special_legendre special_shifted histogramdd segment_reduce
    align_ rename refine embedding_renorm embedding_sparse lift linalg_ to_padded pin_memory matmul_backward
    """)
)
_PARTS = ("backward", "_jvp", "_loss", "sparse", "mkldnn", "quantized", "overrideable", "_stats", "vulkan", "_symint")
_NEVER = _names("""
    data set put range dequantize int_repr smm hspmm coalesce to_dense qscheme hash_tensor native_norm norm_except_dim
    values indices values_copy indices_copy crow_indices_copy col_indices_copy ccol_indices_copy row_indices_copy
    repeat_interleave.self_Tensor repeat_interleave.Tensor tensor_split.tensor_indices_or_sections narrow.Tensor
    where.default argwhere nonzero_numpy nonzero_static masked_scatter item is_nonzero equal slice_inverse
    lu_unpack lu_solve cholesky_solve cholesky_inverse geqrf ormqr orgqr svd qr lstsq triangular_solve nuclear_norm
    pinverse max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d embedding_bag
    binary_cross_entropy binary_cross_entropy_with_logits kl_div unsafe_split unsafe_split_with_sizes unsafe_chunk
    flatten_dense_tensors unflatten_dense_tensors pad_sequence mvlgamma special_multigammaln
""")
_LINALG = _names("""
    linalg_vector_norm linalg_cross linalg_vecdot linalg_matmul linalg_multi_dot linalg_diagonal linalg_matrix_power
    linalg_inv linalg_inv_ex linalg_solve linalg_solve_ex linalg_det linalg_cholesky linalg_cholesky_ex
    linalg_matrix_exp
""")
_TYPES = frozenset(
    {"Tensor", "Tensor?", "int", "bool", "float", "number", "str", "ScalarType", "Layout", "Device", "MemoryFormat"}
)
_UNFIT = (Tag.nondeterministic_seeded, Tag.dynamic_output_shape, Tag.data_dependent_output, Tag.inplace_view)


def _drops(arguments: Mapping[str, Any]) -> str:
    """Attention, whose schema says how much is dropped."""
    return "" if arguments["dropout_p"] == 0 else "drops values at random"


def _trains(flag: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda arguments: "" if arguments[flag] is False else "draws at random in training"


def _writes_statistics(flag: str) -> Callable[[Mapping[str, Any]], str]:
    def rule(arguments: Mapping[str, Any]) -> str:
        kept = arguments["running_mean"] is not None or arguments["running_var"] is not None
        return "writes into its running statistics in training" if arguments[flag] is not False and kept else ""

    return rule


def _selects(arguments: Mapping[str, Any]) -> str:
    masks = (torch.bool, torch.uint8)
    chosen = [index for index in arguments["indices"] if isinstance(index, Tensor) and index.dtype in masks]
    return "selects by a mask: its shape depends on values" if chosen else ""


def _counts(arguments: Mapping[str, Any]) -> str:
    classes = arguments["num_classes"]
    return "" if isinstance(classes, int) and classes > 0 else "counts its classes: its shape depends on values"


def _transforms(arguments: Mapping[str, Any]) -> str:
    axes = arguments["dim"]
    return "" if all(isinstance(axis, int) and axis >= 0 for axis in axes) else "takes no axes counted from the end"


# Operators that are pure for some arguments only, and the check of these.
_BY_ARGUMENTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "scaled_dot_product_attention": _drops,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _trains("train")),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _trains("train")),
    "rrelu": _trains("training"),
    "batch_norm": _writes_statistics("training"),
    "native_batch_norm": _writes_statistics("training"),
    "instance_norm": _writes_statistics("use_input_stats"),
    "index": _selects,
    "index_put": _selects,
    "one_hot": _counts,
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _transforms),
}


@functools.cache
def _public_names() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def find_operator(name: object) -> Any:
    """The operator of a name in a file, such as ``"aten.relu.default"``; None if a file may not hold it.

    In-place operators are found too, under the condition of :func:`functional_twin`.

    Examples
    --------
    >>> find_operator("aten.relu.default"), find_operator("operator.add"), find_operator("aten.bernoulli.default")
    (<OpOverload(op='aten.relu', overload='default')>, <built-in function add>, None)
    """
    if not isinstance(name, str):
        return None
    function: Any = _FUNCTIONS.get(name)
    if function is not None:
        return function
    space, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    full = f"aten::{packet}" if overload == "default" else f"aten::{packet}.{overload}"
    if space != "aten" or full not in _public_names() or not hasattr(aten, packet):
        return None
    found: Any = getattr(getattr(aten, packet), overload, None)
    return found if may_be_archived(found) or functional_twin(found) is not None else None


@functools.cache
def may_be_archived(function: Any) -> bool:
    """Whether an operator is pure, at least for some arguments, and takes and returns only what a file can hold.

    Examples
    --------
    >>> may_be_archived(aten.conv2d.default), may_be_archived(aten.relu_.default), may_be_archived(aten.rand.default)
    (True, False, False)
    """
    if not isinstance(function, torch._ops.OpOverload):
        return any(function is known for known in _FUNCTIONS.values())
    space, _, packet = function._schema.name.partition("::")
    name = f"{packet}.{function._overloadname}"
    if space != "aten" or not _is_of_a_network(packet, name):
        return False
    arguments, returns = function._schema.arguments, function._schema.returns
    if any(argument.is_out or (argument.alias_info and argument.alias_info.is_write) for argument in arguments):
        return False
    if any(tag in function.tags for tag in _UNFIT) and packet not in _BY_ARGUMENTS:
        return False
    if not all(type_of(argument)[0] in _TYPES or type_of(argument)[0] == "Generator" for argument in arguments):
        return False
    if name in _SIZES:
        return True
    return bool(returns) and all(str(returned.type) in ("Tensor", "List[Tensor]") for returned in returns)


def _is_of_a_network(packet: str, name: str) -> bool:
    if packet.startswith("_"):
        return packet in _PRIVATE
    if packet in _NEVER or name in _NEVER or name in _SIZES:
        return name in _SIZES
    if packet in _LINALG:
        return True
    return not packet.startswith(_BEGINNINGS) and not any(part in packet for part in _PARTS)


@functools.cache
def functional_twin(function: Any) -> Any:
    """The pure operator that computes what an in-place one writes; None if there is none, or it is not in place.

    Examples
    --------
    >>> functional_twin(aten.relu_.default), functional_twin(aten.relu.default), functional_twin(aten.normal_.default)
    (<OpOverload(op='aten.relu', overload='default')>, None, None)
    """
    if not isinstance(function, torch._ops.OpOverload):
        return None
    space, _, packet = function._schema.name.partition("::")
    if space != "aten" or not packet.endswith("_") or packet.startswith("_") or Tag.inplace_view in function.tags:
        return None
    written = [a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments]
    twin = getattr(getattr(aten, packet[:-1], None), function._overloadname, None)
    return twin if written and written[0] and not any(written[1:]) and twin and may_be_archived(twin) else None


def impurity(function: Any, arguments: Mapping[str, Any]) -> str:
    """The side effect of a call, given all arguments by name, defaults too; empty if it has none.

    Examples
    --------
    >>> impurity(aten.rrelu.default, {"training": True}), impurity(aten.rrelu.default, {"training": False})
    ('draws at random in training', '')
    """
    if arguments.get("generator") is not None:
        return "draws at random"
    rule = _BY_ARGUMENTS.get(function._schema.name.partition("::")[2])
    return rule(arguments) if rule is not None else ""


def type_of(argument: Any) -> tuple[str, bool, bool]:
    """The type that torch really expects for a schema's argument, whether it is a list, and whether it may be None.

    Examples
    --------
    >>> [type_of(argument) for argument in aten.softmax.int._schema.arguments]
    [('Tensor', False, False), ('int', False, False), ('ScalarType', False, True)]
    """
    text = str(argument.real_type)
    optional = text.startswith("Optional[")
    text = text.removeprefix("Optional[").removesuffix("]") if optional else text
    many = text.startswith("List[")
    text = text[5:-1] if many else text
    if text.startswith("Optional["):  # a list of tensors that may be None
        text = text[9:-1] + "?"
    return text, many, optional
