"""README and the pages say what the committed results say."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from netclone.benchmarking import module_tables
from netclone.benchmarking.reporting import markdown, overview
from netclone.benchmarking.scores import gap, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
SUITES = ("fashion", "cifar10", "zoo")
ALL = [str(file.parent.relative_to(RESULTS)) for file in sorted(RESULTS.rglob("results.md"))]


def text_of(page: str) -> str:
    """A page's text, each run of blanks as one."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def results_of(suite: str) -> dict[str, Any]:
    return json.loads((RESULTS / suite / "results.json").read_text(encoding="utf-8"))


def test_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1400


def test_every_link_of_readme_leads_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https:)([^)]+)\)", readme)]
    assert len(links) > 30
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_table_of_methods_is_a_part_of_that_of_the_results() -> None:
    """Rows as the whole table has them, in its order; netclone's and those that are best in a suite among them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    whole = overview([results_of(name) for name in SUITES]).splitlines()
    start = readme.index(whole[0])
    shown = readme[start : readme.index("", start)]
    assert [line for line in whole if line in shown] == shown
    assert [line for line in whole if "**" in line] == [line for line in shown if "**" in line]


def test_the_table_of_the_demo_is_that_of_its_results() -> None:
    results = results_of("demo")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    costs = [results["costs"][name] for name in ("target", "module", "grafted", "source")]
    for told, kind, unit, digits in (
        ("parameters", "parameters", 1, ",.0f"),
        ("MACs, millions", "macs", 1e6, ".2f"),
        ("latency of one image, ms", "latency_ms", 1, ".1f"),
    ):
        assert f"| {told} | {' | '.join(format(cost[kind] / unit, digits) for cost in costs)} |" in readme
    for told, kind in (("old classes 0-6", "old"), ("new classes 7-9", "new")):
        target, grafted, source = (f"{results['scores'][name][kind]:.1%}" for name in ("target", "grafted", "source"))
        assert f"| accuracy, {told} | {target} | | {grafted} | {source} |" in readme


def test_what_is_said_of_a_resnet_is_what_was_measured() -> None:
    rows = {row[0]: row[1] for row in json.loads((RESULTS / "surgery.json").read_text(encoding="utf-8"))["rows"]}
    macs, latency = (rows[f"{what} slim/dense, resnet50 keep 0.5"] for what in ("MACs", "latency"))
    assert f"has {macs:.2f} of the MACs and takes {latency:.2f} of the time" in text_of("README.md")


def test_what_is_said_of_what_is_lost_and_how_long_it_takes_is_what_the_results_hold() -> None:
    lost, times = [], []
    for results in map(results_of, SUITES):
        settings = results["settings"]
        found = gap(tables(results)[0][2], settings["ours"], settings["tuning"], settings["joint"])
        assert found is not None and found.ours_seconds is not None and found.best_seconds is not None
        lost.append((f"{found.ours_lost:.1f}", f"{found.best_lost:.1f}"))
        times.append(f"{found.ours_seconds / found.best_seconds:.1f}")
    page = text_of("docs/results/index.md")
    first, *others = lost
    told = " and ".join(f"{ours} instead of {best}" for ours, best in others)
    assert f"netclone loses {first[0]} points of the old classes instead of {first[1]}, {told}." in page
    learning = f"took {', '.join(times[:-1])} and {times[-1]} times one run of the best tuning method"
    assert learning in page and learning in text_of("README.md")


@pytest.mark.parametrize("name", ALL)
def test_the_tables_of_a_suite_are_those_of_its_results(name: str) -> None:
    results = results_of(name)
    text = (module_tables.markdown if results["suite"] == "modules" else markdown)(results)
    assert (RESULTS / name / "results.md").read_text(encoding="utf-8") == text


def _searches(suite: str) -> list[list[float]]:
    """Validation scores of the positions tried, from the deepest to the input, of every search of a suite."""
    results = results_of(suite)
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
        searches = _searches(f"every-position/{suite}")
        short = [100 * (max(scores) - _by_the_rule(scores)) for scores in searches]
        worse = [points for points in short if points > 0]
        least = f", by {min(worse):.1f} or more" if len(worse) == len(searches) else ""
        row = f"| `{suite}` | {len(searches)} | {len(worse)} times{least} | {max(worse):.1f} | never worse |"
        assert row in decision
        assert all(max(_by_the_rule(scores), scores[-1]) == max(scores) for scores in searches)
        total += len(searches)
    assert f"hold {total} searches" in decision
    page = text_of("docs/results/index.md")
    assert f"in all {total} searches of these results" in page
    short = [100 * (max(scores) - _by_the_rule(scores)) for scores in _searches("every-position/zoo")]
    assert f"in `zoo` that is {min(short):.0f} to {max(short):.0f} points of validation score below the input" in page


def test_what_is_said_of_the_zoo_is_what_its_tables_hold() -> None:
    page = text_of("docs/results/index.md")
    folder = ROOT / "docs" / "zoo"
    swept, targets = (
        json.loads((folder / part / "zoo.json").read_text(encoding="utf-8"))["rows"] for part in (".", "targets")
    )
    assert all(row["target"]["passed"] and row["source"]["passed"] for row in swept)
    whole = [row["name"] for row in swept if row["source"]["prunable"] == 0]
    assert whole == ["timm/gmlp_ti16_224", "timm/mobilenetv5_base"]
    assert "All pass as both; in two, a gMLP and MobileNetV5's encoder, no channel may be removed." in page
    families = [row for row in swept if row["name"].startswith("timm/")]
    timm, rest = ([row["source"] for row in rows] for rows in (families, [row for row in swept if row not in families]))
    assert f"each of timm's {len(timm)} families and of {len(rest)} of torchvision and transformers" in page
    assert f"masked and slim is {max(source['error'] for source in timm + rest):.0e}." in page
    prunable = statistics.median(source["prunable"] for source in timm)
    assert f"median over timm's families {prunable:.1%} of the parameters are prunable" in page
    seconds = sorted(source["seconds"] for source in timm)
    slow = [row["name"] for row in families if row["source"]["seconds"] in seconds[-2:]]
    assert sorted(slow) == ["timm/deepseek_vit_412m", "timm/gemma4_vit_167m_enc"]
    assert (
        f"{statistics.median(seconds):.1f} s in the median over these, at most {seconds[-3]:.1f} s but for DeepSeek's "
        f"and Gemma4's encoders ({seconds[-1]:.0f} and {seconds[-2]:.0f} s) and, of torchvision's, "
        f"{max(source['seconds'] for source in rest):.0f} s"
    ) in page
    passed = {
        library: [row["target"]["passed"] for row in targets if row["name"].startswith(f"{library}/")]
        for library in ("timm", "transformers", "torchvision")
    }
    told = ", ".join(f"{sum(flags)} of {len(flags)} of {library}" for library, flags in list(passed.items())[:2])
    assert f"{told}, and {sum(passed['torchvision'])} of {len(passed['torchvision'])} of torchvision" in page


def test_what_is_said_of_torch_pruning_is_what_was_measured() -> None:
    found = json.loads((RESULTS / "against-torch-pruning.json").read_text(encoding="utf-8"))
    networks, latency = found["networks"].values(), found["latency"]
    libraries = ("netclone", "torch-pruning")
    ours, theirs = ([n[one]["seconds"] for n in networks if n[one]["passed"]] for one in libraries)
    stopped = sum(network["torch-pruning"]["reason"].startswith("stopped: ") for network in networks)
    slower = sum(one["latency"] > 1.05 for one in _near(networks))
    others = {name: n["netclone"]["reason"] for name, n in found["networks"].items() if not n["netclone"]["passed"]}
    assert others == dict.fromkeys(["timm/gmlp_ti16_224", "timm/mobilenetv5_base"], "ValueError: nothing was pruned")
    version = found["versions"]["torch-pruning"]
    for told in (
        f"Torch-Pruning {version}, told what its own example for timm tells it, slims {len(theirs)} of timm's "
        f"{len(networks)}, netclone {len(ours)}",
        f"{stopped} of Torch-Pruning's were stopped after three minutes",
        f"takes {latency['median']:.2f} of the time of Torch-Pruning's in the median of {latency['networks']}, and "
        f"more than 1.05 in {slower}.",
    ):
        assert told in text_of("docs/results/index.md")
    assert (
        f"Torch-Pruning {version} slims {len(theirs)}, {stopped} were stopped after three minutes or 18 GB, "
        f"{len(networks) - len(theirs) - stopped} failed; netclone slims {len(ours)}"
    ) in text_of("docs/explanation/other-tools.md")


def test_what_is_said_of_the_time_of_slimming_is_what_was_measured() -> None:
    found = json.loads((RESULTS / "slimming.json").read_text(encoding="utf-8"))
    networks, time = found["networks"].values(), found["time"]
    ours, theirs = (
        [network[one]["seconds"] for network in networks if network[one]["passed"]]
        for one in ("netclone", "torch-pruning")
    )
    page = text_of("docs/results/index.md")
    for told in (
        f"take {statistics.median(ours):.1f} seconds of a processor in the median and {max(ours):.1f} at most",
        f"Torch-Pruning takes {statistics.median(theirs):.1f} and {max(theirs):.1f}",
        f"{time['median']:.1f} times Torch-Pruning's time in the median of {time['networks']} ({time['least']:.2f} to "
        f"{time['most']:.1f})",
        f"`{found['command']}`",
    ):
        assert told in page


def _near(networks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where both libraries passed, and ended at MACs within 5%."""
    both = [network["both"] for network in networks if network.get("both", {}).get("passed")]
    return [one for one in both if one["our_macs"] >= 0.95 * one["macs"]]


def test_the_page_of_costs_says_what_the_budgets_left_of_the_time():
    rows = json.loads((ROOT / "docs" / "results" / "latency.json").read_text())["rows"]
    page = " ".join((ROOT / "docs" / "explanation" / "cost.md").read_text().split())
    for budget, words in (("params", "of the parameters left"), ("macs", "of the MACs"), ("latency", "of the time")):
        shares = [value for claim, value, _ in rows if f"half of the {budget}, time" in claim]
        assert len(shares) == 6 and f"alf {words} {min(shares):.2f} to {max(shares):.2f}" in page
