"""Run: how a run is carried out, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch

from netclone.runtime.devices import device_named
from netclone.runtime.resuming import Findings
from netclone.runtime.sharing import ALONE, Workers

Progress = Callable[[str, int, int], None]
"""Called with ``(what, done, total)``."""


@dataclass(frozen=True)
class Run:
    """Where and by whom a run is carried out, who is told of its progress, and where its findings are kept.

    Parameters
    ----------
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or another device: networks are copied there, and each batch is moved. None:
        where the networks are; the data have to be there too.
    progress
        Called with ``(what, done, total)``.
    workers
        The processes that share the work (see :func:`netclone.runtime.sharing.share`): each is given the same data,
        and gets the same result.
    findings
        Where to keep what is found on the way (mask, refitted source, each position tried), and to go on from.

    Raises
    ------
    ArgumentError
        If the device cannot be used.

    Examples
    --------
    >>> Run(device="cpu").place
    device(type='cpu')
    """

    device: str | torch.device | None = None
    progress: Progress | None = None
    workers: Workers = ALONE
    findings: Findings | None = None
    place: torch.device | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", device_named(self.device))

    def begun(self) -> Run:
        """The same, with a place in memory for what is found, where no file keeps it."""
        return self if self.findings is not None else replace(self, findings=Findings())

    @property
    def found(self) -> Findings:
        """Where a run that has begun keeps what it finds."""
        assert self.findings is not None, "begun() comes first"
        return self.findings

    def tell(self, what: str, done: int, total: int) -> None:
        """Tell of progress, if anyone asked."""
        if self.progress is not None:
            self.progress(what, done, total)


class RunFields(TypedDict, total=False):
    """The fields of a :class:`Run`, each of which :func:`netclone.clone` takes by itself too."""

    device: str | torch.device | None
    progress: Progress | None
    workers: Workers
    findings: Findings | None
