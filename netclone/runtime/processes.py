"""each(task, names, limits): call a function for every name, each in a process of its own, under limits."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from netclone.errors import ArgumentError

_TOO_LARGE = 77  # exit code of a process that stopped itself for its memory
_MEGABYTES = 1024 if sys.platform != "darwin" else 1024**2  # bytes in a unit of ru_maxrss

Task = Callable[[str], dict[str, Any]]
"""A function of a module (or a partial of one) that maps a name to plain JSON data."""


@dataclass(frozen=True)
class Limits:
    """Limits of each call, in seconds and in MB of resident memory; and how many processes run at once."""

    seconds: float = 180.0
    memory_mb: float = 6000.0
    processes: int = 2

    def check(self) -> None:
        """Raise unless all limits are positive."""
        if not (self.seconds > 0 and self.memory_mb > 0 and self.processes >= 1):
            raise ArgumentError(f"limits: got {self}; expected seconds and MB above 0 and at least one process")


@dataclass(frozen=True)
class Outcome:
    """A task's value for a name, or the reason why there is none; its seconds, and its peak memory in MB."""

    name: str
    value: dict[str, Any] | None
    reason: str
    seconds: float
    peak_mb: float = 0.0


@dataclass
class _Running:
    name: str
    process: BaseProcess
    result: Connection
    started: float


def each(task: Task, names: Sequence[str], limits: Limits) -> Iterator[Outcome]:
    """Outcomes in the order in which they finish. A task that raises, crashes or exceeds a limit ends alone.

    Modules such as torch and timm are imported once, here; every process is a fork.
    """
    limits.check()
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["netclone.zoo"])
    waiting, running = list(reversed(names)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < limits.processes:
                name = waiting.pop()
                result, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, task, name, limits.memory_mb))
                process.start()
                theirs.close()
                running.append(_Running(name, process, result, time.monotonic()))
            wait([one.result for one in running], timeout=0.2)
            for one in list(running):
                outcome = _outcome(one, limits)
                if outcome is not None:
                    running.remove(one)
                    yield outcome
    finally:
        for one in running:
            _end(one)


def _outcome(one: _Running, limits: Limits) -> Outcome | None:
    """The outcome of a process that has finished or exceeded its time; None if it is still running."""
    took = time.monotonic() - one.started
    if one.result.poll():
        try:
            told = json.loads(one.result.recv_bytes())
            one.process.join(timeout=10)  # killing it at once would leave its locks behind, with a warning
            _end(one)
            return Outcome(one.name, told["value"], told["reason"], took, told["peak_mb"])
        except EOFError:  # it ended without sending a result
            one.process.join()
            why = (
                f"stopped: more than the limit of {limits.memory_mb:.0f} MB"
                if one.process.exitcode == _TOO_LARGE
                else f"the process died with exit code {one.process.exitcode}"
            )
    elif took > limits.seconds:
        why = f"stopped: more than the limit of {limits.seconds:g} s"
    else:
        return None
    _end(one)
    return Outcome(one.name, None, why, took)


def _end(one: _Running) -> None:
    one.process.kill()
    one.process.join()
    one.result.close()


def _child(result: Connection, task: Task, name: str, memory_mb: float) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_watch, args=(memory_mb,), daemon=True).start()
    value, reason = None, ""
    try:
        value = task(name)
    except Exception as error:  # sent, not raised: the parent goes on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    result.send_bytes(json.dumps({"value": value, "reason": reason, "peak_mb": round(_peak_mb())}).encode())
    result.close()


def _watch(memory_mb: float) -> None:
    """End this process if it takes too much memory, or if its parent is gone."""
    parent = multiprocessing.parent_process()
    while _peak_mb() <= memory_mb:
        if parent is not None and not parent.is_alive():
            os._exit(1)
        time.sleep(0.1)
    os._exit(_TOO_LARGE)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MEGABYTES
