"""rows(runs), tables(results), gap(table, ...): the runs of a benchmark as means over seeds, by method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]

FIGURES = ("old", "new", "mean", "old_lost", "locality_open", "size", "ms", "target_ms", "seconds")


@dataclass(frozen=True)
class Row:
    """A method over all its runs: each figure's mean over seeds, and the accuracy of the lowest and highest seed.

    Runs of one seed (single classes) are averaged first. ``failed`` lists the reasons of failed runs, and
    ``inapplicable`` why the method was not run where it does not apply.
    """

    method: str
    figures: dict[str, float | None]
    low: float
    high: float
    runs: int
    failed: tuple[str, ...] = ()
    inapplicable: tuple[str, ...] = ()


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


def rows(runs: Iterable[Run], figures: Sequence[str] = FIGURES, by: str = "mean") -> list[Row]:
    """One row per method, sorted by the figure ``by``, an accuracy; methods without any result come last."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    found = []
    for method, own in by_method.items():
        good = [run for run in own if has_result(run)]
        failed = tuple(dict.fromkeys(run["error"] for run in own if run["error"]))
        inapplicable = tuple(dict.fromkeys(run["does_not_apply"] for run in own if run.get("does_not_apply")))
        over = {name: _over_seeds(good, name) for name in figures}
        means = [_mean([run[by] for run in good if run["seed"] == seed]) for seed in {r["seed"] for r in good}]
        known = [mean for mean in means if mean is not None]
        found.append(
            Row(method, over, min(known, default=0.0), max(known, default=0.0), len(good), failed, inapplicable)
        )
    return sorted(found, key=lambda row: (row.figures[by] is None, -(row.figures[by] or 0.0)))


def at_rest(runs: Sequence[Run]) -> list[Run]:
    """The runs with milliseconds as on a machine without other work: as many times the target's as in each run itself.

    Each network was timed in turn with the target, which other work slows down as much. The target's own time is the
    least of all runs.

    Examples
    --------
    >>> [run["ms"] for run in at_rest([{"ms": 6.0, "target_ms": 4.0}, {"ms": 3.0, "target_ms": 2.0}, {}])[:2]]
    [3.0, 3.0]
    """
    least = min((run["target_ms"] for run in runs if run.get("target_ms")), default=0.0)
    return [
        {**run, "ms": run["ms"] / run["target_ms"] * least, "target_ms": least} if run.get("target_ms") else run
        for run in runs
    ]


def has_result(run: Run) -> bool:
    """Whether a run did not fail, and its method applies."""
    return not run["error"] and not run.get("does_not_apply")


def gap(table: Sequence[Row], ours: str, tuning: Sequence[str], joint: str) -> Gap | None:
    """The share of the gap from the best tuning baseline to joint training that is closed; None if a row is missing.

    ``closed`` is None if joint training is not better than the best tuning baseline.
    """
    by_name = {row.method: row for row in table if row.figures["mean"] is not None}
    best = next((row for row in table if row.method in tuning and row.method in by_name), None)
    if ours not in by_name or joint not in by_name or best is None:
        return None
    mean, other, bound = (known(row, "mean") for row in (by_name[ours], best, by_name[joint]))
    return Gap(
        ours,
        best.method,
        (mean - other) / (bound - other) if bound > other else None,
        mean - other,
        known(by_name[ours], "old_lost"),
        known(best, "old_lost"),
        by_name[ours].figures["seconds"],
        best.figures["seconds"],
    )


def tables(results: dict[str, Any]) -> list[tuple[str, float, list[Row]]]:
    """Group, clone set and rows of each main table, in the order of the runs."""
    main = [run for run in at_rest(results["runs"]) if run["study"] == "main"]
    names = dict.fromkeys((run["group"], run["fraction"]) for run in main)
    return [
        (group, fraction, rows(run for run in main if (run["group"], run["fraction"]) == (group, fraction)))
        for group, fraction in names
    ]


def heading(results: dict[str, Any], group: str) -> str:
    """A group of settings in words."""
    new = [setting["new"] for setting in results["settings"]["settings"] if setting["group"] == group]
    if len(new) == 1:
        return (
            f"{group}: classes {', '.join(map(str, new[0]))} at once"
            if len(new[0]) > 1
            else f"{group}: class {new[0][0]}"
        )
    return f"{group}: one class at a time, mean over {', '.join(str(classes[0]) for classes in new)}"


def _over_seeds(runs: Sequence[Run], name: str) -> float | None:
    """The mean over seeds of the mean over the runs of a seed."""
    seeds = sorted({run["seed"] for run in runs})
    return _mean([_mean([run.get(name) for run in runs if run["seed"] == seed]) for seed in seeds])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def known(row: Row, name: str) -> float:
    """A figure of a method that has results."""
    value = row.figures[name]
    assert value is not None
    return value
