"""Moments: what closed-form classifiers need to know of labelled features, as sums from which samples can be taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Moments:
    """Class by class the number of samples ``(C,)``, their sum ``(C, F)``, and their second moments.

    ``squares`` are sums of outer products: ``(C, F, F)``, or ``(1, F, F)`` over all classes together. All are sums over
    samples, so moments of further samples are added, and those of a class that has to go are subtracted.

    Examples
    --------
    >>> features, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1])
    >>> both = Moments.of(features, labels, 2)
    >>> both.means.tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    >>> left = both - Moments.of(features[:2], labels[:2], 2)
    >>> left.counts.tolist(), left.squares.tolist()
    ([0.0, 1.0], [[[0.0, 0.0], [0.0, 4.0]]])
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int, *, by_class: bool = False) -> Moments:
        """The moments of features ``(N, F)`` with labels ``(N,)`` below ``classes``."""
        belongs = F.one_hot(labels, classes).to(features)
        parts = [features[labels == c] for c in range(classes)] if by_class else [features]
        return cls(belongs.sum(0), belongs.T @ features, torch.stack([part.T @ part for part in parts]))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.counts + other.counts, self.sums + other.sums, self.squares + other.squares)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.counts - other.counts, self.sums - other.sums, self.squares - other.squares)

    @property
    def means(self) -> Tensor:
        """The mean of each class ``(C, F)``; zero for a class without samples."""
        return self.sums / self.counts.clamp_min(1)[:, None]
