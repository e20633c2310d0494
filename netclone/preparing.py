"""Preparation: the size, mean, standard deviation and interpolation of the images a network was trained on.

Where a source's differ from its target's, :func:`converted` puts the conversion in front of the source, as operators of
its graph, so that a clone that reads the target's images carries it along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

INTERPOLATIONS = ("bilinear", "bicubic")  # those that torch does on tensors as on pictures; others become bicubic


@dataclass(frozen=True)
class Preparation:
    """How images are prepared: ``size`` is ``(C, H, W)``; values are ``(pixel / 255 - mean) / std`` per channel."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def transform(self) -> Callable[[Any], Tensor]:
        """timm's own transform of a picture, as in evaluation."""
        made: Callable[[Any], Tensor] = create_transform(
            self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made

    def pixels(self, images: Tensor) -> Tensor:
        """Prepared images ``(N, C, H, W)`` as they are looked at: values in [0, 1]."""
        std, mean = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (self.std, self.mean))
        return (images * std + mean).clamp(0, 1)


def preparation(network: nn.Module) -> Preparation:
    """How a network wants its images, as timm resolves it; one that does not say is taken to want ImageNet's.

    Examples
    --------
    >>> import timm
    >>> preparation(timm.create_model("test_resnet")).size
    (3, 160, 160)
    """
    cfg = getattr(network, "pretrained_cfg", None) or {}
    resolved = resolve_data_config({}, pretrained_cfg=dict(cfg), model=network, use_test_size=False)
    channels, height, width = resolved["input_size"]
    return Preparation(
        size=(channels, height, width),
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=resolved["interpolation"],
        crop_pct=float(resolved["crop_pct"]),
        crop_mode=resolved["crop_mode"],
    )


class Converted(nn.Module):
    """A network behind the conversion of images ``(N, C, H, W)`` that were prepared for another one."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, own: Preparation, given: Preparation) -> None:
        super().__init__()
        self.network = network
        self.size = own.size[1:] if own.size[1:] != given.size[1:] else None
        self.mode = own.interpolation if own.interpolation in INTERPOLATIONS else "bicubic"
        own_mean, own_std, mean, std = (torch.tensor(v) for v in (own.mean, own.std, given.mean, given.std))
        self.register_buffer("scale", (std / own_std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(1, -1, 1, 1), persistent=False)
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """What the network gives for the same pictures, prepared as it wants them."""
        images = images * self.scale + self.shift
        if self.size is not None:
            images = nn.functional.interpolate(images, self.size, mode=self.mode, align_corners=False, antialias=True)
        out: Tensor = self.network(images)
        return out


def converted(network: nn.Module, given: Preparation) -> nn.Module:
    """The network itself if it wants its images prepared that way, or else behind a conversion.

    Cropping is the given one's: what lies outside of its crop is not there any more.
    """
    own = preparation(network)
    if (own.size, own.mean, own.std) == (given.size, given.mean, given.std):
        return network
    return Converted(network, own, given)
