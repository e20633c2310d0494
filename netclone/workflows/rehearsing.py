"""rehearse(source, target, ...) -> Plan: what ``netclone clone`` would do, and about how long it would take.

The whole of it is run on a few images and a few steps, so whatever is wrong shows now. Nothing is written.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from netclone.cloning.method import check_options
from netclone.cloning.method import clone as netclone_clone
from netclone.cloning.modules import CloneModule
from netclone.cloning.recipe import Recipe
from netclone.errors import ArgumentError, WeakDataWarning
from netclone.files.spec import Candidate
from netclone.graph.timing import seconds_in_turn
from netclone.learning.neighbourhoods import mirrored
from netclone.models.loading import Note, silent
from netclone.models.reading import Pictures
from netclone.runtime.context import Progress
from netclone.runtime.devices import device_named, model_on
from netclone.workflows.tasks import Task, opened_task

FEW = 24
"""Images of new classes, and of old ones, that a rehearsal learns from; at least two of each class."""

STEPS = 6  # of distillation
_BRIEF = 25  # batches that each position of a search is tried with
_REFIT = 2048  # images that a refit looks at


@dataclass(frozen=True)
class Plan:
    """What would be cloned from how many images, which positions are tried, and about what it takes.

    ``seconds`` are estimates by stage, from a few images and steps on this machine. ``memory`` is an estimate in bytes
    of what images, features and networks take at most, beside torch itself.
    """

    classes: tuple[tuple[int, str], ...]
    images: int
    old_images: int
    positions: tuple[Candidate, ...]
    steps: int
    seconds: dict[str, float]
    memory: int


def rehearse(
    source: str,
    target: str,
    classes: str,
    data: str,
    *,
    target_data: str | None = None,
    split: str = "train",
    mirror: bool = False,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    progress: Progress | None = None,
    note: Note = silent,
    skip_broken: bool = False,
    **options: Any,
) -> Plan:
    """Try everything that :func:`netclone.workflows.deploying.clone` does, on little of the data.

    Parameters
    ----------
    source, target, classes, data, target_data, split, mirror, images, use_ema, note, skip_broken, options
        As for :func:`netclone.workflows.deploying.clone`.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.workflows.deploying.clone`.
    ArgumentError
        If the images come as a stream, of which no few can be taken.
    """
    recipe, _ = check_options(**options)
    task = opened_task(
        source,
        target,
        classes,
        data,
        target_data,
        split=split,
        batch_size=recipe.batch_size,
        images=images,
        use_ema=use_ema,
        skip_broken=skip_broken,
        note=note,
    )
    new, old = _few(task.new), None if task.old is None else _few(task.old)
    start = time.perf_counter()
    read = [images for part in (new, old) if part is not None for images, _ in part]
    reading = (time.perf_counter() - start) / sum(map(len, read))
    steps = min(recipe.steps, STEPS)
    brief = {"distill_steps": steps, "epochs": min(recipe.epochs, 1), "mask_steps": min(recipe.mask_steps, STEPS)}
    clock = _Clock(progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakDataWarning)  # a few images are weak data
        module = netclone_clone(
            task.source,
            task.target,
            new,
            classes=task.classes,
            class_names=task.names,
            target_data=old,
            augment=mirrored if mirror else None,
            progress=clock.tell,
            **{**options, **brief},
        )
    place = device_named(options.get("device"))
    batch = torch.cat(read)[: recipe.batch_size].to(place)
    passes = [model_on(network, place).eval() for network in (task.source, task.target)]
    of_source, of_target = (seconds / len(batch) for seconds in seconds_in_turn(passes, batch))
    counts = len(task.new), 0 if task.old is None else len(task.old)
    tried = module.spec.search
    return Plan(
        classes=tuple(zip(task.classes, task.names, strict=True)),
        images=counts[0],
        old_images=counts[1],
        positions=tried,
        steps=recipe.steps,
        seconds=_seconds(clock, sum(counts), len(batch), reading, of_source, of_target, recipe, len(tried)),
        memory=_memory(task, module, sum(counts), batch),
    )


class _Clock:
    """When each stage of a run began, in seconds since the start; what it is told is passed on."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.start = progress, time.perf_counter()
        self.told: list[tuple[str, int, float]] = []

    def tell(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, time.perf_counter() - self.start))
        if self.progress is not None:
            self.progress(what, done, total)

    def of_steps(self, what: str) -> tuple[float, float]:
        """Seconds of one step of a stage, and of all of its steps; 0 if it has none."""
        times = [(done, moment) for name, done, moment in self.told if name == what]
        if len(times) < 2:
            return 0.0, 0.0
        (first, began), (last, ended) = times[0], times[-1]
        return (ended - began) / max(1, last - first), ended - began


def _seconds(
    clock: _Clock,
    count: int,
    batch: int,
    reading: float,
    of_source: float,
    of_target: float,
    recipe: Recipe,
    positions: int,
) -> dict[str, float]:
    """Seconds by stage: what was measured on few images, as many times over as there are images and steps."""
    step, all_steps = clock.of_steps("distil")
    fixed = clock.told[-1][2] - all_steps  # capturing, grouping, certifying: the same for any number of images
    larger = recipe.batch_size / batch
    brief = min(count, _BRIEF * recipe.batch_size)
    choosing = count * (4 * of_source + of_target) + min(count, _REFIT) * 3 * of_source
    fitting = positions * brief * (of_source + of_target) + count * (of_source + 2 * of_target)
    return {
        "read the images": count * reading,
        "prepare both networks": fixed,
        "choose and refit channels": choosing,
        f"distil, {recipe.steps} steps": recipe.steps * step * larger,
        f"fit at {positions} position{'s' * (positions > 1)}": fitting,
    }


def _memory(task: Task, module: CloneModule, count: int, batch: torch.Tensor) -> int:
    """Bytes: all images twice, the features at the position and behind the cut, and each network with its gradients."""
    numbers = 2 * count * math.prod(batch.shape[1:]) + 2 * count * math.prod(module.spec.input_shape)
    networks = sum(_numbers(network) * times for network, times in ((task.source, 5), (task.target, 2)))
    return 4 * (numbers + networks)


def _numbers(network: nn.Module) -> int:
    return sum(tensor.numel() for tensor in network.state_dict().values())


def _few(pictures: Pictures) -> Pictures:
    """A few images of every class."""
    if isinstance(pictures.samples, IterableDataset):
        raise ArgumentError(f"dry_run: '{pictures.where}' comes as a stream, of which no few images can be taken")
    by_label: dict[int, list[int]] = {}
    for index, label in enumerate(pictures.labels):
        by_label.setdefault(label, []).append(index)
    each = max(2, FEW // len(by_label))
    return pictures.at(sorted(index for one in by_label.values() for index in one[:each]))
