"""Samples: images and labels gathered from any form of data, and the checks of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from netclone.errors import ArgumentError, DataError, NetcloneError, WeakDataWarning, first_line
from netclone.graph.class_names import ClassNames
from netclone.graph.describing import plain
from netclone.graph.exporting import copied
from netclone.learning.batches import Data, batches, format_of
from netclone.runtime.entering import deterministic
from netclone.runtime.sharing import ALONE, Workers
from netclone.runtime.text import is_plain_text

OLD_WEIGHT = 2.5  # a mistake on an old class weighs this many on a new one: what the target can do comes first
MOST_IMBALANCE = 100  # samples of the most frequent class per sample of the rarest that lead to a warning

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
        """Raise if a label is not one of the model's classes."""
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= count:
            raise DataError(
                f"{self.what}: labels run from {low} to {high}, the {model} has classes 0 to {count - 1}; give labels "
                f"in the {model}'s label space"
            )

    def check_images(self, example: Tensor, model: str) -> None:
        """Raise unless images have the shape, dtype and device of those that a model was traced with."""
        if self.format != format_of(example):
            raise DataError(
                f"{self.what}: images are {self.format}, the {model} takes {format_of(example)}; give them as the "
                f"{model} takes them"
            )

    def of_classes(self, classes: Sequence[int]) -> Samples:
        """The samples whose label is one of ``classes``, each of which has to occur."""
        missing = sorted(set(classes) - set(self.labels.unique().tolist()))
        if missing:
            raise DataError(
                f"{self.what}: no sample of class {missing[0]} (classes asked for: {tuple(classes)}); add some, or "
                "leave the class out"
            )
        chosen = torch.isin(self.labels, torch.tensor(tuple(classes), device=self.labels.device))
        return Samples(self.images[chosen], self.labels[chosen], self.what)


def gather(
    data: Batches, what: str = "data", device: torch.device | None = None, names: ClassNames | None = None
) -> Samples:
    """All batches as one, checked. Each is moved to a device as it is read; None leaves it where it is.

    ``names`` are the class names that labels may be.

    Raises
    ------
    DataError
        As :func:`netclone.learning.batches.batches`.

    Examples
    --------
    >>> gather([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]).images.shape
    torch.Size([2, 3, 8, 8])
    """
    images, labels = zip(*_moved(data, what, device, names), strict=True)
    return Samples(torch.cat(images), torch.cat(labels), what)


def streamed(
    data: Batches,
    rows: int,
    what: str = "data",
    device: torch.device | None = None,
    names: ClassNames | None = None,
) -> Iterator[Samples]:
    """The same samples, so many at a time (the last may be fewer); only these and one batch are in memory.

    Raises
    ------
    DataError
        As :func:`gather`, when it reaches the faulty batch.

    Examples
    --------
    >>> batches = [(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 2]))] * 3
    >>> [len(part) for part in streamed(batches, 4)]
    [4, 4, 1]
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for image, label in _moved(data, what, device, names):
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


def _moved(
    data: Batches, what: str, device: torch.device | None, names: ClassNames | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches(data, what, names):
        yield (images, labels) if device is None else (images.to(device), labels.to(device))


def check_clone_set(samples: Samples, classes: Sequence[int]) -> None:
    """Raise if a clone set lacks a class, and warn if it is weak.

    Warns of a class with a single sample, of a class whose images are all equal or blank, and of an imbalance of 100:1.

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
            f"{samples.what}: {_named(single)} with a single sample, used for training and for validation: the "
            "validation score is optimistic, and the search may choose a wrong position; add samples"
        )
    if blank := [c for c in classes if _says_nothing(images[c])]:
        _warn(
            f"{samples.what}: {_named(blank)} whose images are all equal or blank (one value everywhere); hardly "
            "anything can be learned from them; check how the images are loaded and scaled"
        )
    most, least = (pick(classes, key=lambda c: len(images[c])) for pick in (max, min))
    if len(images[most]) >= MOST_IMBALANCE * len(images[least]):
        _warn(
            f"{samples.what}: {len(images[most])} samples of class {most} and {len(images[least])} of class {least}; "
            f"class {least} hardly counts in the fit and will mostly be mistaken for others; add samples of it, or use "
            f"fewer of class {most}"
        )


def check_agreement(logits: Tensor, samples: Samples, classes: Sequence[int], model: str = "source") -> None:
    """Warn if a model contradicts the labels: the source those of the clone set, or the target those of its own data.

    It does if, among all its classes, it predicts the label of less than half of the samples, and if, among ``classes``
    alone, it is at most half-way from chance to always right. There is no warning for a model that is unsure (an
    untrained one, for example), which disagrees by chance.

    Parameters
    ----------
    logits
        The model's logits for the same samples, ``(N, its classes)``.
    samples, classes
        The samples, and the classes that their labels are among.
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
        f"(it takes class {taken}); {follows}. Give labels in the {model}'s order, and images preprocessed as in its "
        "training"
    )


@contextlib.contextmanager
def taken_by(model: nn.Module, images: Tensor, what: str) -> Iterator[None]:
    """Run a model on a caller's images; an error of its forward becomes a DataError that describes them.

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
            + "; give images in the network's input format"
        ) from error


def check_taken(model: nn.Module, images: Tensor, what: str, role: str) -> None:
    """Raise if a model's forward fails on the images; a copy of it is run on them.

    Raises
    ------
    DataError
        If it raises.
    """
    given = images.clone()
    with taken_by(model, given, f"{what}, for the {role}"), torch.no_grad(), deterministic():
        copied(model).eval()(given)


def in_batches(network: nn.Module, inputs: Tensor, batch_size: int, workers: Workers = ALONE) -> Tensor:
    """A network's outputs for all inputs ``(N, ...)``, computed a batch at a time, without gradient.

    Each of several workers takes whole batches, so the result is the same to the bit.
    """
    parts = inputs.split(batch_size)
    team = workers.team(len(parts))
    with torch.no_grad():
        return team.joined(torch.cat([network(part) for part in parts[team.own(len(parts))]]))


def balance(labels: Tensor, old: int | None, old_weight: float = 1.0) -> Tensor:
    """One weight per sample, mean one: all old ones (label < ``old``) together weigh ``old_weight`` times the new ones.

    If there is only one kind, all weigh one.

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


def mostly_taken_for(logits: Tensor, labels: Tensor) -> list[int]:
    """The columns of logits ``(N, C)`` that the samples of some class ``labels (N,)`` are mostly taken for, ascending.

    Examples
    --------
    >>> mostly_taken_for(torch.eye(4)[[3, 3, 0, 1]], torch.tensor([0, 0, 0, 1]))
    [1, 3]
    """
    taken = logits.argmax(1)
    return sorted({int(taken[labels == label].mode().values) for label in labels.unique().tolist()})


def check_keep(keep: float) -> None:
    """Raise unless a share is in (0, 1]."""
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ArgumentError(f"keep: got {keep!r}, expected a share in (0, 1], such as 0.5")


Classes: TypeAlias = "int | str | Sequence[int | str]"
"""One class, or several, each by its column or by its name."""


def check_classes(classes: Classes | None, count: int, names: ClassNames | None = None) -> tuple[int, ...]:
    """The columns of the requested classes; None means all. ``names`` are those that they may be given by.

    Raises
    ------
    ArgumentError
        If a class is out of range or repeated, there is none, or a name is unknown or not clear.
    """
    if classes is None:
        return tuple(range(count))
    chosen = (names or ClassNames({}, "source")).resolved(classes)
    if not chosen:
        raise ArgumentError("classes: empty; name at least one class of the source")
    for c in chosen:
        if not 0 <= c < count:
            raise ArgumentError(f"classes: {c} is out of range; the source has classes 0 to {count - 1}")
        if chosen.count(c) > 1:
            raise ArgumentError(f"classes: {c} is given {chosen.count(c)} times; name each class once")
    return chosen


def names_for(classes: Classes | None, class_names: str | Sequence[str]) -> Sequence[str]:
    """The names of classes to store: those given, or else those that all the classes were given by.

    Examples
    --------
    >>> names_for(["heron", "ibis"], ()), names_for(["heron", 7], ()), names_for(7, "heron")
    (('heron', 'ibis'), (), ('heron',))
    """
    several = isinstance(classes, Sequence) and not isinstance(classes, str)
    listed = tuple(classes) if several and isinstance(classes, Sequence) else (classes,)
    if isinstance(class_names, str):
        return (class_names,) if len(listed) == 1 else class_names
    named = tuple(one.strip() for one in listed if isinstance(one, str))
    return class_names if len(class_names) or len(named) != len(listed) else named


def check_names(names: Sequence[str], classes: Sequence[int]) -> None:
    """Raise unless there are no names, or one text per class, all different."""
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
    """Warn of classes to clone that have the name of one of the target's classes; numbers do not count as names.

    Examples
    --------
    >>> check_new(["heron", "7"], ["ibis", "7"], "class_names")
    """
    known = {plain(name) for name in own}
    if both := [name for name in names if plain(name) in known and not plain(name).isdigit()]:
        _warn(
            f"{what}: the target already has {', '.join(map(repr, both[:5]))}; two columns of one class compete for "
            "its images: leave the class out, or rename it if it is a different one"
        )


def _says_nothing(images: Tensor) -> bool:
    """Whether several images are all the same, or each has one value everywhere."""
    flat = images.flatten(1)
    blank = flat.shape[1] > 1 and bool((flat == flat[:, :1]).all())
    return blank or (len(flat) > 1 and bool((flat == flat[:1]).all()))


def _named(classes: Sequence[int]) -> str:
    listed = ", ".join(map(str, classes))
    return f"class {listed} is one" if len(classes) == 1 else f"classes {listed} are ones"


def _warn(message: str) -> None:
    # the warning points at the caller of clone(), which calls a check, which calls this
    warnings.warn(message, WeakDataWarning, stacklevel=4)
