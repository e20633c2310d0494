"""Time by node and in turn, with a clock that only the tests move."""

import time

import pytest
import torch
from torch import fx, nn

from netclone.graph import timing
from netclone.graph.timing import MOST, ROUNDS, WARM_UP, clock_for, relative_time, seconds_in_turn, seconds_of_nodes


class Clock:
    """Stands still unless something takes time."""

    def __init__(self):
        self.now = 0.0


@pytest.fixture
def clock(monkeypatch):
    stands = Clock()
    monkeypatch.setattr(timing, "clock_for", lambda images: lambda: stands.now)
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


def test_models_run_in_turn_and_what_slows_both_down_cancels_out(clock):
    order = []

    def takes(name, seconds):
        def run(images):
            order.append(name)
            slower = 1 + (len(order) // 10) % 3  # whatever else the machine does, for a while
            clock.now += seconds * slower

        return run

    assert relative_time(takes("a", 1.0), takes("b", 4.0), torch.zeros(1)) == 0.25
    assert order[:4] == ["a", "b", "a", "b"] and len(order) == 2 * (WARM_UP + ROUNDS)


def test_a_round_that_was_disturbed_does_not_count(clock):
    def takes(seconds, disturbed):
        turns = iter(range(1000))

        def run(images):
            clock.now += seconds + 100 * (next(turns) in disturbed)

        return run

    first, second = takes(1.0, {0, 5, 9}), takes(2.0, {1, 7})
    assert seconds_in_turn([first, second], torch.zeros(1)) == (1.0, 2.0)


def test_networks_that_take_long_run_no_more_often_than_they_must(clock):
    turns = []

    def varies(images):
        turns.append(len(turns))
        clock.now += 1 + 0.1 * (7 * len(turns) % 30)

    seconds_in_turn([varies, varies], torch.zeros(1), 4)
    assert len(turns) == 2 * (WARM_UP + 4)


@pytest.mark.parametrize(
    ("times", "rounds"), [([1.0], ROUNDS), ([1 + 0.1 * (7 * turn % 30) for turn in range(30)], MOST)]
)
def test_rounds_go_on_until_the_ratio_is_known(clock, times, rounds):
    turns = []

    def varies(images):
        turns.append(times[len(turns) % len(times)])
        clock.now += 1e-3 * turns[-1]

    def steady(images):
        clock.now += 1e-3

    seconds_in_turn([varies, steady], torch.zeros(1))
    assert len(turns) == WARM_UP + rounds


def test_the_time_of_one_thread_is_its_own():
    """What other threads do does not count; the time that passes does where several work."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        own = clock_for(torch.zeros(1))
        torch.set_num_threads(2)
        shared = clock_for(torch.zeros(1))
        started = own(), shared()
        time.sleep(0.05)
        assert 2 * (own() - started[0]) < shared() - started[1]
    finally:
        torch.set_num_threads(before)
