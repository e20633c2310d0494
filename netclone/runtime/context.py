"""Run: how a run is carried out, which its result does not depend on."""

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
    """How a run is carried out: its device, its processes, its progress, and where it keeps intermediate results.

    Parameters
    ----------
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or another device. Networks are copied there, and each batch is moved. None:
        where the networks are; the data have to be there too.
    progress
        Called with ``(what, done, total)``.
    workers
        The processes that share the work (see :func:`netclone.runtime.sharing.share`). Each has to be given the same
        data and gets the same result.
    findings
        Where to keep intermediate results (mask, refitted source, each position tried), and to continue from.

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
        """The same run, which keeps intermediate results in memory if no file was given."""
        return self if self.findings is not None else replace(self, findings=Findings())

    @property
    def found(self) -> Findings:
        """The intermediate results of a run that has begun."""
        assert self.findings is not None, "begun() comes first"
        return self.findings

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, if anyone asked for it."""
        if self.progress is not None:
            self.progress(what, done, total)


class RunFields(TypedDict, total=False):
    """The fields of a :class:`Run`, which :func:`netclone.clone` also takes as keywords."""

    device: str | torch.device | None
    progress: Progress | None
    workers: Workers
    findings: Findings | None
