"""Data and labels as netclone takes them: iterables of ``(images, labels)``, gathered and checked once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from netclone.errors import ArgumentError, DataError

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Samples:
    """Images ``(N, C, H, W)`` and integer labels ``(N,)``; ``what`` names them in messages."""

    images: Tensor
    labels: Tensor
    what: str

    def __len__(self) -> int:
        return len(self.images)

    def check_labels(self, count: int, model: str) -> None:
        """Refuse labels outside the model's classes."""
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= count:
            raise DataError(
                f"{self.what}: labels run from {low} to {high}, the {model} has classes 0 to {count - 1}; give labels "
                f"in the {model}'s label space"
            )

    def check_images(self, example: Tensor, model: str) -> None:
        """Refuse images of another shape or dtype than those a model was traced with."""
        if self.images.shape[1:] != example.shape[1:] or self.images.dtype != example.dtype:
            raise DataError(
                f"{self.what}: images are {tuple(self.images.shape[1:])} {self.images.dtype}, the {model} takes "
                f"{tuple(example.shape[1:])} {example.dtype}; give them as the {model} takes them"
            )

    def of_classes(self, classes: Sequence[int]) -> Samples:
        """The samples whose label is one of ``classes``; all of these must occur."""
        missing = sorted(set(classes) - set(self.labels.unique().tolist()))
        if missing:
            raise DataError(f"{self.what}: no sample of class {missing[0]} (classes asked for: {tuple(classes)})")
        chosen = torch.isin(self.labels, torch.tensor(tuple(classes), device=self.labels.device))
        return Samples(self.images[chosen], self.labels[chosen], self.what)


def gather(data: Batches, what: str = "data") -> Samples:
    """All batches in one, checked.

    Raises
    ------
    DataError
        If there is no sample, images and labels do not match, labels are not integers, or a value is not finite.

    Examples
    --------
    >>> gather([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]).images.shape
    torch.Size([2, 3, 8, 8])
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(data):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            raise DataError(f"{what}: batch {number} is {type(batch).__name__}; expected a pair (images, labels)")
        image, label = batch[0], torch.as_tensor(batch[1])
        if image.dim() < 2 or label.dim() != 1 or len(image) != len(label):
            raise DataError(
                f"{what}: batch {number} has images {tuple(image.shape)} and labels {tuple(label.shape)}; expected "
                "(N, ...) and (N,)"
            )
        if label.is_floating_point():
            raise DataError(f"{what}: labels of batch {number} are {label.dtype}; expected integer class indices")
        if image.is_floating_point() and not bool(torch.isfinite(image).all()):
            bad = int((~torch.isfinite(image)).sum())
            raise DataError(f"{what}: batch {number} holds {bad} values that are NaN or infinite; clean them first")
        if images and (image.shape[1:] != images[0].shape[1:] or image.dtype != images[0].dtype):
            raise DataError(
                f"{what}: batch {number} has images {tuple(image.shape)} {image.dtype}, batch 0 has "
                f"{tuple(images[0].shape)} {images[0].dtype}; give all in one size and dtype"
            )
        images.append(image.detach())
        labels.append(label.detach().to(image.device))
    if not images or sum(map(len, images)) == 0:
        raise DataError(f"{what}: empty; expected at least one batch of (images, labels)")
    return Samples(torch.cat(images), torch.cat(labels), what)


def check_keep(keep: float) -> None:
    """Refuse a share outside (0, 1]."""
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ArgumentError(f"keep: got {keep!r}, expected a share in (0, 1], such as 0.5")


def check_classes(classes: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The classes asked for as a tuple; None means all.

    Raises
    ------
    ArgumentError
        If a class is out of range or repeated, or there is none.
    """
    if classes is None:
        return tuple(range(count))
    try:
        chosen = tuple(operator.index(c) for c in classes)
    except TypeError as error:
        raise ArgumentError(f"classes: got {classes!r}, expected a sequence of class indices") from error
    if not chosen:
        raise ArgumentError("classes: empty; name at least one class of the source")
    for c in chosen:
        if not 0 <= c < count:
            raise ArgumentError(f"classes: {c} is out of range; the source has classes 0 to {count - 1}")
        if chosen.count(c) > 1:
            raise ArgumentError(f"classes: {c} is given {chosen.count(c)} times; name each class once")
    return chosen
