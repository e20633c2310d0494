"""SizesRead(batch, device): a model that runs without data reads sizes that know whether they follow the batch size.

It may compute with them and compare them as with numbers, as long as the result is the same multiple of every batch
size, or the same decision for every batch of two or more. Anything else raises :class:`Undecided`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LEAST = 2  # images in a batch; torch.export assumes as much


class Undecided(Exception):
    """What a model does with a size depends on the batch size."""


class BatchSize(int):
    """The size of ``times`` batches; torch takes it for the number that it is with the ``batch`` of this run.

    Examples
    --------
    >>> size = BatchSize(3, 1009)
    >>> size, (size * 8 // 6).times, size == 5, size > 1
    (3027, 4, False, True)
    """

    times: int
    batch: int

    def __new__(cls, times: int, batch: int) -> BatchSize:
        size = super().__new__(cls, times * batch)
        size.times, size.batch = times, batch
        return size

    def __mul__(self, other: Any) -> BatchSize:
        if type(other) is not int or other < 1:
            raise Undecided(f"{other!r} batches")
        return BatchSize(self.times * other, self.batch)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, BatchSize) and self.times % other.times == 0:
            return self.times // other.times
        if type(other) is not int or other < 1 or self.times % other:
            raise Undecided("a part of a batch")
        return BatchSize(self.times // other, self.batch)

    def __mod__(self, other: Any) -> int:
        self.__floordiv__(other)
        return 0

    def __divmod__(self, other: Any) -> Any:
        return self.__floordiv__(other), 0

    def __add__(self, other: Any) -> BatchSize:
        if isinstance(other, BatchSize):
            return BatchSize(self.times + other.times, self.batch)
        if type(other) is not int or other:
            raise Undecided("a batch and more")
        return self

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, BatchSize):
            return self.times == other.times
        if isinstance(other, (int, float)) and other >= self._least and other % self.times == 0:
            raise Undecided(f"asks whether a batch is {other}")
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return not self >= other

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __gt__(self, other: Any) -> bool:
        return self.times > other.times if isinstance(other, BatchSize) else self._always(self._least > other, other)

    def __ge__(self, other: Any) -> bool:
        return self.times >= other.times if isinstance(other, BatchSize) else self._always(self._least >= other, other)

    @property
    def _least(self) -> int:
        return _LEAST * self.times

    def _always(self, already: bool, other: Any) -> bool:
        """True if the least batch is over a number already; large ones are over any number."""
        if not already:
            raise Undecided(f"asks whether a batch is over {other}")
        return True

    def __bool__(self) -> bool:
        return True

    def __hash__(self) -> int:
        return super().__hash__()

    def _undecided(self, *others: Any) -> NoReturn:
        raise Undecided("computes with the batch size")

    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rdivmod__ = _undecided
    __pow__ = __rpow__ = __neg__ = __abs__ = __int__ = __float__ = __invert__ = _undecided
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _undecided
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __round__ = _undecided


class SizesRead(TorchFunctionMode):
    """Inside, sizes that are read from tensors are :class:`BatchSize` where they are multiples of ``batch``.

    All tensors seem to be on ``device``.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__()
        self.batch = batch
        self.about: dict[Any, Callable[[Tensor], Any]] = {
            Tensor.device.__get__: lambda tensor: device,
            Tensor.is_meta.__get__: lambda tensor: device.type == "meta",  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda tensor: device.type == "cuda",  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda tensor: device.type == "cpu",  # type: ignore[attr-defined]
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.about:
            return self.about[func](args[0])
        out = func(*args, **(kwargs or {}))
        if func not in _SIZES:
            return out
        if isinstance(out, torch.Size):
            return torch.Size([self._size(size) for size in out])
        size = self._size(out)
        if func is Tensor.__len__ and isinstance(size, BatchSize):  # Python makes a plain number of it
            raise Undecided("takes the length of a batch")
        return size

    def _size(self, size: int) -> int:
        return size if size % self.batch or not size else BatchSize(size // self.batch, self.batch)


_SHAPE: Any = vars(torch._C.TensorBase)["shape"].__get__
_SIZES = {
    _SHAPE,
    Tensor.size,
    Tensor.numel,
    Tensor.nelement,
    torch.numel,
    Tensor.__len__,
}
