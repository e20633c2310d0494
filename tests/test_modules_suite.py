"""The benchmark of modules, end to end on digits: what it writes, resumes and draws."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from netclone import cli
from netclone.benchmarking import modularising
from netclone.benchmarking.modularising import METHODS, MODULES, Asked, ModuleSuite, planned
from netclone.benchmarking.module_tables import markdown
from netclone.benchmarking.suites import SUITES

SOURCE = SUITES["digits"].source
assert SOURCE.training is not None
TINY = ModuleSuite(
    name="modules",
    about="scikit-learn's digits",
    base=SUITES["digits"],
    sources=(replace(SOURCE, training=replace(SOURCE.training, epochs=1)),),
    asked=(Asked("three", (3,)), Asked("some", (0, 1, 8))),
    keeps=(0.5,),
    fraction=0.1,
    steps=3,
    search_steps=2,
    batch_size=8,
    rates={"mask": (0.03,), "fine-tuned": (3e-3,)},
    others=5,
    timed=2,
)
TRIED = ("netclone", "SeaM's loss, fine-tuned", "Torch-Pruning, fine-tuned", "magnitude")


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What of the runs must be the same whenever they are run."""
    return [{name: value for name, value in run.items() if name not in ("seconds", "time")} for run in results["runs"]]


@pytest.mark.slow
def test_the_suite_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is there, a method that cannot be used is said, and a torn journal is completed with the same."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(modularising, "METHODS", {name: METHODS[name] for name in TRIED})
    before = torch.get_rng_state()
    results = modularising.run(TINY, out=tmp_path / "out", seeds=1, command="netclone bench modules")
    assert torch.equal(before, torch.get_rng_state())
    assert len(results["runs"]) == 2 * (2 + len(TRIED))
    for run in results["runs"]:
        if run["method"].startswith("Torch-Pruning"):
            assert run["does_not_apply"].startswith("torch-pruning is not installed")
            continue
        assert run["error"] == "" and 0 <= run["accuracy"] <= 1 and 0 <= run["validation"] <= 1 + 1e-6
        assert run["macs"] == 1 if run["keep"] == 1 else 0 < run["macs"] < 0.52  # with the rows of the other classes
    given, restricted = (
        [r["accuracy"] for r in results["runs"] if r["method"] == name]
        for name in ("source, as given", "source, restricted")
    )
    assert all(one <= two + 0.1 for one, two in zip(given, restricted, strict=True))
    assert {found["what"] for found in results["searches"]} == {"SeaM, mask", "SeaM's loss, fine-tuned"}
    text = (tmp_path / "out" / "results.md").read_text()
    assert text == markdown(results) and "| does not apply |" in text and "10.1% of the weights" in text
    assert str(tmp_path) not in text + (tmp_path / "out" / "results.json").read_text()

    journal = tmp_path / "out" / "runs.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    again = modularising.run(TINY, out=tmp_path / "out", seeds=1, command="netclone bench modules")
    assert figures(again) == figures(results)

    for name in ("results.md", "time.png"):
        (tmp_path / "out" / name).unlink()
    outcome = CliRunner().invoke(cli.app, ["bench", "modules", "--report", "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "out" / "results.md").read_text() == markdown(again)
    assert (tmp_path / "out" / "time.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_is_planned_in_every_size_of_every_sub_problem() -> None:
    jobs = planned(MODULES, 3)
    assert len({job.key(MODULES) for job in jobs}) == len(jobs)
    parts = len(MODULES.sources) * len(MODULES.asked)
    assert len(jobs) == 3 * parts * (2 + len(METHODS) * len(MODULES.keeps))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    parts_in_turn = [job.part for job in jobs]
    assert list(dict.fromkeys(parts_in_turn)) == [key for key, _ in itertools.groupby(parts_in_turn)]


def test_results_of_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"runs": []}')
    outcome = CliRunner().invoke(cli.app, ["bench", "modules", "--report", "--out", str(tmp_path)])
    assert outcome.exit_code == 1 and "no results in" in outcome.stderr
