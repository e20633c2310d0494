"""README says what the committed results say."""

from __future__ import annotations

import json
import statistics
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


def _searches(suite: str) -> list[list[float]]:
    """Validation scores of the positions tried, from the deepest to the input, of every search of a suite."""
    results = json.loads((RESULTS / suite / "results.json").read_text(encoding="utf-8"))
    found = [[c for c in run.get("search", ()) if c["score"] is not None] for run in results["runs"]]
    return [[c["score"] for c in tried] for tried in found if len(tried) > 2 and tried[-1]["at"] == "input"]


def _by_the_rule(scores: list[float]) -> float:
    """The best score seen by a search that stops at the first position that is no better than those before."""
    best = scores[0]
    for score in scores[1:]:
        if score <= best:
            break
        best = score
    return best


def test_what_is_said_of_the_papers_rule_is_what_the_results_hold() -> None:
    decision = (ROOT / "docs" / "adr" / "0009-the-input-is-tried.md").read_text(encoding="utf-8")
    total = 0
    for suite in SUITES:
        searches = _searches(suite)
        short = [100 * (max(scores) - _by_the_rule(scores)) for scores in searches]
        worse = [points for points in short if points > 0]
        least = f", by {min(worse):.1f} or more" if len(worse) == len(searches) else ""
        row = f"| `{suite}` | {len(searches)} | {len(worse)} times{least} | {max(worse):.1f} | never worse |"
        assert row in decision
        assert all(max(_by_the_rule(scores), scores[-1]) == max(scores) for scores in searches)
        total += len(searches)
    assert f"hold {total} searches" in decision
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"in all {total} searches of these results" in readme
    short = [100 * (max(scores) - _by_the_rule(scores)) for scores in _searches("zoo")]
    assert f"in `zoo` that is {min(short):.0f} to {max(short):.0f} points of validation score below the input" in readme


def test_what_is_said_of_the_zoo_is_what_its_tables_hold() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    folder = ROOT / "docs" / "zoo"
    swept, later, targets = (
        json.loads((folder / part / "zoo.json").read_text(encoding="utf-8"))["rows"]
        for part in (".", "later", "targets")
    )
    families = [row for row in swept if row["name"].startswith("timm/")]
    others = [row for row in swept if row not in families]
    failed = [
        row["name"] for row in swept if not (row["target"]["passed"] and row["source"] and row["source"]["passed"])
    ]
    assert f"each of timm's {len(families)} families and of {len(others)} of torchvision and transformers" in readme
    assert len(failed) == 2 and set(failed) == {row["name"] for row in later} and "All pass as both but two." in readme
    again = {row["name"]: row["source"] for row in later if row["target"]["passed"]}
    assert list(again) == ["timm/gemma4_vit_167m_enc"]
    timm, rest = ([row["source"] for row in rows if row["name"] not in failed] for rows in (families, others))
    assert f"masked and slim is {max(source['error'] for source in timm + rest):.0e}." in readme
    prunable = statistics.median(source["prunable"] for source in timm)
    assert f"median over timm's families {prunable:.1%} of the parameters are prunable" in readme
    seconds = [source["seconds"] for source in timm]
    slow = again["timm/gemma4_vit_167m_enc"]["seconds"], max(source["seconds"] for source in rest)
    assert (
        f"{statistics.median(seconds):.1f} s in the median over these, at most {max(seconds):.1f} s "
        f"(Gemma4's, later, {slow[0]:.0f} s; of torchvision's, {slow[1]:.0f} s)"
    ) in readme
    passed = {
        library: [row["target"]["passed"] for row in targets if row["name"].startswith(f"{library}/")]
        for library in ("timm", "transformers", "torchvision")
    }
    told = ", ".join(f"{sum(flags)} of {len(flags)} of {library}" for library, flags in list(passed.items())[:2])
    assert f"{told}, and {sum(passed['torchvision'])} of {len(passed['torchvision'])} of torchvision" in readme
