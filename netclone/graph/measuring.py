"""measure(graph, *inputs): the shape that every node of a graph gives and the MACs it takes, by running it once."""

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
    """What a node gives, without the batch dimension, and its MACs; the shape is None where it is not one tensor."""

    shape: tuple[int, ...] | None
    macs: int


class _Meter(fx.Interpreter):
    """An interpreter that counts the MACs of every node; those of a module's call are all of the module's."""

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
    """Shape and MACs by the name of the node, for the given inputs; what could not be run is not in it.

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
        except Exception:  # torch's counter trips over some operators: nodes before are measured, the others are not
            return meter.found
    return meter.found


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run without gradient and reproducibly, in eval mode; modes and random state are restored."""
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
    """As in eval mode, with no parameter asking for a gradient: torch's counter of MACs trips over some that do.

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
