"""fit_router(features, ...) -> Router: which images a clone has to see, from the target's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.errors import AdapterError, DataError
from netclone.learning.adapting import grid_of
from netclone.learning.choosing import folds
from netclone.learning.solving import minimise, place_to_solve

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, on the mean squared weight over standardised features."""

FOLDS = 5
STEPS = 100  # of L-BFGS at most

_POOLED = {"NC": (), "NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,)}  # axes that are averaged, by layout


class Router(nn.Module):
    """Scores ``(N,)`` of images from the target's features: the clone sees those whose score is above 0.

    A score is linear in the means of the features over their grids. An image's score depends on its own features alone.

    Parameters
    ----------
    shapes
        Of the features that are read, one after another, without the batch.
    weight, bias
        ``(F,)``, where F is the number of all their channels, and ``()``.

    Raises
    ------
    AdapterError
        If the weights do not fit the shapes.

    Examples
    --------
    >>> router = Router([(2, 4, 4), (1,)], torch.tensor([1.0, 0.0, 1.0]), torch.tensor(-1.5))
    >>> router(torch.ones(3, 2, 4, 4), torch.arange(3.0)[:, None]).tolist()
    [-0.5, 0.5, 1.5]
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, shapes: Sequence[tuple[int, ...]], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        grids = [grid_of(shape) for shape in shapes]
        if weight.shape != (sum(grid.channels for grid in grids),) or bias.shape != ():
            raise AdapterError(
                f"a router of features {', '.join(map(str, shapes))} has a weight for each channel and one bias, got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        self.axes = tuple(_POOLED[grid.layout] for grid in grids)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, *features: Tensor) -> Tensor:
        score: Tensor = self.pooled(*features) @ self.weight + self.bias
        return score

    def pooled(self, *features: Tensor) -> Tensor:
        """The means ``(N, F)`` of the features over their grids, side by side."""
        return torch.cat([part.mean(axes) if axes else part for part, axes in zip(features, self.axes, strict=True)], 1)


@dataclass(frozen=True)
class Routed:
    """A router, and how it did on samples that it was not fitted to.

    ``skipped`` is the share of old-class samples that it leaves out, ``missed`` that of new-class samples.
    """

    router: Router
    skipped: float
    missed: float


def fit_router(
    features: Sequence[Tensor],
    labels: Tensor,
    shows: Tensor,
    *,
    old: int,
    share: float,
    generator: torch.Generator,
) -> Routed:
    """A router that leaves out a share of the old classes' images, and as few of the new classes' as it can.

    It is a logistic regression of old against new, both weighted alike. Its ridge is the one of the lowest loss on
    samples left out, by five folds. The scores of the old classes' samples that were left out give the threshold.

    Parameters
    ----------
    features
        What the router will read, for all samples: each ``(N, ...)``.
    labels
        Those below ``old`` are old classes.
    shows
        The sample that each row shows ``(N,)``: views of one sample are left out together.
    share
        The share of the old classes' images to leave out, in (0, 1).
    generator
        What the folds are drawn from, class by class.

    Raises
    ------
    DataError
        If there are fewer samples than folds, of the old classes or of the new ones.
    """
    shapes = [tuple(part.shape[1:]) for part in features]
    width = sum(grid_of(shape).channels for shape in shapes)
    router = Router(shapes, features[0].new_zeros(width), features[0].new_zeros(()))
    is_new = labels >= old
    for kind, name in ((~is_new, "target_data"), (is_new, "data")):
        if (count := len(shows[kind].unique())) < FOLDS:
            raise DataError(f"{name}: {count} samples are too few to fit a gate; give {FOLDS} or more")
    rows = router.pooled(*features).double()
    rows, labels, shows = (tensor.to(place_to_solve(rows)) for tensor in (rows, labels, shows))
    mean, std = rows.mean(0), rows.std(0, unbiased=False)
    std = std.clamp_min(1e-4 * float(std.max()) or 1.0)
    rows = (rows - mean) / std
    fold = folds(labels, shows, generator)
    tried = {}
    for strength in STRENGTHS:
        scores = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        for number in range(FOLDS):
            out = fold == number
            weight, bias = _logistic(rows[~out], is_new[~out], strength)
            scores[out] = rows[out] @ weight + bias
        tried[strength] = scores, float(_loss(scores, is_new))
    strength = min(tried, key=lambda one: tried[one][1])
    scores = tried[strength][0]
    threshold = torch.quantile(scores[~is_new], share)
    weight, bias = _logistic(rows, is_new, strength)
    weight = weight / std
    router.weight.copy_(weight)
    router.bias.copy_(bias - weight @ mean - threshold)
    left = (scores <= threshold).double()
    return Routed(router, float(left[~is_new].mean()), float(left[is_new].mean()))


def _logistic(rows: Tensor, is_new: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the logistic regression of old against new with a ridge."""
    weight, bias = rows.new_zeros(rows.shape[1]).requires_grad_(), rows.new_zeros(()).requires_grad_()

    def loss() -> Tensor:
        return _loss(rows @ weight + bias, is_new) + strength * weight.square().sum()

    minimise([weight, bias], loss, steps=STEPS, history=10)
    return weight.detach(), bias.detach()


def _loss(scores: Tensor, is_new: Tensor) -> Tensor:
    """The cross entropy, old and new samples weighted alike."""
    losses = F.binary_cross_entropy_with_logits(scores, is_new.to(scores.dtype), reduction="none")
    return (losses[is_new].mean() + losses[~is_new].mean()) / 2
