"""choices_of(method, ...): what a baseline's search tries besides the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

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


def choices_of(method: str, depths: Sequence[int], *, all_of_them: bool) -> list[tuple[str, Sequence[float]]]:
    """What a baseline's search tries after the learning rate; not ``all_of_them``: the freezing depth alone."""
    choices: list[tuple[str, Sequence[float]]] = [("frozen", depths if method in DEPTHS else ())]
    if all_of_them:
        choices += [OPTIONS[method]] if method in OPTIONS else []
        choices += [("old_weight", OLD_WEIGHTS)] if method not in UNLABELLED else []
    return choices
