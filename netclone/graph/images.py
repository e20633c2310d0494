"""Checks of batches of images: each returns a reason in words, and the caller raises."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
"""Dtypes that a network may take: floating point values, or indices such as tokens."""


def tensor_fault(tensor: Tensor) -> str:
    """Why a tensor is not plain memory with values; empty if it is.

    Examples
    --------
    >>> tensor_fault(torch.eye(2)), tensor_fault(torch.eye(2).to_sparse())
    ('', 'a sparse tensor (torch.sparse_coo): call .to_dense() first')
    """
    if tensor.is_nested:
        return "a nested tensor: pad it to one size first"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout}): call .to_dense() first"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype}): call .dequantize() first"
    return ""


def images_fault(images: Tensor, *, values: bool = True) -> str:
    """Why a tensor is not a batch of images ``(N, ...)``; empty if it is.

    Parameters
    ----------
    values
        Whether to refuse images on the meta device, which have no values.

    Examples
    --------
    >>> images_fault(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))[:42]
    'torch.uint8: give floating point values, p'
    """
    if fault := tensor_fault(images):
        return fault
    if images.is_meta:
        return "on the meta device, without values: give real images" if values else ""
    if images.dtype not in IMAGE_TYPES:
        way = "such as images.float() / 255, normalised" if images.dtype is torch.uint8 else "such as torch.float32"
        return f"{images.dtype}: give floating point values, preprocessed as in the network's training, {way}"
    return ""


def not_finite(images: Tensor) -> str:
    """How many values are NaN or infinite, in words; empty if none is.

    Examples
    --------
    >>> not_finite(torch.tensor([1.0, torch.inf])), not_finite(torch.zeros(2))
    ('holds 1 values that are NaN or infinite; clean them first', '')
    """
    if images.is_meta or not images.is_floating_point() or bool(torch.isfinite(images).all()):
        return ""
    return f"holds {int((~torch.isfinite(images)).sum())} values that are NaN or infinite; clean them first"
