"""draw(results, out): plot a benchmark as time.png, size.png, old-new.png and search.png."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netclone.benchmarking.planning import amount
from netclone.benchmarking.scores import Row, Run, has_result, known, rows, tables
from netclone.reporting.style import LIGHT, NETCLONE, Point, figure, label, panel, points, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 340  # of a panel, in pixels of a page
_MOST_LABELS = 16  # of methods; of more than these, only those that tell most are named
_LEAST_MARK = 6  # of a method that loses nothing, in pixels; it grows by one for each point that is lost


def draw(results: dict[str, Any], out: Path) -> None:
    """Write ``time.png``, ``size.png``, ``old-new.png`` and ``search.png``.

    The first only of runs with milliseconds, which older results do not have, and all but the last only of runs.
    """
    if tables(results):
        _draw_time(results, out / "time.png")
        _draw_size(results, out / "size.png")
        _draw_old_new(results, out / "old-new.png")
    _draw_search(results, out / "search.png")


def _ours(method: str) -> bool:
    return method.startswith("netclone")


def _style(method: str) -> dict[str, Any]:
    """The style of a method's point: large in netclone's colour, or grey."""
    ours = _ours(method)
    return {"marker": "o", "ls": "", "color": NETCLONE if ours else LIGHT["grey"], "ms": points(11 if ours else 8)}


def _label(axes: Axes, results: dict[str, Any], named: dict[str, Point], avoid: Sequence[Sequence[Point]] = ()) -> None:
    """Label the methods' points, best first; of the many classifiers over features only the first of each kind."""
    heads = results["settings"].get("heads", ())
    first: dict[str, str] = {}
    for method in named:
        first.setdefault(method.partition(",")[0] if method in heads else method, method)
    told = {method: named[method] for method in first.values()}
    others = [[point] for method, point in named.items() if method not in told]
    label(axes, told, _ours, [*avoid, *others])


def _draw_time(results: dict[str, Any], path: Path) -> None:
    """Plot mean accuracy against milliseconds; the less a method loses of the old classes, the smaller is its mark."""
    group, fraction, table = tables(results)[0]
    timed = [row for row in table if row.figures["ms"] is not None]
    if not timed:
        return
    sheet = figure(_HEIGHT + 60)
    axes = panel(
        sheet,
        _title(results, group, fraction),
        "ms an image at inference (large marks lose more of the old classes)",
        "mean of old and new accuracy, %",
        "\N{NORTH WEST ARROW}",
    )
    named = {row.method: (known(row, "ms"), 100 * known(row, "mean")) for row in timed}
    for row in sorted(timed, key=lambda row: -known(row, "old_lost")):
        mark = {"ms": points(_mark(row)), "alpha": 0.8, "mec": LIGHT["page"]}
        axes.plot(*named[row.method], **_style(row.method) | mark)
    axes.set_xscale("log", base=2)
    axes.margins(0.12)
    low, high = axes.get_xlim()
    ticks = [2.0**power for power in range(-10, 12) if low <= 2.0**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    rims: list[list[Point]] = []
    for _ in range(3):  # where the rims are depends on the limits
        rims = [rim for row in timed for rim in _rim(axes, named[row.method], _mark(row) / 2)]
        _make_room(axes, [point for rim in rims for point in rim])
    label(axes, {name: named[name] for name in _telling(results, timed, "ms")}, _ours, rims)
    save(sheet, path)


def _mark(row: Row) -> float:
    """The size of a method's mark in pixels."""
    return _LEAST_MARK + max(0.0, known(row, "old_lost"))


def _rim(axes: Axes, point: Point, radius: float) -> list[list[Point]]:
    """Points around a mark, which no label may cover."""
    x, y = axes.transData.transform(point)
    around = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in range(12)]
    return [[tuple(place)] for place in axes.transData.inverted().transform(around)]


def _make_room(axes: Axes, around: Sequence[Point]) -> None:
    """Widen the limits so that these points lie within."""
    across, up = zip(*around, strict=True)
    axes.set_xlim(min(*axes.get_xlim(), *across), max(*axes.get_xlim(), *across))
    axes.set_ylim(min(*axes.get_ylim(), *up), max(*axes.get_ylim(), *up))


def _telling(results: dict[str, Any], table: Sequence[Row], cost: str) -> list[str]:
    """The methods worth a label, best first: ours, the best of each kind, and those that no cheaper one beats."""
    facts = results["settings"]
    kinds = [facts[kind] for kind in ("tuning", "ensembles", "heads") if facts.get(kind)]
    best = [next((row.method for row in table if row.method in kind), None) for kind in kinds]
    cheaper = [
        row.method
        for number, row in enumerate(table)
        if all(known(row, cost) < known(better, cost) for better in table[:number])
    ]
    return [row.method for row in table if _ours(row.method) or row.method in (*best, *cheaper, facts["joint"])]


def _draw_size(results: dict[str, Any], path: Path) -> None:
    """Plot mean accuracy against size: ours as a line, the others as points."""
    group, fraction, table = tables(results)[0]
    curve = rows(
        run
        for run in results["runs"]
        if run["study"] in ("main", "curve")
        and (run["group"], run["fraction"]) == (group, fraction)
        and _ours(run["method"])
    )
    joint = results["settings"]["joint"]
    every = [row for row in (*curve, *table) if row.figures["mean"] is not None]
    bound = next((100 * known(row, "mean") for row in every if row.method == joint), None)
    named = {row.method: (100 * known(row, "size"), 100 * known(row, "mean")) for row in every if row.method != joint}
    sheet = figure(_HEIGHT + 60)
    axes = panel(
        sheet,
        _title(results, group, fraction),
        "weights added or changed, % of the source's",
        "mean of old and new accuracy, %",
        "\N{NORTH WEST ARROW}",
    )
    line = sorted(point for name, point in named.items() if _ours(name))
    axes.plot(*zip(*line, strict=True), color=NETCLONE, lw=points(3))
    for name, point in named.items():
        axes.plot(*point, **_style(name))
    axes.set_xscale("log", base=2)
    sizes = [x for x, _ in named.values()]
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 2)
    ticks = [100 / 2**halved for halved in range(8) if min(sizes) / 1.3 <= 100 / 2**halved]
    axes.set_xticks(ticks, [f"{tick:.1f}".removesuffix(".0") for tick in ticks])
    axes.margins(y=0.1)
    if bound is not None:
        axes.axhline(bound, color=LIGHT["grey"], ls="--", lw=points(1.5), zorder=1)
        axes.annotate(
            joint,
            (0, bound),
            xycoords=axes.get_yaxis_transform(),
            xytext=(points(4), points(5)),
            textcoords="offset points",
            size=points(12),
            color=LIGHT["faint"],
        )
    across = [] if bound is None else [[(x, bound) for x in axes.get_xlim()]]
    shown = sorted({row.method: row for row in every if row.method in named}.values(), key=_mean, reverse=True)
    telling = _telling(results, shown, "size") if len(shown) > _MOST_LABELS else list(named)
    others = [[point] for method, point in named.items() if method not in telling]
    _label(axes, results, {method: named[method] for method in telling}, [line, *across, *others])
    save(sheet, path)


def _mean(row: Row) -> float:
    return known(row, "mean")


def _draw_old_new(results: dict[str, Any], path: Path) -> None:
    """Plot old against new accuracy, one panel per setting and clone set; single seeds are small."""
    found = tables(results)
    sheet = figure(_HEIGHT * len(found))
    for number, (group, fraction, table) in enumerate(found):
        axes = panel(
            sheet,
            _title(results, group, fraction),
            "accuracy on old classes, %",
            "accuracy on new classes, %",
            "\N{NORTH EAST ARROW}",
            (number / len(found), (number + 1) / len(found)),
        )
        shown = [row for row in table if row.figures["mean"] is not None]
        named = {row.method: (100 * known(row, "old"), 100 * known(row, "new")) for row in shown}
        seeds = []
        for method, point in named.items():
            own = [run for run in results["runs"] if _is(run, group, fraction, method)]
            for seed in {run["seed"] for run in own}:
                of_seed = [run for run in own if run["seed"] == seed]
                old, new = (100 * statistics.fmean(run[kind] for run in of_seed) for kind in ("old", "new"))
                axes.plot(old, new, **_style(method) | {"ms": points(5), "alpha": 0.4})
                seeds.append([(old, new)])
            axes.plot(*point, **_style(method))
        axes.margins(0.08)
        telling = _telling(results, shown, "ms") if len(shown) > _MOST_LABELS else list(named)
        others = [[point] for method, point in named.items() if method not in telling]
        _label(axes, results, {method: named[method] for method in telling}, [*seeds, *others])
    save(sheet, path)


def _is(run: Run, group: str, fraction: float, method: str) -> bool:
    """Whether a run belongs to a method of a main table, and has a result."""
    asked = ("main", group, fraction, method)
    return (run["study"], run["group"], run["fraction"], run["method"]) == asked and has_result(run)


def _draw_search(results: dict[str, Any], path: Path) -> None:
    """Plot validation scores by position, deep to shallow, one line per seed (and class) of our first size."""
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
    sheet = figure(_HEIGHT)
    axes = panel(
        sheet,
        f"{facts['ours']}, {_title(results, first['group'], first['fractions'][0])}",
        "position in the target, deep to shallow",
        "validation score, %",
        "\N{UPWARDS ARROW}",
    )
    places = list(dict.fromkeys(tried["at"] for run in own for tried in run["search"]))
    axes.set_xticks(range(len(places)), places)
    lines, chosen = [], []
    for run in own:
        scores = {tried["at"]: 100 * tried["score"] for tried in run["search"] if tried["score"] is not None}
        lines.append([(float(places.index(at)), score) for at, score in scores.items()])
        axes.plot(*zip(*lines[-1], strict=True), "o-", color=NETCLONE, lw=points(2), ms=points(7))
        if run["at"] in scores:
            chosen.append((float(places.index(run["at"])), 100 * run["validation"]))
            axes.plot(*chosen[-1], "*", ms=points(18), color=NETCLONE, mec=LIGHT["ink"], mew=points(1))
    told = {"chosen, after the longer fit": chosen, f"{len(own)} seeds": [line[0] for line in lines] * (len(own) > 1)}
    named = {words: max(at, key=lambda point: point[1]) for words, at in told.items() if at}
    axes.margins(0.15, 0.12)
    label(axes, named, lambda name: True, lines)
    save(sheet, path)


def _title(results: dict[str, Any], group: str, fraction: float) -> str:
    new = [setting["new"] for setting in results["settings"]["settings"] if setting["group"] == group]
    at_once = f"{len(new[0])} classes at once" if len(new[0]) > 1 else "one class"
    words = "one class at a time" if len(new) > 1 else at_once
    return f"{results['suite']}, {words}, from {amount(fraction)}"
