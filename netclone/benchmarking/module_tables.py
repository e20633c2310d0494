"""write(results, out): the tables and the chart of a benchmark of modules; report(out): the same from results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netclone.benchmarking.reporting import as_now, circumstances_of, stored, without_result
from netclone.benchmarking.scores import Row, Run, known, rows
from netclone.reporting.style import LIGHT, NETCLONE, Point, figure, label, panel, points, save
from netclone.runtime.writing import write_text

FIGURES = ("accuracy", "macs", "parameters", "time", "seconds")
TITLES = {
    "one class": "is it this class? (balanced accuracy)",
    "several classes": "which of these classes? (accuracy)",
}
PUBLISHED = """\
These figures are not comparable with ours: other training data (all of CIFAR-10 and more), other networks (VGG16 in
full width), and mostly another measure of size. SeaM (ICSE 2023): 10.1% of the weights kept, and 5.9 points more than
the source on the sub-problem. It keeps single weights, so tensors keep their shapes, and its source may answer with
classes outside the sub-problem, as `source, as given` may here. MwT (ICSE 2024): 14.6% of the kernels kept and 1.1
points lost, with a training of the source that is made for it."""

_HEIGHT = 380  # of a panel, in pixels of a page


def write(results: dict[str, Any], out: Path) -> None:
    """Write ``results.json``, ``results.md`` and ``time.png``; each completely or not at all."""
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "results.md", markdown(results))
    draw(results, out / "time.png")


def report(out: Path) -> dict[str, Any]:
    """Write ``results.md`` and ``time.png`` again from ``results.json``.

    Raises
    ------
    ArgumentError
        If that file does not exist, or is not one of a benchmark of modules.
    """
    results, text = stored(out, markdown)
    write_text(out / "results.md", text)
    draw(results, out / "time.png")
    return results


def parts(results: dict[str, Any]) -> list[tuple[str, str, dict[float, list[Row]]]]:
    """Source, kind of sub-problem, and the rows of each size (1: the source itself), in the order of the runs."""
    runs = results["runs"]
    names = dict.fromkeys((run["source"], run["group"]) for run in runs)
    return [
        (
            source,
            group,
            {
                keep: rows((run for run in own if run["keep"] == keep), FIGURES, "accuracy")
                for keep in sorted({run["keep"] for run in own})
            },
        )
        for source, group in names
        for own in [[run for run in runs if (run["source"], run["group"]) == (source, group)]]
    ]


def markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    results = as_now(results)
    facts, seconds = results["settings"], results["seconds"]
    names = {asked["name"]: asked["classes"] for asked in facts["asked"]}
    asked = ", ".join(f"{name} ({', '.join(map(str, classes))})" for name, classes in names.items())
    given, restricted = facts["references"]
    spent = ", ".join(
        f"{what} {seconds[name]:.0f}"
        for name, what in {"runs": "runs", "searches": "the search of learning rates", "networks": "training"}.items()
    )
    lines = [
        f"# Benchmark: {results['suite']}",
        "",
        f"{results['about']}.",
        "",
        f"{circumstances_of(results)} Time in {results['clock']}: {spent}.",
        "",
        "A module is a part of a source that solves a sub-problem; there is no target. Sub-problems, with labels: "
        f"{asked}. A module of one class answers whether an image shows it (balanced accuracy: the mean over images of "
        f"the class and over {facts['others']} images of each other class). A module of several classes answers which "
        "of them an image shows. Accuracies are in %, means over seeds on test images, in brackets the lowest and the "
        "highest seed. Columns are the sizes asked for, as shares of the source's MACs. "
        f"*s*: {results['clock']} to make a module.",
        "",
        f"`{given}` answers among all of its classes, as in the papers. `{restricted}` has the same choice of answers "
        "as the modules, and for one class a scale and a bias of its yes fitted to the clone set: the fair reference.",
        "",
        f"All methods see the same clone set, {facts['fraction']:.0%} of the training images, of which a fifth is held "
        "out: images of all classes for a module of one class, otherwise of its classes alone. Learning a mask, "
        f"fine-tuning and distillation take {facts['steps']} steps of {facts['batch_size']} images each.",
        "",
        "- *netclone*: mask by `localize`, least squares and distillation, as `clone()` makes the body of a branch. "
        "Labels serve for the mask, and for scale and bias of a yes. No learning rate is searched.",
        "- *distilled*: the same with another mask.",
        "- *fine-tuned*: cross entropy on labels, from the slim network on; the best of eight moments on validation.",
        "- SeaM's and GradSplitter's losses are here over units of channels, under a budget, with one mask for a "
        "sub-problem (`netclone/baselines/modularising.py`). Without *fine-tuned*, weights stay the source's, as in "
        "the papers.",
        "- Magnitude, random and MPruner are those of `localize`. Torch-Pruning prunes by norms of groups, globally.",
        "- The chart has the best method of each mask.",
        "",
        "Learning rates of masks and of fine-tuning were searched on the first seed and the first sub-problem of a "
        f"kind, in trials of {facts['search_steps']} steps, by validation, from a grid of three that is extended by "
        "factors of 3 while the best is at an end.",
    ]
    for source, group, by_keep in parts(results):
        lines += ["", f"## {source}: {TITLES[group]}", "", *_accuracies(by_keep, facts)]
        lines += ["", "What is left, as % of the source's parameters / MACs / time:", "", *_sizes(by_keep, facts)]
    lines += ["", "## What the papers claim", "", PUBLISHED]
    lines += _searches(results["searches"])
    lines += without_result(
        results["runs"],
        lambda run: f"{run['source']}, {run['asked']}, {100 * run['keep']:g}%",
        lambda run: f", {run['source']}, {100 * run['keep']:g}%",
    )
    return "\n".join(lines) + "\n"


def _keeps(by_keep: dict[float, list[Row]], facts: dict[str, Any]) -> list[float]:
    return [keep for keep in facts["keeps"] if keep in by_keep]


def _accuracies(by_keep: dict[float, list[Row]], facts: dict[str, Any]) -> list[str]:
    """A table with a row for each method and a column for each size; methods are sorted by their mean over sizes."""
    keeps = _keeps(by_keep, facts)
    found = {keep: {row.method: row for row in by_keep[keep]} for keep in keeps}
    methods = [method for method in facts["methods"] if any(method in found[keep] for keep in keeps)]

    def standing(method: str) -> tuple[int, float]:
        own = [row.figures["accuracy"] for keep in keeps if (row := found[keep].get(method))]
        values = [value for value in own if value is not None]
        return -len(values), -sum(values) / max(1, len(values))

    lines = [
        "| method | " + " | ".join(f"{100 * keep:g}%" for keep in keeps) + " | s |",
        "|---" * (len(keeps) + 2) + "|",
    ]
    for row in by_keep.get(1.0, ()):
        lines.append(f"| *{row.method}* | {_accuracy(row)} |" + " |" * len(keeps))
    for method in sorted(methods, key=standing):
        own = [found[keep].get(method) for keep in keeps]
        took = [row.figures["seconds"] for row in own if row is not None]
        seconds = [value for value in took if value is not None]
        name = f"**{method}**" if method == facts["ours"] else method
        mean = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
        lines.append(f"| {name} | " + " | ".join(_accuracy(row) for row in own) + f" | {mean} |")
    return lines


def _accuracy(row: Row | None) -> str:
    if row is None:
        return ""
    if row.figures["accuracy"] is None:
        return "does not apply" if row.inapplicable else "failed"
    return f"{100 * known(row, 'accuracy'):.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def _sizes(by_keep: dict[float, list[Row]], facts: dict[str, Any]) -> list[str]:
    """A table of what each mask leaves; methods that share a mask have one row."""
    keeps = _keeps(by_keep, facts)
    masks = dict.fromkeys(method["mask"] for method in facts["methods"].values())
    lines = ["| mask | " + " | ".join(f"{100 * keep:g}%" for keep in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for mask in masks:
        cells = []
        for keep in keeps:
            own = (row for row in by_keep[keep] if facts["methods"].get(row.method, {}).get("mask") == mask)
            row = next((row for row in own if row.figures["accuracy"] is not None), None)
            sizes = [] if row is None else [f"{100 * known(row, name):.1f}" for name in ("parameters", "macs", "time")]
            cells.append(" / ".join(sizes))
        if any(cells):
            lines.append(f"| {mask} | " + " | ".join(cells) + " |")
    return lines


def _searches(searches: Sequence[Run]) -> list[str]:
    if not searches:
        return []
    lines = [
        "",
        "## Learning rates",
        "",
        "| source | sub-problems | method | lr | tried | s |",
        "|---|---|---|---|---|---|",
    ]
    for found in searches:
        lines.append(
            f"| {found['source']} | {found['group']} | {found['what']} | {found['recipe']['lr']:.3g} | "
            f"{len(found['trials'])} | {found['seconds']:.0f} |"
        )
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot accuracy on the sub-problem against the share of time: a panel for each source and kind of sub-problem.

    A method is a line over its sizes, labelled at its largest. Of the methods that share a mask, the best is drawn.
    """
    facts, found = results["settings"], parts(results)
    sheet = figure(_HEIGHT * len(found))
    for number, (source, group, by_keep) in enumerate(found):
        axes = panel(
            sheet,
            f"{source}: {TITLES[group].partition(' (')[0]}",
            "time, % of the source's",
            f"{TITLES[group].partition(' (')[2].rstrip(')')}, %",
            "\N{NORTH WEST ARROW}",
            (number / len(found), (number + 1) / len(found)),
        )
        lines = _best_lines(by_keep, facts)
        for method, line in lines.items():
            ours = method == facts["ours"]
            axes.plot(
                *zip(*line, strict=True),
                "o-",
                color=NETCLONE if ours else LIGHT["grey"],
                lw=points(3 if ours else 1.5),
                ms=points(9 if ours else 6),
                zorder=3 if ours else 2,
            )
        fair = next((row for row in by_keep.get(1.0, ()) if row.method == facts["references"][1] and row.runs), None)
        if fair is not None:
            bound = 100 * known(fair, "accuracy")
            axes.axhline(bound, color=LIGHT["grey"], ls="--", lw=points(1.5), zorder=1)
            axes.annotate(
                fair.method,
                (0, bound),
                xycoords=axes.get_yaxis_transform(),
                xytext=(points(4), points(4)),
                textcoords="offset points",
                size=points(12),
                color=LIGHT["faint"],
            )
        axes.margins(0.05, 0.12)
        least, most = axes.get_xlim()
        axes.set_xlim(least, most + (most - least) / 2)  # room for labels
        across = [] if fair is None else [[(x, 100 * known(fair, "accuracy")) for x in axes.get_xlim()]]
        ends = {method: line[-1] for method, line in lines.items()}
        label(axes, ends, lambda name: name == facts["ours"], [*lines.values(), *across])
    save(sheet, path)


def _best_lines(by_keep: dict[float, list[Row]], facts: dict[str, Any]) -> dict[str, list[Point]]:
    """The points of the best method for each mask, by size: with results in most sizes, then the most accurate."""
    lines: dict[str, list[Point]] = {}
    for keep in _keeps(by_keep, facts):
        for row in by_keep[keep]:
            if row.figures["accuracy"] is not None:
                lines.setdefault(row.method, []).append((100 * known(row, "time"), 100 * known(row, "accuracy")))
    best: dict[str, str] = {}
    for method in sorted(lines, key=lambda method: (-len(lines[method]), -sum(y for _, y in lines[method]))):
        best.setdefault(facts["methods"][method]["mask"], method)
    return {method: lines[method] for method in best.values()}
