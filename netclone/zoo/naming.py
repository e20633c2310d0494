"""names(patterns): the matching networks of timm, torchvision and transformers, with their families and kinds."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from functools import cache

import timm
from torchvision import models

from netclone.errors import ArgumentError

TRANSFORMERS = ("convnext", "deit", "resnet", "swin", "vit")
_KINDS = (
    "classification",
    "segmentation",
    "video",
    "detection",
)  # of torchvision, without quantised networks and optical flow


@cache
def known() -> dict[str, str]:
    """Every name, with its family: the module of its library that defines it."""
    found: dict[str, str] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        if module.startswith("timm."):  # anyone may register networks, as netclone.timm does
            found[f"timm/{name}"] = f"timm/{module.rpartition('.')[2]}"
    for name in models.list_models():
        if kind(f"torchvision/{name}") in _KINDS:
            module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
            found[f"torchvision/{name}"] = f"torchvision/{module.replace('.', '/')}"
    return found | {f"transformers/{name}": f"transformers/{name}" for name in TRANSFORMERS}


def kind(name: str) -> str:
    """What a network does: ``"classification"``, or the name of its package in torchvision."""
    library, _, model = name.partition("/")
    if library != "torchvision":
        return "classification"
    parts = models.get_model_builder(model).__module__.split(".")[2:]
    return parts[0] if len(parts) > 1 else "classification"


def names(patterns: Iterable[str]) -> tuple[str, ...]:
    """The known networks that match a pattern (``"resnet*"``: of timm; ``"torchvision/*"``), each once.

    Raises
    ------
    ArgumentError
        If a pattern matches none.

    Examples
    --------
    >>> names(["test_vit", "torchvision/squeezenet*"])
    ('timm/test_vit', 'torchvision/squeezenet1_0', 'torchvision/squeezenet1_1')
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        full = pattern if "/" in pattern else f"timm/{pattern}"
        matching = fnmatch.filter(known(), full)
        if not matching:
            raise ArgumentError(
                f"pattern: {pattern!r} matches no network of timm, torchvision/* or transformers/*; see "
                "timm.list_models() and torchvision.models.list_models()"
            )
        found |= dict.fromkeys(sorted(matching))
    return tuple(found)
