"""Data and labels as netclone takes them: iterables of ``(images, labels)``, gathered and checked once."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netclone.errors import ArgumentError, DataError, WeakDataWarning
from netclone.sharing import ALONE, Workers

OLD_WEIGHT = 2.5  # of a mistake on an old class against one on a new class: what the target can must not be disturbed
MOST_IMBALANCE = 100  # samples of the most frequent class to one of the rarest, from which on a warning is given

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Samples:
    """Images ``(N, C, H, W)`` and integer labels ``(N,)``; ``what`` names them in messages."""

    images: Tensor
    labels: Tensor
    what: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def format(self) -> str:
        """Shape of an image, dtype and device, in words."""
        return _format(self.images)

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
            raise DataError(
                f"{self.what}: no sample of class {missing[0]} (classes asked for: {tuple(classes)}); add some, or "
                "leave the class out"
            )
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
    images, labels = zip(*_checked(data, what), strict=True)
    return Samples(torch.cat(images), torch.cat(labels), what)


def streamed(data: Batches, rows: int, what: str = "data") -> Iterator[Samples]:
    """The same samples, so many at a time (the last may be fewer): no more of them are held than these and a batch.

    Raises
    ------
    DataError
        As :func:`gather`, once it gets there.

    Examples
    --------
    >>> batches = [(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 2]))] * 3
    >>> [len(part) for part in streamed(batches, 4)]
    [4, 4, 1]
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for image, label in _checked(data, what):
        images.append(image)
        labels.append(label)
        if sum(map(len, labels)) >= rows:
            whole, known = torch.cat(images), torch.cat(labels)
            full = len(known) - len(known) % rows
            for start in range(0, full, rows):
                yield Samples(whole[start : start + rows], known[start : start + rows], what)
            images, labels = [whole[full:].clone()], [known[full:].clone()]
    if sum(map(len, labels)):
        yield Samples(torch.cat(images), torch.cat(labels), what)


def _checked(data: Batches, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches one by one; raises at the first that is none, and at the end if there was no sample."""
    if not isinstance(data, Iterable):
        raise DataError(f"{what}: got {type(data).__name__}; expected an iterable of batches (images, labels)")
    first, count = "", 0
    for number, batch in enumerate(data):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            raise DataError(f"{what}: batch {number} is {type(batch).__name__}; expected a pair (images, labels)")
        image = batch[0]
        try:
            label = torch.as_tensor(batch[1])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{what}: labels of batch {number} are {type(batch[1]).__name__}; expected integer class indices"
            ) from error
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
        if number and _format(image) != first:
            raise DataError(
                f"{what}: batch {number} has images {_format(image)}, batch 0 has {first}; give all in one size and "
                "dtype, on one device"
            )
        first, count = _format(image), count + len(image)
        yield image.detach(), label.detach().to(image.device)
    if count == 0:
        raise DataError(f"{what}: empty; expected at least one batch of (images, labels)")


def check_clone_set(samples: Samples, classes: Sequence[int]) -> None:
    """Refuse a clone set that lacks a class, and say of one that is accepted what it is too weak for.

    Warns of a class with a single sample, a class whose images are all equal or blank, and of an imbalance of 100:1.

    Raises
    ------
    DataError
        If a class has no sample.

    Examples
    --------
    >>> check_clone_set(Samples(torch.randn(16, 3, 8, 8), torch.arange(16) % 2, "data"), (0, 1))
    """
    samples = samples.of_classes(classes)
    images = {c: samples.images[samples.labels == c] for c in classes}
    if single := [c for c in classes if len(images[c]) == 1]:
        _warn(
            f"{samples.what}: {_named(single)} with a single sample, which is both trained on and validated with: the "
            "validation score is optimistic and the search may choose a wrong position; add samples"
        )
    if blank := [c for c in classes if _says_nothing(images[c])]:
        _warn(
            f"{samples.what}: {_named(blank)} whose images are all equal or blank (one value everywhere); nothing can "
            "be learned from them but to tell that one picture; look at how the images are loaded and scaled"
        )
    most, least = (pick(classes, key=lambda c: len(images[c])) for pick in (max, min))
    if len(images[most]) >= MOST_IMBALANCE * len(images[least]):
        _warn(
            f"{samples.what}: {len(images[most])} samples of class {most} and {len(images[least])} of class {least}; "
            f"class {least} hardly counts in the fit and will mostly be taken for others; add samples of it, or take "
            f"fewer of class {most}"
        )


def check_agreement(logits: Tensor, samples: Samples, classes: Sequence[int]) -> None:
    """Warn if the source itself contradicts the labels of the clone set.

    That is when it predicts the label, out of all its classes, for less than half of the samples, and among ``classes``
    alone does no better than half-way from chance to always right. A source that is unsure (untrained, say) is left
    alone: it disagrees by chance.

    Parameters
    ----------
    logits
        The source's, ``(N, source classes)``, for the same samples.
    samples, classes
        The clone set, labels among ``classes``.

    Raises
    ------
    DataError
        If the logits are not finite.

    Examples
    --------
    >>> labels = torch.tensor([0, 1, 1, 0])
    >>> check_agreement(torch.eye(3)[labels], Samples(torch.randn(4, 3, 8, 8), labels, "data"), (0, 1))
    """
    labels = samples.labels.to(logits.device)
    if broken := int((logits.isnan().any(1) | logits[:, list(classes)].isinf().any(1)).sum()):
        raise DataError(
            f"{samples.what}: the source's logits are NaN or infinite on {broken} of {len(samples)} samples; nothing "
            "can be learned from them: scale the images as the source was trained, or use another source"
        )
    columns = torch.tensor(range(logits.shape[1]) if len(classes) == 1 else tuple(classes), device=logits.device)
    confidence, among = logits[:, columns].double().softmax(1).max(1)
    bar = (1 + 1 / len(columns)) / 2  # half-way from chance to certainty
    predicted = logits.argmax(1)
    share = float((predicted == labels).double().mean())
    share_among = float((columns[among] == labels).double().mean())
    if share >= 0.5 or share_among >= bar or float(confidence.mean()) < bar:
        return
    taken = "; ".join(f"{c} mostly for {int(predicted[labels == c].mode().values)}" for c in labels.unique().tolist())
    _warn(
        f"{samples.what}: the source's own prediction agrees with the labels on {share:.0%} of {len(samples)} samples "
        f"(it takes class {taken}); the module learns what the source knows, so the cloned classes will be weak or "
        "mixed up; give labels in the source's order, and images scaled as the source was trained"
    )


def in_batches(network: nn.Module, inputs: Tensor, batch_size: int, workers: Workers = ALONE) -> Tensor:
    """What a network gives for all inputs ``(N, ...)``, a batch at a time, without gradient.

    Several workers take whole batches, so that the result is the same to the bit.
    """
    parts = inputs.split(batch_size)
    team = workers.team(len(parts))
    with torch.no_grad():
        return team.joined(torch.cat([network(part) for part in parts[team.own(len(parts))]]))


def balance(labels: Tensor, old: int | None, old_weight: float = 1.0) -> Tensor:
    """One weight per sample, mean one, such that old samples (labels below ``old``) weigh so many times the new ones.

    Where there is only one kind, all weigh one.

    Examples
    --------
    >>> balance(torch.tensor([0, 0, 0, 1]), 1).tolist()
    [0.6666666865348816, 0.6666666865348816, 0.6666666865348816, 2.0]
    """
    weights = torch.ones(len(labels), device=labels.device)
    is_new = labels >= (0 if old is None else old)
    for kind, share in ((~is_new, old_weight), (is_new, 1.0)):
        if 0 < int(kind.sum()) < len(labels):
            weights[kind] = share / (1 + old_weight) * len(labels) / int(kind.sum())
    return weights


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


def check_names(names: Sequence[str], classes: Sequence[int]) -> None:
    """Refuse names that are not as many as the classes; none at all are well."""
    if names and len(names) != len(classes):
        raise ArgumentError(f"class_names: {len(names)} names for {len(classes)} classes; give one per class")


def check_number(number: int, what: str, least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ArgumentError(f"{what}: got {number!r}, expected a whole number from {least} on")


def _format(images: Tensor) -> str:
    return f"{tuple(images.shape[1:])} {images.dtype} on {images.device}"


def _says_nothing(images: Tensor) -> bool:
    """Whether several images are one and the same, or each is of one value everywhere."""
    flat = images.flatten(1)
    blank = flat.shape[1] > 1 and bool((flat == flat[:, :1]).all())
    return blank or (len(flat) > 1 and bool((flat == flat[:1]).all()))


def _named(classes: Sequence[int]) -> str:
    listed = ", ".join(map(str, classes))
    return f"class {listed} is one" if len(classes) == 1 else f"classes {listed} are ones"


def _warn(message: str) -> None:
    # Blamed is the caller of clone(), which calls a check, which calls this.
    warnings.warn(message, WeakDataWarning, stacklevel=4)
