"""evaluate(model, ...): score a named network on folders of images, labelled with the columns of its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.cloning.grafted import GraftedModule, columns, modules_of
from netclone.errors import ArgumentError, DataError
from netclone.files.bundling import is_bundle
from netclone.graph.preparing import Preparation, converted, preparation
from netclone.graph.tracing import example_input
from netclone.metrics.evaluating import Cost, Scores, costs
from netclone.metrics.evaluating import evaluate as netclone_evaluate
from netclone.metrics.held_out import far_apart, held_out
from netclone.metrics.skipping import ungated
from netclone.models.loading import Note, load_model, open_model, open_target, silent
from netclone.models.reading import Pictures, read
from netclone.runtime.context import Progress
from netclone.runtime.devices import device_named, model_on


@dataclass(frozen=True)
class Subject:
    """A network, its target without clones (itself, if it has none), and images labelled with its columns.

    ``names`` are the class names of its columns, as far as they are known. Iterating gives batches
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
                    self.progress("images", done, total)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the target's own columns, or their numbers if they are not known."""
        new = _new_columns(self.network).values()
        count = min(new, default=len(self.names))
        return tuple(self.names.get(column, str(column)) for column in range(count))

    def source(self, name: str | None) -> nn.Module | None:
        """The network of that name, set up to take the same images; None for None."""
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
    """Load a named network, and images labelled with the columns of its logits.

    Parameters
    ----------
    model
        As for :func:`netclone.load_model`; only a file that ``netclone inject`` wrote has cloned classes.
    data
        As for :func:`netclone.models.reading.read`: images of the cloned classes and, without ``target_data``, of the
        network's own classes too. Folders of other classes are left out.
    target_data
        Images of the network's own classes.
    images, use_ema
        As for :func:`netclone.load_model`.
    device
        As for :func:`netclone.evaluate`.
    note
        Called with one line for the user when something is assumed or left out.
    skip_broken
        Whether to skip and count images that cannot be read, instead of raising.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model` and :func:`netclone.models.reading.read`.
    ArgumentError
        If neither ``data`` nor ``target_data`` is given, or ``data`` for a network without clones.
    """
    if data is None and target_data is None:
        raise ArgumentError("data: got no images; pass a folder with --data, --target-data or both")
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


@dataclass(frozen=True)
class Evaluation:
    """What a named network is worth and what it costs, beside its target without clones and beside the source.

    ``scores`` are those of the network; ``scores.old_before`` and ``scores.new_source`` those of the other two. The
    latencies of all costs are the medians of several runs, of all networks in turn. ``promised`` are the accuracies on
    old and new classes that were measured on held-out images when the clone was made, by name; empty if not known.
    """

    scores: Scores
    cost: Cost
    target: Cost | None
    source: Cost | None
    promised: dict[str, float]

    @property
    def far_apart(self) -> dict[str, tuple[float, float]]:
        """Accuracies that are far from those promised, as :func:`netclone.metrics.held_out.far_apart` finds them."""
        return far_apart(self.promised, self.scores)


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
) -> Evaluation:
    """Scores of a named network on images, and its cost; old classes are compared with the target alone.

    The cost is that of an image which every clone sees. The scores have the time as it is, gates and all.

    Parameters
    ----------
    model, data, target_data, split, images, use_ema, device, note, skip_broken
        As for :func:`opened`.
    source, name
        The network that a clone was made from, to compare with, and the clone's name.

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
    grafted = isinstance(subject.network, GraftedModule)
    compared = subject.source(source)
    scores = netclone_evaluate(
        subject.network,
        subject,
        reference=subject.target if grafted else None,
        source=compared,
        name=name,
        batch_size=batch_size,
    )
    networks = {"cost": ungated(subject.network) if isinstance(subject.network, GraftedModule) else subject.network}
    networks |= {"target": subject.target} if grafted else {}
    networks |= {} if compared is None else {"source": compared}
    image = example_input(subject.target)[:1].to(subject.device)
    found = costs({role: (network, [image]) for role, network in networks.items()})
    return Evaluation(scores, found["cost"], found.get("target"), found.get("source"), _promised(subject.network, name))


def _promised(network: nn.Module, name: str | None) -> dict[str, float]:
    """What was measured when the clone was made: of the one that is meant, or the only one."""
    clones = modules_of(network) if isinstance(network, GraftedModule) else {}
    if name is None and len(clones) != 1:
        return {}
    return held_out(clones[name or next(iter(clones))])


def _new(network: nn.Module, model: str, pictures: Pictures, target: nn.Module | None) -> Pictures:
    """The images of the clones' classes, by their names when cloned, and of the target's classes, if it is given.

    Raises
    ------
    ArgumentError, DataError
        If there is no clone, two clones have a class of the same name, or none of the classes was cloned.
    """
    known = _new_columns(network)
    if not known:
        raise ArgumentError(
            f"data: '{model}' has no clone; pass images of its own classes as --target-data, or a file that netclone "
            "inject wrote as the model"
        )
    listed = [name for names in _names_of_clones(network) for name in names]
    if twice := [name for name in pictures.names if listed.count(name) > 1]:
        raise DataError(f"data: '{twice[0]}' is a class of two clones, so it has two columns; remove one of the clones")
    if not set(known) & set(pictures.names):
        raise DataError(
            f"data: none of the classes in '{pictures.where}' was cloned: it has {', '.join(pictures.names[:5])}; the "
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
    """The columns of a grafted network's new classes, by name or, without one, by the source's column."""
    if not isinstance(network, fx.GraphModule):
        return {}
    found: dict[str, int] = {}
    for names, own in zip(_names_of_clones(network), columns(network).values(), strict=True):
        found.update(zip(names, own, strict=False))  # a clone that is off has no columns
    return found


def _names_of_clones(network: nn.Module) -> list[Sequence[str]]:
    """The class names of each clone, or the source's columns if it has no names."""
    assert isinstance(network, fx.GraphModule)
    return [module.class_names or tuple(map(str, module.classes)) for module in modules_of(network).values()]
