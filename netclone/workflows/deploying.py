"""clone, inject, remove: from names of models, folders of images and files to files."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from netclone.cloning.grafted import columns, modules_of, own_columns, seat_of
from netclone.cloning.injecting import graft
from netclone.cloning.method import check_options
from netclone.cloning.method import clone as netclone_clone
from netclone.cloning.modules import CloneModule, save
from netclone.cloning.requirements import differences, tell_mismatch, tell_same_names
from netclone.errors import ArchiveError, CloneNameError, WorkerError
from netclone.files.bundling import (
    Bundle,
    Packed,
    config_of,
    is_bundle,
    is_plain_checkpoint,
    log_of,
    read_bundle,
    write_bundle,
)
from netclone.files.inspecting import classes_of
from netclone.files.provenance import MOST_LETTERS, checked_by, today
from netclone.learning.neighbourhoods import mirrored
from netclone.models.grafting import check_comes_back
from netclone.models.loading import Note, checked_images, clone_in, open_model, silent
from netclone.runtime.context import Progress
from netclone.runtime.resuming import Findings
from netclone.runtime.sharing import share
from netclone.runtime.text import as_plain_text
from netclone.runtime.writing import check_place
from netclone.workflows.tasks import opened_task

_log = logging.getLogger(__package__)
Columns = tuple[int, int, str, str]
"""First and last column, their owner (the target or a clone), and their classes."""


def clone(
    source: str,
    target: str,
    classes: str,
    data: str,
    out: Path,
    *,
    target_data: str | None = None,
    split: str = "train",
    mirror: bool = False,
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    progress: Progress | None = None,
    note: Note = silent,
    skip_broken: bool = False,
    save_dtype: str | None = None,
    by: str | None = None,
    **options: Any,
) -> CloneModule:
    """Clone classes of a named source for a named target, and write the clone to a file.

    Images are preprocessed for the target; if the source needs other preprocessing, the clone converts them itself.
    Several processes (started by accelerate, torchrun or mpirun) share one run: each opens its part of the images, and
    the first one writes the file. Intermediate results are kept in ``OUT.part``, from which a stopped run continues to
    the same result when it is started again. That file is removed once the clone is written.

    Parameters
    ----------
    source, target
        As for :func:`netclone.load_model`.
    classes
        The source's classes, separated by commas: as for :func:`netclone.models.classes.wanted`.
    data, target_data
        As for :func:`netclone.models.reading.read`, with classes named as the source's and as the target's.
    split
        Which part of the data to use, if there are several.
    mirror
        Whether to train on horizontally flipped images too.
    images, use_ema
        As for :func:`netclone.load_model`; ``images`` is for the target.
    save_dtype
        As ``dtype`` for :func:`netclone.save`.
    note
        Called with one line for the user when something is assumed or left out.
    skip_broken
        Whether to skip and count images that cannot be read, instead of raising.
    by
        Who makes the clone, for its file. None: the file does not say.
    options
        As for :func:`netclone.clone`.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model`, :func:`netclone.models.reading.read` and :func:`netclone.clone`.
    WorkerError
        If another process of the run is gone.
    KeyboardInterrupt
        If the run is interrupted; the message says what is kept.
    """
    who = checked_by(by)
    today()  # refused here if the environment gives no day
    recipe, _ = check_options(**{name: value for name, value in options.items() if name != "mask"})
    with share() as workers:
        with workers.agreed():
            if workers.main:
                check_place(out)
            told = note if workers.main else silent
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
                note=told,
            )
        part = out.with_name(f"{out.name}.part")
        findings = Findings(part, workers, lambda stages: note(f"Resuming from '{part}' ({', '.join(stages)})."))
        try:
            module = netclone_clone(
                task.source,
                task.target,
                replace(task.new, workers=workers),
                classes=task.classes,
                class_names=task.names,
                target_data=None if task.old is None else replace(task.old, workers=workers),
                augment=mirrored if mirror else None,
                progress=progress if workers.main else None,
                workers=workers,
                findings=findings,
                **options,
            )
            origin = (*task.origin(), ("date", today()), *([("by", who)] if who else []))
            module = module.with_spec(target_preparation=task.preparation, origin=origin)
            with workers.agreed():
                if workers.main:
                    save(module, out, save_dtype)
        except WorkerError as error:
            if len(findings):
                raise WorkerError(f"{error}; {_goes_on(findings)}") from error
            raise
        except KeyboardInterrupt as stop:
            if len(findings):
                raise KeyboardInterrupt(_goes_on(findings)) from stop
            raise
        findings.forget()
    for tried in module.spec.search:
        _log.debug("position %s: %s", tried.at, tried.reason or f"validation {tried.score:.4f}")
    _log.debug("cloned at %s, certificate %.1e, kept: %s", module.at, module.spec.certificate, module.spec.kept)
    return module


def _goes_on(findings: Findings) -> str:
    return f"run the same command again to continue from '{findings.path}' ({', '.join(findings.stages)})"


def inject(
    target: str,
    files: Sequence[Path],
    out: Path,
    at: str | None = None,
    *,
    names: Sequence[str] = (),
    images: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    allow_mismatch: bool = False,
    by: str | None = None,
    write: bool = True,
) -> tuple[Columns, ...]:
    """Graft clones onto a named target and write the result to one file, or nothing if a clone does not fit.

    Parameters
    ----------
    target
        As for :func:`netclone.load_model`. A grafted network's file keeps the clones it has.
    files
        Files that :func:`netclone.save` wrote.
    at
        Position to graft at. None: the one that each clone was fitted for.
    names
        What to call the clones, in the order of their files. None: each is named after its file.
    images, use_ema
        As for :func:`netclone.load_model`.
    allow_mismatch
        As for :func:`netclone.inject`. Different preprocessing of images is then only warned of, too.
    by
        Who does it, for the file's log. None: the log does not say.
    write
        False: everything is checked, and nothing is written.

    Returns
    -------
    What the columns of the grafted network's logits stand for.

    Raises
    ------
    LoadError, ArchiveError, PositionError, AdapterError, CloneNameError, TargetError
        If the target or a clone cannot be read, or one does not fit.
    """
    called, who = _names(files, names), checked_by(by)
    check_place(out)
    opened = open_model(target, use_ema=use_ema, images=images)
    network = opened.network
    if is_bundle(target):
        bundle = read_bundle(target)
        bundle = replace(bundle, config={**bundle.config, **checked_images(images or {})})
    else:
        log = log_of(target) if is_plain_checkpoint(target) else ()
        bundle = Bundle(opened.architecture, network.state_dict(), (), config_of(network), opened.options, log)
    given, history = opened.preparation, bundle.history
    for file, name in zip(files, called, strict=True):
        packed = Packed(name, at, _content(file))
        module = clone_in(packed)
        before, network = network, graft(network, module, at, name=packed.name)
        differing = differences(network, module.spec, given)
        if module.spec.target_input_shape not in (None, given.size):
            differing.append(f"its images had the shape {module.spec.target_input_shape}, here they have {given.size}")
        tell_mismatch(differing, allow_mismatch)
        tell_same_names(before, module, allow_mismatch)
        packed = replace(packed, first=seat_of(network, packed.name).first)
        bundle = replace(bundle, clones=(*bundle.clones, packed))
    assert isinstance(network, fx.GraphModule)
    came_from = {name: _plain(file.name) for file, name in zip(files, called, strict=True)}
    bundle = bundle.logged(history, files=came_from, by=who)
    check_comes_back(bundle, network, out)
    if write:
        write_bundle(bundle, out)
    of_clones = columns(network)
    found: list[Columns] = [(0, len(own_columns(network)) - 1, "target", "its own")]
    for name, own in ((name, own) for name, own in of_clones.items() if own):  # others are off
        found.append((own.start, own.stop - 1, name, classes_of(modules_of(network)[name].spec)))
    return tuple(found)


def remove(file: Path, name: str | None, out: Path, *, by: str | None = None) -> tuple[str, ...]:
    """Write a grafted network without one of its clones; returns the names of those that are left.

    ``by`` is who does it, for the file's log.

    Raises
    ------
    ArchiveError, CloneNameError
        If the file holds no grafted network, or not this clone.
    """
    who, before = checked_by(by), read_bundle(file)
    bundle = before.without(name).logged(before.history, by=who)
    write_bundle(bundle, out)
    return tuple(packed.name for packed in bundle.clones)


def _names(files: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What to call the clones in these files."""
    if names and len(names) != len(files):
        raise CloneNameError(
            f"name: got {len(names)} names for {len(files)} files; give one --name for each, in order, or none"
        )
    if wrong := [name for name in names if not name.isidentifier()]:
        raise CloneNameError(
            f"name: {wrong[0]!r} is no identifier; use letters, digits and underscores, and no digit first"
        )
    return list(names) or [_name(file) for file in files]


def _name(file: Path) -> str:
    name = re.sub(r"\W", "_", file.stem)
    if not name.isidentifier():
        raise CloneNameError(
            f"name: a clone is named after its file, and '{file.stem}' is no identifier; pass --name, such as "
            f"--name clone_{name}"
        )
    return name


def _plain(name: str) -> str:
    """The name of a file, as far as it can stand in another one."""
    return as_plain_text(name)[:MOST_LETTERS]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArchiveError(f"cannot read '{file}': {error.strerror or error}") from error
