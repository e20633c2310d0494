"""Checks of what a file says about a target: its constructor's options, and the preprocessing of its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard, cast

from netclone.errors import ArchiveError
from netclone.files.graphdata import shown
from netclone.graph.preparing import IMAGES
from netclone.runtime.text import is_plain_text

LIBRARIES = ("timm", "torchvision", "transformers")
"""The libraries whose architectures a file may name; each is looked up in the library's own registry."""

SAID = "netclone_target"
"""Key of the metadata under which a checkpoint that netclone wrote records its architecture, options and config."""


def checked_config(config: object) -> dict[str, object]:
    """A target's config, with known fields of the right types only.

    Raises
    ------
    ArchiveError
        If a field is unknown or has an invalid value.
    """
    if not isinstance(config, Mapping) or not set(config) <= set(CONFIG):
        raise ArchiveError(f"config: got {shown(config)}, expected an object of some of {', '.join(CONFIG)}")
    for name, value in config.items():
        if not CONFIG[name](value):
            raise ArchiveError(f"config: '{name}' has an invalid value, {shown(value)}")
    return dict(config)


def checked_architecture(name: object) -> str:
    """An architecture's name, with its library.

    Raises
    ------
    ArchiveError
        If it is of no known library.

    Examples
    --------
    >>> checked_architecture("timm/resnet18")
    'timm/resnet18'
    """
    if not is_plain_text(name) or name.partition("/")[0] not in LIBRARIES or "/" not in name:
        raise ArchiveError(
            f"architecture: got {shown(name)}, expected {' or '.join(f'{one}/...' for one in LIBRARIES)}"
        )
    return name


def checked_options(options: object) -> dict[str, object]:
    """Options of a constructor, as literals; none of them may say where to get weights or code.

    Raises
    ------
    ArchiveError
        If an option is not allowed, or its value is not a literal.

    Examples
    --------
    >>> checked_options({"pad_type": "same", "img_size": (64, 64)})
    {'pad_type': 'same', 'img_size': [64, 64]}
    """
    if not isinstance(options, Mapping) or len(options) > _MOST_OPTIONS:
        raise ArchiveError(f"options: got {shown(options)}, expected an object of at most {_MOST_OPTIONS} options")
    made = {}
    for name, value in options.items():
        if not isinstance(name, str) or not name.isidentifier() or is_of_weights(name):
            raise ArchiveError(f"options: {shown(name)} is not an option that a file may set")
        made[name] = _literal(value, name)
    return made


def is_of_weights(name: str) -> bool:
    """Whether an option says where weights or code come from, or where they go: a file may set none of these."""
    return name.startswith(_NO_OPTIONS)


def _literal(value: object, name: str, depth: int = 0) -> object:
    """A JSON literal of moderate size, a tuple as a list."""
    if value is None or type(value) is bool or (is_plain_text(value) and len(value) <= _MOST_LETTERS):
        return value
    if type(value) in (int, float) and abs(cast("float", value)) <= _LARGEST:
        return value
    if _is_sequence(value) and len(value) <= _MOST_OPTIONS and depth < 3:
        return [_literal(item, name, depth + 1) for item in value]
    raise ArchiveError(
        f"options: '{name}' has an invalid value, {shown(value)}; expected text, a number, true, false, or a list"
    )


def _is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    return type(value) in (list, tuple)


def _are_words(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _LARGEST and all(is_plain_text(word) for word in value)


_LARGEST = 100_000  # of a number, of names of labels
_MOST_OPTIONS, _MOST_LETTERS = 100, 1000
_NO_OPTIONS = ("pretrained", "weights", "checkpoint", "cache", "custom", "hf_", "features_only", "device", "dtype")
CONFIG: dict[str, Callable[[object], bool]] = {**IMAGES, "label_names": _are_words}
"""The fields of a target's config, by timm's names, and the check of each one's value."""
