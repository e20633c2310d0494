"""Devices: where networks and batches are placed, by torch's names."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from netclone.errors import ArgumentError, first_line

_AnyModule = TypeVar("_AnyModule", bound=nn.Module)


def device_named(name: str | torch.device | None) -> torch.device | None:
    """The device of a name. ``"auto"`` is the accelerator that torch finds, or else the CPU. None stays None.

    Certificates and least squares need float64, so ``"auto"`` skips an accelerator without it, such as ``mps``.

    Raises
    ------
    ArgumentError
        If torch knows no such device, it cannot be used here, or it has no float64.

    Examples
    --------
    >>> device_named("cpu"), device_named(None)
    (device(type='cpu'), None)
    """
    if name is None:
        return None
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None or _refusal(found) else found
    error: Exception | None
    try:
        device = torch.device(name)
        error = _refusal(device)
    except (RuntimeError, TypeError) as refused:
        error = refused
    if error is not None:
        raise ArgumentError(
            f"device: {name!r} cannot be used here ({first_line(error)}); expected 'auto', 'cpu', 'cuda' or another "
            "device that this torch has, with float64"
        ) from error
    return device


def _refusal(device: torch.device) -> Exception | None:
    """The error that a device raises when float64 is used on it; None if it works."""
    try:
        torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        return error
    return None


def model_on(model: _AnyModule, device: torch.device | None) -> _AnyModule:
    """A copy of a model on a device; the model itself if it is there already, or if no device was asked for."""
    if device is None or not isinstance(model, nn.Module):
        return model
    if all(_same(tensor.device, device) for tensor in [*model.parameters(), *model.buffers()]):
        return model
    return copy.deepcopy(model).to(device)


def on_device(inputs: Tensor | tuple[Tensor] | None, device: torch.device) -> Tensor | tuple[Tensor] | None:
    """Example inputs, one tensor or a tuple of one, moved to a device; anything else is left for later checks."""
    if isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], Tensor):
        return (inputs[0].to(device),)
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same; an accelerator without a number is its first."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)
