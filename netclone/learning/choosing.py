"""fit_classifier(branch, ...) -> score, Choice: how much of a classifier is fitted, by cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from netclone.errors import FitError
from netclone.learning.adapting import Branch, Cached, Classifier, outputs, set_threshold, validated
from netclone.learning.data import OLD_WEIGHT, balance
from netclone.learning.solving import minimise, place_to_solve
from netclone.learning.stepping import Loop
from netclone.runtime.sharing import ALONE, Workers

FOLDS = 5
NO_FIT = "no fit"
FITS: dict[str, float | None] = {
    "scale and bias": None,
    "linear, weights about 0.03": 0.03,
    "linear, weights about 0.1": 0.1,
    "linear, weights about 0.3": 0.3,
}
"""What may be fitted: scale and bias alone, or the linear part too, whose weights have a prior of this deviation."""
PRIOR = 1.0  # the deviation of scale and bias from where they start
SURE = 2.0  # standard errors by which a fit has to be better than no fit, in its loss and in its accuracy
STEPS = 100  # of L-BFGS at most


@dataclass(frozen=True)
class Choice:
    """What of a classifier was fitted, and how each candidate did on the samples it was not fitted to.

    ``scores`` are balanced accuracies in [0, 1] by candidate, ``losses`` mean balanced cross entropies; ``right (N,)``
    says of each row whether what was chosen gave it its class.
    """

    fit: str
    scores: tuple[tuple[str, float], ...]
    losses: tuple[tuple[str, float], ...]
    right: Tensor

    def told(self) -> tuple[tuple[str, float], ...]:
        """Accuracy and loss of every candidate by name, for a clone's spec; the name says which was chosen."""
        mark = {self.fit: " (chosen)"}
        return tuple(
            (f"{what}, {name}{mark.get(name, '')}", value)
            for what, values in (("left out", self.scores), ("loss left out", self.losses))
            for name, value in values
        )


@dataclass(frozen=True)
class _Numbers:
    """What is fitted of a classifier."""

    scale: Tensor
    bias: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Rows:
    """Samples as the fit sees them, in float64: a new logit is ``scale * own + given + weight @ seen + bias``."""

    own: Tensor
    given: Tensor
    seen: Tensor
    logits: Tensor
    labels: Tensor
    shows: Tensor

    def __getitem__(self, chosen: Tensor) -> _Rows:
        return _Rows(*(tensor[chosen] for tensor in vars(self).values()))

    def on(self, device: torch.device) -> _Rows:
        """The same on a device."""
        return _Rows(*(tensor.to(device) for tensor in vars(self).values()))

    def outputs(self, numbers: _Numbers) -> Tensor:
        """Old and new logits, side by side."""
        new = numbers.scale * self.own + self.given + self.seen @ numbers.weight.T + numbers.bias
        return torch.cat([self.logits, new], 1)

    def losses(self, outputs: Tensor) -> Tensor:
        """The cross entropy of each row."""
        return F.cross_entropy(outputs, self.labels, reduction="none")

    def weights(self, old_weight: float) -> Tensor:
        """How much each row counts, one in the mean (see :func:`netclone.learning.data.balance`)."""
        return balance(self.labels, self.logits.shape[1], old_weight).double()

    def by_sample(self, values: Tensor) -> Tensor:
        """The mean over the rows that show a sample, for each sample."""
        _, place, count = self.shows.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(count), dtype=values.dtype, device=values.device).index_add(0, place, values)
        means: Tensor = sums / count
        return means

    def fewest(self) -> int:
        """Samples of the new class that has the fewest, or of all old classes together if these are fewer."""
        kinds = self.labels.clamp_min(self.logits.shape[1] - 1)  # the old classes are one kind
        return min(len(self.shows[kinds == kind].unique()) for kind in kinds.unique().tolist())


def fit_classifier(
    branch: Branch, train: Cached, held_out: Cached, shows: Tensor, *, loop: Loop, calibrate: bool = True
) -> tuple[float, Choice | None]:
    """Fit the classifier alone on cached features, as far as cross-validation says that it gains (see :func:`choose`).

    It is fitted to the held-out samples too. Without any old-class sample it stays as it starts if it knows the
    source's other classes; if it does not, or without calibration, it is fitted to the training samples, new classes
    among themselves, and without calibration gets no threshold afterwards.

    Parameters
    ----------
    shows
        The sample that each row of ``train``, and then of ``held_out``, shows.

    Returns
    -------
    tuple[float, Choice | None]
        Balanced accuracy on the held-out samples, which were classified without having been seen, and what was chosen;
        None if there was nothing to choose.

    Raises
    ------
    FitError
        If the loss is not finite.
    """
    classifier, by, old = branch.classifier, (loop.batch_size, loop.workers), train.logits.shape[1]
    if calibrate and bool((train.labels < old).any()):
        both = Cached(*(torch.cat(parts) for parts in zip(_parts(train), _parts(held_out), strict=True)))
        choice = choose(classifier, both, shows, loop.generator)
        return held_out.over_kinds(choice.right[len(train) :].double()), choice
    if calibrate and classifier.gated:  # the source's own odds stand: nothing here could better them
        return validated(branch, held_out, *by)[0], None
    new = (train.labels >= old).nonzero().flatten()
    choice = choose(classifier, train[new], shows[new], loop.generator, joint=False)
    if calibrate:
        set_threshold(branch, train, *by)
    return validated(branch, held_out, *by)[0], choice


def classified(
    branch: Branch,
    train: Cached,
    held_out: Cached,
    choice: Choice | None,
    batch_size: int,
    workers: Workers = ALONE,
) -> Tensor:
    """Whether each held-out sample is given its class ``(N,)``.

    A classifier that was fitted to the held-out samples too is judged by what was fitted without them.
    """
    if choice is not None and len(choice.right) == len(train) + len(held_out):
        return choice.right[len(train) :]
    logits = torch.cat([held_out.logits, outputs(branch, held_out, batch_size, workers)], 1)
    return logits.argmax(1) == held_out.labels


def by_kind(held_out: Cached, right: Tensor) -> tuple[tuple[str, float], ...]:
    """Accuracy on held-out samples by name: ``old before`` and ``old``, without and with the clone, and ``new``.

    ``right (N,)`` says which get their class with the clone. What there is no sample of is left out.
    """
    before, _ = held_out.by_kind((held_out.logits.argmax(1) == held_out.labels).double())
    found = zip(("old before", "old", "new"), (before, *held_out.by_kind(right.double())), strict=True)
    return tuple((name, float(mean)) for name, mean in found if mean is not None)


def choose(
    classifier: Classifier, samples: Cached, shows: Tensor, generator: torch.Generator, *, joint: bool = True
) -> Choice:
    """Fit of a classifier, in place, what gains: nothing, scale and bias, or the linear part as well.

    Each candidate is a convex problem: the cross entropy over old and new logits, and a normal prior about the
    classifier as it starts. It is solved without one fold of the samples after the other, and judged on the fold left
    out. A fit counts if its loss there is lower than that of no fit by two standard errors, and its balanced accuracy
    is not lower. Where the classifier starts from a formula (``gated``), it has to be higher by two standard errors,
    too. The fit of the lowest loss is solved on all samples. If none counts, the classifier stays as it starts. A gated
    one does so, too, where a new class has fewer samples than there are folds, or the old ones together.

    Parameters
    ----------
    classifier
        At its start (see :meth:`Classifier.start`).
    samples
        The module's features ``(N, F)``, the target's logits, and the labels.
    shows
        The sample that each row shows ``(N,)``: views of one sample are left out together.
    generator
        What the folds are drawn from, class by class.
    joint
        False: all samples are of new classes, whose logits are fitted and judged among themselves.

    Raises
    ------
    FitError
        If a loss is not finite.
    """
    columns = samples.logits.shape[1] if joint else 0
    with torch.no_grad():
        own, given, seen = classifier.terms(samples.features, samples.logits)
    given = torch.zeros_like(own[:, :1]) if given is None else given
    labels = samples.labels - (samples.logits.shape[1] - columns)
    rows = _Rows(own.double(), given.double(), seen.double(), samples.logits[:, :columns].double(), labels, shows)
    rows = rows.on(place_to_solve(rows.seen))
    linear, place = classifier.linear, rows.labels.device
    start = _Numbers(*(part.detach().double().to(place) for part in (classifier.scale, linear.bias, linear.weight)))
    tried = FITS if not classifier.gated or rows.fewest() >= FOLDS else {}
    outputs = _left_out(rows, start, tried, folds(rows.labels, rows.shows, generator))
    losses = {name: rows.by_sample(rows.losses(out) * rows.weights(OLD_WEIGHT)) for name, out in outputs.items()}
    right = {name: out.argmax(1) == rows.labels for name, out in outputs.items()}
    hits = {name: rows.by_sample(hit * rows.weights(1.0)) for name, hit in right.items()}
    means = {name: float(loss.mean()) for name, loss in losses.items()}

    def counts(name: str) -> bool:
        gained = hits[name] - hits[NO_FIT]
        right_as_often = _surely_positive(gained) if classifier.gated else bool(gained.mean() >= 0)
        return right_as_often and _surely_positive(losses[NO_FIT] - losses[name])

    fit = min([NO_FIT, *filter(counts, tried)], key=means.__getitem__)
    if fit != NO_FIT:
        found = _solved(rows, start, tried)[fit]
        with torch.no_grad():
            for part, number in zip((classifier.scale, linear.bias, linear.weight), vars(found).values(), strict=True):
                part.copy_(number)
    scores = tuple((name, float(hit.mean())) for name, hit in hits.items())
    return Choice(fit, scores, tuple(means.items()), right[fit].to(labels.device))


def _surely_positive(gains: Tensor) -> bool:
    """Whether the mean is above zero by more than two of its standard errors."""
    return bool(gains.mean() > SURE * gains.std(unbiased=False) / len(gains) ** 0.5)


def _parts(cached: Cached) -> tuple[Tensor, Tensor, Tensor]:
    return cached.features, cached.logits, cached.labels


def folds(labels: Tensor, shows: Tensor, generator: torch.Generator) -> Tensor:
    """The fold of each row ``(N,)``: of every class about as many samples in each, all rows of a sample in one.

    ``labels (N,)`` are the classes, and ``shows (N,)`` the samples that the rows show.

    Examples
    --------
    >>> folds(torch.zeros(6, dtype=torch.long), torch.arange(6) // 2, torch.Generator()).unique().tolist()
    [0, 1, 2]
    """
    row_of = {sample: row for row, sample in enumerate(shows.tolist())}
    samples = torch.tensor(list(row_of), device=labels.device)
    labels = labels[list(row_of.values())]
    order = torch.randperm(len(samples), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]  # class by class, and dealt out in turn
    fold = torch.zeros(int(samples.max()) + 1, dtype=torch.long, device=labels.device)
    fold[samples[order]] = torch.arange(len(samples), device=labels.device) % FOLDS
    return fold[shows]


def _left_out(rows: _Rows, start: _Numbers, tried: Mapping[str, float | None], fold: Tensor) -> dict[str, Tensor]:
    """The outputs of each candidate, for every fold by what was solved without it."""
    outputs = {name: rows.outputs(start) for name in (NO_FIT, *tried)}
    if not bool(torch.isfinite(rows.losses(outputs[NO_FIT])).all()):
        raise FitError("fitting the classifier: the loss is not finite; check the data's scale")
    for number in fold.unique().tolist():
        out = fold == number
        if not bool(out.all()):
            for name, found in _solved(rows[~out], start, tried).items():
                outputs[name][out] = rows[out].outputs(found)
    return outputs


def _solved(rows: _Rows, start: _Numbers, tried: Mapping[str, float | None]) -> dict[str, _Numbers]:
    """What each candidate finds on these samples; each begins where the one before it ended."""
    weights, count = rows.weights(OLD_WEIGHT), len(rows.shows.unique())
    now = _Numbers(*(part.clone().requires_grad_(True) for part in vars(start).values()))
    found = {}
    for name, deviation in tried.items():
        parts = [now.scale, now.bias] if deviation is None else list(vars(now).values())

        def loss(deviation: float | None = deviation) -> Tensor:
            moved = (now.scale - start.scale).square() + (now.bias - start.bias).square().sum()
            prior = moved / PRIOR**2
            if deviation is not None:
                prior = prior + (now.weight - start.weight).square().sum() / deviation**2
            return (rows.losses(rows.outputs(now)) * weights).mean() + prior / (2 * count)

        minimise(parts, loss, steps=STEPS, history=10)
        found[name] = _Numbers(*(part.detach().clone() for part in vars(now).values()))
    return found
