"""search(method, problem, ...): find the recipe of a baseline on the validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from netclone.baselines.problems import Recipe
from netclone.baselines.training import P, Tuned, tune, validated
from netclone.errors import FitError

MOST_FURTHER = 4
"""The number of learning rates that a search may try beyond its grid."""


def search(
    method: Callable[[P, Recipe], nn.Module],
    problem: P,
    base: Recipe,
    rates: tuple[float, ...],
    choices: Sequence[tuple[str, Sequence[float]]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Find the best learning rate, and then the best value of each option, one option after another.

    A grid of three rates or more is extended by factors of 3 as long as its best is at an end. The best is that of the
    highest balanced accuracy on the validation split; ties go to the lower cross entropy.
    """
    found: list[Tuned] = []
    scores: list[tuple[float, float]] = []

    def run(recipes: list[Recipe]) -> None:
        found.append(tune(method, problem, recipes, progress))
        scores.append(validated(found[-1].model, problem.validation, problem.old))

    def further(recipes: list[Recipe]) -> None:
        with contextlib.suppress(FitError):  # if all of them fail, they are no better
            run(recipes)

    def best() -> Tuned:
        return found[scores.index(max(scores))]

    run([replace(base, lr=rate) for rate in rates])
    tried = list(rates)
    while len(rates) >= 3 and best().recipe.lr in (min(tried), max(tried)) and len(tried) < len(rates) + MOST_FURTHER:
        tried.append(max(tried) * 3 if best().recipe.lr == max(tried) else min(tried) / 3)
        further([replace(base, lr=tried[-1])])
    for name, values in choices:
        now = best().recipe
        others: list[dict[str, Any]] = [{name: value} for value in values if value != getattr(now, name)]
        if recipes := [replace(now, **other) for other in others]:
            further(recipes)
    trials = tuple(trial for tuned in found for trial in tuned.trials)
    return replace(best(), trials=trials, seconds=sum(tuned.seconds for tuned in found))
