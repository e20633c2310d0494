"""Budgets of a run: its operations, elements in memory and mixed dtypes, seen below the graph's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tag, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from netclone.errors import ArchiveError

aten = torch.ops.aten

_ELEMENTS = 2**24  # for any file and input
_ELEMENTS_PER_SAMPLE = 2**22
_ELEMENTS_PER_INPUT = 256  # plus so many per element of a sample
_ELEMENTS_PER_STORED = 4  # plus so many per element of the file's tensors
_OPERATIONS = 2**32
_OPERATIONS_PER_SAMPLE = 2**28
_OPERATIONS_PER_PAIR = 16  # per pair of an element of a sample and one of the file's

_ALIKE = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.mv, aten.dot, aten.vdot, aten.addmv}
_MIXING = {aten.cat, aten.stack, aten.copy_, aten.copy, aten._to_copy, aten.index_put_, aten.index_put, aten.where}
_FRESH = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


@dataclass(frozen=True)
class Budget:
    """The most elements that a graph may hold at a time, and the most operations of one run."""

    elements: int
    operations: int


def budget(batch: int, sample: int, stored: int) -> Budget:
    """The budget of a graph for a batch of samples, given the elements of a sample and of the graph's own tensors.

    Examples
    --------
    >>> budget(2, 3 * 224 * 224, 25_000_000).elements // 2**20, budget(1, 4, 0).operations // 2**20
    (192, 4352)
    """
    return Budget(
        _ELEMENTS + _ELEMENTS_PER_STORED * stored + batch * (_ELEMENTS_PER_SAMPLE + _ELEMENTS_PER_INPUT * sample),
        _OPERATIONS
        + _OPERATIONS_PER_PAIR * stored
        + batch * (_OPERATIONS_PER_SAMPLE + _OPERATIONS_PER_PAIR * sample * (stored + 1)),
    )


class Meter(TorchDispatchMode):
    """Counts operations and new elements of all calls inside the block, and raises for what no graph may do.

    ``may_write`` says whether a memory (see :func:`memory_of`) may be written into.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.operations = 0
        self.elements = 0
        self.may_write: Callable[[int], bool] = lambda memory: True
        self.where = ""
        self._known: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call, before and after."""
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        packet = func._overloadpacket
        self._check(func, packet, given, args)
        before = {memory_of(tensor) for tensor in given}
        key = None if func._schema.is_mutable else (func, _described(args), _described(kwargs))
        result = self._once(key) if key in self._known else func(*args, **kwargs)
        if key is not None and isinstance(result, Tensor) and memory_of(result) not in before:
            self._known[key] = result.shape, result.stride(), result.dtype
        made = list(_tensors(result))
        new = sum(tensor.numel() for tensor in made if memory_of(tensor) not in before)
        self.elements += new + _scratch(packet, args, result)
        if new or func._schema.is_mutable:
            self.operations += new + sum(tensor.numel() for tensor in given) + _inside(packet, args, kwargs, made)
            if packet in flop_registry:
                self.operations += int(flop_registry[packet](*args, **kwargs, out_val=result))
        return result

    def _once(self, key: Any) -> Tensor:
        """Results of an operator by the kind of its arguments, since networks repeat their layers."""
        shape, stride, dtype = self._known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _check(self, func: Any, packet: Any, given: list[Tensor], args: Any) -> None:
        if Tag.nondeterministic_seeded in func.tags:
            raise ArchiveError(f"{self.where}: draws at random ({packet})")
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and not all(self.may_write(memory_of(tensor)) for tensor in _tensors(value)):
                    raise ArchiveError(f"{self.where}: writes into memory that is read elsewhere ({packet})")
        if packet in _MIXING or Tag.pointwise in func.tags or packet in _FRESH:
            return
        dtypes = {tensor.dtype for tensor in given if packet in _ALIKE or tensor.is_floating_point()}
        if len(dtypes) > 1:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ArchiveError(f"{self.where}: combines tensors of {names}, which no operator does")


def memory_of(tensor: Tensor) -> int:
    """A key that tells a tensor's memory from others as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _described(value: Any) -> Any:
    """Arguments as a key: tensors by shape, strides and dtype, numbers with their types."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return type(value), value


def _scratch(packet: Any, args: Any, result: Any) -> int:
    """Elements of scratch memory that a convolution may unfold its input into: one column per position."""
    if packet is not aten.convolution:
        return 0
    weight, transposed = args[1], args[6]
    positions = (args[0] if transposed else result).shape[2:]
    channels = weight.shape[1] if transposed else args[0].shape[1]
    return int(args[0].shape[0] * channels * math.prod(weight.shape[2:]) * math.prod(positions))


def _inside(packet: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Operations that neither the sizes of the tensors nor torch's counter show."""
    name = packet._qualified_op_name.partition("::")[2]
    if "pool" in name and "adaptive" not in name:
        kernel = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        axes = args[0].dim() - 2 if "2d" in name or "3d" in name else 1
        return made[0].numel() * int(math.prod(kernel) if len(kernel) > 1 else kernel[0] ** axes)
    if name in ("linalg_vector_norm", "linalg_cross"):
        return 0  # one pass, unlike all others of linear algebra
    if "linalg" in name or name in ("inverse", "det", "matrix_exp", "_cdist_forward", "_linalg_det"):
        return 64 * int(args[0].numel() * max(args[0].shape[-2:], default=1))
    return 0
