"""Run what may crash, hang or fill the memory: in forked processes, with limits."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIGABYTE = 2**30


@dataclass(frozen=True)
class Ended:
    """How one case ended: ``kind`` is "done", "raised", "crashed" or "hung".

    ``value`` is what the task returned, ``text`` the error's type and message, or the signal, and ``seconds`` how long
    it took.
    """

    kind: str
    value: Any = None
    text: str = ""
    seconds: float = 0.0


def each(
    task: Callable[[Any], Any], cases: Sequence[Any], memory: int = 4 * GIGABYTE, seconds: float = 10.0
) -> Iterator[Ended]:
    """How a task ends on each of the cases, in order.

    One forked process runs them one by one; where a case kills it or takes more than ``seconds``, another one goes on
    behind that case. What a task returns has to be plain data. ``memory`` limits the address space, in bytes, and what
    is refused for it is a ``MemoryError`` or ``RuntimeError`` in the task. It comes on top of what this process has.
    """
    done = 0
    while done < len(cases):
        child, pipe = _forked(task, cases[done:], memory)
        try:
            while done < len(cases):
                begun = time.monotonic()
                message = _received(pipe, begun + seconds)
                took = time.monotonic() - begun
                if message is None:
                    os.kill(child, signal.SIGKILL)
                    yield Ended("hung", text=f"more than {seconds:g} s", seconds=took)
                elif not message:
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    child = 0
                    text = signal.Signals(-status).name if status < 0 else f"exit code {status}"
                    yield Ended("crashed", text=text, seconds=took)
                else:
                    yield Ended(*pickle.loads(message), seconds=took)
                done += 1
                if not message:
                    break
        finally:
            os.close(pipe)
            if child:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def alone(task: Callable[[], Any], memory: int = 4 * GIGABYTE, seconds: float = 60.0) -> Ended:
    """How one call ends in a process of its own."""
    [ended] = each(lambda _: task(), [None], memory, seconds)
    return ended


def _forked(task: Callable[[Any], Any], cases: Sequence[Any], memory: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = memory + _own()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in cases:
            try:
                told: tuple[str, Any, str] = ("done", task(case), "")
            except BaseException as error:  # also what a test raises to stop: it is told
                told = ("raised", None, f"{type(error).__name__}: {str(error)[:2000]}")
            content = pickle.dumps(told)
            os.write(writing, len(content).to_bytes(8, "little") + content)
    finally:
        os._exit(0)


def _received(pipe: int, deadline: float) -> bytes | None:
    """The next message; empty at the end of the pipe, None where it does not come in time."""
    content, needed = b"", 8
    while len(content) < needed:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        more = os.read(pipe, needed - len(content))
        if not more:
            return b""
        content += more
        if needed == 8 and len(content) == 8:
            needed += int.from_bytes(content, "little")
    return content[8:]


def _own() -> int:
    """Bytes of address space that this process has taken, which a forked one starts with."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
