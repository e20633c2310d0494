"""Ensembles: the source, whole or pruned, beside the target; its new-class logits plain or calibrated."""

from __future__ import annotations

import copy
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.problems import Problem, Recipe
from netclone.baselines.training import validated
from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.learning.data import OLD_WEIGHT, Samples, balance
from netclone.learning.localizing import localize
from netclone.learning.solving import minimise, place_to_solve
from netclone.metrics.evaluating import predict


class Rescalable(Protocol):
    """A network whose new logits have a scale and a bias, ``(n,)`` or ``()``."""

    scale: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor: ...


class Columns(nn.Module):
    """Some columns ``(N, n)`` of a classifier's logits ``(N, classes)``, in the given order."""

    columns: Tensor

    def __init__(self, model: nn.Module, columns: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns, device=device))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits[:, self.columns]


class Ensemble(nn.Module):
    """A target's logits ``(N, K)``, to the bit, followed by ``scale * new + bias`` of another network's ``(N, n)``."""

    scale: Tensor
    bias: Tensor

    def __init__(self, target: nn.Module, new: nn.Module, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.target, self.new = target, new
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.target(x), self.scale * self.new(x) + self.bias], 1)


def ensemble(problem: Problem, recipe: Recipe) -> nn.Module:
    """The target's logits followed by the source's for the new classes; nothing is fitted.

    Reference: Partial Network Cloning (arXiv 2303.10597), section 4 (direct ensemble).
    """
    return _plain(problem, _whole_source(problem))


def calibrated_ensemble(problem: Problem, recipe: Recipe) -> nn.Module:
    """The ensemble with a scale and bias of the new logits, fitted on the training samples.

    L-BFGS minimises the cross entropy. Scale and bias are common to all new columns, or separate for each. A mistake on
    an old class weighs as much as one on a new class, or as in :func:`netclone.clone`. Of these four fits and the plain
    ensemble, the best on validation is kept.

    Reference: Guo et al., On Calibration of Modern Neural Networks (ICML 2017, arXiv 1706.04599), vector scaling:
    equation 8 with a diagonal matrix.
    """
    return _calibrated(problem, _whole_source(problem))


def pruned_ensemble(problem: Problem, recipe: Recipe) -> nn.Module:
    """The calibrated ensemble with a source that is pruned by magnitude to ``problem.keep`` of its parameters.

    Instead of retraining, layers that read pruned channels are refitted by least squares on the training samples.

    Raises
    ------
    ArgumentError
        If the source cannot be pruned to so few parameters.

    Reference: Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017, arXiv 1608.08710).
    """
    groups = channel_groups(problem.source, problem.train.images[:2])
    mask = localize(groups, classes=problem.classes, method="magnitude", budget="params", keep=problem.keep)
    images = problem.train.images
    unread = torch.zeros(len(images), dtype=torch.long, device=images.device)  # least squares reads no labels
    data = [(images, unread)]
    return _calibrated(problem, extract(groups, mask, classes=problem.classes, reconstruct=data))


def _whole_source(problem: Problem) -> nn.Module:
    return Columns(copy.deepcopy(problem.source), problem.classes, problem.train.images.device)


def _plain(problem: Problem, new: nn.Module) -> Ensemble:
    ones = torch.ones(len(problem.classes), device=problem.train.images.device)
    return Ensemble(copy.deepcopy(problem.target), new, ones, torch.zeros_like(ones)).eval()


def _calibrated(problem: Problem, new: nn.Module) -> Ensemble:
    model = _plain(problem, new)
    calibrate(problem, model)
    return model


def calibrate(problem: Problem, model: Rescalable) -> None:
    """Fit the scale and bias of a network's new logits on the training samples; they have to be 1 and 0 before.

    The best on validation of four fits and of none is kept.
    """
    old = problem.old
    network = cast("nn.Module", model)
    train, validation = (
        Samples(predict(network, part.images), part.labels, part.what) for part in (problem.train, problem.validation)
    )
    n = len(problem.classes)
    choices = [(model.scale, model.bias)]
    choices += [fitted_scale(train, old, size, weight) for size in (1, n) for weight in (1.0, OLD_WEIGHT)]
    scores = [validated(_Rescaled(old, *choice), validation, old) for choice in choices]
    scale, bias = choices[scores.index(max(scores))]
    model.scale, model.bias = scale.expand(n).clone(), bias.expand(n).clone()


class _Rescaled(nn.Module):
    """The calibration alone, on logits ``(N, K + n)`` that are computed once."""

    def __init__(self, old: int, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.old, self.scale, self.bias = old, scale, bias

    def forward(self, logits: Tensor) -> Tensor:
        return torch.cat([logits[:, : self.old], self.scale * logits[:, self.old :] + self.bias], 1)


def fitted_scale(logits: Samples, old: int, size: int, old_weight: float) -> tuple[Tensor, Tensor]:
    """Scale and bias ``(size,)`` that minimise the balanced cross entropy; a convex problem."""
    values, labels = (tensor.to(place_to_solve(logits.images)) for tensor in (logits.images.double(), logits.labels))
    weights = balance(labels, old, old_weight).double()
    scale = torch.ones(size, dtype=torch.double, device=values.device, requires_grad=True)
    bias = torch.zeros(size, dtype=torch.double, device=values.device, requires_grad=True)

    def loss() -> Tensor:
        out = _Rescaled(old, scale, bias)(values)
        return (F.cross_entropy(out, labels, reduction="none") * weights).mean()

    minimise([scale, bias], loss, steps=200)
    return scale.detach().to(logits.images), bias.detach().to(logits.images)
