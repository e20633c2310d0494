"""search(method, problem, ...): find the recipe of a baseline on the validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from netclone.baselines import Recipe, Tuned, tune, validated
from netclone.baselines.training import P
from netclone.errors import FitError
from netclone.learning.data import OLD_WEIGHT

DEPTHS = ("fine-tune", "LwF", "PCSD", "source as teacher", "UHC")
"""Baselines whose freezing depth is searched."""
OPTIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "LwF": ("distillation", (0.3, 3.0)),
    "PCSD": ("distillation", (0.3, 3.0)),
    "source as teacher": ("distillation", (0.3, 3.0)),
    "MeRLin": ("meta", (0.3, 3.0)),
    "DER": ("sparsity", (0.0, 1.0)),
    "shallow prompts": ("prompts", (1, 20)),
    "deep prompts": ("prompts", (1, 20)),
    "class prompts": ("prompts", (1,)),
}
"""The option of a baseline's own, and the values that are tried besides the recipe's."""
OLD_WEIGHTS = (1.0, OLD_WEIGHT)
"""Weights of a mistake on an old class that are tried, relative to one on a new class."""
UNLABELLED = ("UHC",)
"""Baselines that know of no such weight, because they use no labels."""
MOST_FURTHER = 4
"""The number of learning rates that a search may try beyond its grid."""


def choices_of(method: str, depths: Sequence[int], *, all_of_them: bool) -> list[tuple[str, Sequence[float]]]:
    """What a baseline's search tries after the learning rate; not ``all_of_them``: the freezing depth alone."""
    choices: list[tuple[str, Sequence[float]]] = [("frozen", depths if method in DEPTHS else ())]
    if all_of_them:
        choices += [OPTIONS[method]] if method in OPTIONS else []
        choices += [("old_weight", OLD_WEIGHTS)] if method not in UNLABELLED else []
    return choices


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
