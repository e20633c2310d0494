"""How long graphs take: every node of one, and one beside another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

ROUNDS = 12
"""Runs of each graph, in turn. The fastest counts: whatever else the machine does only ever makes a run slower."""


class _Clock(fx.Interpreter):
    """Times every node, and remembers the fastest of its runs."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        started = time.perf_counter()
        value = super().run_node(n)
        if isinstance(value, Tensor):
            _wait(value)
        self.seconds[n.name] = min(time.perf_counter() - started, self.seconds.get(n.name, float("inf")))
        return value


def seconds_of_nodes(graph: fx.GraphModule, images: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """The time that each node takes for a batch of images ``(N, ...)``, in seconds, by its name.

    Examples
    --------
    >>> graph = fx.symbolic_trace(torch.nn.Linear(4, 2))
    >>> sorted(seconds_of_nodes(graph, torch.zeros(1, 4), 1))
    ['bias', 'input_1', 'linear', 'output', 'weight']
    """
    clock = _Clock(graph)
    with torch.no_grad():
        for _ in range(rounds):
            clock.run(images)
    nothing = min(clock.seconds.values())  # what the interpreter itself takes
    return {name: seconds - nothing for name, seconds in clock.seconds.items()}


def fastest_in_turn(
    calls: Sequence[Callable[[Tensor], Any]], images: Tensor, rounds: int = ROUNDS
) -> tuple[float, ...]:
    """The time that each call takes for images ``(N, ...)``, in seconds. Measured in turn, without gradient.

    Examples
    --------
    >>> [seconds > 0 for seconds in fastest_in_turn([torch.relu, torch.tanh], torch.zeros(1, 10_000), 2)]
    [True, True]
    """
    fastest = [float("inf")] * len(calls)
    with torch.no_grad():
        for _ in range(rounds + 2):  # the first ones warm up, and are never the fastest
            for which, run in enumerate(calls):
                _wait(images)
                started = time.perf_counter()
                run(images)
                _wait(images)
                fastest[which] = min(fastest[which], time.perf_counter() - started)
    return tuple(fastest)


def relative_time(model: Callable[[Tensor], Any], other: Callable[[Tensor], Any], images: Tensor) -> float:
    """The time that a model takes for images ``(N, ...)``, as a share of another's, by :func:`fastest_in_turn`.

    Examples
    --------
    >>> 0.1 < relative_time(torch.relu, torch.relu, torch.zeros(1, 10_000)) < 10
    True
    """
    seconds, others = fastest_in_turn([model, other], images)
    return seconds / others


def _wait(tensor: Tensor) -> None:
    """Wait for a device that works on its own."""
    synchronize = getattr(getattr(torch, tensor.device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()
