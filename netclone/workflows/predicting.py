"""predict(model, where) -> Predictions: the class of every image in a folder, and which clone it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from netclone.cloning.grafted import GraftedModule, columns, label_names
from netclone.errors import DataError
from netclone.graph.describing import column_names, described
from netclone.graph.preparing import preparation
from netclone.metrics.evaluating import predict as logits_of
from netclone.models.loading import Note, open_model, silent
from netclone.models.reading import read_unlabelled
from netclone.runtime.context import Progress
from netclone.runtime.devices import device_named, model_on


@dataclass(frozen=True)
class Prediction:
    """An image's most likely class: its column, its label, its probability in [0, 1], and its clone (None: no clone).

    The probability is that of the softmax over all columns, and the label is the column's number if it has no name.
    """

    path: str
    column: int
    label: str
    probability: float
    clone: str | None


@dataclass(frozen=True)
class Predictions:
    """The images that could be read, in timm's order, and for each other one its path and why not."""

    images: tuple[Prediction, ...]
    broken: tuple[tuple[str, str], ...]


def predict(
    model: str,
    where: str,
    *,
    batch_size: int = 64,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    note: Note = silent,
) -> Predictions:
    """Predict the class of every image in a folder and below it, or of one image.

    Parameters
    ----------
    model, images, use_ema
        As for :func:`netclone.load_model`.
    where
        A folder, or an image's file.
    device
        As for :func:`netclone.evaluate`.
    note
        Called with one line for the user when something is assumed.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model`.
    DataError
        If there are no images, or none can be read.
    """
    place = device_named(device)
    opened = open_model(model, use_ema=use_ema, images=images)
    if opened.assumption:
        note(f"model: {opened.assumption}")
    pictures = read_unlabelled(where, preparation(opened.network).transform(), "images", batch_size)
    network = model_on(opened.network, place)
    found: list[Prediction] = []
    done = 0
    names: tuple[str, ...] = ()
    owners: dict[int, str] = {}
    for batch, numbers in pictures:
        logits = logits_of(network, batch.to(place), batch_size, first=done)
        names = names or _names(network, logits.shape[1])
        owners = owners or _owners(network)
        for number, row in zip(numbers.tolist(), logits.double().softmax(1), strict=True):
            column = int(row.argmax())
            found.append(
                Prediction(pictures.names[number], column, names[column], float(row[column]), owners.get(column))
            )
        done += len(batch)
        if progress is not None:
            progress("images", done, len(pictures))
    if not found:
        path, why = next(iter(pictures.broken.items()))
        raise DataError(f"images: none of the {len(pictures)} in '{where}' can be read: '{path}': {why}")
    return Predictions(tuple(found), tuple(pictures.broken.items()))


def _owners(network: nn.Module) -> dict[int, str]:
    """The clone that each new column belongs to."""
    if not isinstance(network, GraftedModule):
        return {}
    return {column: name for name, own in columns(network).items() for column in own}


def _names(network: nn.Module, count: int) -> tuple[str, ...]:
    """What the columns are called, or their numbers."""
    if isinstance(network, GraftedModule):
        known: Sequence[str | None] = label_names(network)
    else:
        known = column_names(described(network), count)
    return tuple(name or str(column) for column, name in enumerate(known or [None] * count))
