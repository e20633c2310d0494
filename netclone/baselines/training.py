"""train(model, samples, recipe): the training loop of all baselines; tune(method, ...): find the best recipe."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.problems import InapplicableError, Problem, Recipe
from netclone.cloning.placing import reason
from netclone.errors import ArgumentError, DataError, FitError, NetcloneError
from netclone.graph.timing import clock_of_work
from netclone.learning.data import Samples, balance
from netclone.learning.neighbourhoods import Augment
from netclone.metrics.evaluating import predict

LOOKS = 8  # how often validation is measured, evenly spaced; the best of these moments is kept
WARM_UP = 0.2

Progress = Callable[[int, int], None]
Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The loss of a batch from its images, logits, labels and weights."""


class Validated(Protocol):
    """What has a validation split: a problem that recipes can be tried on."""

    @property
    def validation(self) -> Samples:
        """The samples to choose by."""

    @property
    def old(self) -> int | None:
        """The number of old columns, as for :func:`validated`."""


P = TypeVar("P", bound=Validated)


def train(  # noqa: PLR0913 - public
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    objective: Objective | None = None,
    augment: Augment | None = None,
    validation: Samples | None = None,
    old: int | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    progress: Progress | None = None,
) -> float | None:
    """Train a classifier in place by cross entropy; with validation samples, keep the best of eight moments.

    Frozen parts do not change, BatchNorm statistics included: a module whose parameters are all frozen runs in eval
    mode. The model is left in eval mode, with its flags as before. Global random states are restored.

    Parameters
    ----------
    model
        Any network that takes ``(N, C, H, W)`` and returns logits ``(N, classes)``.
    loss
        A term to add to the cross entropy: ``loss(images, logits)``.
    objective
        What to minimise instead of the cross entropy: ``objective(images, logits, labels, weights)``.
    validation
        Samples on which balanced accuracy is measured, to keep the best state. None: the last state is kept.
    old
        Number of old columns; all old samples together then weigh ``recipe.old_weight`` times the new ones. None: every
        sample weighs the same.
    parameters
        The parameters to train. None: all that require a gradient.
    progress
        Called with ``(step, steps)``.

    Returns
    -------
    float or None
        The best balanced validation accuracy (see :func:`validated`); None without validation.

    Raises
    ------
    FitError
        If the loss, or a weight, is not finite.
    DataError
        If there are fewer than two samples, or a label has no column.
    ArgumentError
        If there is nothing to train.

    Examples
    --------
    >>> images = torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    >>> samples = Samples(images, (images[:, 0] > 0).long(), "data")
    >>> train(nn.Linear(1, 2), samples, Recipe(lr=0.1, steps=40), validation=samples)
    1.0
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained = [p for p, flag in flags if flag] if parameters is None else list(parameters)
    if not trained:
        raise ArgumentError(f"{type(model).__name__}: nothing to train, no parameter requires a gradient")
    if len(samples) < 2:
        raise DataError(f"{samples.what}: {len(samples)} samples; training takes at least two")
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with seeded(recipe.seed, samples.images.device):
            return _loop(model, samples, recipe, objective or _added(loss), augment, validation, old, trained, progress)
    finally:
        model.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def train_on(
    problem: Problem,
    model: nn.Module,
    recipe: Recipe,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    objective: Objective | None = None,
) -> None:
    """As :func:`train`, for some parameters, on the samples of a problem, with old and new ones balanced."""
    train(
        model,
        problem.train,
        recipe,
        loss=loss,
        objective=objective,
        augment=problem.augment,
        validation=problem.validation,
        old=problem.old,
        parameters=list(parameters),
    )


def _loop(  # noqa: PLR0913 - what train() is given
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    objective: Objective,
    augment: Augment | None,
    validation: Samples | None,
    old: int | None,
    trained: list[nn.Parameter],
    progress: Progress | None,
) -> float | None:
    steps = recipe.steps
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _batches(len(samples), recipe.batch_size, generator)
    weights = balance(samples.labels, old, recipe.old_weight)
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)} if validation is not None else set()
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    for step in range(steps + 1):
        if validation is not None and step in looks:
            score = validated(model, validation, old)
            if not math.isfinite(score[1]):
                raise FitError(
                    f"training: the validation loss is {-score[1]} after {step} steps; lower the learning rate"
                )
            if best is None or score > best[0]:
                best = score, copy.deepcopy(model.state_dict())
        if step == steps:
            break
        _modes(model, True)
        chosen = next(batches).to(samples.labels.device)
        images, labels = samples.images[chosen], samples.labels[chosen]
        if augment is not None:
            images = augment(images, generator)
        logits = model(images)
        if step == 0:
            samples.check_labels(logits.shape[1], "model")
        value = objective(images, logits, labels, weights[chosen])
        if not torch.isfinite(value):
            raise FitError(f"training: the loss is {value.item()} at step {step}; lower the learning rate {recipe.lr}")
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * one_cycle((step + 1) / (steps + 1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
    if best is not None:
        model.load_state_dict(best[1])
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise FitError(f"training: a weight is not finite after {steps} steps; lower the learning rate {recipe.lr}")
    return None if best is None else best[0][0]


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean cross entropy of logits ``(N, classes)`` with a weight for each sample."""
    return (F.cross_entropy(logits, labels, reduction="none") * weights).mean()


def _added(loss: Callable[[Tensor, Tensor], Tensor] | None) -> Objective:
    """The cross entropy, and a further term."""

    def objective(images: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        value = weighted_cross_entropy(logits, labels, weights)
        return value if loss is None else value + loss(images, logits)

    return objective


def validated(model: nn.Module, samples: Samples, old: int | None = None) -> tuple[float, float]:
    """Balanced accuracy, and the negative balanced cross entropy to break ties; greater is better.

    Both are means of the values for old and for new classes, over all columns (``old`` None: over all samples).
    """
    logits = predict(model, samples.images)
    samples.check_labels(logits.shape[1], "model")
    right = (logits.argmax(1) == samples.labels).double()
    losses = F.cross_entropy(logits, samples.labels, reduction="none").double()
    weights = balance(samples.labels, old).double()
    return float((right * weights).mean()), -float((losses * weights).mean())


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried: its balanced validation accuracy, or None and why it failed; and its seconds."""

    recipe: Recipe
    score: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Tuned:
    """The best network of a method, with its recipe and score, all trials, and the seconds that they took.

    On the CPU they are seconds of a processor, elsewhere those that pass.
    """

    model: nn.Module
    recipe: Recipe
    score: float
    trials: tuple[Trial, ...]
    seconds: float


def tune(
    method: Callable[[P, Recipe], nn.Module], problem: P, recipes: Sequence[Recipe], progress: Progress | None = None
) -> Tuned:
    """Run a method with every recipe, and keep the best on validation (ties: by cross entropy, then the first).

    A recipe that fails becomes a trial with the reason. A method that does not apply is not tried again.

    Parameters
    ----------
    progress
        Called with ``(recipes done, recipes)``.

    Raises
    ------
    ArgumentError
        If there is no recipe.
    FitError
        If every recipe fails; the message lists the reasons.
    InapplicableError
        If the method does not apply to the target or the source.
    """
    if not recipes:
        raise ArgumentError("recipes: empty; give at least one")
    trials: list[Trial] = []
    best: tuple[tuple[float, float], Recipe, nn.Module] | None = None
    now = clock_of_work(problem.validation.images.device)
    started = now()
    for recipe in recipes:
        began = now()
        try:
            model = method(problem, recipe)
            score = validated(model, problem.validation, problem.old)
            if not math.isfinite(score[1]):
                raise FitError(f"the validation loss is {-score[1]}")
        except InapplicableError:
            raise
        except NetcloneError as error:
            trials.append(Trial(recipe, None, now() - began, reason(error)))
        else:
            trials.append(Trial(recipe, score[0], now() - began))
            if best is None or score > best[0]:
                best = score, recipe, model
        if progress is not None:
            progress(len(trials), len(recipes))
    if best is None:
        raise FitError("no recipe works: " + "; ".join(f"lr {t.recipe.lr:g}: {t.reason}" for t in trials))
    return Tuned(best[2], best[1], best[0][0], tuple(trials), now() - started)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with global random states set by a seed, and restore the caller's, on the CPU and the device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def one_cycle(done: float) -> float:
    """Share of the peak learning rate after a share of the steps: a linear rise, then half a cosine to zero."""
    if done < WARM_UP:
        return done / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices, in a new order every epoch; samples that do not fill a batch are left out of that epoch."""
    size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _modes(module: nn.Module, training: bool) -> None:
    """Set train mode where something is trained; a module without parameters has the mode of its parent."""
    own = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(own) if own else training
    for child in module.children():
        _modes(child, module.training)
