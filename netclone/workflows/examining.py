"""evaluate(model, ...): a named network on folders of pictures, which get the columns of its logits as labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from netclone.cloning.injecting import columns
from netclone.cloning.modules import CloneModule
from netclone.errors import ArgumentError, DataError
from netclone.files.bundling import is_bundle
from netclone.graph.preparing import Preparation, converted, preparation
from netclone.graph.tracing import example_input
from netclone.metrics.evaluating import Cost, Scores, cost
from netclone.metrics.evaluating import evaluate as netclone_evaluate
from netclone.models.loading import Note, load_model, open_model, open_target, silent
from netclone.models.reading import Pictures, read
from netclone.runtime.context import Progress
from netclone.runtime.devices import device_named, model_on


@dataclass(frozen=True)
class Subject:
    """A network, what it was before its clones (itself, if it has none), and pictures labelled with its columns.

    ``names`` are those of its columns, as far as pictures or clones say them. Iterated over, it gives batches
    ``(images, labels)``. Networks and batches are on ``device`` (None: where they were loaded).
    """

    network: nn.Module
    target: nn.Module
    pictures: tuple[Pictures, ...]
    names: dict[int, str]
    preparation: Preparation
    progress: Progress | None = None
    device: torch.device | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        total, done = sum(map(len, self.pictures)), 0
        for pictures in self.pictures:
            for images, labels in pictures:
                yield images.to(self.device), labels.to(self.device)
                done += len(images)
                if self.progress is not None:
                    self.progress("pictures", done, total)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the target's own columns: their numbers where nobody says."""
        new = _new_columns(self.network).values()
        count = min(new, default=len(self.names))
        return tuple(self.names.get(column, str(column)) for column in range(count))

    def source(self, name: str | None) -> nn.Module | None:
        """The network of that name, given the same pictures; None for None."""
        return None if name is None else model_on(converted(load_model(name), self.preparation), self.device)


def opened(
    model: str,
    data: str | None,
    target_data: str | None,
    *,
    split: str = "validation",
    batch_size: int = 64,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    note: Note = silent,
    skip_broken: bool = False,
) -> Subject:
    """A named network, and folders of pictures labelled with the columns of its logits.

    Parameters
    ----------
    model
        As for :func:`netclone.load_model`; only a file that ``netclone inject`` wrote has new classes.
    data
        As for :func:`netclone.models.reading.read`: pictures of new classes and, without ``target_data``, of the
        network's own beside them; folders of other classes are left out.
    target_data
        Pictures of the network's own classes.
    images, use_ema
        As for :func:`netclone.load_model`, over what is known of the model.
    device
        As for :func:`netclone.evaluate`.
    note
        Called with a line for a person, where something is assumed or left out.
    skip_broken
        Whether pictures that cannot be read are left out and counted, instead of being an error.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model` and :func:`netclone.models.reading.read`.
    ArgumentError
        If neither is given, or pictures of new classes for a network that has none.
    """
    if data is None and target_data is None:
        raise ArgumentError("data: no pictures were given; name a folder with --data, --target-data or both")
    place = device_named(device)
    opened = open_model(model, use_ema=use_ema, images=images)
    network = opened.network
    target = open_target(model, images=images).network if is_bundle(model) else network
    given = preparation(target)
    if opened.assumption:
        note(f"model: {opened.assumption}")
    opening = partial(read, batch_size=batch_size, skip_broken=skip_broken, note=note)
    pictures: list[Pictures] = []
    names: dict[int, str] = {}
    if target_data is not None:
        old = opening(target_data, given.transform(), split, "target-data").labelled_for(target)
        pictures.append(old.keeping(old.known.values()))
    if data is not None:
        found = opening(data, given.transform(), split, "data")
        pictures.append(_new(network, model, found, target if target_data is None else None))
    for given_pictures in pictures:
        names.update({column: name for name, column in given_pictures.known.items()})
    names.update({column: name for name, column in _new_columns(network).items()})
    here = model_on(network, place)
    before = here if target is network else model_on(target, place)
    return Subject(here, before, tuple(pictures), names, given, progress, place)


def evaluate(
    model: str,
    data: str | None,
    target_data: str | None,
    *,
    source: str | None = None,
    name: str | None = None,
    split: str = "validation",
    batch_size: int = 64,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    note: Note = silent,
    skip_broken: bool = False,
) -> tuple[Scores, Cost]:
    """Scores of a named network on pictures, and what it costs; its own part is compared with what it was before.

    Parameters
    ----------
    model, data, target_data, split, images, use_ema, device, note, skip_broken
        As for :func:`opened`.
    source, name
        What a clone was cloned from, for the similarity, and which clone that is.

    Raises
    ------
    NetcloneError
        As for :func:`opened` and :func:`netclone.evaluate`.
    """
    subject = opened(
        model,
        data,
        target_data,
        split=split,
        batch_size=batch_size,
        images=images,
        use_ema=use_ema,
        device=device,
        progress=progress,
        note=note,
        skip_broken=skip_broken,
    )
    scores = netclone_evaluate(
        subject.network,
        subject,
        reference=None if subject.target is subject.network else subject.target,
        source=subject.source(source),
        name=name,
        batch_size=batch_size,
    )
    return scores, cost(subject.network, example_input(subject.target)[:1].to(subject.device))


def _new(network: nn.Module, model: str, pictures: Pictures, target: nn.Module | None) -> Pictures:
    """Those of the clones' classes, by the names that they were cloned under, and those of the target, if it is given.

    Raises
    ------
    ArgumentError, DataError
        If there is no clone, a name is that of two clones' classes, or no class was cloned.
    """
    known = _new_columns(network)
    if not known:
        raise ArgumentError(
            f"data: '{model}' has no clone, so no new classes; give pictures of its own with --target-data, or a file "
            "that netclone inject wrote"
        )
    listed = [name for names in _names_of_clones(network) for name in names]
    if twice := [name for name in pictures.names if listed.count(name) > 1]:
        raise DataError(f"data: '{twice[0]}' is a class of two clones, and so two columns; remove one of the clones")
    if not set(known) & set(pictures.names):
        raise DataError(
            f"data: none of the classes of '{pictures.where}' was cloned: it has {', '.join(pictures.names[:5])}, the "
            f"clones have {', '.join(known)}"
        )
    others = tuple(name for name in pictures.names if name not in known)
    own: dict[str, int] = {}
    if target is not None and others:
        with contextlib.suppress(DataError):  # none of them is the target's
            own = replace(pictures, names=others).labelled_for(target).known
    labels = tuple(known.get(name, own.get(name, -1)) for name in pictures.names)
    labelled = replace(pictures, columns=labels)
    return labelled.keeping(labelled.known.values())


def _new_columns(network: nn.Module) -> dict[str, int]:
    """The columns of a grafted network's new classes, by name and, where they have none, by the source's column."""
    if not isinstance(network, fx.GraphModule):
        return {}
    own = [column for columns_of_clone in columns(network).values() for column in columns_of_clone]
    names = [name for names_of_clone in _names_of_clones(network) for name in names_of_clone]
    return dict(zip(names, own, strict=True))


def _names_of_clones(network: nn.Module) -> list[Sequence[str]]:
    """What each clone's classes are called: by the source's columns, where they have no names."""
    assert isinstance(network, fx.GraphModule)
    modules = [cast(CloneModule, network.get_submodule(clone)) for clone in columns(network)]
    return [module.class_names or tuple(map(str, module.classes)) for module in modules]
