"""recipe_of(content) -> Recipe: what a checkpoint records of its architecture and the preprocessing of its images.

Training scripts store their arguments beside the tensors: timm's and torchvision's as ``args``, Lightning as
``hyper_parameters``. They are read as data, and checked.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from netclone.errors import NetcloneWarning
from netclone.files.options import SAID, checked_architecture, checked_config, checked_options, is_of_weights
from netclone.graph.preparing import IMAGES

_PLACES = ("args", "hyper_parameters", "config", "cfg", "opt")
_ARCHITECTURE = ("arch", "architecture", "model", "model_name")
_OPTIONS = {"in_chans": "in_chans", "gp": "global_pool", "global_pool": "global_pool", "bn_eps": "bn_eps"}


@dataclass(frozen=True)
class Recipe:
    """An architecture's name, its constructor's options, and the preprocessing of images by timm's names.

    ``library`` is the architecture's, or empty if it is not recorded. ``says`` is whether the preprocessing is known to
    be what this and the network say.
    """

    architecture: str | None = None
    library: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    says: bool = False


def recipe_of(content: Mapping[Any, Any]) -> Recipe:
    """What a checkpoint records beside its tensors.

    Raises
    ------
    ArchiveError
        If an option of the constructor is not plain data.

    Examples
    --------
    >>> given = Namespace(model="resnet18", img_size=96, mean=[0.5], gp="max")
    >>> recipe = recipe_of({"state_dict": {}, "args": given})
    >>> recipe.architecture, recipe.options, recipe.images
    ('resnet18', {'global_pool': 'max'}, {'input_size': [3, 96, 96], 'mean': [0.5, 0.5, 0.5]})
    """
    if isinstance(content.get(SAID), Mapping):
        return _as_we_say_it(content[SAID])
    said: dict[str, Any] = {}
    for place in _PLACES:
        found = content.get(place)
        found = vars(found) if isinstance(found, Namespace) else found
        said |= {k: v for k, v in found.items() if v is not None} if isinstance(found, Mapping) else {}
    names = [found.get(key) for found in (content, said) for key in _ARCHITECTURE]
    architecture = next((name for name in names if isinstance(name, str)), None)
    options = {ours: said[theirs] for theirs, ours in _OPTIONS.items() if type(said.get(theirs)) in (int, float, str)}
    kwargs = said.get("model_kwargs")
    if isinstance(kwargs, Mapping):  # but for those that say where weights come from: they are in the checkpoint
        options |= checked_options({k: v for k, v in kwargs.items() if not is_of_weights(str(k))})
    images = _images(said)
    return Recipe(architecture, "", options, images, bool(images) or _resolves_as_timm(said))


def _as_we_say_it(said: Mapping[str, Any]) -> Recipe:
    architecture = checked_architecture(said.get("architecture"))
    config, options = checked_config(said.get("config")), checked_options(said.get("options"))
    library, _, name = architecture.partition("/")
    return Recipe(name, library, options, config, says=True)


def _resolves_as_timm(said: Mapping[str, Any]) -> bool:
    """Whether these are arguments of timm's training script, which uses the model's own preprocessing for the rest."""
    return "train_interpolation" in said or "crop_pct" in said


def _images(said: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing that is recorded, as far as it is valid."""
    found = {"input_size": _size(said), "interpolation": said.get("interpolation"), "crop_pct": said.get("crop_pct")}
    found |= {name: said.get(name) for name in ("mean", "std", "crop_mode")}
    crop, resize = said.get("val_crop_size"), said.get("val_resize_size")  # torchvision's reference scripts
    if isinstance(crop, int) and isinstance(resize, int) and resize > 0:
        found["crop_pct"] = found["crop_pct"] or crop / resize
    channels = (found["input_size"] or [said.get("in_chans", 3)])[0]
    usable = {}
    for name, value in found.items():
        value = list(value) if isinstance(value, (tuple, list)) else value
        if name in ("mean", "std"):
            value = [value] if isinstance(value, float) else value
            value = value * channels if isinstance(value, list) and len(value) == 1 else value
        if value in (None, ""):
            continue
        if IMAGES[name](value):
            usable[name] = value
            continue
        warnings.warn(
            f"weights: the checkpoint's {name}={str(value)[:80]!r} is no valid preprocessing, and is ignored",
            NetcloneWarning,
            stacklevel=2,
        )
    return usable


def _size(said: Mapping[str, Any]) -> list[Any] | None:
    """``[C, H, W]`` of images, as timm resolves it from its arguments, or torchvision's crop."""
    if isinstance(said.get("input_size"), (tuple, list)):
        return list(said["input_size"])
    side = said.get("img_size") or said.get("image_size") or said.get("val_crop_size")
    if side is None:
        return None
    sides: Sequence[Any] = side if isinstance(side, (tuple, list)) else [side]
    return [said.get("in_chans", 3), *(sides if len(sides) == 2 else [*sides] * 2)]
