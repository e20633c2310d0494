from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from limits import GIGABYTE, alone, each


def misbehaving(case: str) -> Any:
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif case == "leave":
        os._exit(3)
    elif case == "hang":
        time.sleep(60)
    elif case == "fail":
        raise ValueError("no")
    elif case == "fill":
        torch.ones(4 * GIGABYTE)
    return case


def test_each_case_ends_for_itself() -> None:
    cases = ["a", "crash", "fail", "hang", "leave", "fill", "b"]
    ended = list(each(misbehaving, cases, memory=3 * GIGABYTE, seconds=2))
    assert [one.kind for one in ended] == ["done", "crashed", "raised", "hung", "crashed", "raised", "done"]
    assert [one.value for one in ended if one.kind == "done"] == ["a", "b"]
    assert ended[1].text == "SIGSEGV" and ended[2].text == "ValueError: no" and ended[4].text == "exit code 3"


def test_alone() -> None:
    assert alone(lambda: 3).value == 3
    assert alone(lambda: misbehaving("crash")).text == "SIGSEGV"
