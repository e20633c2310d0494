"""How far two measurements of the same time are apart: python examples/benchmarks/clock.py FILE.json

The time of a network as a share of another's, from twelve rounds in turn on one thread, is measured sixteen times, with
and without another process on the same core. Three ways: the fastest of each by the clock, the median ratio by the
clock, and the median ratio by the thread's own processor time, as netclone measures it. The figures behind
docs/adr/0025. Linux only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
from timing import Row, reported
from torch import nn

PAIRS = (("resnet18", "resnet10t"), ("mobilenetv2_100", "mobilenetv2_050"))
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(500, 500)\nwhile True: a @ a"
ROUNDS, WARM_UP, TIMES, SIZE = 12, 3, 16, 128

Rounds = list[tuple[float, float]]


def rounds(first: nn.Module, second: nn.Module) -> tuple[Rounds, Rounds]:
    """What each of the two took in every round, by the clock and by the thread's own time."""
    images = torch.randn(1, 3, SIZE, SIZE)
    found: list[list[tuple[float, float]]] = []
    with torch.no_grad():
        for _ in range(WARM_UP + ROUNDS):
            took = []
            for network in (first, second):
                started = time.perf_counter(), time.thread_time()
                network(images)
                took.append((time.perf_counter() - started[0], time.thread_time() - started[1]))
            found.append(took)
    by_clock, own = ([(one[clock], other[clock]) for one, other in found[WARM_UP:]] for clock in (0, 1))
    return by_clock, own


def fastest(taken: Rounds) -> float:
    return min(second for _, second in taken) / min(first for first, _ in taken)


def median(taken: Rounds) -> float:
    return statistics.median(second / first for first, second in taken)


def spread(shares: list[float]) -> float:
    """The whole range of the measurements, as a share of their median."""
    return (max(shares) - min(shares)) / statistics.median(shares)


def rows_of(names: tuple[str, str], beside: int) -> list[Row]:
    first, second = (timm.create_model(name).eval() for name in names)
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(beside)]
    try:
        rounds(first, second)
        taken = [rounds(first, second) for _ in range(TIMES)]
    finally:
        for other in others:
            other.kill()
    ways: dict[str, tuple[Callable[[Rounds], float], int]] = {
        "fastest, by the clock": (fastest, 0),
        "median ratio, by the clock": (median, 0),
        "median ratio, by the thread's time": (median, 1),
    }
    about = f"{names[1]} / {names[0]}, {'beside another process' if beside else 'alone'}"
    return [
        (f"{about}, {way}: range / median", spread([measure(one[clock]) for one in taken]), None)
        for way, (measure, clock) in ways.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    raise SystemExit(reported([row for beside in (0, 1) for names in PAIRS for row in rows_of(names, beside)]))
