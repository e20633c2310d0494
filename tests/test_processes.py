"""A task for every name in a process of its own: what goes wrong with one is said of that one alone."""

import os
import time

import pytest

from netclone.errors import ArgumentError
from netclone.runtime.processes import Limits, each


def task(name):
    if name == "raises":
        raise ValueError("no\nsuch thing")
    if name == "dies":
        os._exit(3)
    if name == "sleeps":
        time.sleep(600)
    return {"name": name, "process": os.getpid()}


def test_one_that_raises_or_dies_ends_alone():
    found = {one.name: one for one in each(task, ["a", "raises", "dies", "b"], Limits())}
    assert set(found) == {"a", "raises", "dies", "b"}
    assert found["raises"].reason == "ValueError: no such thing"
    assert found["dies"].reason == "the process died with exit code 3"
    values = [found[name].value for name in "ab"]
    assert [value["name"] for value in values] == ["a", "b"]
    assert len({os.getpid(), *(value["process"] for value in values)}) == 3
    assert all(found[name].peak_mb > 0 for name in "ab")


def test_one_that_takes_too_long_is_stopped():
    [stopped] = each(task, ["sleeps"], Limits(seconds=2))
    assert (stopped.value, stopped.reason) == (None, "stopped: more than the limit of 2 s")


def test_nothing_to_do_is_no_outcome():
    assert list(each(task, [], Limits())) == []


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": -1}, {"processes": 0}], ids=str)
def test_limits_have_to_be_some(limits):
    with pytest.raises(ArgumentError, match="limits"):
        list(each(task, ["a"], Limits(**limits)))
