"""isolated(): capture a model while other threads run theirs. Only this file replaces parts of torch.

While torch traces, it replaces ``nn.Module.__call__`` and ``nn.Module.__getattr__`` for the whole process. It also
tells all threads that they are being compiled, and switches off oneDNN for all of them, which changes their bits.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.export._trace
import torch.fx._symbolic_trace as symbolic
from torch import Tensor, nn

_ONE_CAPTURE = threading.RLock()
_MASKS, _ASKS = "transformers.masking_utils", "is_torchdynamo_exporting"


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Wait for other captures. Inside the block, torch's replacements act in this thread only, and are undone after.

    Captures by netclone wait for each other. Those that torch makes on its own in another thread (``torch.compile``,
    ``torch.fx.symbolic_trace``) do not wait.

    Examples
    --------
    >>> with isolated():
    ...     graph = torch.fx.symbolic_trace(nn.ReLU())
    """
    with _ONE_CAPTURE, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch._C, "_select_conv_backend", _convolutions_without_onednn()))
        for owner, name, replacement in _REPLACED:
            if not hasattr(owner, name):
                continue  # this torch has no such part, so there is nothing to replace
            stack.enter_context(mock.patch.object(owner, name, replacement))
        if (masks := sys.modules.get(_MASKS)) is not None and hasattr(masks, _ASKS):
            stack.enter_context(mock.patch.object(masks, _ASKS, _as_when_called(getattr(masks, _ASKS))))
        yield


@contextlib.contextmanager
def as_in_export() -> Iterator[None]:
    """Inside, modules choose kernels as they do for torch.export; only in this thread."""
    with _compiling_in_one_thread(), _without_cudnn():
        yield


def _as_when_called(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Tells transformers that it is not exported, since it would add masks that let everything pass.

    A position bias plus such a mask, which is one everywhere, has other bits.
    """
    thread = threading.get_ident()
    return lambda: asked() if threading.get_ident() != thread else False


class _PatcherOfOneThread(symbolic._Patcher):
    """Replaces functions and methods while torch traces; other threads get the original ones."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def patch(
        self, frame_dict: dict[str, Any], name: str, new_fn: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        """Replace a function of a module."""
        before = frame_dict[name] if name in frame_dict else getattr(builtins, name)
        super().patch(frame_dict, name, self._only_here(new_fn, before), deduplicate)

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        """Replace a method of a class."""
        super().patch_method(cls, name, self._only_here(new_fn, getattr(cls, name)), deduplicate)

    def _only_here(self, new: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
        thread, current = self._thread, threading.get_ident

        @functools.wraps(before)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return new(*args, **kwargs) if current() == thread else before(*args, **kwargs)

        return chosen


class _TrueInOneThread(int):
    """A flag that is true in the thread that made it."""

    def __new__(cls) -> _TrueInOneThread:
        flag = super().__new__(cls, 1)
        flag.thread = threading.get_ident()
        return flag

    thread: int

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


@contextlib.contextmanager
def _compiling_in_one_thread() -> Iterator[None]:
    """Make ``torch.compiler.is_compiling()`` and ``is_exporting()`` true here; modules choose kernels by them."""
    flag = _TrueInOneThread()
    with (
        mock.patch.object(torch.compiler, "_is_compiling_flag", flag),
        mock.patch.object(torch.compiler, "_is_exporting_flag", flag),
    ):
        yield


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Leaves oneDNN and NNPACK on, which torch would switch off; other threads on the CPU would get other bits."""
    before = torch.backends.cudnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.cudnn.set_flags(*before)


def _convolutions_without_onednn() -> Callable[..., Any]:
    """Answers torch which kernel a convolution will take; oneDNN's answer would fix the batch size of an export."""
    thread, asked = threading.get_ident(), torch._C._select_conv_backend

    @functools.wraps(asked)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]  # by name in torch 2.9
        if threading.get_ident() != thread or weight.device.type != "cpu":
            return asked(*args, **kwargs)
        backends = torch._C._ConvBackend  # type: ignore[attr-defined]  # torch's stub lacks it
        return backends.Slow2d if weight.dim() == 4 else backends.Slow3d

    return chosen


class _NoHook:
    def remove(self) -> None:
        """Do nothing, since there is nothing to remove."""


def _no_hook(root: nn.Module, assigned: dict[str, str]) -> _NoHook:
    """Replaces a hook for the exported root's buffers, which every module of the process would call; it has none."""
    return _NoHook()


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (symbolic, "_Patcher", _PatcherOfOneThread),
    (torch.export._trace, "_compiling_state_context", _compiling_in_one_thread),
    (torch.export._trace, "_ignore_backend_decomps", _without_cudnn),
    (torch.export._trace, "register_buffer_assignment_hook", _no_hook),
)
