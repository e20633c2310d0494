from __future__ import annotations

import pytest
from fuzz import BEHAVED, fuzz_operators, write
from fuzzing import Case, names, run
from limits import each

from netclone.graph import dry_run as checking


def misbehaved(figures: dict[str, object]) -> object:
    return figures["misbehaved"]


def test_some_random_calls_do_not_misbehave() -> None:
    figures = fuzz_operators(500)
    assert misbehaved(figures) == []
    assert set(figures["ends"]) == set(BEHAVED)  # type: ignore[call-overload]


def test_a_check_that_lets_writes_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking._Runs, "_check_in_place", lambda *_: None)
    monkeypatch.setattr(checking, "impurity", lambda *_: "")
    seeds = [
        seed for seed in range(20_000) if names()[seed % len(names())] in ("aten.mul_.Tensor", "aten.relu_.default")
    ]
    assert "wrote into what is not its own" in {ended.value for ended in each(run, seeds)}


def test_cases_are_the_same_every_time() -> None:
    assert Case(7).nodes == Case(7).nodes != Case(8).nodes


@pytest.mark.fuzz
def test_many_random_calls_do_not_misbehave() -> None:
    figures = fuzz_operators(100_000)
    write("operators", figures)
    assert misbehaved(figures) == []
