"""A device that is not the CPU and refuses to mix with it, as a GPU does, on a machine that has none.

It is a Python backend for torch's PrivateUse1: a tensor there keeps its numbers in a tensor on the CPU that hangs at
its storage, and every operator is computed with those. An operator that meets a tensor on the CPU which is more than a
single number fails, as on a GPU, and so does one that draws from a generator of the CPU. ``register()`` registers the
device, for good: do so in a process of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "strict"
LIBRARIES: list[torch.library.Library] = []
"""The device's operators are there as long as these are."""


def _is_on_it(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _numbers(tensor: Tensor) -> Tensor:
    """The tensor on the CPU that holds a tensor's numbers."""
    return tensor.untyped_storage().numbers


def _of(numbers: Tensor) -> Tensor:
    with torch.inference_mode(False):
        tensor = torch._C._acc.create_empty_tensor(numbers.size(), numbers.dtype)
    tensor.untyped_storage().numbers = numbers
    return tensor


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    flat, structure = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    if any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors):
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but found "
            + ", ".join(str(tensor.device) for tensor in tensors)
        )

    if any(isinstance(value, torch.Generator) for value in flat) and any(map(_is_on_it, tensors)):
        raise RuntimeError(
            f"{operator}: Expected a '{NAME}' device type for generator but found 'cpu', not the same device"
        )

    def on_the_cpu(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return _numbers(value) if _is_on_it(value) else value

    known = [(_numbers(tensor), tensor) for tensor in tensors if _is_on_it(tensor)]
    plain, named = tree_unflatten([on_the_cpu(value) for value in flat], structure)
    try:
        out = operator(*plain, **named)
    except RuntimeError:
        if operator is not torch.ops.aten.view.default:
            raise
        out = plain[0].reshape(plain[1])  # the tensor itself says that it is contiguous, its numbers need not be

    return tree_map(lambda value: _given_back(value, known) if isinstance(value, Tensor) else value, out)


def _given_back(numbers: Tensor, known: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The tensor whose numbers these are: what an operator was given, where it works in place, or else a new one."""
    for own, tensor in known:
        if own is numbers:
            return tensor
    return _of(numbers)


def _copied(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    plain = [_numbers(tensor) if _is_on_it(tensor) else tensor for tensor in (source, destination)]
    plain[1].copy_(plain[0])
    return destination


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _of(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _of(torch.empty_strided(size, stride, dtype=dtype))


def _deepcopy(self: Tensor, memo: dict[int, Any], original: Any = Tensor.__deepcopy__) -> Tensor:
    """A storage of this device has no bytes of its own to copy."""
    if not _is_on_it(self):
        return original(self, memo)
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def register() -> None:
    """Register the device in this process. (Doctests import this module in those of the other tests.)"""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    own = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copied}
    for name, function in own.items():
        aten.impl(name, function, "PrivateUse1")
    left_to_torch = {"_to_copy", "set_", "resize_", "detach", "alias", "copy", "copy_"}  # work on the tensor as it is
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        kinds = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
        if not name.startswith("aten::") or base in left_to_torch or not any(has(name, kind) for kind in kinds):
            continue  # what has no such kernel comes to the fallback
        operator = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        if operator is not None and not has(name, "PrivateUse1"):
            aten.impl(name.removeprefix("aten::"), functools.partial(_run, operator), "PrivateUse1")
    Tensor.__deepcopy__ = _deepcopy
    LIBRARIES.extend([everything, aten])
