"""Frozen networks side by side: a classifier over their features gives the new logits, gated as a clone's are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.baselines.ensembling import fitted_scale
from netclone.baselines.heads import KINDS, Head
from netclone.baselines.problems import InapplicableError, Method, Problem, Recipe, classifier
from netclone.baselines.training import seeded
from netclone.errors import OutputError
from netclone.learning.adapting import Cached, Classifier
from netclone.learning.choosing import choose, folds
from netclone.learning.data import Samples, mostly_taken_for
from netclone.metrics.evaluating import predict

Of = Literal["target", "source", "both"]
_NAMES: dict[Of, str] = {"target": "target features", "source": "source features", "both": "both features"}


class Split(nn.Module):
    """A network in two: ``body``, images to the features ``(N, F)`` that its last linear layer reads, and that layer.

    Raises
    ------
    OutputError
        If the network does not end in that layer.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.body = copy.deepcopy(model).eval()
        logits = predict(self.body, images)
        name, self.linear = classifier(self.body, logits.shape[1])
        path, _, leaf = name.rpartition(".")
        if name:
            setattr(self.body.get_submodule(path), leaf, nn.Identity())
        else:
            self.body = nn.Identity()
        features = predict(self.body, images)
        with torch.no_grad():
            whole = features.shape[1] == self.linear.in_features and torch.equal(self.linear(features), logits)
        if not whole:
            raise OutputError(f"{type(model).__name__}: no features to read, it does not end in its last linear layer")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features: Tensor = self.body(x)
        logits: Tensor = self.linear(features)
        return features, logits


class Streams(nn.Module):
    """The target's logits ``(N, K)``, and behind them the features of the target, of the source, or of both.

    ``widths`` are the numbers of features of each network that is read. Of the source only what gives them is kept.
    """

    def __init__(self, problem: Problem, of: Of) -> None:
        super().__init__()
        images = problem.train.images[:2]
        self.target = copy.deepcopy(problem.target).eval() if of == "source" else Split(problem.target, images)
        source = None if of == "target" else Split(problem.source, images)
        self.source = None if source is None else source.body
        self.widths = [part.linear.in_features for part in (self.target, source) if isinstance(part, Split)]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.target, Split):
            own, logits = self.target(x)
            parts = [logits, own]
        else:
            parts = [self.target(x)]
        if self.source is not None:
            parts.append(self.source(x))
        return torch.cat(parts, 1)


class Beside(nn.Module):
    """The target's logits ``(N, K)``, to the bit, and new ones ``(N, n)`` from frozen features.

    ``left_out`` is the balanced accuracy on samples that the last fit, a cross-validated one, did not see; None if
    nothing was fitted.
    """

    def __init__(self, streams: Streams, scorer: nn.Module, classifier: Classifier, left_out: float | None) -> None:
        super().__init__()
        self.streams, self.scorer, self.classifier, self.left_out = streams, scorer, classifier, left_out
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        seen = self.streams(x)
        old = seen.shape[1] - sum(self.streams.widths)
        logits, features = seen[:, :old], seen[:, old:]
        return torch.cat([logits, self.classifier(self.scorer(features), logits)], 1)


class Scorer(nn.Module):
    """Scores ``(N, columns)`` of features ``(N, F)``, computed in float64: scaled, lifted, and solved for."""

    scale: Tensor

    def __init__(self, scale: Tensor, lift: nn.Module, solved: nn.Module) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.lift, self.solved = lift, solved

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.solved(self.lift(features.double() / self.scale))
        return scores.to(features)


def gated_ensemble(problem: Problem, recipe: Recipe) -> nn.Module:
    """The whole source beside the target, its new logits gated as a clone's are before any fit; nothing is fitted.

    A new logit is the source's odds of the class against what it takes old samples for, put on the scale of the
    target's logits (see :class:`netclone.learning.adapting.Classifier`). For each old class that is one class of the
    source: the one it predicts most often, new ones left out. A clone at the input starts from the same formula, but
    against up to 64 classes of the source, some of which may be near synonyms of the new ones.

    Raises
    ------
    OutputError
        If the source does not end in a linear layer.
    """
    return _whole_source(problem, recipe, fitted=False)


def fitted_gated_ensemble(problem: Problem, recipe: Recipe) -> nn.Module:
    """The gated ensemble with its classifier fitted as a clone's is: as far as cross-validation says that it gains.

    It is fitted to the validation samples too, as :func:`netclone.clone` fits it.

    Raises
    ------
    OutputError
        If the source does not end in a linear layer.
    """
    return _whole_source(problem, recipe, fitted=True)


def _whole_source(problem: Problem, recipe: Recipe, *, fitted: bool) -> nn.Module:
    return whole_source(problem, recipe, lambda made, seen, linear: None, fitted=fitted)


def whole_source(
    problem: Problem, recipe: Recipe, prepare: Callable[[Classifier, Cached, nn.Linear], None], *, fitted: bool = True
) -> Beside:
    """The whole source beside the target, gated as a clone; ``prepare`` may change the classifier before it is fitted.

    It is given the classifier at its closed-form start, all samples, and the source's last layer.
    """
    streams = Streams(problem, "source")
    linear = Split(problem.source, problem.train.images[:2]).linear
    seen = _seen(problem, streams)
    with seeded(recipe.seed, problem.train.images.device):
        made = started(seen, linear, problem.classes, rest(linear, seen, problem.classes))
        prepare(made, seen, linear)
        return _beside(streams, nn.Identity(), seen, made, recipe.seed if fitted else None)


def started(seen: Cached, linear: nn.Linear, classes: Sequence[int], others: Sequence[int]) -> Classifier:
    """A clone's classifier at its closed-form start, for some classes of a source against others of its classes."""
    order = [*classes, *others]
    rows = linear.weight.detach()[order], None if linear.bias is None else linear.bias.detach()[order]
    return _classifier(seen, len(classes), rows)


def rest(linear: nn.Linear, seen: Cached, left_out: Collection[int]) -> list[int]:
    """For each old class the source's class that its samples are mostly taken for; some are left out."""
    others = torch.tensor([c for c in range(linear.out_features) if c not in left_out], dtype=torch.long)
    if not len(others):
        return []
    old = seen.labels < seen.logits.shape[1]
    with torch.no_grad():
        logits = linear(seen.features[old])[:, others.to(seen.features.device)]
    return [int(others[column]) for column in mostly_taken_for(logits, seen.labels[old])]


def frozen_head(problem: Problem, recipe: Recipe, *, kind: str, of: Of) -> nn.Module:
    """A classifier over frozen features of all classes, old and new, gated and calibrated as a clone's is.

    Its strength is chosen on the clone set (see :class:`netclone.baselines.heads.Head`). Its scores are then computed
    for each fifth of the samples from the other four, and get the temperature of the least cross entropy. On these the
    gate is fitted as far as cross-validation says that it gains. At last it is solved on all samples, those for
    validation included, as :func:`netclone.clone` fits its classifier.

    Parameters
    ----------
    kind
        One of :data:`netclone.baselines.heads.KINDS`.
    of
        Whose features it reads.

    Raises
    ------
    InapplicableError
        If there is one sample of each class, which is also the one for validation.
    OutputError
        If a network whose features are read does not end in a linear layer.
    """
    with seeded(recipe.seed, problem.train.images.device):
        return _headed(problem, KINDS[kind], Streams(problem, of), recipe.seed)


def _headed(problem: Problem, head: Head, streams: Streams, seed: int) -> Beside:
    if len(problem.samples) == len(problem.train):
        raise InapplicableError("classifiers over features are chosen and gated on samples left out: give two a class")
    generator = torch.Generator().manual_seed(seed)
    seen = _seen(problem, streams)
    features, columns = seen.features.double(), problem.columns
    parts = features.split(streams.widths, 1)
    scale = torch.cat([part.square().mean().sqrt().clamp_min(1e-12).expand(part.shape[1]) for part in parts])
    lift = head.lift(features / scale, generator)
    lifted = lift(features / scale)
    fold = folds(seen.labels, torch.arange(len(seen), device=seen.labels.device), generator)
    strength = chosen_strength(head, lifted, seen.labels, columns, fold, len(problem.validation))
    scores = _left_out(head, lifted, seen.labels, columns, fold, [strength])[strength]
    temperature = _temperature(scores, seen.labels)
    new_first = torch.arange(columns, device=scores.device).roll(len(problem.classes))
    rows = temperature * torch.eye(columns).to(seen.logits)[new_first]
    scorer = Scorer(scale, lift, head.solve(head.summary(lifted, seen.labels, columns), strength))
    left = Cached(scores.to(seen.logits), seen.logits, seen.labels)
    return _beside(streams, scorer, left, _classifier(left, len(problem.classes), (rows, None)), seed)


def _seen(problem: Problem, streams: Streams) -> Cached:
    """Features and the target's logits of all samples, those for validation last."""
    rows = predict(streams, problem.samples.images)
    widths = [rows.shape[1] - sum(streams.widths), sum(streams.widths)]
    logits, features = rows.split(widths, 1)
    return Cached(features, logits, problem.samples.labels)


def _classifier(seen: Cached, classes: int, rows: tuple[Tensor, Tensor | None]) -> Classifier:
    """A gated classifier of scores, which ``rows`` map to logits, new ones first."""
    made = Classifier(seen.features.shape[1], seen.logits.shape[1], classes).to(seen.logits)
    made.start(seen.features, seen.logits, *rows)
    return made.requires_grad_(False)


def _beside(streams: Streams, scorer: nn.Module, seen: Cached, made: Classifier, seed: int | None) -> Beside:
    """The target beside a classifier of scores; no seed: it is not fitted."""
    if seed is None:
        return Beside(streams, scorer, made, None)
    choice = choose(made, seen, torch.arange(len(seen), device=seen.labels.device), torch.Generator().manual_seed(seed))
    return Beside(streams, scorer, made, seen.over_kinds(choice.right.double()))


def chosen_strength(head: Head, lifted: Tensor, labels: Tensor, columns: int, fold: Tensor, held_out: int) -> float:
    """The strength that does best on samples it was not solved on: the last ``held_out``, or each fold in turn."""
    if len(head.strengths) == 1:
        return head.strengths[0]
    if head.by == "last fifth":
        fold = torch.full_like(fold, -1)
        fold[-held_out:] = 0
    scores = _left_out(head, lifted, labels, columns, fold, head.strengths)
    known = fold >= 0

    def loss(strength: float) -> float:
        found, truth = scores[strength][known], labels[known]
        if head.by == "last fifth":
            value = float((found - F.one_hot(truth, columns)).square().mean())
        else:
            value = float(F.cross_entropy(_temperature(found, truth) * found, truth))
        return value if math.isfinite(value) else math.inf

    return min(head.strengths, key=loss)


def _left_out(
    head: Head, lifted: Tensor, labels: Tensor, columns: int, fold: Tensor, strengths: Iterable[float]
) -> dict[float, Tensor]:
    """The scores ``(N, columns)`` by strength, for every fold from the samples outside; zero where the fold is -1."""
    scores = {strength: lifted.new_zeros(len(lifted), columns) for strength in strengths}
    for number in fold[fold >= 0].unique().tolist():
        out = fold == number
        summary = head.summary(lifted[~out], labels[~out], columns)
        for strength, found in scores.items():
            found[out] = head.solve(summary, strength)(lifted[out])
    return scores


def _temperature(scores: Tensor, labels: Tensor) -> float:
    """The factor that scores ``(N, columns)`` have to have for the least cross entropy."""
    size = float(scores.std().clamp_min(1e-12))
    return float(fitted_scale(Samples(scores / size, labels, "scores"), 0, 1, 1.0)[0]) / size


HEADS: dict[str, Method] = {
    f"{kind}, {words}": partial(frozen_head, kind=kind, of=of) for kind in KINDS for of, words in _NAMES.items()
}
"""Classifiers over frozen features by name: each kind on the features of the target, of the source, and of both."""
