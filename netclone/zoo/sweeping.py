"""sweep(names, out) -> rows: many networks, each in a process of its own under limits, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import netclone
from netclone.errors import ArgumentError
from netclone.journal import Journal
from netclone.zoo.checking import REAL, Row, TargetResult, check
from netclone.zoo.naming import known
from netclone.zoo.processes import Limits, Outcome, each

JOURNAL = "rows.jsonl"


def sweep(
    names: Sequence[str],
    out: Path,
    *,
    source: bool = True,
    real: int = REAL,
    limits: Limits | None = None,
    console: Console | None = None,
) -> tuple[Row, ...]:
    """Check networks, several at once; what is done is kept in ``out``, and the same call goes on after a kill.

    Every network is checked in a process of its own: one that crashes, takes too long or too much memory is a row that
    says so, and is tried again by the next call.

    Parameters
    ----------
    names
        As given by :func:`netclone.zoo.names`.
    out
        Folder for the journal, ``rows.jsonl``.
    source, real
        As for :func:`netclone.zoo.check`.

    Raises
    ------
    ArgumentError
        If a limit is not positive, or ``out`` cannot be written.
    """
    limits = limits or Limits()
    limits.check()
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out / JOURNAL)
    except OSError as error:
        raise ArgumentError(f"out: '{out}' cannot be written: {error.strerror}") from error
    digest = _digest(source, real)
    done_before = {key for key, record in journal.records.items() if record["digest"] == digest and record["finished"]}
    todo = [name for name in names if name not in done_before]
    with _progress(console) as tell:
        tell(len(names) - len(todo), len(names), "")
        task = partial(checked, source=source, real=real)
        for done, outcome in enumerate(each(task, todo, limits), len(names) - len(todo) + 1):
            finished = outcome.value is not None  # else it was stopped, and is tried again by the next call
            row = _row(outcome).as_dict()
            journal.append({"key": outcome.name, "digest": digest, "finished": finished, "row": row})
            tell(done, len(names), outcome.name)
    return tuple(Row.from_dict(journal.records[name]["row"]) for name in names)


def checked(name: str, source: bool, real: int) -> dict[str, Any]:
    """:func:`netclone.zoo.check`, as plain data."""
    return check(name, source=source, real=real).as_dict()


def _row(outcome: Outcome) -> Row:
    if outcome.value is not None:
        return replace(Row.from_dict(outcome.value), peak_mb=outcome.peak_mb)
    failed = TargetResult(False, outcome.reason)
    return Row(outcome.name, known().get(outcome.name, ""), 0, (), "", failed, None, outcome.seconds)


def _digest(source: bool, real: int) -> str:
    """What a row depends on besides its network: the code, the versions and what is asked for."""
    folder = Path(netclone.__file__).parent
    files = [*sorted(folder.glob("*.py")), *(folder / "zoo" / f"{part}.py" for part in ("building", "checking"))]
    aside = {"cli.py", "demo.py", "plotting.py", "__main__.py"}
    text = [path.read_text(encoding="utf-8") for path in files if path.name not in aside]
    versions = [torch.__version__, timm.__version__, torchvision.__version__, str(source), str(real)]
    return hashlib.sha256("\n".join([*versions, *text]).encode()).hexdigest()


@contextmanager
def _progress(console: Console | None) -> Iterator[Any]:
    columns = TextColumn("{task.description:<40}"), BarColumn(24), MofNCompleteColumn()
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, *times, console=console, disable=console is None, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=None)

        def tell(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        yield tell
