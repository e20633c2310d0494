"""opened_task(source, target, ...) -> Task: the networks, images and classes that ``netclone clone`` names, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from netclone.files.provenance import is_absolute_path
from netclone.graph.preparing import Preparation, converted
from netclone.learning.data import check_new
from netclone.models.classes import wanted
from netclone.models.loading import CHECKPOINTS, Note, open_model, open_target, revision_of, silent, weights_digest
from netclone.models.reading import READERS, Pictures, read
from netclone.runtime.text import is_plain_text


@dataclass(frozen=True)
class Task:
    """What :func:`netclone.clone` is given, from names: networks, images of new and of old classes, classes by name.

    ``source`` takes the target's images, which are prepared as ``preparation`` says. ``networks`` says where source and
    target come from, and ``places`` where the images of new and of old classes do.
    """

    source: nn.Module
    target: nn.Module
    new: Pictures
    old: Pictures | None
    classes: tuple[int, ...]
    names: tuple[str, ...]
    preparation: Preparation
    networks: tuple[tuple[str, str], ...]
    places: tuple[str, str | None]

    def origin(self) -> tuple[tuple[str, str], ...]:
        """Where networks and images come from, by name, for a clone's spec; images count as they were last read."""
        old = () if self.old is None or self.places[1] is None else _of_images("target data", self.places[1], self.old)
        return (*self.networks, *_of_images("data", self.places[0], self.new), *old)


def opened_task(
    source: str,
    target: str,
    classes: str,
    data: str,
    target_data: str | None,
    *,
    split: str,
    batch_size: int,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    skip_broken: bool = False,
    note: Note = silent,
) -> Task:
    """Open what ``netclone clone`` names; no image is read yet.

    Parameters
    ----------
    source, target, classes, data, target_data, split, images, use_ema, skip_broken, note
        As for :func:`netclone.workflows.deploying.clone`.
    batch_size
        Images at a time.

    Raises
    ------
    NetcloneError
        As :func:`netclone.load_model`, :func:`netclone.models.reading.read` and :func:`netclone.models.classes.wanted`.
    """
    source_network = open_model(source, use_ema=use_ema).network
    opened = open_target(target, use_ema=use_ema, images=images)
    given = opened.preparation
    networks = (*_of_network("source", source, source_network), *_of_network("target", target, opened.network))
    if opened.assumption:
        note(f"target: {opened.assumption}")
    opening = partial(read, batch_size=batch_size, skip_broken=skip_broken, note=note)
    new, columns, names = wanted(classes, opening(data, given.transform(), split, "data"), source_network)
    old = None
    if target_data is not None:
        old = opening(target_data, given.transform(), split, "target-data").labelled_for(opened.network)
        old = old.keeping(old.known.values())
        check_new(names, old.known, "target-data")
    return Task(
        source=converted(source_network, given),
        target=opened.network,
        new=new,
        old=old,
        classes=columns,
        names=names,
        preparation=given,
        networks=networks,
        places=(data, target_data),
    )


def _of_network(role: str, name: str, network: nn.Module) -> tuple[tuple[str, str], ...]:
    """Where a network comes from: its name, the revision if it was downloaded, and the digest of its tensors."""
    found = [(role, _told(name))]
    revision = revision_of(name, network)
    found += [(f"{role} revision", revision)] if revision else []
    return (*found, (f"{role} weights", f"sha256:{weights_digest(network)}"))


def _of_images(role: str, where: str, pictures: Pictures) -> tuple[tuple[str, str], ...]:
    """Where images come from: their folder, but for those above it; how many were read; their digest."""
    path = Path(where)
    outside = where.partition("/")[0] not in READERS and (path.is_absolute() or ".." in path.parts)
    name = path.name if outside else where
    found = [(role, name if name and is_plain_text(name) and not is_absolute_path(name) else "images")]
    if pictures.digest is not None:
        found += [(f"{role} images", str(len(pictures.seen))), (f"{role} digest", f"sha256:{pictures.digest}")]
    return tuple(found)


def _told(name: str) -> str:
    """The name of a model as another may read it: a file by its own name, without its folders."""
    for mark in ("@", "local-dir:"):
        before, found, path = name.rpartition(mark)
        if found:
            return f"{before}{mark}{Path(path).name}"
    return Path(name).name if Path(name).suffix in CHECKPOINTS else name
