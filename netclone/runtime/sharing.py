"""Sharing a run among processes: which rows each worker does, and how results are gathered and summed.

Only this module knows accelerate. Every worker holds all data and the same networks, and does the same in the same
order. Slow work is divided: the batches of a forward pass, the rows of a step's batch, the images to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from netclone.errors import NetcloneError, WorkerError, first_line

PATIENCE = 600.0  # seconds that a worker waits for the others, in case one hangs
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # that accelerate reads
_NUMBERS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Workers:
    """The processes of a run: this one's ``number`` (its rank), of ``count``. A single one needs no work.

    Examples
    --------
    >>> Workers(1, 3).own(10)
    slice(3, 6, None)
    >>> ALONE.joined(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    number: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the worker that writes and prints."""
        return self.number == 0

    def team(self, items: int) -> Workers:
        """All workers if there is an item for each. Otherwise this one alone: every worker does all the work.

        Examples
        --------
        >>> Workers(1, 3).team(3), Workers(1, 3).team(2)
        (Workers(number=1, count=3), Workers(number=0, count=1))
        """
        return self if items >= self.count else ALONE

    def own(self, items: int) -> slice:
        """The items that belong to this worker: consecutive ones, divided as evenly as possible."""
        return slice(items * self.number // self.count, items * (self.number + 1) // self.count)

    def portion(self, items: int, most: int) -> int:
        """How many items to do at once so that each worker has work; ``most`` for a single one.

        Examples
        --------
        >>> Workers(0, 2).portion(20, 64), Workers(0, 2).portion(500, 64), ALONE.portion(20, 64)
        (10, 64, 64)
        """
        return most if self.count == 1 else max(1, min(most, items // self.count))

    def joined(self, rows: Tensor) -> Tensor:
        """Gather the rows ``(n, ...)`` of all workers into ``(N, ...)``, in their order; ``n`` may differ.

        Raises
        ------
        WorkerError
            If another worker is gone, as for all the following methods.
        """
        if self.count == 1:
            return rows
        sizes = _gathered(torch.tensor([len(rows)])).tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = _gathered(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all workers, in place; all of them get the same bits."""
        if self.count == 1 or not tensors:
            return
        total = _summed(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def told(self, fact: Any) -> list[Any]:
        """Gather a small picklable object from every worker, in their order."""
        return [fact] if self.count == 1 else _told(fact)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block in every worker, and go on only if none of them failed; nobody waits for one that did.

        Raises
        ------
        WorkerError
            If another worker failed; the one that failed raises its own error.
        """
        if self.count == 1:
            yield
            return
        met = None
        try:
            yield
        except Exception as error:  # raised again once the others know
            met = error
        said = self.told(None if met is None else f"{type(met).__name__}: {first_line(met)}")
        if met is not None:
            raise met
        for number, text in enumerate(said):
            if text is not None:
                raise WorkerError(f"worker {number} failed: {text}; fix that and run it again")

    def check_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raise unless all workers have the same tensors, to the bit.

        Raises
        ------
        WorkerError
            If they differ.
        """
        if self.count == 1:
            return
        said = self.told(digest(tensors))
        for number, text in enumerate(said):
            if text != said[0]:
                raise WorkerError(
                    f"{what}: worker {number} has different values from worker 0; give every process the same data in "
                    "the same order, on the same kind of processor"
                )


ALONE = Workers()
"""A single process, to which all rows belong."""


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and bits.

    Examples
    --------
    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2)]) != digest([torch.zeros(3)])
    True
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def launched() -> bool:
    """Whether accelerate, torchrun or mpirun started this process as one of several."""
    return _from_environment(_COUNTS, 1) > 1


def is_main() -> bool:
    """Whether this process is the one that prints: the first of several, or the only one."""
    return not launched() or _from_environment(_NUMBERS, 0) == 0


@contextlib.contextmanager
def share(patience: float = PATIENCE) -> Iterator[Workers]:
    """Join the processes that accelerate, torchrun or mpirun started; a single process is alone.

    They communicate over gloo, through CPU memory. When the launcher stops this process because another one is gone,
    that is a :class:`~netclone.errors.WorkerError` too.

    Parameters
    ----------
    patience
        Seconds to wait for the others, each time, before giving up.

    Raises
    ------
    WorkerError
        If accelerate is not installed, or the others cannot be reached.

    Examples
    --------
    >>> with share() as workers:
    ...     workers.count
    1
    """
    if not launched():
        yield ALONE
        return
    try:
        from accelerate import PartialState  # slow to import, and not needed by one process
    except ImportError as error:
        raise WorkerError(
            f"a run of {_from_environment(_COUNTS, 1)} processes needs accelerate, which is not installed: "
            "pip install netclone[distributed], or start one process"
        ) from error
    with warnings.catch_warnings(), _wire():
        warnings.simplefilter("ignore")  # about the number of threads that it has chosen
        state = PartialState(cpu=True, timeout=timedelta(seconds=patience))
    try:
        with _ended_by_the_launcher():
            yield Workers(state.process_index, state.num_processes)
    except NetcloneError:
        _leave(state)
        raise
    with contextlib.suppress(RuntimeError):  # a worker that is gone by now had nothing left to do
        state.wait_for_everyone()
    _leave(state)


def _leave(state: Any) -> None:
    """Close the connections: threads that still use them when Python exits would abort it."""
    with contextlib.suppress(RuntimeError):
        state.destroy_process_group()
    type(state)._reset_state()


@contextlib.contextmanager
def _ended_by_the_launcher() -> Iterator[None]:
    """Raise a WorkerError on the signal that a launcher sends when another worker is gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(number: int, frame: object) -> None:
        raise WorkerError("stopped by the launcher, as happens when another worker is gone; look at that one's error")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _wire() -> Iterator[None]:
    """Raise errors of the communication between processes as WorkerError."""
    try:
        yield
    except NetcloneError:
        raise
    except RuntimeError as error:  # the type of errors of gloo and the store
        raise WorkerError(f"another worker is gone or does not answer ({first_line(error)}); run it again") from error


def _gathered(tensor: Tensor) -> Tensor:
    from accelerate import PartialState
    from accelerate.utils import gather

    with _wire():
        gathered: Tensor = gather(tensor.detach().contiguous().to(PartialState().device))
    return gathered.to(tensor.device)


def _summed(tensor: Tensor) -> Tensor:
    from accelerate import PartialState
    from accelerate.utils import reduce

    with _wire():
        total: Tensor = reduce(tensor.detach().to(PartialState().device), reduction="sum")
    return total.to(tensor.device)


def _told(fact: Any) -> list[Any]:
    from accelerate.utils import gather_object

    with _wire():
        said: list[Any] = gather_object([fact])
    return said


def _from_environment(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
