"""Options of a network's constructor, and how it wants its images, as data in files: checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from netclone.errors import ArchiveError
from netclone.files.graphdata import shown
from netclone.graph.preparing import IMAGES
from netclone.runtime.text import is_plain_text

SAID = "netclone_target"
"""Under this a checkpoint of netclone's says its architecture, options and configuration, beside its tensors."""


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
        if not isinstance(name, str) or not name.isidentifier() or is_of_weights(name):
            raise ArchiveError(f"options: {shown(name)} is none that a network is made from")
        made[name] = _literal(value, name)
    return made


def is_of_weights(name: str) -> bool:
    """Whether an option says where weights or code come from, or what becomes of them: a file holds none of these."""
    return name.startswith(_NO_OPTIONS)


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
