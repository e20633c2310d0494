"""measure(graph, *inputs): the output shape and the MACs of every node of a graph, by running it once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.graph.counting import MacCounter
from netclone.graph.unchanging import unchanged
from netclone.runtime.entering import deterministic


@dataclass(frozen=True)
class Measured:
    """The shape of a node's output, without the batch (None if it is not one tensor), and its MACs."""

    shape: tuple[int, ...] | None
    macs: int


class _Meter(fx.Interpreter):
    """An interpreter that counts the MACs of every node; a call of a module counts all of the module."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, Measured] = {}

    def run_node(self, n: fx.Node) -> Any:
        with MacCounter() as counter:
            value = super().run_node(n)
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
        self.found[n.name] = Measured(shape, counter.macs)
        return value


def measure(graph: fx.GraphModule, *inputs: Tensor) -> dict[str, Measured]:
    """Shape and MACs by the name of the node, for the given inputs; nodes that fail are left out.

    The graph is run in eval mode; its modes and flags are restored.

    Examples
    --------
    >>> import torch
    >>> graph = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()))
    >>> [(name, node.macs) for name, node in measure(graph, torch.zeros(1, 4)).items()]
    [('input_1', 0), ('_0', 8), ('_1', 0), ('output', 0)]
    """
    meter = _Meter(graph)
    with running(graph):
        try:
            meter.run(*(tensor.clone() for tensor in inputs))
        except Exception:  # torch's counter fails on some operators: only the nodes before are measured
            return meter.found
    return meter.found


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, without gradient and reproducibly; modes and random states are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), deterministic(), unchanged(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """As :func:`in_eval_mode`, with no parameter that requires a gradient, which torch's counter may fail on.

    Modes, flags and random state are restored.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with in_eval_mode(model):
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
