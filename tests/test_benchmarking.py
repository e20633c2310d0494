"""The benchmark: the digits suite end to end, once; what it writes, resumes, reuses and refuses."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from netclone import benchmarking, cli
from netclone.baselines import ENSEMBLES, HEADS, TUNING, Recipe, Trial, Tuned
from netclone.benchmarking import choices, modularising, plots, searching
from netclone.benchmarking.networks import ResNet, Training, cropped, train_network
from netclone.benchmarking.planning import JOINT, REFITS, Job, planned
from netclone.benchmarking.reporting import _table, markdown
from netclone.benchmarking.running import _Bench, _code, changed
from netclone.benchmarking.scores import Row, gap, rows, tables
from netclone.benchmarking.suites import RATES, SUITES, in_development, suite_named
from netclone.benchmarking.training import Networks
from netclone.errors import ArgumentError, FitError
from netclone.learning.neighbourhoods import mirrored
from netclone.runtime import dependencies
from netclone.runtime.journal import Journal

runner = CliRunner()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks this small gain nothing from a second thread; the benchmark leaves the number alone then."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the digits suite."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "out"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_rng_state()
        result = runner.invoke(cli.app, ["bench", "digits", "--seeds", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert torch.equal(before, torch.get_rng_state())
    return out


def results_in(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return data


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """What of a run must be the same whenever it is run."""
    return {name: value for name, value in run.items() if not name.endswith("seconds")}


@pytest.mark.long
def test_every_method_is_there_with_figures(ran: Path) -> None:
    results = results_in(ran)
    main = [run for run in results["runs"] if run["study"] == "main"]
    for setting in SUITES["digits"].settings:
        for fraction in setting.fractions:
            methods = {r["method"] for r in main if (r["setting"], r["fraction"]) == (setting.name, fraction)}
            assert methods >= {*TUNING, *ENSEMBLES, *HEADS, JOINT, "netclone 50%"}
    assert {run["study"] for run in results["runs"]} == {"main", "curve", "localize", "ablation"}
    for run in results["runs"]:
        assert run["error"] == ""
        others = "prompts" in run["method"] or run["method"] == "ZipIt"  # the target is another, convolutional network
        assert bool(run.get("does_not_apply")) == others
        if run.get("does_not_apply"):
            continue
        assert 0 <= run["new"] <= 1 and 0 <= run["validation"] <= 1 + 1e-6 and run["seconds"] >= 0
        assert run["mean"] == pytest.approx((run["old"] + run["new"]) / 2)
        assert run["old_lost"] == pytest.approx(100 * (run["old_before"] - run["old"]))
    assert all(run["locality_closed"] == 0 for run in main if run["method"].startswith("netclone"))
    assert all("recipe" in run for run in main if run["method"] in TUNING and not run["does_not_apply"])
    assert {(found["method"], found["group"]) for found in results["searches"]} == {
        (method, group) for method in TUNING if "prompts" not in method for group in "MS"
    }


@pytest.mark.long
def test_settings_come_before_studies_and_refits_are_told_apart(ran: Path) -> None:
    lines = (ran / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [record for record in map(json.loads, lines) if not record["key"].startswith("search|")]
    assert list(dict.fromkeys((run["study"], run["group"]) for run in runs)) == [
        ("main", "M"),
        ("main", "S"),
        ("localize", "M"),
        ("curve", "M"),
        ("ablation", "M"),
    ]
    options = {run["method"]: run["options"] for run in runs if run["study"] == "localize"}
    assert set(options) == {f"{m}, {words}" for m in SUITES["digits"].localize for words in REFITS}
    for method, given in options.items():
        assert given["reconstruct" if "plain" in method else "distill_steps"] == ("distilled" in method) * 4


def test_all_methods_are_compared_once_and_the_best_known_in_further_settings_and_clone_sets() -> None:
    digits = SUITES["digits"]
    first, other = (replace(setting, fractions=(0.2, 0.5)) for setting in digits.settings)
    networks: Any = None  # they are looked at for positions alone
    jobs = planned(replace(digits, settings=(first, other)), 2, networks)
    brief = ["fine-tune", "LwF", "source as teacher"]
    brief += ["RanPAC, both features", "gated ensemble", "fitted gated ensemble"]
    everything = [*TUNING, *ENSEMBLES, *HEADS]
    for seed in (0, 1):
        for setting, fraction, ours, others in (
            (first, 0.2, ["netclone 50%", "netclone 25%"], everything),
            (first, 0.5, ["netclone 50%", "netclone 25%"], brief),
            (other, 0.2, ["netclone 50%"], brief),
            (other, 0.5, ["netclone 50%"], brief),
        ):
            asked = ("main", setting, fraction, seed)
            found = [job.method for job in jobs if (job.study, job.setting, job.fraction, job.seed) == asked]
            assert found == [*ours, *others, JOINT]
    main = [(job.setting.name, job.fraction) for job in jobs if job.study == "main"]
    assert list(dict.fromkeys(main)) == [("M", 0.2), ("S 5", 0.2), ("M", 0.5), ("S 5", 0.5)]


CLONE = "netclone 50%"
IMPORTS = {
    "baselines/lora.py": "from netclone.baselines.training import train\nfrom netclone.cloning.method import clone\n",
    "baselines/training.py": "from netclone.learning.data import balance\nfrom netclone.graph.tracing import trace\n",
    "cloning/method.py": "from netclone.cloning.placing import place\n",
}


@pytest.fixture
def code(tmp_path: Path) -> Iterator[Path]:
    """The package's modules, without code but for a few imports: digests are of these."""
    for path in dependencies.PACKAGE.rglob("*.py"):
        name = path.relative_to(dependencies.PACKAGE)
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(IMPORTS.get(name.as_posix(), ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dependencies, "PACKAGE", tmp_path)
        dependencies.code_digest.cache_clear()
        yield tmp_path
    dependencies.code_digest.cache_clear()


@pytest.mark.parametrize(
    ("file", "concerned"),
    [
        ("baselines/lora.py", {"LoRA"}),
        ("baselines/training.py", {"LoRA"}),  # which imports it
        ("baselines/merging.py", {"ZipIt"}),
        ("baselines/prompting.py", {"shallow prompts", "deep prompts", "class prompts"}),
        ("baselines/frozen.py", {*HEADS, "gated ensemble", "fitted gated ensemble"}),
        ("baselines/ensembling.py", {"ensemble", "calibrated ensemble", "pruned ensemble", JOINT}),
        ("cloning/method.py", {CLONE}),
        ("cloning/placing.py", {CLONE}),
        ("learning/data.py", {"LoRA"}),  # through its training
        ("graph/tracing.py", set()),
        ("metrics/evaluating.py", {*TUNING, *ENSEMBLES, *HEADS, JOINT, CLONE}),
    ],
)
def test_a_change_in_the_code_concerns_the_methods_that_it_makes(code: Path, file: str, concerned: set[str]) -> None:
    first = SUITES["digits"].settings[0]
    jobs = [Job("main", first, 0.2, 0, method) for method in (*TUNING, *ENSEMBLES, *HEADS, JOINT)]
    jobs.append(Job("main", first, 0.2, 0, CLONE, (("keep", 0.5),)))
    before = {job.method: _code(job) for job in jobs}
    assert len({before[method] for method in ("fine-tune", "LoRA", "DER", "ZipIt", "ensemble", CLONE)}) == 6
    dependencies.code_digest.cache_clear()
    with (code / file).open("a") as changed_file:
        changed_file.write("# another line\n")
    assert {job.method for job in jobs if _code(job) != before[job.method]} == concerned


@pytest.mark.long
def test_the_results_name_no_path_of_the_machine(ran: Path) -> None:
    for file in ("results.json", "results.md", "runs.jsonl"):
        assert str(ran.parent) not in (ran / file).read_text(encoding="utf-8")
    assert results_in(ran)["command"].startswith("netclone bench digits --seeds 1")


@pytest.mark.long
def test_module_is_at_most_half_of_the_source(ran: Path) -> None:
    """Adapter and classifier included."""
    sizes = {run["method"]: run["size"] for run in results_in(ran)["runs"] if run["study"] == "main" and "size" in run}
    assert 0 < sizes["netclone 25%"] <= 0.25 and 0 < sizes["netclone 50%"] <= 0.5
    assert sizes[JOINT] == sizes["ensemble"] == 1


@pytest.mark.long
def test_markdown_says_what_the_json_says(ran: Path) -> None:
    results = results_in(ran)
    text = (ran / "results.md").read_text(encoding="utf-8")
    assert text == markdown(results)
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    for (_, _, table), section in zip(tables(results), sections, strict=False):
        lines = {cells[0].strip("* "): cells for cells in _cells(section)}
        assert set(lines) >= {row.method for row in table}
        means = []
        for row in table:
            own = [r for r in results["runs"] if r["study"] == "main" and r["method"] == row.method]
            titled = next(r for r in own if f"{r['fraction']:.0%} of" in section and section.startswith(r["group"]))
            cells = lines[row.method]
            if titled["does_not_apply"]:
                assert cells[1] == "does not apply" and f"- {row.method}: {titled['does_not_apply']}" in text
                continue
            assert cells[1:3] == [f"{100 * titled['old']:.1f}%", f"{100 * titled['new']:.1f}%"]
            assert cells[3].startswith(f"{100 * titled['mean']:.1f}%")
            assert cells[4] == f"{titled['old_lost']:.1f}"
            means.append(titled["mean"])
        assert means == sorted(means, reverse=True)


def _cells(section: str) -> list[list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.long
def test_plots_are_drawn_and_can_be_drawn_again(ran: Path) -> None:
    for name in ("time.png", "size.png", "old-new.png", "search.png"):
        assert (ran / name).read_bytes().startswith(b"\x89PNG")
        (ran / name).unlink()
    text = (ran / "results.md").read_text()
    (ran / "results.md").unlink()
    result = runner.invoke(cli.app, ["bench", "digits", "--report", "--out", str(ran)])
    assert result.exit_code == 0, result.output
    assert (ran / "results.md").read_text() == text
    assert (ran / "search.png").exists()
    assert not list(ran.glob("*.part"))


RESULTS = Path(__file__).parent.parent / "docs" / "results"
COMMITTED = [file.parent for file in sorted(RESULTS.rglob("old-new.png"))]


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_plots_of_the_committed_results_fit_a_page(committed: Path, tmp_path: Path) -> None:
    """They can be drawn again, at twice the 690 pixels of a page, and those that are committed were so drawn."""
    results = json.loads((committed / "results.json").read_text())
    plots.draw(results, tmp_path)
    timed = {"time.png"} if "every-position" not in committed.parts else set()
    assert {path.name for path in tmp_path.iterdir()} == {"size.png", "old-new.png", "search.png"} | timed
    for path in tmp_path.iterdir():
        sizes = [struct.unpack(">II", file.read_bytes()[16:24]) for file in (path, committed / path.name)]
        assert sizes[0] == sizes[1] and sizes[0][0] == 2 * 690, path.name


def test_of_classifiers_over_features_the_best_of_each_kind_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are drawn; the others are points that no label may cover."""
    seen: list[Any] = []
    monkeypatch.setattr(plots, "label", lambda axes, named, ours, avoid: seen.append((list(named), avoid)))
    names = ["SLDA, both features", "LwF", "SLDA, source features", "RanPAC, source features"]
    named = {name: (float(i), 0.0) for i, name in enumerate(names)}
    axes: Any = None
    plots._label(axes, {"settings": {"heads": list(HEADS)}}, named)
    assert seen == [([names[0], names[1], names[3]], [[(2.0, 0.0)]])]


def test_ours_the_best_of_each_kind_and_what_no_cheaper_one_beats_are_labelled() -> None:
    def row(method: str, mean: float, ms: float) -> Row:
        return Row(method, {"mean": mean, "ms": ms}, mean, mean, 1)

    table = [
        row("a", 0.9, 4.0),
        row("netclone 50%", 0.8, 5.0),
        row("b", 0.7, 6.0),
        row("c", 0.6, 3.0),
        row("d", 0.5, 9.0),
    ]
    settings = {"tuning": ["d", "b"], "ensembles": ["a"], "heads": [], "joint": "none"}
    assert plots._telling({"settings": settings}, table, "ms") == ["a", "netclone 50%", "b", "c"]


def test_in_a_crowded_plot_only_those_that_tell_most_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than sixteen: ours, the best of each kind, the bound, and what no cheaper one beats; over time always."""
    seen: list[set[str]] = []
    monkeypatch.setattr(plots, "label", lambda axes, named, ours, avoid: seen.append(set(named)))
    setting = {"name": "M", "group": "M", "new": [5], "fractions": [5]}
    settings = {"ours": "netclone 50%", "settings": [setting], "joint": "joint"}
    settings |= {"tuning": ["t1", "t2"], "ensembles": ["e1", "e2"], "heads": ["h1, both", "h1, source"]}
    kinds = ["t1", "t2", "e1", "e2", "h1, both", "h1, source", "netclone 50%", "netclone 25%", "joint"]
    for others in (7, 9):
        names = [*kinds, *(f"other {number}" for number in range(others))]
        runs = [
            {"method": name, "study": "main", "group": "M", "setting": "M", "fraction": 5, "seed": 0, "error": ""}
            | {"old": 0.9, "new": 0.9 - 0.01 * number, "mean": 0.9 - 0.005 * number, "old_lost": 1.0}
            | {"seconds": 1.0, "ms": 0.5 if name == "other 6" else 1 + number}
            | {"size": 0.1 if name == "other 5" else 0.5}
            for number, name in enumerate(names)
        ]
        seen.clear()
        plots.draw({"suite": "none", "runs": runs, "settings": settings}, tmp_path)
        over_time, over_size, old_new, _ = seen
        telling = {"t1", "e1", "h1, both", "netclone 50%", "netclone 25%", "joint", "other 6"}
        assert over_time == telling
        rest = {*names} - {"h1, source"}
        assert over_size == ((telling - {"other 6"} | {"other 5"} if len(names) > 16 else rest) - {"joint"})
        assert old_new == (telling if len(names) > 16 else rest)


def test_a_time_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    runs = [
        {"method": name, "study": "main", "group": "M", "setting": "M", "fraction": 5, "seed": 0, "error": ""}
        | {"old": 0.9, "new": 0.7, "mean": 0.8, "old_lost": lost, "size": 0.5, "seconds": 1.0, "ms": ms}
        for name, ms, lost in (("netclone 50%", 1.5, 1.0), ("ensemble", 3.0, 9.0))
    ]
    setting = {"name": "M", "group": "M", "new": [5], "fractions": [5]}
    settings = {"ours": "netclone 50%", "settings": [setting], "tuning": [], "ensembles": ["ensemble"], "joint": ""}
    plots.draw({"suite": "none", "runs": runs, "settings": settings}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"time.png", "size.png", "old-new.png", "search.png"}
    content = (tmp_path / "time.png").read_bytes()
    for run in runs:
        run["old_lost"] = 20.0
    plots.draw({"suite": "none", "runs": runs, "settings": settings}, tmp_path)
    assert (tmp_path / "time.png").read_bytes() != content


def test_a_source_of_the_other_half_and_clone_sets_of_so_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarking.training, "train_network", lambda *args, **options: None)
    digits = SUITES["digits"]
    few = replace(digits.settings[0], fractions=(1, 3))
    suite = replace(digits, source_knows=(5, 6, 7, 8, 9), settings=(few,), networks="shared")
    networks = Networks(suite, suite.load(tmp_path), tmp_path, tmp_path, lambda *_: None)
    bench = _Bench(networks, Journal(tmp_path / "runs.jsonl"), lambda *_: None)
    assert networks.columns("source") == (-1,) * 5 + (0, 1, 2, 3, 4) and networks.columns("joint") == tuple(range(10))
    one, three = (bench.problem(Job("main", few, count, 0, "LwF")) for count in few.fractions)
    assert three.classes == (0, 1, 2, 3, 4) and three.columns == 10
    assert torch.equal(one.train.images, one.validation.images) and one.train.labels.tolist() == list(range(10))
    assert (
        three.train.labels.bincount().tolist() == [2] * 10 and three.validation.labels.bincount().tolist() == [1] * 10
    )
    assert networks.joint(0)(three.train.images).shape == (20, 10) and three.source(three.train.images).shape == (20, 5)
    assert {path.name.split("-seed")[0] for path in tmp_path.glob("*.safetensors")} == {
        f"shared-{role}" for role in ("source", "target", "joint")
    }


def test_nothing_is_drawn_of_no_runs(tmp_path: Path) -> None:
    settings = {"ours": "netclone 50%", "settings": [{"name": "M", "group": "M", "new": [5], "fractions": [0.1]}]}
    plots.draw({"suite": "none", "runs": [], "settings": settings}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"search.png"}


@pytest.mark.long
def test_a_torn_run_is_made_again_with_the_same_figures(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in the middle of a line; networks come from the cache, and the recipes from the journal."""
    before = results_in(ran)["runs"]
    path = ran / "runs.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    studies = [json.loads(line).get("study") for line in lines]
    cut = len(lines) - 2
    assert studies[cut] is not None
    path.write_bytes(b"".join(lines[:cut]) + lines[cut][:40])
    monkeypatch.setattr(benchmarking.training, "train_network", None)  # would fail if it were called
    result = runner.invoke(cli.app, ["bench", "digits", "--seeds", "1", "--out", str(ran)])
    assert result.exit_code == 0, result.output
    assert f"{len(before) - 2} of {len(before)} runs are finished" in result.output
    after = results_in(ran)["runs"]
    assert [figures(run) for run in after] == [figures(run) for run in before]


@pytest.mark.long
def test_other_settings_run_again_and_the_cache_serves_another_folder(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned baseline, whose search the first folder holds, comes out the same when searched anew."""
    suite = SUITES["digits"]
    small = replace(suite, settings=suite.settings[-1:], curve=(), localize=(), ablations=())
    monkeypatch.setattr(benchmarking.training, "train_network", None)
    methods = {"kernel modulation": TUNING["kernel modulation"]}
    for module in (benchmarking.planning, benchmarking.running):
        monkeypatch.setattr(module, "TUNING", methods)
    first = benchmarking.run(small, out=tmp_path / "a", seeds=1, cache=ran / "cache")
    whole = {run["key"]: run for run in results_in(ran)["runs"]}
    for run in first["runs"]:
        assert figures(run) == figures(whole[run["key"]])
    setting = replace(small.settings[0], steps=3)
    other = replace(small, settings=(setting,))
    second = benchmarking.run(other, out=tmp_path / "a", seeds=1, cache=ran / "cache")
    [trained] = [run for run in second["runs"] if run["method"] == "kernel modulation"]
    assert trained["recipe"]["steps"] == 3
    clones = [[r for r in part["runs"] if r["method"] == "netclone 50%"] for part in (first, second)]
    assert clones[0] == clones[1]  # to the second: not run again


def test_in_development_the_test_split_plays_no_part() -> None:
    suite = suite_named("digits")
    whole, part = suite.load(Path()), in_development(suite).load(Path())
    images = torch.cat([part.images, part.test_images]).flatten(1)
    assert torch.equal(images.unique(dim=0), whole.images.flatten(1).unique(dim=0))
    assert len(images) == len(whole.images)
    assert part.columns == whole.columns
    share = part.test_labels.bincount() / whole.labels.bincount()
    assert bool(((share - 0.1).abs() < 0.01).all())


def run_of(method: str, seed: int, old: float, new: float, lost: float = 1.0) -> dict[str, Any]:
    return {
        **{"method": method, "seed": seed, "old": old, "new": new, "mean": (old + new) / 2, "old_lost": lost},
        **{"locality_open": 0.0, "size": 0.5, "seconds": 2.0, "error": ""},
    }


def test_gap_is_a_share_of_the_way_from_the_best_tuning_baseline_to_joint_training() -> None:
    table = rows(
        [
            *(run_of("joint", seed, 0.95, 0.93) for seed in (0, 1)),
            *(run_of("ours", seed, 0.94, 0.92 - 0.02 * seed, lost=0.5) for seed in (0, 1)),
            *(run_of("good", seed, 0.92, 0.88, lost=2.0) for seed in (0, 1)),
            *(run_of("poor", seed, 0.5, 0.5) for seed in (0, 1)),
            *(run_of("ensemble", seed, 0.99, 0.99) for seed in (0, 1)),
        ]
    )
    assert [row.method for row in table] == ["ensemble", "joint", "ours", "good", "poor"]
    ours = table[2]
    assert (ours.low, ours.high) == pytest.approx((0.92, 0.93))
    found = gap(table, "ours", ("poor", "good"), "joint")
    assert found is not None
    assert found.best == "good"
    assert found.closed == pytest.approx((0.925 - 0.90) / (0.94 - 0.90))
    assert found.lead == pytest.approx(0.025)
    assert (found.ours_lost, found.best_lost) == (0.5, 2.0)
    assert gap(table, "ours", ("ensemble",), "joint").closed is None  # type: ignore[union-attr]
    assert gap(table, "ours", ("absent",), "joint") is None


@pytest.mark.parametrize("fails_from", [math.inf, 0.2])
def test_a_search_goes_on_while_its_best_is_at_an_end_then_looks_at_depth_and_distillation(
    monkeypatch: pytest.MonkeyPatch, fails_from: float
) -> None:
    def quality(recipe: Recipe, *_: object) -> tuple[float, float]:
        far = abs(math.log(recipe.lr / 0.27)), abs(recipe.frozen - 2), abs(math.log(recipe.distillation / 3))
        return -sum(far), 0.0

    tried: list[Recipe] = []

    def tuned(method: object, problem: object, recipes: list[Recipe], progress: object) -> Tuned:
        tried.extend(recipes)
        good = [recipe for recipe in recipes if recipe.lr < fails_from]
        if not good:
            raise FitError("no recipe works")
        best = max(good, key=quality)
        trials = tuple(Trial(recipe, quality(recipe)[0], 1.0) for recipe in recipes)
        return Tuned(best, best, quality(best)[0], trials, float(len(recipes)))  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "tune", tuned)
    monkeypatch.setattr(searching, "validated", quality)
    problem: Any = SimpleNamespace(validation=None, old=None)
    rates = (3e-3, 1e-2, 3e-2)
    choices = (("frozen", (0, 1, 2, 3)), ("distillation", (0.3, 3.0)), ("old_weight", ()))
    found = searching.search(None, problem, Recipe(lr=1, steps=1), rates, choices)  # type: ignore[arg-type]
    further = (0.09, 0.27, 0.81) if fails_from == math.inf else (0.09, 0.27)
    assert [recipe.lr for recipe in tried[:-5]] == pytest.approx([*rates, *further])
    assert (found.recipe.lr, found.recipe.frozen) == (pytest.approx(0.27 if fails_from == math.inf else 0.09), 2)
    assert found.recipe.distillation == 3.0
    assert len(found.trials) == found.seconds == len(tried) - (fails_from < math.inf)


def test_several_runs_of_a_seed_are_averaged_before_seeds_are() -> None:
    [row] = rows([run_of("a", 0, 1.0, 1.0), run_of("a", 0, 0.0, 0.0), run_of("a", 1, 1.0, 1.0)])
    assert isinstance(row, Row)
    assert (row.figures["mean"], row.low, row.high, row.runs) == (0.75, 0.5, 1.0, 3)


def test_a_method_that_does_not_apply_has_no_figures_and_did_not_fail() -> None:
    left_out = {"method": "b", "seed": 0, "error": "", "does_not_apply": "b: for others"}
    table = rows([run_of("a", 0, 1.0, 1.0), left_out])
    assert table[1].figures["mean"] is None
    assert (table[1].failed, table[1].inapplicable) == ((), ("b: for others",))
    assert "| b | does not apply |" in "\n".join(_table(table, set()))


def test_what_a_search_tries_beyond_the_learning_rate() -> None:
    def names(method: str) -> list[str]:
        return [name for name, _ in choices.choices_of(method, (0, 2), all_of_them=True)]

    assert names("LwF") == ["frozen", "distillation", "old_weight"]
    assert names("UHC") == ["frozen"]  # it knows no labels
    assert set(choices.OPTIONS) | set(choices.DEPTHS) <= set(TUNING) == set(RATES)
    assert choices.choices_of("DER", (0, 2), all_of_them=False) == [("frozen", ())]


def test_a_failed_run_is_told_and_not_averaged() -> None:
    failed = {"method": "b", "seed": 0, "error": "FitError: it diverged"}
    table = rows([run_of("a", 0, 1.0, 1.0), failed])
    assert table[1].figures["mean"] is None
    assert table[1].failed == ("FitError: it diverged",)


@pytest.mark.parametrize(
    ("suite", "file"),
    [("fashion", "fashion_mnist.npz"), ("cifar10", "cifar10_jpeg_1000x500.npz"), ("zoo", "tiny_imagenet_10c_64.npz")],
)
def test_missing_data_is_one_line_that_names_the_file(
    suite: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def offline(*args: Any, **options: Any) -> None:
        raise RuntimeError("no network")

    for name in ("FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, offline)
    out = tmp_path / "out"
    result = runner.invoke(cli.app, ["bench", suite, "--data", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert file in result.stderr and "--data" in result.stderr


def test_unknown_suites_seeds_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="expected one of digits, fashion"):
        suite_named("mnist")
    with pytest.raises(ArgumentError, match="seeds: got 0"):
        benchmarking.run(SUITES["digits"], out=tmp_path, seeds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot write"):
        benchmarking.run(SUITES["digits"], out=tmp_path / "file", seeds=1)
    with pytest.raises(ArgumentError, match="no results"):
        benchmarking.report(tmp_path)


@pytest.mark.parametrize("run", [benchmarking.run, modularising.run])
def test_a_device_that_is_not_there_is_refused_before_a_folder_is_made(run: Any, tmp_path: Path) -> None:
    suite = SUITES["digits"] if run is benchmarking.run else modularising.MODULES
    with pytest.raises(ArgumentError, match="device: 'nosuch' cannot be used here"):
        run(suite, out=tmp_path / "out", device="nosuch")
    assert not (tmp_path / "out").exists()


def test_the_device_is_named_where_it_is_no_cpu(ran: Path) -> None:
    results = results_in(ran)
    assert results["device"] == "cpu" and results["clock"] == "processor seconds"
    facts = {"device": "NVIDIA H200", "clock": "seconds"}
    elsewhere = markdown({**results, **facts})
    assert "1 thread; netclone" in markdown(results) and "1 thread, on one NVIDIA H200; netclone" in elsewhere
    assert re.search(r"Runs took \d+ seconds", elsewhere)


def test_changed_weights_are_counted_once() -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert changed(target, target) == 0
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    other[0].load_state_dict(target[0].state_dict())
    assert changed(target, other) == 4 * 3 + 3


@pytest.mark.parametrize(("shortcut", "channels_last"), [("conv", True), ("conv", False), ("pad", False)])
def test_resnet_and_its_training_are_made_by_the_seed(shortcut: str, channels_last: bool) -> None:
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 2
    how = Training(1, 0.1, batch_size=8, channels_last=channels_last)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = ResNet(3, 2, depth=1, shortcut=shortcut)
        train_network(model, images, labels, how, 3, augment=mirrored)
        outputs.append(model(images))
    assert torch.equal(*outputs)
    assert not model.training


def test_cropped_moves_images_without_new_values() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    moved = cropped(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    assert set(moved.flatten().tolist()) <= set(image.flatten().tolist())
