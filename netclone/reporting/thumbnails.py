"""thumbnails(images): small versions of a batch's images as data URIs, for a page that loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from netclone.errors import ArgumentError

SIDE = 112
"""Longest side of a thumbnail in pixels; smaller images stay as they are."""

_LOSSLESS = 48  # longest side up to which a thumbnail is a PNG; above, a JPEG


def thumbnails(images: Tensor, pixels: Callable[[Tensor], Tensor] | None = None) -> tuple[str, ...]:
    """Thumbnails of images ``(N, C, H, W)`` as ``data:`` URIs; empty for images that cannot be shown.

    Parameters
    ----------
    pixels
        Maps the batch to RGB ``(N, 3, H, W)`` in [0, 1]. None: scale each image from its darkest to its brightest
        value. One channel is shown as grey; other numbers of channels than one and three cannot be shown.

    Raises
    ------
    ArgumentError
        If ``pixels`` returns anything else.

    Examples
    --------
    >>> thumbnails(torch.rand(1, 3, 8, 8))[0][:21]
    'data:image/png;base64'
    """
    if not len(images):
        return ()
    if pixels is None:
        if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            return ()
        rgb = _stretched(images)
    else:
        rgb = pixels(images.clone())
        if not isinstance(rgb, Tensor) or rgb.dim() != 4 or len(rgb) != len(images) or rgb.shape[1] not in (1, 3):
            seen = tuple(rgb.shape) if isinstance(rgb, Tensor) else type(rgb).__name__
            raise ArgumentError(f"pixels: returned {seen}, expected RGB ({len(images)}, 3, H, W) with values in [0, 1]")
        if not bool(torch.isfinite(rgb).all()):
            raise ArgumentError("pixels: returned values that are NaN or infinite, expected RGB in [0, 1]")
    bytes_of = (rgb.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return tuple(_uri(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())) for image in bytes_of)


def _stretched(images: Tensor) -> Tensor:
    flat = images.detach().double().flatten(1)
    low, high = flat.amin(1)[:, None, None, None], flat.amax(1)[:, None, None, None]
    return (images.detach().double() - low) / (high - low).clamp_min(1e-12)


def _uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if max(image.size) <= _LOSSLESS:
        kind = "png"
        image.save(content, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(content, "JPEG", quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
