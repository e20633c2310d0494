"""Time by node and in turn, with a clock that only the tests move."""

import pytest
import torch
from torch import fx, nn

from netclone.graph import timing
from netclone.graph.timing import relative_time, seconds_of_nodes


class Clock:
    """Stands still unless something takes time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    stands = Clock()
    monkeypatch.setattr(timing, "time", stands)
    return stands


def test_every_node_has_its_own_time_and_the_fastest_run_counts(clock):
    runs = iter([5.0, 3.0, 4.0])

    class Slow(nn.Module):
        def forward(self, x):
            clock.now += next(runs)
            return x + 1

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return True

    net = nn.Sequential(nn.ReLU(), Slow())
    graph = fx.GraphModule(net, Tracer().trace(net))
    found = seconds_of_nodes(graph, torch.zeros(1, 2), 3)
    assert found["_1"] == 3.0 and found["_0"] == 0.0


def test_models_run_in_turn_and_the_fastest_run_of_each_counts(clock):
    order = []

    def takes(name, seconds):
        def run(images):
            order.append(name)
            clock.now += seconds + (len(order) < 20)  # all else that the machine does comes on top

        return run

    assert relative_time(takes("a", 1.0), takes("b", 4.0), torch.zeros(1)) == 0.25
    assert order[:4] == ["a", "b", "a", "b"]
