"""Tensors stored in fewer bits than they are computed in: bfloat16, or int8 with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from netclone.errors import ArchiveError
from netclone.files.spec import CloneSpec

STORED = {"bf16": torch.bfloat16, "int8": torch.int8}
"""What a clone's weights may be stored in, by the words of :func:`netclone.save`."""

_IMAGES = 16  # random inputs that the error is measured on
_LARGEST = 127


def is_stored_in_fewer_bits(tensor: Tensor) -> bool:
    """Whether a tensor is one that takes room: weights, not biases and statistics."""
    return tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel() > 0


def quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor ``(R, ...)`` as int8, and the scales ``(R,)`` in float32 that its rows are multiplied with.

    Raises
    ------
    ArchiveError
        If the tensor holds what is not finite.

    Examples
    --------
    >>> stored, scale = quantized(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    >>> stored.tolist(), dequantized(stored, scale, torch.float32).tolist()[1]
    ([[127, -64], [0, 0]], [0.0, 0.0])
    """
    largest = tensor.detach().reshape(len(tensor), -1).abs().amax(1).double()
    scale = (largest / _LARGEST).float()
    if not bool(scale.isfinite().all()):
        raise ArchiveError("weights that are not finite cannot be stored as int8: leave dtype out")
    rows = torch.where(scale > 0, scale, 1.0).double().reshape(-1, *[1] * (tensor.dim() - 1))
    return (tensor.detach().double() / rows).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def dequantized(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that int8 ``(R, ...)`` and scales ``(R,)`` stand for."""
    return (stored.double() * scale.double().reshape(-1, *[1] * (stored.dim() - 1))).to(dtype)


def error_of(body: fx.GraphModule, stored: fx.GraphModule, spec: CloneSpec) -> float:
    """max |stored - full| / max |full| of the logits, for random inputs that are the same each time."""
    tensor = next((tensor for tensor in body.parameters() if tensor.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in (spec.input_shape, spec.feature_shape) if shape is not None]
    inputs = [torch.randn(_IMAGES, *shape, generator=generator).to(tensor.dtype) for shape in shapes]
    with torch.no_grad():
        full = body(*(given.clone() for given in (one.to(tensor.device) for one in inputs))).cpu().double()
        return float((stored(*inputs).double() - full).abs().max() / full.abs().max().clamp_min(1e-30))
