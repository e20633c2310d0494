"""The search for a share of time, with clocks that are functions of what a model of time is asked for."""

import pytest
import torch

from netclone.channels.approaching import NEAR, TRIES, Try, approached, following

UNITS = 10_000


def searched(clock, keep):
    """The share that is settled for, and all that were measured, if ``clock`` tells the share of what is asked for."""
    seen = []

    def choose(asked):
        return [torch.arange(UNITS) < max(1, round(asked * UNITS))]

    def share(flags):
        seen.append(clock(int(flags[0].sum()) / UNITS))
        return seen[-1]

    def refuse(least):
        if least > keep:
            raise ArithmeticError(least)

    number, flags = approached(choose, share, keep, refuse)
    assert seen[number] == clock(int(flags[0].sum()) / UNITS)  # the flags are those of the try that is named
    return seen[number], seen


@pytest.mark.parametrize(
    "clock",
    [
        pytest.param(lambda asked: asked, id="as the model says"),
        pytest.param(lambda asked: 0.6 * asked, id="less"),
        pytest.param(lambda asked: min(2.5 * asked, 1.0), id="more"),
        pytest.param(lambda asked: 0.45 + 0.55 * asked, id="most of it whatever the width"),
        pytest.param(lambda asked: asked**2, id="bent"),
        pytest.param(lambda asked: asked**0.5, id="bent the other way"),
    ],
)
def test_it_comes_near_from_below_and_soon(clock):
    share, seen = searched(clock, 0.5)
    assert NEAR * 0.5 <= share <= 0.5
    assert len(seen) <= 6


def test_the_best_that_steps_allow_is_taken():
    share, seen = searched(lambda asked: 0.1 if asked < 0.25 else 0.4 if asked < 0.35 else 0.51, 0.5)
    assert share == 0.4 and len(seen) == TRIES


def test_the_whole_is_taken_where_it_is_little_enough():
    assert searched(lambda asked: 0.3 * asked, 0.5) == (0.3, [0.15, 0.3])


def test_time_that_no_width_saves_is_refused_with_the_least_that_was_seen():
    with pytest.raises(ArithmeticError, match="0.6"):
        searched(lambda asked: 0.6 + 0.4 * asked, 0.5)


def test_nothing_is_refused_before_nothing_is_left_to_remove():
    """However often a clock says that it is too much."""
    share, seen = searched(lambda asked: 0.49 if asked < 1e-3 else 0.51, 0.5)
    assert share == 0.49 and TRIES < len(seen) <= TRIES + 8  # from then on it asks for half


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        pytest.param({0.5: 0.8}, 0.304, id="through zero from one"),
        pytest.param({0.5: 0.05}, 1.0, id="at most twice"),
        pytest.param({0.5: 0.9, 0.4: 0.7}, 0.294, id="on along the line of two"),
        pytest.param({0.5: 0.9, 0.4: 0.9}, 0.3, id="a quarter less where less made no difference"),
        pytest.param({0.5: 0.6, 0.3: 0.4}, 0.387, id="between two"),
        pytest.param({0.5: 0.51, 0.1: 0.1}, 0.4, id="well between them"),
    ],
)
def test_what_is_asked_for_next(shares, expected):
    tries = [Try(asked, share, []) for asked, share in shares.items()]
    assert following(tries, 0.5, 0.4875) == pytest.approx(expected, abs=0.002)
