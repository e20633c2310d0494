"""fit_joint(train, held_out, ...) -> Joint: a classifier of old and new classes from the features of both networks.

A source that knows new classes alone cannot tell them from old ones. Here all classes are told apart by what both
networks see, as far as the clone set teaches it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.learning.adapting import Branch, Cached, Classifier, frozen_linear
from netclone.learning.choosing import FOLDS, folds
from netclone.learning.data import balance
from netclone.learning.solving import minimise

PROJECTIONS = 200
"""Random projections of the features (see docs/adr/0024)."""
RIDGES = tuple(10.0**power for power in range(-4, 3))
"""What is tried on the diagonal of the second moments, in units of the mean there; less would not do in float32."""
SMALL = 0.1
"""The share of the source's MACs that such a classifier may have at most: it comes on top of what is kept."""
STEPS = 50  # of L-BFGS at most


class Scorer(nn.Module):
    """Scores ``(N, classes)`` of features ``(N, F)``: ``relu(x W) V`` with a random ``W``.

    Reference: McDonnell et al., RanPAC (NeurIPS 2023, arXiv 2307.02251), section 4.
    """

    def __init__(self, projections: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.projections, self.rows = frozen_linear(projections, None), frozen_linear(weight, None)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.rows(F.relu(self.projections(features)))
        return scores


class JointClassifier(nn.Module):
    """New-class logits ``(N, n)`` from a clone's features ``(N, F)`` and the target's features ``(N, G)``.

    ``gate`` reads scores of new and old classes, in this order, and the target's logits. These it computes itself from
    the target's features by ``head``, a copy of the target's last layer.
    """

    def __init__(self, scorer: Scorer, head: nn.Linear, gate: Classifier) -> None:
        super().__init__()
        self.scorer, self.head, self.gate = scorer, head, gate

    def forward(self, module_features: Tensor, target_features: Tensor) -> Tensor:
        scores = self.scorer(torch.cat([module_features, target_features], 1))
        new: Tensor = self.gate(scores, self.head(target_features))
        return new


class JointBranch(nn.Module):
    """A frozen body and its classifier in one module, which becomes the clone's graph."""

    def __init__(self, body: nn.Module, classifier: JointClassifier) -> None:
        super().__init__()
        self.body, self.classifier = body, classifier

    def forward(self, features: Tensor, target_features: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.body(features), target_features)
        return out


@dataclass(frozen=True)
class Joint:
    """A scorer, the gate at its start, and the gate's samples: their scores are by scorers fitted without them."""

    scorer: Scorer
    gate: Classifier
    train: Cached
    held_out: Cached

    @property
    def branch(self) -> Branch:
        """What is left to fit."""
        return Branch(nn.Identity(), nn.Identity(), self.gate)


def scorer_size(features: int, classes: int) -> int:
    """The number of weights of a scorer, each of which is a multiplication, too."""
    return PROJECTIONS * (features + classes)


def enough(labels: Tensor, shows: Tensor, old: int) -> bool:
    """Whether there are old samples, and of every class as many as there are folds."""
    classes = labels.unique()
    fewest = min(len(shows[labels == label].unique()) for label in classes)
    return bool((classes < old).any()) and fewest >= FOLDS


def fit_joint(train: Cached, held_out: Cached, width: int, shows: Tensor, *, classes: int, seed: int) -> Joint:
    """Fit scores of all classes to the features of both networks, and start a gate from them.

    Parameters
    ----------
    train, held_out
        Their features ``(N, F + G)`` are those of the clone and, behind them, of the target.
    width
        The number of the target's features, G.
    shows
        The sample that each row of ``train``, and then of ``held_out``, shows.
    classes
        The number of new classes.
    seed
        What projections and folds are drawn from.
    """
    old = train.logits.shape[1]
    features, labels = (
        torch.cat([getattr(part, what) for part in (train, held_out)]) for what in ("features", "labels")
    )
    generator = torch.Generator().manual_seed(seed)
    scorer, scores = _scored(features, width, labels, shows, old, classes, generator)
    parts = scores.split([len(train), len(held_out)])
    train, held_out = (replace(one, features=part) for one, part in zip((train, held_out), parts, strict=True))
    gate = Classifier(scores.shape[1], old, classes).to(scores)
    gate.start(train.features, train.logits, torch.eye(scores.shape[1]).to(scores), None)
    return Joint(scorer, gate, train, held_out)


def _scored(
    features: Tensor, width: int, labels: Tensor, shows: Tensor, old: int, new: int, generator: torch.Generator
) -> tuple[Scorer, Tensor]:
    """A scorer, and the scores ``(N, new + old)`` of each row by one that was fitted without its sample.

    Ridge regression of the classes, each of which counts the same, on random projections. The ridge is the one of the
    least squared error on samples left out, by five folds. All scores get the factor of the least cross entropy there,
    so that they are logits.
    """
    parts = features.double().split([features.shape[1] - width, width], 1)
    scale = torch.cat([part.square().mean().sqrt().clamp_min(1e-12).expand(part.shape[1]) for part in parts])
    drawn = torch.randn(PROJECTIONS, len(scale), generator=generator, dtype=torch.double).to(scale.device) / scale
    lifted = F.relu(features.double() @ drawn.T)
    wanted = F.one_hot((labels - old) % (old + new), old + new).to(lifted)  # new classes first
    alike, fold = _alike(labels), folds(labels, shows, generator)
    moments = [_moments(lifted[out], wanted[out], alike[out]) for out in (fold == number for number in range(FOLDS))]
    gram, sums = (torch.stack(parts).sum(0) for parts in zip(*moments, strict=True))
    scores = torch.zeros(len(RIDGES), *wanted.shape, dtype=lifted.dtype, device=lifted.device)
    for number, (own_gram, own_sums) in enumerate(moments):
        out = fold == number
        for tried, found in enumerate(_solved(gram - own_gram, sums - own_sums)):
            scores[tried, out] = lifted[out] @ found
    errors = ((scores - wanted).square().sum(2) * alike).mean(1)
    best = int(errors.argmin())
    factor = _factor(scores[best], wanted.argmax(1), balance(labels, old).double())
    weight = factor * _solved(gram, sums)[best].T
    return Scorer(drawn.to(features), weight.to(features)), (factor * scores[best]).to(features)


def _alike(labels: Tensor) -> Tensor:
    """Weights of samples with which every class counts the same, one in the mean."""
    _, place, count = labels.unique(return_inverse=True, return_counts=True)
    weights: Tensor = len(labels) / (len(count) * count.double())
    return weights[place]


def _moments(lifted: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over samples: their second moments ``(M, M)``, and those with the classes ``(M, C)``."""
    weighed = lifted * weights[:, None]
    return weighed.T @ lifted, weighed.T @ wanted


def _solved(gram: Tensor, sums: Tensor) -> list[Tensor]:
    """The solution ``(M, C)`` for each ridge."""
    values, vectors = torch.linalg.eigh(gram)
    size = values.mean().clamp_min(1e-12)
    return [vectors @ ((vectors.T @ sums) / (values.clamp_min(0) + ridge * size)[:, None]) for ridge in RIDGES]


def _factor(scores: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The factor of scores with the least cross entropy, between old and new classes balanced."""
    size = scores.std().clamp_min(1e-12)
    log = torch.zeros((), dtype=scores.dtype, device=scores.device, requires_grad=True)

    def loss() -> Tensor:
        return (F.cross_entropy(log.exp() * scores / size, labels, reduction="none") * weights).mean()

    minimise([log], loss, steps=STEPS)
    return float((log.exp() / size).detach())
