"""CloneSpec: what is known about a clone, as plain data, and as data from a file: checked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, SupportsIndex, TypeAlias, TypeVar, cast, overload

from netclone.errors import ArchiveError
from netclone.files.graphdata import check_keys, check_list, check_shape, float_from_data, float_to_data, shown
from netclone.graph.preparing import IMAGES, ORDER, Preparation
from netclone.runtime.text import is_plain_text


@dataclass(frozen=True)
class Candidate:
    """One position tried by the search: its score, or the reason it was rejected.

    ``score`` is the validation accuracy over old and new classes in [0, 1]; None if the candidate failed.
    """

    at: str
    source_at: str | None
    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Gate:
    """What the router of a clone reads, and how it did on samples that it was not fitted to.

    ``reads`` are the target's nodes, each with the shape of its output. ``skipped`` is the share of the old classes'
    samples that the clone was spared, and ``missed`` that of the new classes' samples that it was not shown.
    """

    reads: tuple[tuple[str, tuple[int, ...]], ...]
    skipped: float
    missed: float


@dataclass(frozen=True)
class CloneSpec:
    """What is known about a clone, as plain data (this is what an archive's header holds).

    Shapes leave out the batch dimension. ``target_input_shape`` is the shape of the images the target was traced
    with, ``target_preparation`` how these are prepared, if that is known, and ``target_digests`` what stands for the
    target's numbers, as they are and cast to other dtypes. ``kept`` gives, per channel group of the source, the units
    kept and the units there were.

    ``recipe`` is all that the clone depends on beside networks and data, by name, each value as JSON; ``versions`` are
    those of what made it; ``origin`` says by name, as far as it is known, what ``netclone clone`` made it from, when,
    and who did, if they gave a name. Like all of a header they are what the file claims. ``stored`` is empty, or what
    the weights were stored in, with the largest difference that made, relative to the largest logit, on random inputs.
    ``gate`` is None if the clone sees every image. ``bias`` is what the clone adds to its logits; certificate and
    scores are those without it.
    """

    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    source_at: str | None
    input_shape: tuple[int, ...]
    certificate: float
    at: str | None = None
    feature_node: str | None = None
    feature_shape: tuple[int, ...] | None = None
    target_input_shape: tuple[int, ...] | None = None
    source_fingerprint: str = ""
    target_fingerprint: str = ""
    kept: tuple[tuple[str, int, int], ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    search: tuple[Candidate, ...] = ()
    target_digests: tuple[tuple[str, str], ...] = ()
    target_preparation: Preparation | None = None
    recipe: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    origin: tuple[tuple[str, str], ...] = ()
    stored: tuple[tuple[str, float], ...] = ()
    gate: Gate | None = None
    bias: float = 0.0


def spec_to_data(spec: CloneSpec) -> dict[str, object]:
    """A spec as JSON holds it, field by field; :func:`spec_from_data` reads it."""
    return {field.name: _plain(vars(spec)[field.name]) for field in fields(spec)}


def _plain(value: object) -> object:
    """Plain data as JSON holds it: tuples as lists, a Candidate as an object."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        return float_to_data(float(value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        held = {key: item for key, item in asdict(value).items() if (key, item) != ORDER}
        return {key: _plain(item) for key, item in held.items()}
    return operator.index(cast("SupportsIndex", value))


# From a file

BATCH = 2
"""Samples in the runs on shapes that a file is checked by."""

_T = TypeVar("_T")
_U = TypeVar("_U")
_V = TypeVar("_V")
_Reader: TypeAlias = Callable[[object], _T]
"""Makes what a field holds from JSON, or raises ArchiveError."""

_LARGEST_SCORE, _MOST_CHANNELS = 1e30, 2**31


def _text(value: object) -> str:
    if not is_plain_text(value):
        raise ArchiveError(f"expected text without control characters, got {shown(value)}")
    return value


def _finite(value: object) -> float:
    number = float_from_data(value)
    if not -_LARGEST_SCORE <= number <= _LARGEST_SCORE:  # NaN is none of them
        raise ArchiveError(f"expected a finite number, got {shown(value)}")
    return number


def _error(value: object) -> float:
    if not (number := _finite(value)) >= 0:
        raise ArchiveError(f"expected an error of 0 or more, got {shown(value)}")
    return number


def _kept(value: object) -> tuple[str, int, int]:
    """A group of channels: its name, how many of it are kept, its size."""
    name, kept, size = _row(_text, _integer, _integer)(value)
    if not 0 <= kept <= size or not 1 <= size <= _MOST_CHANNELS:
        raise ArchiveError(f"{kept} of {size} channels kept; expected 0 to all of them, of 1 to {_MOST_CHANNELS}")
    return name, kept, size


def _integer(value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ArchiveError(f"expected an integer of 64 bits, got {shown(value)}")
    return value


def _shape(value: object) -> tuple[int, ...]:
    shape = check_shape(value, "shape without batch")
    check_shape([BATCH, *shape], f"a batch of {BATCH}")
    return shape


def _optional(read: _Reader[_T]) -> _Reader[_T | None]:
    return lambda value: None if value is None else read(value)


def _items(read: _Reader[_T]) -> _Reader[tuple[_T, ...]]:
    return lambda value: tuple(read(item) for item in check_list(value, "the field"))


@overload
def _row(first: _Reader[_T], second: _Reader[_U], /) -> _Reader[tuple[_T, _U]]: ...
@overload
def _row(first: _Reader[_T], second: _Reader[_U], third: _Reader[_V], /) -> _Reader[tuple[_T, _U, _V]]: ...
def _row(*reads: _Reader[object]) -> _Reader[tuple[object, ...]]:
    return lambda value: tuple(
        read(item) for read, item in zip(reads, check_list(value, "a row of the field"), strict=True)
    )


def _candidate(value: object) -> Candidate:
    return Candidate(**_fields_from(value, _CANDIDATE, "candidate"))


def _fields_from(
    value: object, readers: Mapping[str, _Reader[object]], where: str, later: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """The fields by name; those in ``later`` are younger than the format, and left out of older files."""
    if isinstance(value, dict):
        value = {**(later or {}), **value}
    data = check_keys(value, list(readers), where)
    made = {}
    for name, read in readers.items():
        try:
            made[name] = read(data[name])
        except ValueError as error:
            raise ArchiveError(f"{where}.{name}: {error}") from error
    return made


def _preparation(value: object) -> Preparation:
    """The preprocessing of images: plain values, checked as those of a grafted network's file are."""
    if isinstance(value, dict):
        value = {ORDER[0]: ORDER[1], **value}
    names = ["size", "mean", "std", "interpolation", "crop_pct", "crop_mode", ORDER[0]]
    data = check_keys(value, names, "target_preparation")
    for name, item in data.items():
        if not IMAGES["input_size" if name == "size" else name](item):
            raise ArchiveError(f"'{name}' has an invalid value, {shown(item)}")
    made: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in data.items()}
    return Preparation(**made)


def _share(value: object) -> float:
    if not 0 <= (number := _finite(value)) <= 1:
        raise ArchiveError(f"expected a share from 0 to 1, got {shown(value)}")
    return number


def _gate(value: object) -> Gate:
    gate = Gate(**_fields_from(value, _GATE, "gate"))
    if not gate.reads:
        raise ArchiveError("gate: it reads nothing")
    return gate


_GATE: dict[str, _Reader[object]] = {"reads": _items(_row(_text, _shape)), "skipped": _share, "missed": _share}
_CANDIDATE: dict[str, _Reader[object]] = {
    "at": _text,
    "source_at": _optional(_text),
    "score": _optional(_finite),
    "reason": _text,
}
_SPEC: dict[str, _Reader[object]] = {
    "classes": _items(_integer),
    "class_names": _items(_text),
    "source_at": _optional(_text),
    "input_shape": _shape,
    "certificate": _error,
    "at": _optional(_text),
    "feature_node": _optional(_text),
    "feature_shape": _optional(_shape),
    "target_input_shape": _optional(_shape),
    "source_fingerprint": _text,
    "target_fingerprint": _text,
    "kept": _items(_kept),
    "scores": _items(_row(_text, _finite)),
    "search": _items(_candidate),
    "target_digests": _items(_row(_text, _text)),
    "target_preparation": _optional(_preparation),
    "recipe": _items(_row(_text, _text)),
    "versions": _items(_row(_text, _text)),
    "origin": _items(_row(_text, _text)),
    "stored": _items(_row(_text, _error)),
    "gate": _optional(_gate),
    "bias": _finite,
}
_LATER: dict[str, object] = {
    "target_digests": [],
    "target_preparation": None,
    "recipe": [],
    "versions": [],
    "origin": [],
    "stored": [],
    "gate": None,
    "bias": 0.0,
}
"""Fields that older files lack, and what they are there."""


def spec_from_data(value: object) -> CloneSpec:
    """A spec from what a header says, checked.

    Raises
    ------
    ArchiveError
        If a field is missing, unknown or out of its range.
    """
    spec = CloneSpec(**_fields_from(value, _SPEC, "spec", _LATER))
    if not spec.classes or len(spec.class_names) not in (0, len(spec.classes)):
        raise ArchiveError(f"spec: {len(spec.classes)} classes with {len(spec.class_names)} class names")
    return spec
