"""How long graphs take: every node of one, and one beside another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

WARM_UP, ROUNDS, MOST = 3, 12, 96
"""Runs of each graph, in turn: those that do not count, and how many there are after them, at least and at most."""
SURE, LONG = 0.02, 3.0
"""No more rounds than the least are run once the median of ratios is known so well, or they took so many seconds."""


class _Clock(fx.Interpreter):
    """Times every node, and remembers the fastest of its runs."""

    def __init__(self, graph: fx.GraphModule, now: Callable[[], float]) -> None:
        super().__init__(graph)
        self.now = now
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        started = self.now()
        value = super().run_node(n)
        if isinstance(value, Tensor):
            wait_for(value)
        self.seconds[n.name] = min(self.now() - started, self.seconds.get(n.name, float("inf")))
        return value


def seconds_of_nodes(graph: fx.GraphModule, images: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """The time that each node takes for a batch of images ``(N, ...)``, in seconds, by its name.

    Examples
    --------
    >>> graph = fx.symbolic_trace(torch.nn.Linear(4, 2))
    >>> sorted(seconds_of_nodes(graph, torch.zeros(1, 4), 1))
    ['bias', 'input_1', 'linear', 'output', 'weight']
    """
    clock = _Clock(graph, clock_for(images))
    with torch.no_grad():
        for _ in range(rounds):
            clock.run(images)
    nothing = min(clock.seconds.values())  # what the interpreter itself takes
    return {name: seconds - nothing for name, seconds in clock.seconds.items()}


def seconds_in_turn(
    calls: Sequence[Callable[[Tensor], Any]], images: Tensor, least: int = ROUNDS, most: int = MOST
) -> tuple[float, ...]:
    """The time that each call takes for images ``(N, ...)``, in seconds. Measured in turn, without gradient.

    The last call's is the median of all rounds. Each of the others takes as many times as long as in the median round,
    so what slows the machine down for a while slows both. There are between ``least`` and ``most`` rounds, as many as
    it takes to know these ratios well, or as fit into a few seconds (``SURE``, ``LONG``).

    Examples
    --------
    >>> [seconds > 0 for seconds in seconds_in_turn([torch.relu, torch.tanh], torch.zeros(1, 10_000), 2, 2)]
    [True, True]
    """
    now = clock_for(images)
    rounds: list[list[float]] = []
    with torch.no_grad():
        for number in range(WARM_UP + most):
            took = []
            for run in calls:
                wait_for(images)
                started = now()
                run(images)
                wait_for(images)
                took.append(max(now() - started, 1e-9))
            if number >= WARM_UP:
                rounds.append(took)
            if len(rounds) >= least and (
                sum(map(sum, rounds)) >= LONG or all(_spread(ratios) <= SURE for ratios in _ratios(rounds))
            ):
                break
    last = statistics.median(took[-1] for took in rounds)
    return tuple(last * statistics.median(ratios) for ratios in _ratios(rounds))


def _ratios(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """By call, how many times as long as the last one it took in each round."""
    return [[took[call] / took[-1] for took in rounds] for call in range(len(rounds[0]))]


def _spread(values: Sequence[float]) -> float:
    """Half of the interval that holds the median of such values with 95% probability, as a share of it."""
    ordered, count = sorted(values), len(values)
    off = 0.98 * math.sqrt(count)  # ranks: 1.96 deviations of a binomial distribution of even odds
    low, high = max(0, math.floor(count / 2 - off)), min(count - 1, math.ceil(count / 2 + off))
    return (ordered[high] - ordered[low]) / 2 / statistics.median(ordered)


def clock_for(images: Tensor) -> Callable[[], float]:
    """What tells the time of work on such images.

    Where one thread does it all, the time of this thread: other work on the machine does not count, and neither does
    waiting for a core. Else the time that passes.
    """
    alone = images.device.type == "cpu" and torch.get_num_threads() == 1
    fine = time.get_clock_info("thread_time").resolution <= 1e-6  # 15 ms on some systems
    return time.thread_time if alone and fine else time.perf_counter


def clock_of_work(device: torch.device) -> Callable[[], float]:
    """What tells the time of long work that a device does.

    On the CPU the seconds of all threads together, which other work on the machine does not lengthen. Elsewhere the
    time that passes.

    Examples
    --------
    >>> now = clock_of_work(torch.device("cpu"))
    >>> 0 <= now() <= now()
    True
    """
    return time.process_time if device.type == "cpu" else time.perf_counter


def relative_time(model: Callable[[Tensor], Any], other: Callable[[Tensor], Any], images: Tensor) -> float:
    """The time that a model takes for images ``(N, ...)``, as a share of another's, by :func:`seconds_in_turn`.

    Examples
    --------
    >>> 0.1 < relative_time(torch.relu, torch.relu, torch.zeros(1, 10_000)) < 10
    True
    """
    seconds, others = seconds_in_turn([model, other], images)
    return seconds / others


def wait_for(tensor: Tensor) -> None:
    """Wait for a device that works on its own."""
    synchronize = getattr(getattr(torch, tensor.device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()
