"""README says what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netclone.benchmarking.reporting import markdown, overview

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DEMO = {
    "target before": "target",
    "target with the clone": "grafted",
    "target, clone removed": "removed",
    "source": "source",
}
SUITES = [name for name in ("fashion", "cifar10", "zoo") if (RESULTS / name).is_dir()]


def test_the_table_of_methods_is_that_of_the_results() -> None:
    results = [json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8")) for name in SUITES]
    assert overview(results) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_demo_is_that_of_its_results() -> None:
    results = json.loads((RESULTS / "demo" / "results.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for title, name in DEMO.items():
        cells = (f"{100 * results['scores'][name][kind]:.1f}%" for kind in ("old", "new", "all"))
        assert f"| {title} | {' | '.join(cells)} |" in readme
    module, source = results["costs"]["module"], results["costs"]["source"]
    shares = [f"{100 * module[kind] / source[kind]:.1f}%" for kind in ("parameters", "macs")]
    assert f"The module has {shares[0]} of the source's parameters and {shares[1]} of its MACs" in readme


@pytest.mark.parametrize("name", SUITES)
def test_the_tables_of_a_suite_are_those_of_its_results(name: str) -> None:
    results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    assert (RESULTS / name / "results.md").read_text(encoding="utf-8") == markdown(results)
