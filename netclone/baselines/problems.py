"""The input of every baseline: a target, a source, samples of old and new classes, and how to train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import nn

from netclone.errors import ArgumentError, DataError, OutputError
from netclone.learning.data import Samples, check_classes, check_keep
from netclone.learning.neighbourhoods import Augment
from netclone.metrics.evaluating import predict


class InapplicableError(ArgumentError):
    """A method is not made for such a target or source (prompts for a convolutional network): not a failure."""


@dataclass(frozen=True)
class Problem:
    """A target that has to learn ``n`` classes of a source, and the samples for it.

    Parameters
    ----------
    target, source
        Classifiers of the same images; never changed.
    classes
        Source classes to clone; column ``K + i`` of the result is ``classes[i]``.
    train, validation
        Samples of old and new classes; labels are columns of the result: old 0 to K-1, then the new ones.
    keep
        The most parameters of a pruned source, as a share of the source's, in (0, 1].
    augment
        Changes a training batch ``(N, C, H, W)``. All randomness has to come from the generator, which is on the CPU.

    Raises
    ------
    ArgumentError
        If ``classes`` is empty, has repetitions or is out of the source's range, or ``keep`` is out of range.
    DataError
        If a label is not a column of the result.
    """

    target: nn.Module
    source: nn.Module
    classes: tuple[int, ...]
    train: Samples
    validation: Samples
    keep: float = 0.5
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_classes(self.classes, predict(self.source, self.train.images[:1]).shape[1])
        for samples in (self.train, self.validation):
            samples.check_labels(self.columns, "extended model")

    @cached_property
    def old(self) -> int:
        """K, the number of classes that the target knows."""
        return predict(self.target, self.train.images[:1]).shape[1]

    @cached_property
    def samples(self) -> Samples:
        """All samples, those for validation last; each once, since a single one of each class may be for both."""
        train, validation = self.train, self.validation
        if train.images.shape == validation.images.shape and torch.equal(train.images, validation.images):
            return train
        images = torch.cat([train.images, validation.images])
        labels = torch.cat([train.labels, validation.labels])
        return Samples(images, labels, train.what)

    @property
    def columns(self) -> int:
        """K + n, the number of logits of a result."""
        return self.old + len(self.classes)

    def extended_target(self, recipe: Recipe) -> nn.Module:
        """A copy of the target with a column for each class to clone, checked on images.

        Raises
        ------
        OutputError
            If the target has no final linear layer, or does not end in one.
        """
        model = extended(self.target, len(self.classes), old=self.old, seed=recipe.seed)
        ends = "the baselines need a target that ends in that layer"
        what = f"{len(self.classes)} rows added to its last linear layer"
        try:
            width = predict(model, self.train.images[:1]).shape[1]
        except DataError as error:  # the target itself works on these images
            said = error.__cause__ or error
            raise OutputError(f"{type(model).__name__} fails with {what}: {said}; {ends}") from error
        if width != self.columns:
            raise OutputError(f"{type(model).__name__}: {width} logits with {what}, expected {self.columns}: {ends}")
        return model


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam, with a learning rate that rises for a fifth of the steps and then falls to zero; and options.

    Parameters
    ----------
    lr, steps, batch_size
        Peak learning rate, optimiser steps, samples per step.
    seed
        Seed of everything random; the same seed gives the same network.
    weight_decay
        Decoupled, as in AdamW.
    frozen
        Number of stages, counted from the input, that fine-tuning freezes (see ``stages``), and methods built on it.
    distillation
        Weight of the distillation of LwF, of PCSD, and of fine-tuning with the source as teacher.
    old_weight
        Weight of all old samples together in the loss, relative to all new ones together.
    sparsity
        Weight of DER's sparsity loss.
    prompts
        Number of visual prompts, of each class where they depend on it.
    meta
        Weight of MeRLin's meta loss.

    Raises
    ------
    ArgumentError
        If a value is out of range.
    """

    lr: float
    steps: int
    batch_size: int = 128
    seed: int = 0
    weight_decay: float = 0.0
    frozen: int = 0
    distillation: float = 1.0
    old_weight: float = 1.0
    sparsity: float = 0.1
    prompts: int = 5
    meta: float = 1.0

    def __post_init__(self) -> None:
        least = {"batch_size": 2, "prompts": 1}
        for name in (field.name for field in fields(self) if field.name != "seed"):
            value = getattr(self, name)
            if not value >= least.get(name, 0):
                raise ArgumentError(f"recipe: {name} is {value!r}, expected {least.get(name, 0)} or more")


Method = Callable[[Problem, Recipe], nn.Module]


def classifier(model: nn.Module, old: int | None = None) -> tuple[str, nn.Linear]:
    """Path and module of the last linear layer with ``old`` outputs (None: any), in the order of ``named_modules``.

    Raises
    ------
    OutputError
        If there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and old in (None, module.out_features)
    ]
    if not found:
        wanted = "" if old is None else f" with {old} outputs"
        raise OutputError(
            f"{type(model).__name__}: no linear layer{wanted} to add classes to; the baselines need a target that "
            "ends in one"
        )
    return found[-1]


def extended(target: nn.Module, n: int, *, old: int | None = None, seed: int = 0) -> nn.Module:
    """A copy of the target whose final linear layer has ``K + n`` outputs: the old rows, then small new ones.

    Parameters
    ----------
    old
        K, by which the final layer is recognised. None: the last linear layer is the final one.
    seed
        Seed of the new rows, which are normal with a hundredth of the old rows' mean size; their biases are zero.

    Raises
    ------
    OutputError
        If there is no linear layer with K outputs.

    Examples
    --------
    >>> extended(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 2)[1]
    Linear(in_features=4, out_features=5, bias=True)
    """
    model = copy.deepcopy(target)
    _, linear = classifier(model, old)
    weight, bias = linear.weight, linear.bias
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, linear.in_features, generator=generator).to(weight) * (weight.detach().abs().mean() / 100)
    linear.weight = nn.Parameter(torch.cat([weight.detach(), rows]), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(torch.cat([bias.detach(), bias.new_zeros(n)]), requires_grad=bias.requires_grad)
    linear.out_features += n
    return model
