"""Bars: progress bars, one per step, with the time left; and the columns that all bars of netclone share."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress(console: Console | None, period: float = 30) -> Progress:
    """A display of progress bars with elapsed and remaining time; not shown without a console.

    Parameters
    ----------
    period
        Seconds of the past that the remaining time is estimated from.
    """
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
        speed_estimate_period=period,
    )


class Bars:
    """One bar per step, created when the step begins.

    Examples
    --------
    >>> with Bars(None) as bars:
    ...     bars.tell("mask", 1, 2)
    """

    def __init__(self, console: Console | None) -> None:
        self.progress = progress(console)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        """The callback to pass to :func:`netclone.clone` as ``progress``."""
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)

    def named(self, what: str) -> Callable[[int, int], None]:
        """A callback ``(done, total)`` for one bar, which is shown from now on."""
        self.tell(what, 0, 1)
        return lambda done, total: self.tell(what, done, total)
