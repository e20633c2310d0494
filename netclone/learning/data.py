"""Samples: images and labels gathered from data as they come, and what they are checked for."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from netclone.errors import ArgumentError, DataError, NetcloneError, WeakDataWarning, first_line
from netclone.graph.capturing import deterministic
from netclone.graph.describing import plain
from netclone.graph.exporting import copied
from netclone.learning.batches import Data, batches, format_of
from netclone.runtime.sharing import ALONE, Workers
from netclone.runtime.text import is_plain_text

OLD_WEIGHT = 2.5  # of a mistake on an old class against one on a new class: what the target can must not be disturbed
MOST_IMBALANCE = 100  # samples of the most frequent class to one of the rarest, from which on a warning is given

Batches: TypeAlias = Data


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
        return format_of(self.images)

    def check_labels(self, count: int, model: str) -> None:
        """Refuse labels outside the model's classes."""
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= count:
            raise DataError(
                f"{self.what}: labels run from {low} to {high}, the {model} has classes 0 to {count - 1}; give labels "
                f"in the {model}'s label space"
            )

    def check_images(self, example: Tensor, model: str) -> None:
        """Refuse images of another shape or dtype, or elsewhere, than those a model was traced with."""
        if self.format != format_of(example):
            raise DataError(
                f"{self.what}: images are {self.format}, the {model} takes {format_of(example)}; give them as the "
                f"{model} takes them"
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


def gather(data: Batches, what: str = "data", device: torch.device | None = None) -> Samples:
    """All batches in one, checked, each moved to a device as it comes; None leaves them where they are.

    Raises
    ------
    DataError
        As :func:`netclone.learning.batches.batches`.

    Examples
    --------
    >>> gather([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]).images.shape
    torch.Size([2, 3, 8, 8])
    """
    images, labels = zip(*_moved(data, what, device), strict=True)
    return Samples(torch.cat(images), torch.cat(labels), what)


def streamed(data: Batches, rows: int, what: str = "data", device: torch.device | None = None) -> Iterator[Samples]:
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
    for image, label in _moved(data, what, device):
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


def _moved(data: Batches, what: str, device: torch.device | None) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches(data, what):
        yield (images, labels) if device is None else (images.to(device), labels.to(device))


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


def check_agreement(logits: Tensor, samples: Samples, classes: Sequence[int], model: str = "source") -> None:
    """Warn if a model itself contradicts the labels: the source those of the clone set, or the target its own.

    That is when it predicts the label, out of all its classes, for less than half of the samples, and among ``classes``
    alone does no better than half-way from chance to always right. A model that is unsure (untrained, say) is left
    alone: it disagrees by chance.

    Parameters
    ----------
    logits
        The model's, ``(N, its classes)``, for the same samples.
    samples, classes
        Labels are among ``classes``.
    model
        ``"source"`` or ``"target"``.

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
            f"{samples.what}: the {model}'s logits are NaN or infinite on {broken} of {len(samples)} samples; nothing "
            f"can be learned from them: scale the images as the {model} was trained, or use another {model}"
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
    follows = (
        "the module learns what the source knows, so the cloned classes will be weak or mixed up"
        if model == "source"
        else "new logits are fitted against the old ones by these labels, and will be too high or too low"
    )
    _warn(
        f"{samples.what}: the {model}'s own prediction agrees with the labels on {share:.0%} of {len(samples)} samples "
        f"(it takes class {taken}); {follows}; give labels in the {model}'s order, and images scaled as the {model} "
        "was trained"
    )


@contextlib.contextmanager
def taken_by(model: nn.Module, images: Tensor, what: str) -> Iterator[None]:
    """Run a model on a caller's images; what its forward raises becomes a DataError that says what it was given.

    Raises
    ------
    DataError
        If the forward raises.

    Examples
    --------
    >>> with taken_by(nn.Linear(4, 2), torch.zeros(2, 3), "data"):
    ...     nn.Linear(4, 2)(torch.zeros(2, 3))
    Traceback (most recent call last):
        ...
    netclone.errors.DataError: data: Linear does not take images (2, 3) torch.float32 on cpu: RuntimeError: mat1 and ...
    """
    try:
        yield
    except (NetcloneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a caller's forward may raise anything
        weight = next((p for p in model.parameters() if p.is_floating_point()), images)
        other = (weight.dtype, weight.device) != (images.dtype, images.device)
        raise DataError(
            f"{what}: {type(model).__name__} does not take images {tuple(images.shape)} {images.dtype} on "
            f"{images.device}: {type(error).__name__}: {first_line(error)}"
            + (f"; its parameters are {weight.dtype} on {weight.device}" if other else "")
            + "; give images as the network takes them"
        ) from error


def check_taken(model: nn.Module, images: Tensor, what: str, role: str) -> None:
    """Refuse images that a model's forward cannot take, by running a copy of it on them.

    Raises
    ------
    DataError
        If it raises.
    """
    given = images.clone()
    with taken_by(model, given, f"{what}, for the {role}"), torch.no_grad(), deterministic():
        copied(model).eval()(given)


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
    """Refuse names that are not as many as the classes, no text, or given twice; none at all are well."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"class_names: got {names!r}; expected a sequence of texts, one per class")
    if strange := [name for name in names if not is_plain_text(name)]:
        raise ArgumentError(
            f"class_names: {strange[0]!r} has control characters or is too long: it could not be saved; rename it"
        )
    if names and len(names) != len(classes):
        raise ArgumentError(f"class_names: {len(names)} names for {len(classes)} classes; give one per class")
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise ArgumentError(f"class_names: {twice[0]!r} is given {list(names).count(twice[0])} times; name each once")


def check_new(names: Sequence[str], own: Iterable[str], what: str) -> None:
    """Warn of classes to clone whose names the target's own classes have; numbers are no names.

    Examples
    --------
    >>> check_new(["heron", "7"], ["ibis", "7"], "class_names")
    """
    known = {plain(name) for name in own}
    if both := [name for name in names if plain(name) in known and not plain(name).isdigit()]:
        _warn(
            f"{what}: the target already has {', '.join(map(repr, both[:5]))}; what it shows would have two columns, "
            "which take it from each other; leave the class out, or name it otherwise if it is another"
        )


def check_number(number: int, what: str, least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ArgumentError(f"{what}: got {number!r}, expected a whole number from {least} on")


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
