"""confusion, by_class, changes: what a clone changed, per class and per sample, computed from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """How often samples of one class (rows) were predicted as another (columns).

    ``columns`` are the classes shown, old ones first. ``others`` is how many classes were left out. If there are any,
    the last row and column of ``counts`` sum over them.
    """

    columns: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    others: int


@dataclass(frozen=True)
class OfClass:
    """A class: its column, its number of samples, and shares in [0, 1].

    ``before`` and ``grafted`` are its recall without and with the clone: the share of its samples that are predicted as
    it. ``precision``, with the clone, is the share of the samples predicted as it that are its; None if there is none.
    ``source`` is the source's recall; None for a class that is not the clone's, or without a source.
    """

    column: int
    is_new: bool
    samples: int
    before: float
    grafted: float
    precision: float | None
    source: float | None = None


@dataclass(frozen=True)
class Change:
    """A sample without and with the clone: the probability of its label, and its predicted class."""

    index: int
    label: int
    before: float
    grafted: float
    taken_before: int
    taken_grafted: int

    @property
    def gain(self) -> float:
        """The increase of the label's probability by the clone, in [-1, 1]."""
        return self.grafted - self.before


def confusion(labels: Tensor, predicted: Tensor, old: Sequence[int], new: Sequence[int], most: int) -> Confusion:
    """Count labels ``(N,)`` against predictions ``(N,)``, for at most ``most`` old and ``most`` new classes.

    If there are more, the classes that are involved in most mistakes are shown.

    Examples
    --------
    >>> confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 2]), old=[0, 1], new=[2], most=2).counts
    ((1, 0, 1), (0, 1, 0), (0, 0, 1))
    """
    width = len(old) + len(new)
    wrong = labels != predicted
    mistakes = torch.bincount(labels[wrong], minlength=width) + torch.bincount(predicted[wrong], minlength=width)
    samples = torch.bincount(labels, minlength=width)

    def chosen(columns: Sequence[int]) -> list[int]:
        order = sorted(columns, key=lambda column: (-int(mistakes[column]), -int(samples[column]), column))
        return sorted(order[:most])

    shown = [*chosen(old), *chosen(new)]
    others = width - len(shown)
    place = torch.full((width,), len(shown), dtype=torch.long)
    place[shown] = torch.arange(len(shown))
    size = len(shown) + (others > 0)
    counts = torch.bincount(place[labels] * size + place[predicted], minlength=size * size).view(size, size)
    return Confusion(tuple(shown), tuple(tuple(row) for row in counts.tolist()), others)


def by_class(
    labels: Tensor, before: Tensor, grafted: Tensor, new: Sequence[int], of_source: Tensor | None = None
) -> tuple[OfClass, ...]:
    """Every class that has samples, from labels ``(N,)`` and predictions ``(N,)``, in order of its column.

    ``of_source (M,)`` says which of the samples of new classes the source gets right, in their order.

    Examples
    --------
    >>> found = by_class(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), new=[1])
    >>> [(one.column, one.grafted, one.precision) for one in found]
    [(0, 0.0, None), (1, 1.0, 0.6666666666666666)]
    """
    of_new = torch.isin(labels, torch.tensor(list(new)))
    found = []
    for column in labels.unique().tolist():
        own, taken = labels == column, grafted == column
        recall = [float((predicted[own] == column).double().mean()) for predicted in (before, grafted)]
        precision = float(own[taken].double().mean()) if bool(taken.any()) else None
        known = None if of_source is None or column not in new else float(of_source[own[of_new]].double().mean())
        found.append(OfClass(column, column in new, int(own.sum()), recall[0], recall[1], precision, known))
    return tuple(found)


def changes(labels: Tensor, before: Tensor, grafted: Tensor, old: Sequence[int]) -> tuple[Change, ...]:
    """All samples in order, from labels ``(N,)``, logits ``(N, len(old))`` and logits ``(N, columns)``.

    Without the clone, a new class has no column and therefore probability zero.

    Examples
    --------
    >>> changes(torch.tensor([1]), torch.zeros(1, 1), torch.zeros(1, 2), [0])[0].gain
    0.5
    """
    wide = torch.zeros(grafted.shape, dtype=torch.double)
    wide[:, list(old)] = before.double().softmax(1)
    likely = grafted.double().softmax(1)
    rows = torch.arange(len(labels))
    columns = (rows, labels, wide[rows, labels], likely[rows, labels], wide.argmax(1), grafted.argmax(1))
    return tuple(Change(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
