"""merlin(problem, recipe): features for which a ridge classifier of some samples is right about others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.frozen import Split
from netclone.baselines.problems import Problem, Recipe
from netclone.baselines.training import train_on, weighted_cross_entropy

RIDGE = 0.1
"""Strength of the inner ridge, relative to the mean squared length of the features."""


class Represented(nn.Module):
    """A network whose classifier does not train its features: in train mode these are kept for losses of their own."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.split.body(x)
        self.features = features if self.training else None
        logits: Tensor = self.split.linear(features.detach() if self.training else features)
        return logits


def merlin(problem: Problem, recipe: Recipe) -> nn.Module:
    """The extended target, whose features are trained so that a classifier of half of a batch fits the other half.

    The features minimise ``L_old + meta * L_meta``. ``L_old`` is the cross entropy of old samples among the old
    classes, the task that the network was trained on. ``L_meta`` is the squared error, on one half of each batch, of
    the ridge regression of one-hot labels that the other half gives in closed form; the gradient runs through it. The
    classifier of all classes is fitted on the features as they are, and does not change them.

    In the paper the inner classifier minimises cross entropy, approximately, by gradient steps. The paper's classifier
    for the new task is fitted when the features are ready, and here beside them. The paper's target task has new
    classes alone, where here all have to be told apart. Old logits change.

    Raises
    ------
    FitError
        If training diverges.
    OutputError
        If the target does not end in a linear layer.

    Reference: Liu et al., Meta-learning Transferable Representations with a Single Target Domain (MeRLin, arXiv
    2011.01418), the section on the method.
    """
    model = Represented(Split(problem.extended_target(recipe), problem.train.images[:2]))
    linear = model.split.linear

    def objective(images: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        features = model.features
        assert features is not None
        value = weighted_cross_entropy(logits, labels, weights)
        old = labels < problem.old
        if bool(old.any()):
            value = value + F.cross_entropy(linear(features[old])[:, : problem.old], labels[old])
        return value + recipe.meta * meta_loss(features, labels, problem.columns)

    train_on(problem, model, recipe, model.parameters(), objective=objective)
    model.features = None
    return model


def meta_loss(features: Tensor, labels: Tensor, columns: int) -> Tensor:
    """The squared error on every other sample of ``features (N, F)`` of a ridge on the rest, summed over ``columns``.

    Examples
    --------
    >>> meta_loss(torch.tensor([[1.0], [1.0]]), torch.tensor([0, 0]), 1)  # (1 - 2 / (2 + 0.2))^2
    tensor(0.0083)
    """
    wanted = F.one_hot(labels, columns).to(features)
    inner, outer = features[::2], features[1::2]
    inner, outer = (F.pad(part, (0, 1), value=1.0) for part in (inner, outer))
    gram = inner @ inner.T
    ridge = RIDGE * gram.diagonal().mean().detach() * torch.eye(len(gram)).to(gram)
    found: Tensor = outer @ inner.T @ torch.linalg.solve(gram + ridge, wanted[::2])
    return (found - wanted[1::2]).square().sum(1).mean()
