"""write(results, out): results.json, the tables in results.md, and plots; report(out): the last two from the first."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netclone.errors import ArgumentError
from netclone.runtime.writing import write_file, write_text

Run = dict[str, Any]

FIGURES = ("old", "new", "mean", "old_lost", "locality_open", "size", "seconds")


@dataclass(frozen=True)
class Row:
    """A method over all its runs: each figure's mean over seeds, and the mean accuracy of the lowest and highest seed.

    Runs of one seed (single classes) are averaged first. ``failed`` lists the reasons of failed runs.
    """

    method: str
    figures: dict[str, float | None]
    low: float
    high: float
    runs: int
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gap:
    """netclone against the best tuning baseline and the upper bound; accuracies in [0, 1], losses in points."""

    ours: str
    best: str
    closed: float | None
    lead: float
    ours_lost: float
    best_lost: float
    ours_seconds: float | None
    best_seconds: float | None


def rows(runs: Iterable[Run]) -> list[Row]:
    """One row per method, sorted by mean accuracy; methods that always failed come last."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    found = []
    for method, own in by_method.items():
        good = [run for run in own if not run["error"]]
        failed = tuple(dict.fromkeys(run["error"] for run in own if run["error"]))
        figures = {name: _over_seeds(good, name) for name in FIGURES}
        means = [_mean([run["mean"] for run in good if run["seed"] == seed]) for seed in {r["seed"] for r in good}]
        known = [mean for mean in means if mean is not None]
        found.append(Row(method, figures, min(known, default=0.0), max(known, default=0.0), len(good), failed))
    return sorted(found, key=lambda row: (row.figures["mean"] is None, -(row.figures["mean"] or 0.0)))


def gap(table: Sequence[Row], ours: str, tuning: Sequence[str], joint: str) -> Gap | None:
    """The share of the gap from the best tuning baseline to joint training that is closed; None if a row is missing.

    ``closed`` is None if joint training is not better than the best tuning baseline.
    """
    by_name = {row.method: row for row in table if row.figures["mean"] is not None}
    best = next((row for row in table if row.method in tuning and row.method in by_name), None)
    if ours not in by_name or joint not in by_name or best is None:
        return None
    mean, other, bound = (_known(row, "mean") for row in (by_name[ours], best, by_name[joint]))
    return Gap(
        ours,
        best.method,
        (mean - other) / (bound - other) if bound > other else None,
        mean - other,
        _known(by_name[ours], "old_lost"),
        _known(best, "old_lost"),
        by_name[ours].figures["seconds"],
        best.figures["seconds"],
    )


def write(results: dict[str, Any], out: Path, *, plots: bool = True) -> None:
    """Write ``results.json``, ``results.md`` and, if asked for, the plots; each completely or not at all."""
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "results.md", markdown(results))
    if plots:
        draw(results, out)


def report(out: Path) -> dict[str, Any]:
    """Write ``results.md`` and the plots again from ``results.json``.

    Raises
    ------
    ArgumentError
        If that file does not exist, or is not one of a benchmark.
    """
    try:
        results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        text = markdown(results)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            f"out: no results in '{out}' ({type(error).__name__}); run the benchmark first, or give its folder"
        ) from error
    write_text(out / "results.md", text)
    draw(results, out)
    return results


def overview(suites: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of every method's mean accuracy, with the lost points of old accuracy, in the first setting.

    One column per suite; methods are sorted by their mean over the suites. The best tuning baseline and ours are bold.
    """
    columns = []
    for results in suites:
        table = tables(results)[0][2]
        found = gap(table, *(results["settings"][name] for name in ("ours", "tuning", "joint")))
        marked = {results["settings"]["ours"], found.best if found else ""}
        cells = {}
        for row in table:
            if row.figures["mean"] is not None:
                cell = f"{100 * _known(row, 'mean'):.1f} ({_known(row, 'old_lost'):.1f})"
                cells[row.method] = _known(row, "mean"), f"**{cell}**" if row.method in marked else cell
        columns.append((f"`{results['suite']}`", cells))
    methods = dict.fromkeys(method for _, cells in columns for method in cells)

    def standing(method: str) -> tuple[int, float]:
        means = [cells[method][0] for _, cells in columns if method in cells]
        return -len(means), -sum(means) / len(means)

    lines = ["| method | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in sorted(methods, key=standing):
        lines.append(f"| {method} | " + " | ".join(cells.get(method, (0, ""))[1] for _, cells in columns) + " |")
    return "\n".join(lines) + "\n"


def tables(results: dict[str, Any]) -> list[tuple[str, float, list[Row]]]:
    """Group, clone set and rows of each main table, in the order of the runs."""
    main = [run for run in results["runs"] if run["study"] == "main"]
    names = dict.fromkeys((run["group"], run["fraction"]) for run in main)
    return [
        (group, fraction, rows(run for run in main if (run["group"], run["fraction"]) == (group, fraction)))
        for group, fraction in names
    ]


def markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    facts = results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seconds = results["seconds"]
    seeds = len(results["seeds"])
    lines = [
        f"# Benchmark: {results['suite']}",
        "",
        f"{results['about']}.",
        "",
        f"`{results['command']}`, {results['date'][:10]}; {seeds} seed{'s' * (seeds != 1)}, {results['threads']} "
        f"thread{'s' * (results['threads'] != 1)}; {versions}. Runs took {seconds['runs']:.0f} s, the search of the "
        f"baselines' recipes {seconds['searches']:.0f} s, training of sources and targets {seconds['networks']:.0f} s.",
        "",
        "Accuracies are means over seeds on the test split, with the lowest and highest seed in brackets. *mean*: the "
        "mean of old and new accuracy. *old lost*: accuracy on old classes before minus after, in points. *open "
        "locality*: the share of old samples whose prediction over all classes differs from that over the old ones. "
        "*size*: weights that are not the target's, as a share of the source's (LoRA and kernel modulation are merged "
        "into the target's weights, which therefore count as changed). *s*: seconds of one run; for "
        f"`{facts['joint']}`, seconds of training the source. The best tuning baseline and ours are bold.",
        "",
        *_how_tuned(results),
    ]
    for group, fraction, table in tables(results):
        lines += ["", f"## {_title(results, group)}, clone set {fraction:.0%} of the training images", ""]
        found = gap(table, facts["ours"], facts["tuning"], facts["joint"])
        marked = {facts["ours"], found.best if found else ""}
        searched = {s["method"]: s["seconds"] for s in results["searches"] if s["group"] == group}
        lines += _table(table, marked, searched)
        if found:
            lines += ["", *_gap_lines(found, facts["joint"])]
    lines += _studies(results)
    problems = [
        f"- {r['method']}, {r['setting']}, seed {r['seed']}: {r['error']}" for r in results["runs"] if r["error"]
    ]
    if problems:
        lines += ["", "## Failed runs", "", *problems]
    warned = dict.fromkeys(text for run in results["runs"] for text in run.get("warnings", ()))
    if warned:
        lines += ["", "## Warnings of runs", "", *(f"- {text}" for text in warned)]
    return "\n".join(lines) + "\n"


def _title(results: dict[str, Any], group: str) -> str:
    new = [setting["new"] for setting in results["settings"]["settings"] if setting["group"] == group]
    if len(new) == 1:
        return (
            f"{group}: classes {', '.join(map(str, new[0]))} at once"
            if len(new[0]) > 1
            else f"{group}: class {new[0][0]}"
        )
    return f"{group}: one class at a time, mean over {', '.join(str(classes[0]) for classes in new)}"


def _how_tuned(results: dict[str, Any]) -> list[str]:
    facts = results["settings"]
    least, most = facts["old_weights"]
    lengths = dict.fromkeys((setting["group"], setting["steps"]) for setting in facts["settings"])
    steps = ", ".join(f"{count} ({group})" for group, count in lengths)
    ours = any("training" in network for name, network in results["networks"].items() if name.startswith("source"))
    trained = ": a network trained on all training images of both" if ours else ", with its own pretrained weights"
    lines = [
        "Baselines were tuned on the first seed of each setting, with the smallest clone set and, of single classes, "
        "the first one. The search chose the learning rate (extending the grid by factors of 3 while the best was at "
        "an end), then for fine-tuning and LwF the freezing depth, then for LwF the weight of its distillation loss, "
        f"and last whether a mistake on an old class weighs {least:g} or {most:g} times one on a new class (netclone: "
        f"{most:g}). All runs of the setting then used this recipe, for up to {steps} steps. Every run keeps the best "
        "of eight moments on its validation split, a fifth of the clone set. All methods see the same clone set, of "
        "which `clone()` itself holds out a fifth. Its constants are the same everywhere. They were found on the first "
        "setting of `fashion` (docs/adr/0005), so for `fashion` the figures do not include that search. "
        f"`{facts['joint']}` is the source itself, restricted to the old and new classes{trained}.",
    ]
    if results["searches"]:
        lines += ["", "| baseline | setting | recipe found | tried | search, s |", "|---|---|---|---|---|"]
    for found in results["searches"]:
        recipe = found["recipe"]
        depth = f", first {recipe['frozen']} stages frozen" if recipe["frozen"] else ""
        depth += f", distillation weighing {recipe['distillation']:g}" if found["method"] == "LwF" else ""
        depth += f", old classes weighing {recipe['old_weight']:g}"
        lines.append(
            f"| {found['method']} | {found['group']} | lr {recipe['lr']:.3g}, {recipe['steps']} steps of "
            f"{recipe['batch_size']}{depth} | {len(found['trials'])} | {found['seconds']:.0f} |"
        )
    return lines


def _table(table: Sequence[Row], marked: set[str], searched: dict[str, float] | None = None) -> list[str]:
    lines = [
        "| method | old | new | mean | old lost | open locality | size | s | search, s | runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        name = f"**{row.method}**" if row.method in marked else row.method
        if row.figures["mean"] is None:
            lines.append(f"| {name} | failed | | | | | | | | 0 |")
            continue
        f = row.figures
        search = (searched or {}).get(row.method)
        lines.append(
            f"| {name} | {_percent(f['old'])} | {_percent(f['new'])} | {_percent(f['mean'])} "
            f"[{100 * row.low:.1f}, {100 * row.high:.1f}] | {f['old_lost']:.1f} | {_percent(f['locality_open'])} | "
            f"{_percent(f['size'])} | {_seconds(f['seconds'])} | {_seconds(search)} | {row.runs} |"
        )
    return lines


def _gap_lines(found: Gap, bound: str) -> list[str]:
    closed = f"no gap: {bound} is not better" if found.closed is None else f"{found.closed:.0%}"
    times = ""
    if found.ours_seconds is not None and found.best_seconds is not None:
        times = f"; seconds, ours / best tuning: {found.ours_seconds:.1f} / {found.best_seconds:.1f}"
    return [
        f"Gap closed by {found.ours} between {found.best} and {bound}: {closed} ({100 * found.lead:+.1f} points "
        f"against {found.best}); old lost, ours / best tuning: {found.ours_lost:.1f} / {found.best_lost:.1f}{times}."
    ]


def _studies(results: dict[str, Any]) -> list[str]:
    runs, ours = results["runs"], results["settings"]["ours"]
    titles = {
        "curve": "Size and accuracy",
        "localize": "Ways to localise, half the parameters, at the input",
        "ablation": "Ablations",
    }
    lines: list[str] = []
    for study, title in titles.items():
        own = [run for run in runs if run["study"] == study]
        if not own:
            continue
        if study != "localize":
            seeds = {run["seed"] for run in own}
            own += [
                run
                for run in runs
                if run["study"] == "main"
                and (run["setting"], run["fraction"]) == (own[0]["setting"], own[0]["fraction"])
                and run["seed"] in seeds
                and (run["method"] == ours or (study == "curve" and run["method"].startswith("netclone")))
            ]
        about = f"{own[0]['setting']}, clone set {own[0]['fraction']:.0%}"
        lines += ["", f"## {title} ({about})", "", *_table(rows(own), {ours})]
    return lines


# Plots


def draw(results: dict[str, Any], out: Path) -> None:
    """``size.png``, ``old-new.png`` and ``search.png``."""
    from matplotlib.figure import Figure

    _draw_size(results, Figure(figsize=(8, 5), layout="constrained"), out / "size.png")
    count = len(tables(results))
    _draw_old_new(results, Figure(figsize=(4.6 * count + 2.6, 4.8), layout="constrained"), out / "old-new.png")
    _draw_search(results, Figure(figsize=(8, 4.5), layout="constrained"), out / "search.png")


MARKS = "osD^v<>Pp*Xhd"


def _draw_size(results: dict[str, Any], figure: Any, path: Path) -> None:
    """Plot mean accuracy against size: ours as a line, the others as points."""
    axes = figure.add_subplot()
    first = tables(results)[:1]
    if not first:
        return
    group, fraction, table = first[0]
    curve = rows(
        run
        for run in results["runs"]
        if run["study"] in ("main", "curve")
        and (run["group"], run["fraction"]) == (group, fraction)
        and run["method"].startswith("netclone")
    )
    points = sorted((_known(r, "size"), _known(r, "mean"), r.method) for r in curve if r.figures["mean"] is not None)
    axes.plot(
        [100 * x for x, _, _ in points], [100 * y for _, y, _ in points], "o-", lw=2, color="C0", label="netclone"
    )
    for x, y, name in points:
        axes.annotate(
            name.removeprefix("netclone "), (100 * x, 100 * y), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    others = [row for row in table if not row.method.startswith("netclone") and row.figures["mean"] is not None]
    joint = results["settings"]["joint"]
    for number, row in enumerate(sorted(others, key=lambda row: row.method)):
        x, y = 100 * _known(row, "size"), 100 * _known(row, "mean")
        if row.method == joint:
            axes.axhline(y, color="grey", ls="--", lw=1, label=joint)
        else:
            axes.plot(x, y, MARKS[number % len(MARKS)], color=f"C{number % 9 + 1}", label=row.method)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("weights added or changed, % of the source's")
    axes.set_ylabel("mean of old and new accuracy, %")
    axes.set_title(f"{results['suite']} {group}, clone set {fraction:.0%}")
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, path)


def _draw_old_new(results: dict[str, Any], figure: Any, path: Path) -> None:
    """Plot old against new accuracy, one panel per setting and clone set; single seeds are faint."""
    found = tables(results)
    if not found:
        return
    names = sorted({row.method for _, _, table in found for row in table})
    handles: dict[str, Any] = {}
    for panel, (group, fraction, table) in enumerate(found):
        axes = figure.add_subplot(1, len(found), panel + 1)
        for row in table:
            number = names.index(row.method)
            style = {"marker": MARKS[number % len(MARKS)], "color": f"C{number % 10}", "ls": ""}
            own = [
                run
                for run in results["runs"]
                if (run["study"], run["group"], run["fraction"], run["method"]) == ("main", group, fraction, row.method)
                and not run["error"]
            ]
            if not own:
                continue
            if len(own) > 1:
                axes.plot([100 * r["old"] for r in own], [100 * r["new"] for r in own], alpha=0.25, ms=4, **style)
            x, y = 100 * _known(row, "old"), 100 * _known(row, "new")
            handles[row.method] = axes.plot(x, y, ms=8, mec="black", mew=0.6, **style)[0]
        axes.set_title(f"{group}, clone set {fraction:.0%}")
        axes.set_xlabel("accuracy on old classes, %")
        if panel == 0:
            axes.set_ylabel("accuracy on new classes, %")
        axes.grid(alpha=0.3)
    listed = sorted(handles)
    figure.legend([handles[name] for name in listed], listed, loc="outside right center", frameon=False)
    _save(figure, path)


def _draw_search(results: dict[str, Any], figure: Any, path: Path) -> None:
    """Plot validation scores by position, deep to shallow, one line per seed (and class) of our first size."""
    axes = figure.add_subplot()
    facts = results["settings"]
    first = facts["settings"][0]
    own = [
        run
        for run in results["runs"]
        if run["study"] == "main"
        and run["method"] == facts["ours"]
        and (run["setting"], run["fraction"]) == (first["name"], first["fractions"][0])
        and run.get("search")
    ]
    places = list(dict.fromkeys(tried["at"] for run in own for tried in run["search"]))
    for run in own:
        scores = {tried["at"]: tried["score"] for tried in run["search"] if tried["score"] is not None}
        xs = [places.index(at) for at in scores]
        line = axes.plot(xs, [100 * score for score in scores.values()], "o-", label=f"seed {run['seed']}")[0]
        if run["at"] in scores:
            at = places.index(run["at"]), 100 * run["validation"]
            axes.plot(*at, "*", ms=15, color=line.get_color(), mec="black", mew=0.6)
    axes.plot([], [], "*", ms=12, color="white", mec="black", label="chosen, after the longer fit")
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel("position in the target, deep to shallow")
    axes.set_ylabel("validation score, %")
    axes.set_title(
        f"{results['suite']} {first['name']}, clone set {first['fractions'][0]:.0%}: search of {facts['ours']}"
    )
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    write_file(path, content.getvalue())


def _over_seeds(runs: Sequence[Run], name: str) -> float | None:
    """The mean over seeds of the mean over the runs of a seed."""
    seeds = sorted({run["seed"] for run in runs})
    return _mean([_mean([run[name] for run in runs if run["seed"] == seed]) for seed in seeds])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _known(row: Row, name: str) -> float:
    value = row.figures[name]
    assert value is not None
    return value


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
