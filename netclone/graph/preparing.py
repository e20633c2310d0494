"""Preparation: the preprocessing of a network's images: size, mean, standard deviation, interpolation.

If source and target differ in it, :func:`converted` puts a conversion in front of the source, as operators of its
graph. A clone that reads the target's images then carries the conversion along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from netclone.graph.describing import facts_about
from netclone.runtime.text import is_plain_text

INTERPOLATIONS = ("bilinear", "bicubic")  # those that torch computes on tensors as on images; others become bicubic
ORDER = ("channel_order", "rgb")
"""The field of preprocessing that files leave out where it has this value, which nearly all networks have."""

_WORDS = ("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box", "random")  # those that timm reads
_MOST_VALUES = 2**26  # of an image
_MOST = 100_000  # of a size or a number
_CHANNELS = 1000


def _is_size(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not all(type(size) is int for size in value):
        return False
    return min(value) >= 1 and math.prod(value) <= _MOST_VALUES


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast("float", value) <= _MOST


def _are_numbers(value: object) -> TypeGuard[list[float]]:
    if not isinstance(value, list) or not 1 <= len(value) <= _CHANNELS:
        return False
    return all(type(number) in (int, float) and abs(number) <= _MOST for number in value)


IMAGES: dict[str, Callable[[object], bool]] = {
    "input_size": _is_size,
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and all(number > 0 for number in value),
    "interpolation": lambda value: value in _WORDS,
    "crop_pct": _is_positive,
    "crop_mode": lambda value: is_plain_text(value) and len(value) <= _MOST,
    "channel_order": lambda value: value in ("rgb", "bgr"),
}
"""The fields of a network's preprocessing, by timm's names but for the last, and the check of each one's value."""


@dataclass(frozen=True)
class Preparation:
    """Preprocessing of images: ``size`` is ``(C, H, W)``; values are ``(pixel / 255 - mean) / std`` per channel.

    The channels are then put into ``channel_order``; ``mean`` and ``std`` are in the order of ``"rgb"`` in any case.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    channel_order: str = ORDER[1]

    def transform(self) -> Callable[[Any], Tensor]:
        """timm's own transform of an image, as for evaluation, and the order of the channels."""
        from timm.data import create_transform  # slow to import, and not needed to read a clone

        made: Callable[[Any], Tensor] = create_transform(
            self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made if self.channel_order == ORDER[1] else lambda image: made(image).flip(0)

    def as_config(self) -> dict[str, object]:
        """The same as plain data, by timm's names."""
        config: dict[str, object] = {
            "input_size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }
        return config if self.channel_order == ORDER[1] else config | {ORDER[0]: self.channel_order}

    def __str__(self) -> str:
        """One line for messages."""
        size = "x".join(map(str, self.size[1:]))
        mean, std = (",".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        order = "" if self.channel_order == ORDER[1] else f", {self.channel_order}"
        return f"{size} px, mean {mean}, std {std}, {self.interpolation}, crop {self.crop_pct:.4g}{order}"

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessed images ``(N, C, H, W)`` turned back into pixels in [0, 1]."""
        std, mean = (
            torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
            for values in (self.std, self.mean)
        )
        images = images if self.channel_order == ORDER[1] else images.flip(1)
        return (images * std + mean).clamp(0, 1)


def preparation(network: nn.Module) -> Preparation:
    """The preprocessing of a network's images, as timm resolves it; ImageNet's if the network does not record it.

    Examples
    --------
    >>> import timm
    >>> preparation(timm.create_model("test_resnet")).size
    (3, 160, 160)
    """
    cfg = facts_about(network)
    from timm.data import resolve_data_config  # slow to import, and not needed to read a clone

    resolved = resolve_data_config({}, pretrained_cfg=dict(cfg), model=network, use_test_size=False)
    channels, height, width = resolved["input_size"]
    return Preparation(
        size=(channels, height, width),
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=resolved["interpolation"],
        crop_pct=float(resolved["crop_pct"]),
        crop_mode=resolved["crop_mode"],
        channel_order=str(cfg.get(*ORDER)),
    )


def said_preparation(network: nn.Module, size: tuple[int, ...] = ()) -> Preparation | None:
    """The preprocessing that a network records, perhaps at another size; None if it records none."""
    about = getattr(network, "pretrained_cfg", None)
    if not isinstance(about, Mapping) or not about.get("mean") or not about.get("std"):
        return None
    said = preparation(network)
    return replace(said, size=(size[0], size[1], size[2])) if len(size) == 3 else said


def prepared_as(network: nn.Module, images: Mapping[str, object]) -> None:
    """Record preprocessing in a network's ``pretrained_cfg``, as timm does; everything else stays.

    Examples
    --------
    >>> import timm
    >>> network = timm.create_model("test_resnet")
    >>> prepared_as(network, {"input_size": [3, 96, 96]})
    >>> preparation(network).size
    (3, 96, 96)
    """
    if not images:
        return
    about = dict(facts_about(network))
    if "input_size" in images:  # timm's recommendation for testing belongs to other weights
        for name in ("test_input_size", "test_crop_pct", "pool_size", "test_pool_size"):
            about.pop(name, None)
    values = {
        name: tuple(cast("list[float]", value)) if name in ("input_size", "mean", "std") else value
        for name, value in images.items()
    }
    network.pretrained_cfg = about | values  # type: ignore[assignment]  # nn.Module: tensors and modules alone
    network.default_cfg = network.pretrained_cfg


class Converted(nn.Module):
    """A network behind a conversion of images ``(N, C, H, W)`` that were preprocessed for another network."""

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
        self.flips = tuple(one.channel_order != ORDER[1] for one in (given, own))
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """The network's output for the same images, preprocessed for it."""
        images = images.flip(1) if self.flips[0] else images
        images = images * self.scale + self.shift
        images = images.flip(1) if self.flips[1] else images
        if self.size is not None:
            images = nn.functional.interpolate(images, self.size, mode=self.mode, align_corners=False, antialias=True)
        out: Tensor = self.network(images)
        return out


def converted(network: nn.Module, given: Preparation) -> nn.Module:
    """The network itself if its preprocessing is the given one, else the network behind a conversion.

    The crop is the given one's, since pixels outside of it are gone.
    """
    own = preparation(network)
    if all(getattr(own, name) == getattr(given, name) for name in ("size", "mean", "std", "channel_order")):
        return network
    return Converted(network, own, given)
