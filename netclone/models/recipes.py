"""recipe_of(content) -> Recipe: what a checkpoint says of how its network was made and its images were prepared.

Training scripts keep their arguments beside the tensors: timm's and torchvision's as ``args``, Lightning as
``hyper_parameters``. They are data, and checked as such.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from netclone.errors import ArchiveError, NetcloneWarning
from netclone.files.text import is_plain_text
from netclone.graphdata import shown
from netclone.preparing import IMAGES

SAID = "netclone_target"
"""Under this a checkpoint of netclone's says its architecture, options and configuration, beside its tensors."""

_PLACES = ("args", "hyper_parameters", "config", "cfg", "opt")
_ARCHITECTURE = ("arch", "architecture", "model", "model_name")
_OPTIONS = {"in_chans": "in_chans", "gp": "global_pool", "global_pool": "global_pool", "bn_eps": "bn_eps"}


@dataclass(frozen=True)
class Recipe:
    """The name of an architecture, its constructor's options, and by timm's names how images are prepared.

    ``library`` is the one that the architecture is of ("": not said); ``says`` is whether images are known to be
    prepared as this and the network say.
    """

    architecture: str | None = None
    library: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    says: bool = False


def recipe_of(content: Mapping[Any, Any]) -> Recipe:
    """What a checkpoint says beside its tensors.

    Raises
    ------
    ArchiveError
        If options of the constructor are no data.

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
        options |= checked_options({k: v for k, v in kwargs.items() if not str(k).startswith(_NO_OPTIONS)})
    images = _images(said)
    return Recipe(architecture, "", options, images, bool(images) or _resolves_as_timm(said))


def _as_we_say_it(said: Mapping[str, Any]) -> Recipe:
    architecture = said.get("architecture")
    if not isinstance(architecture, str) or not architecture.startswith(("timm/", "torchvision/")):
        raise ArchiveError(f"architecture: got {shown(architecture)}, expected timm/... or torchvision/...")
    config, options = checked_config(said.get("config")), checked_options(said.get("options"))
    library, _, name = architecture.partition("/")
    return Recipe(name, library, options, config, says=True)


def _resolves_as_timm(said: Mapping[str, Any]) -> bool:
    """Whether these are arguments of timm's training script, which takes the model's own preparation for the rest."""
    return "train_interpolation" in said or "crop_pct" in said


def _images(said: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, of what is said about it and can be used."""
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
            f"weights: the checkpoint says {name}={str(value)[:80]!r}, which says nothing of how images are prepared",
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


def checked_config(config: Any) -> dict[str, Any]:
    """A configuration of plain values of the types that it has to have.

    Raises
    ------
    ArchiveError
        If it is none.
    """
    if not isinstance(config, Mapping) or not set(config) <= set(CONFIG):
        raise ArchiveError(f"config: got {shown(config)}, expected an object with none but {', '.join(CONFIG)}")
    for name, value in config.items():
        if not CONFIG[name](value):
            raise ArchiveError(f"config: {name} is {shown(value)}, which is none")
    return dict(config)


def checked_options(options: Any) -> dict[str, Any]:
    """Options of a constructor, which are data: literals, of which none says where to get weights or code.

    Raises
    ------
    ArchiveError
        If one is something else.

    Examples
    --------
    >>> checked_options({"pad_type": "same", "img_size": (64, 64)})
    {'pad_type': 'same', 'img_size': [64, 64]}
    """
    if not isinstance(options, Mapping) or len(options) > _MOST_OPTIONS:
        raise ArchiveError(f"options: got {shown(options)}, expected an object of at most {_MOST_OPTIONS} options")
    made = {}
    for name, value in options.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith(_NO_OPTIONS):
            raise ArchiveError(f"options: {shown(name)} is none that a network is made from")
        made[name] = _literal(value, name)
    return made


def _literal(value: Any, name: str, depth: int = 0) -> Any:
    """A JSON literal of moderate size, a tuple as a list."""
    if value is None or type(value) is bool or (is_plain_text(value) and len(value) <= _MOST_LETTERS):
        return value
    if type(value) in (int, float) and abs(value) <= _LARGEST:
        return value
    if type(value) in (list, tuple) and len(value) <= _MOST_OPTIONS and depth < 3:
        return [_literal(item, name, depth + 1) for item in value]
    raise ArchiveError(
        f"options: {name} is {shown(value)}, which is no data: expected text, a number, true or false, or a list"
    )


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _LARGEST and all(is_plain_text(word) for word in value)


_LARGEST = 100_000  # of a number, of names of labels
_MOST_OPTIONS, _MOST_LETTERS = 100, 1000
_NO_OPTIONS = ("pretrained", "weights", "checkpoint", "cache", "custom", "hf_", "features_only", "device", "dtype")
CONFIG: dict[str, Callable[[Any], bool]] = {**IMAGES, "label_names": _are_words}
"""What a bundle may say about how a target wants its images, by timm's names, and what is a value of each."""
