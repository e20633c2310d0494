"""Closed-form classifiers over frozen features: nearest mean, SLDA, FeCAM, RanPAC; and logistic regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.baselines.moments import Moments
from netclone.learning.adapting import frozen_linear
from netclone.learning.solving import minimise, place_to_solve

WIDTH = 2000
"""Random projections of RanPAC."""
STEPS = 100  # of L-BFGS at most


@dataclass(frozen=True)
class Head:
    """A classifier of features, in three steps, each a function.

    Parameters
    ----------
    lift
        From all features ``(N, F)`` and a generator: a fixed map of features, ``(N, F)`` to ``(N, L)``.
    summary
        From lifted features, labels and the number of classes: what ``solve`` has to know of them.
    solve
        From a summary and a strength: a module that gives scores, ``(N, L)`` to ``(N, classes)``.
    strengths
        The hyper-parameters to choose from.
    by
        How the strength is chosen: by cross entropy over five folds, or by squared error on the last fifth.
    """

    lift: Callable[[Tensor, torch.Generator], nn.Module]
    summary: Callable[[Tensor, Tensor, int], Any]
    solve: Callable[[Any, float], nn.Module]
    strengths: tuple[float, ...] = (0.0,)
    by: Literal["folds", "last fifth"] = "folds"


@dataclass(frozen=True)
class Rows:
    """Labelled features as they are, for a classifier that has no shorter summary of them."""

    features: Tensor
    labels: Tensor
    classes: int


def nearest_mean(moments: Moments, strength: float) -> nn.Module:
    """Half the negative squared distance to each class's mean, up to a term that all classes share.

    Reference: Mensink et al., Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost (TPAMI
    2013), the nearest class mean classifier: ``argmin_c |x - m_c|``, with ``m_c`` the mean of class ``c``.
    """
    means = moments.means
    return frozen_linear(means, -means.square().sum(1) / 2)


def slda(moments: Moments, shrinkage: float) -> nn.Module:
    """Linear discriminants under one covariance for all classes, shrunk towards the identity.

    With ``S`` the covariance about the class means, ``P = ((1 - e) S + e I)^-1``, ``w_c = P m_c`` and
    ``b_c = -m_c . P m_c / 2``. The paper updates ``S`` sample by sample, with means as they are so far. Here it is
    taken about the final means, so the order of the samples does not matter. The paper has e = 1e-4.

    Reference: Hayes and Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis (CVPR
    Workshops 2020, arXiv 1909.01520), section 3; the authors' code, github.com/tyler-hayes/Deep_SLDA,
    ``SLDA_Model.py``: ``predict``.
    """
    means = moments.means
    within = (moments.squares[0] - (means.T * moments.counts) @ means) / moments.counts.sum()
    shrunk = (1 - shrinkage) * within + shrinkage * torch.eye(len(within)).to(within)
    weight = torch.linalg.solve(shrunk, means.T).T
    return frozen_linear(weight, -(weight * means).sum(1) / 2)


def fecam(moments: Moments, gamma: float) -> nn.Module:
    """Half the negative Mahalanobis distance of normalised features to each class, by that class's own covariance.

    A covariance ``S`` of mean variance ``v1`` and mean covariance ``v2`` is shrunk to ``S + g v1 I + g v2 (1 - I)``,
    and then divided by its deviations, which makes it a correlation. Features are lifted by Tukey's transformation
    before. The authors' code shrinks twice. Here it is once, and ``g`` is chosen.

    Reference: Goswami et al., FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual
    Learning (NeurIPS 2023, arXiv 2309.14062), section 3; the authors' code, github.com/dipamgoswami/FeCAM,
    ``models/base.py``: ``shrink_cov``, ``normalize_cov``, ``_tukeys_transform``, ``_mahalanobis``.
    """
    means = moments.means
    precisions = []
    for count, mean, squares in zip(moments.counts, means, moments.squares, strict=True):
        covariance = (squares - count * torch.outer(mean, mean)) / (count - 1).clamp_min(1)
        size, eye = len(mean), torch.eye(len(mean)).to(mean)
        variance = covariance.diagonal().mean()
        beside = (covariance.sum() - size * variance) / max(1, size * (size - 1))
        shrunk = covariance + gamma * (variance * eye + beside * (1 - eye))
        deviation = shrunk.diagonal().clamp_min(1e-12).sqrt()
        precisions.append(torch.linalg.inv(shrunk / torch.outer(deviation, deviation) + 1e-8 * eye))
    return Mahalanobis(F.normalize(means), torch.stack(precisions))


def ranpac(moments: Moments, ridge: float) -> nn.Module:
    """Ridge regression of one-hot labels on random features: scores ``h (G + r I)^-1 C``.

    ``h = relu(x W)`` for random normal ``W``, ``G`` is the Gram matrix of ``h``, and ``C`` its sum over each class.
    These are the pooled squares and the sums of moments, so a class is taken out again by subtraction. The ridge ``r``
    is one of 17 powers of ten: the one of the least squared error on the last fifth of the samples, solved on the
    others. All this is the paper's, but ``W`` has 10,000 columns there.

    Reference: McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning (NeurIPS 2023,
    arXiv 2307.02251), section 4 and algorithm 1; the authors' code, github.com/RanPAC/RanPAC, ``RanPAC.py``:
    ``replace_fc``, ``optimise_ridge_parameter``.
    """
    gram = moments.squares[0] + ridge * torch.eye(moments.squares.shape[1]).to(moments.sums)
    return frozen_linear(torch.linalg.solve(gram, moments.sums.T).T, None)


def logistic(rows: Rows, decay: float) -> nn.Module:
    """Multinomial logistic regression: mean cross entropy and ``decay / 2`` times the squared weights, by L-BFGS.

    Reference: Bishop, Pattern Recognition and Machine Learning (2006), equation 4.108.
    """
    features, labels = (tensor.to(place_to_solve(rows.features)) for tensor in (rows.features, rows.labels))
    weight, bias = features.new_zeros(rows.classes, features.shape[1]), features.new_zeros(rows.classes)
    parts = [weight.requires_grad_(True), bias.requires_grad_(True)]

    def loss() -> Tensor:
        return F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()

    minimise(parts, loss, steps=STEPS)
    return frozen_linear(*(part.detach().to(rows.features) for part in parts))


class Mahalanobis(nn.Module):
    """``-(x - m_c) P_c (x - m_c) / 2`` for normalised ``x (N, F)``, means ``(C, F)`` and precisions ``(C, F, F)``."""

    def __init__(self, means: Tensor, precisions: Tensor) -> None:
        super().__init__()
        self.means = nn.Parameter(means, requires_grad=False)
        self.precisions = nn.Parameter(precisions, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        away = [F.normalize(features) - mean for mean in self.means]
        return torch.stack([-((x @ p) * x).sum(1) / 2 for x, p in zip(away, self.precisions, strict=True)], 1)


class Standardised(nn.Module):
    """Features with the mean and deviation of given ones taken out."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        std = features.std(0, unbiased=False)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", std.clamp_min(1e-4 * float(std.max().clamp_min(1e-12))))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Tukey(nn.Module):
    """The square root of features that are never negative; others stay as they are."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.rooted = bool((features >= 0).all())

    def forward(self, features: Tensor) -> Tensor:
        return features.clamp_min(0).sqrt() if self.rooted else features


class Projected(nn.Module):
    """``relu(x W)`` with a random ``W (F, WIDTH)``."""

    def __init__(self, features: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(features.shape[1], WIDTH, generator=generator).to(features)
        self.projections = nn.Parameter(drawn, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features @ self.projections)


def _as_it_is(features: Tensor, generator: torch.Generator) -> nn.Module:
    return nn.Identity()


def _by_class(features: Tensor, labels: Tensor, classes: int) -> Moments:
    return Moments.of(features, labels, classes, by_class=True)


KINDS: dict[str, Head] = {
    "nearest mean": Head(_as_it_is, Moments.of, nearest_mean),
    "SLDA": Head(_as_it_is, Moments.of, slda, (1e-4, 1e-3, 1e-2, 1e-1, 0.5)),
    "FeCAM": Head(lambda features, generator: Tukey(features), _by_class, fecam, (1.0, 10.0, 100.0)),
    "RanPAC": Head(Projected, Moments.of, ranpac, tuple(10.0**power for power in range(-8, 9)), "last fifth"),
    "logistic regression": Head(
        lambda features, generator: Standardised(features), Rows, logistic, (1e-3, 1e-2, 1e-1, 1.0)
    ),
}
"""The classifiers by name."""
