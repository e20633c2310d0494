"""skipping(scores, logits, labels, ...) -> Points: accuracy against the share of images that a gate skips."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from netclone.cloning.grafted import modules_of
from netclone.errors import ArgumentError
from netclone.metrics.evaluating import predict

STEPS = 20  # of a curve, from no old image skipped to all of them


@dataclass(frozen=True)
class Point:
    """Shares of old and of new images that a clone skips, and the accuracies on both then, all in [0, 1]."""

    skipped_old: float
    skipped_new: float
    old: float
    new: float

    @property
    def mean(self) -> float:
        """The mean of old and new accuracy."""
        return (self.old + self.new) / 2


def ungated(grafted: fx.GraphModule) -> fx.GraphModule:
    """A copy whose clones see every image; the network itself if that is so already."""
    gates = [name for name, clone in modules_of(grafted).items() if clone.router is not None]
    if not gates:
        return grafted
    whole = copy.deepcopy(grafted)
    for name in gates:
        gated = modules_of(whole)[name]
        sees_all = gated.ungated()
        sees_all.slot = gated.slot
        setattr(whole, name, sees_all)
    return whole


def seen_whole(grafted: fx.GraphModule, name: str, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """The scores ``(N,)`` of a clone's router, and the logits ``(N, columns)`` if that clone saw every image.

    Raises
    ------
    ArgumentError
        If the clone has no gate.
    """
    if modules_of(grafted)[name].router is None:
        raise ArgumentError(f"name: clone '{name}' has no gate; make one with netclone.clone(..., gate=0.5)")
    whole, scores = copy.deepcopy(grafted), []

    def send_all(_module: Any, _given: Any, score: Tensor) -> Tensor:
        scores.append(score)
        return torch.ones_like(score)

    whole.get_submodule(f"{name}.router").register_forward_hook(send_all)
    logits = predict(whole, images, batch_size)
    return torch.cat(scores), logits


def skipping(
    scores: Tensor, logits: Tensor, labels: Tensor, *, old: Sequence[int], new: Sequence[int]
) -> tuple[Point, ...]:
    """What becomes of accuracy if the clone skips more and more of the old images: those of the lowest scores.

    Parameters
    ----------
    scores
        ``(N,)``: the lower, the earlier an image is skipped.
    logits
        ``(N, columns)``, where the clone saw every image.
    labels
        Columns of the logits.
    old, new
        The columns of the old classes, and those of the clone.

    Raises
    ------
    ArgumentError
        If there are no images of one kind.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0], [2.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    >>> points = skipping(torch.tensor([0.0, 1.0, 2.0, 3.0]), logits, torch.tensor([0, 0, 1, 1]), old=[0], new=[1])
    >>> [(point.skipped_old, point.mean) for point in points][::10]
    [(0.0, 0.75), (0.5, 0.75), (1.0, 1.0)]
    """
    is_old = torch.isin(labels, torch.tensor(tuple(old), device=labels.device))
    if bool(is_old.all()) or not bool(is_old.any()):
        raise ArgumentError("data: the curve of a gate needs images of old and of new classes")
    order = scores[is_old].sort().values
    points = []
    for step in range(STEPS + 1):
        count = round(step / STEPS * len(order))
        points.append(
            at_threshold(float(order[count - 1]) if count else -torch.inf, scores, logits, labels, is_old, new)
        )
    return tuple(points)


def at_threshold(
    threshold: float, scores: Tensor, logits: Tensor, labels: Tensor, is_old: Tensor, new: Sequence[int]
) -> Point:
    """The point at which images with scores up to a threshold are skipped; ``is_old (N,)`` says which are old."""
    skipped = scores <= threshold
    given = logits.clone()
    given[skipped.nonzero(), torch.tensor(tuple(new), device=logits.device)] = -torch.inf
    right = given.argmax(1) == labels
    shares = [float(flags[kind].double().mean()) for flags in (skipped, right) for kind in (is_old, ~is_old)]
    return Point(*shares)
