"""sweep(names, out) -> rows: check many networks, each in a process of its own, with limits; resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console

from netclone.errors import ArgumentError
from netclone.runtime.bars import progress
from netclone.runtime.dependencies import code_digest
from netclone.runtime.devices import device_named
from netclone.runtime.journal import Journal
from netclone.runtime.processes import Limits, Outcome, each
from netclone.zoo.checking import REAL, Row, TargetResult, check
from netclone.zoo.naming import known

JOURNAL = "rows.jsonl"


def sweep(
    names: Sequence[str],
    out: Path,
    *,
    source: bool = True,
    real: int = REAL,
    limits: Limits | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> tuple[Row, ...]:
    """Check networks, several at once. Finished rows are kept in ``out``; the same call continues after a kill.

    Every network is checked in a process of its own. If that crashes or exceeds a limit of time or memory, its row says
    so, and the next call tries it again.

    Parameters
    ----------
    names
        As given by :func:`netclone.zoo.names`.
    out
        Folder for the journal, ``rows.jsonl``.
    source, real, device
        As for :func:`netclone.zoo.check`.

    Raises
    ------
    ArgumentError
        If a limit is not positive, there is no such device, or ``out`` cannot be written.
    """
    limits = limits or Limits()
    limits.check()
    place = str(device_named(device))
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out / JOURNAL)
    except OSError as error:
        raise ArgumentError(f"out: '{out}' cannot be written: {error.strerror}") from error
    digest = _digest(source, real, place)
    done_before = {key for key, record in journal.records.items() if record["digest"] == digest and record["finished"]}
    todo = [name for name in names if name not in done_before]
    with progress(console, period=600) as bar:
        one = bar.add_task("", total=len(names), completed=len(names) - len(todo))
        task = partial(checked, source=source, real=real, device=place)
        for done, outcome in enumerate(each(task, todo, limits), len(names) - len(todo) + 1):
            finished = outcome.value is not None  # otherwise it was stopped, and the next call tries it again
            row = _row(outcome).as_dict()
            journal.append({"key": outcome.name, "digest": digest, "finished": finished, "row": row})
            bar.update(one, completed=done, description=outcome.name)
    return tuple(Row.from_dict(journal.records[name]["row"]) for name in names)


def checked(name: str, source: bool, real: int, device: str) -> dict[str, Any]:
    """:func:`netclone.zoo.check`, as plain data."""
    return check(name, source=source, real=real, device=device).as_dict()


def _row(outcome: Outcome) -> Row:
    if outcome.value is not None:
        return replace(Row.from_dict(outcome.value), peak_mb=outcome.peak_mb)
    failed = TargetResult(False, outcome.reason)
    return Row(outcome.name, known().get(outcome.name, ""), 0, (), "", failed, None, outcome.seconds)


def _digest(source: bool, real: int, device: str) -> str:
    """A digest of all that a row depends on besides its network: code, versions and options."""
    versions = [torch.__version__, timm.__version__, torchvision.__version__, str(source), str(real), device]
    return hashlib.sha256("\n".join([*versions, code_digest("netclone.zoo.checking")]).encode()).hexdigest()
