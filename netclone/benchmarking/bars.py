"""Bars: the progress of a benchmark, with the time left."""

from __future__ import annotations

from rich.console import Console

from netclone.runtime.bars import progress


class Bars:
    """Two progress bars: one for all runs, with the time left, and one for the present run."""

    def __init__(self, console: Console) -> None:
        self.progress = progress(console, period=1200)
        self.all = self.progress.add_task("data and networks", total=None)
        self.one = self.progress.add_task("", total=None)
        self.what = ""

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def overall(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.all, description=what, completed=done, total=total)

    def tell(self, what: str, done: int, total: int) -> None:
        """The callback for :func:`netclone.clone`, and for everything else that takes long."""
        if what != self.what:
            self.what = what
            self.progress.reset(self.one, total=total, description=what)
        self.progress.update(self.one, completed=done, total=total)
