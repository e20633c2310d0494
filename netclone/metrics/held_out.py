"""held_out(module), far_apart(...): accuracies that were measured when a clone was made, beside those of now."""

from __future__ import annotations

from collections.abc import Mapping

from netclone.cloning.modules import CloneModule
from netclone.metrics.evaluating import Scores

FAR = 0.05
"""Accuracies further apart than this are said to be: more than chance explains with a few hundred images."""


def held_out(module: CloneModule) -> dict[str, float]:
    """Accuracy on old and new classes, by ``"old"`` and ``"new"``, on images that a clone was not fitted to.

    Empty if it was not measured, or if the clone has a bias, which moves it.
    """
    return {kind: module.scores[kind] for kind in ("old", "new") if kind in module.scores and not module.spec.bias}


def far_apart(measured: Mapping[str, float], scores: Scores) -> dict[str, tuple[float, float]]:
    """Those of :func:`held_out` that differ from the scores by more than :data:`FAR`: what was measured, and what is.

    Examples
    --------
    >>> scores = Scores(0.7, 0.8, 0.75, 0.0, 0.0, 10, 0.1, None)
    >>> far_apart({"old": 0.9, "new": 0.81}, scores)
    {'old': (0.9, 0.7)}
    """
    now = {"old": scores.old, "new": scores.new}
    return {
        kind: (was, found)
        for kind, was in measured.items()
        if (found := now[kind]) is not None and abs(found - was) > FAR
    }


def said(kind: str, was: float, found: float) -> str:
    """One of :func:`far_apart` in words.

    Examples
    --------
    >>> said("old", 0.9, 0.7).partition(".")[0]
    'old classes: 90'
    """
    return (
        f"{kind} classes: {was:.1%} on images held out when the clone was made, {found:.1%} on these. Either these "
        "images differ from those that it was made from, or there were too few"
    )
