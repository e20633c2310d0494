"""evaluate(model, data) -> Scores: accuracy, locality, calibration, similarity; cost(model) -> Cost: size and time."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from netclone.arguments import check_number
from netclone.cloning.grafted import columns, modules_of, names_in, own_columns
from netclone.cloning.modules import CloneModule, save
from netclone.errors import ArchiveError, ArgumentError, CloneNameError, DataError, OutputError
from netclone.graph.counting import MacCounter
from netclone.graph.measuring import in_eval_mode, running
from netclone.graph.outputs import Output, logits_of
from netclone.graph.timing import seconds_in_turn, wait_for
from netclone.learning.data import Batches, Samples, streamed, taken_by
from netclone.runtime.devices import device_named, model_on
from netclone.runtime.entering import entered
from netclone.runtime.sharing import ALONE, Workers

BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1]; None if there is no sample of that kind.

    ``locality_open`` is the share of old-class samples whose prediction over all columns differs from the one over the
    old columns alone. ``locality_closed`` is the share whose prediction over the old columns differs from that of the
    reference (None without a reference); it is 0 for a grafted model.

    ``calibration_error`` is the expected calibration error of the softmax over all columns: the mean distance between
    confidence and accuracy over 15 bins of confidence of equal width, in [0, 1].

    ``similarity`` is Pearson's correlation, in [-1, 1], between the clone's and the source's logits of the cloned
    classes, over samples of these classes, after subtracting each class's mean logit. So it is defined for a single
    class too, and neither a common scale nor an offset per class changes it. None without a source, a clone, or logits
    that vary. A clone with a gate is compared on the images that it sees.

    ``sent_old`` is the share of old-class samples that a clone with a gate sees, and ``sent_new`` that of the samples
    of its own classes; the mean over such clones, and None if there is none. ``ms_per_image`` is the time that the
    model took for all images, divided by their number. It is None where it was not measured, and no part of a
    comparison.

    ``old_before`` is the reference's accuracy on the old-class samples, over the old columns, and ``new_source`` the
    source's on samples of the cloned classes, over all of its classes. None without a reference, or without a source.
    """

    old: float | None
    new: float | None
    all: float
    locality_open: float | None
    locality_closed: float | None
    samples: int
    calibration_error: float
    similarity: float | None
    sent_old: float | None = None
    sent_new: float | None = None
    ms_per_image: float | None = field(default=None, compare=False)
    old_before: float | None = None
    new_source: float | None = None


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence lies in (low, high]: their number, mean confidence and accuracy.

    The last two are None if there is no prediction.
    """

    low: float
    high: float
    samples: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Cost:
    """Parameters; MACs and latency in ms of one forward pass on the given input; bytes of a clone's file.

    :func:`cost` gives the median latency of many runs, :func:`costs` that of several networks in turn.
    ``archive_bytes`` is the size of the file that :func:`netclone.save` writes; None for anything but a CloneModule,
    and for a clone that cannot be saved.
    """

    parameters: int
    macs: int
    latency_ms: float
    archive_bytes: int | None


@entered()
def evaluate(  # noqa: PLR0913 - public
    model: nn.Module,
    data: Batches,
    *,
    old: Sequence[int] | None = None,
    new: Sequence[int] | None = None,
    reference: nn.Module | Tensor | None = None,
    source: nn.Module | None = None,
    name: str | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    workers: Workers = ALONE,
    output: Output = None,
) -> Scores:
    """A model's accuracy over old, new and all classes, its locality and calibration, and a clone's similarity.

    Parameters
    ----------
    model
        Any classifier. It is evaluated in eval mode, and its modes are restored.
    data
        Batches ``(images, labels)``, a ``Dataset`` of samples, or one such pair, in any form that
        :func:`netclone.clone` takes. Labels are columns of the (grafted) model's output, or their names. Read once, so
        it has to end.
    old, new
        Which labels count as old and as new. By default, a grafted model's old columns are the target's and its new
        ones the clones', and all columns of any other model are old. A label without a column counts as wrong.
    reference
        The target before grafting, or its logits ``(N, columns)`` for the same images, for ``locality_closed``.
    source
        The network that a clone was made from, for ``similarity``. It is given the same images.
    name
        Which clone that is. May be left out if there is only one.
    device
        Where to run; copies of the networks and each batch are moved there. None: where the networks are; the data have
        to be there too.
    workers
        The processes that share the batches (see :func:`netclone.runtime.sharing.share`). Each gets the same scores.
    output
        Which part of what a model returns is its logits, as for :func:`netclone.trace`.

    Raises
    ------
    ArgumentError
        If old and new labels overlap, or the source has no output for a cloned class.
    CloneNameError
        If there is no clone of that name, or a source was given with several clones and no name.
    DataError
        If the data are empty or not finite, the model fails on them, or a label is neither old nor new.
    OutputError
        If a model does not return logits ``(N, classes)``, or the reference's logits have another shape.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> scores = netclone.evaluate(model, [(torch.zeros(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))])
    >>> scores.samples, scores.new
    (4, None)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 4 (accuracy and locality).
    """
    check_number(batch_size, "batch_size", 1)
    place = device_named(device)
    if place is not None:
        model = model_on(model, place)
        source = None if source is None else model_on(source, place)
        reference = model_on(reference, place) if isinstance(reference, nn.Module) else reference
    of_clones = _columns_of_clones(model)
    cloned = None if source is None else _cloned(model, of_clones, name)
    logits, labels, references, likeness, known_to_source = [], [], [], [], []
    seen, seconds = 0, 0.0
    for samples in streamed(
        data, batch_size * workers.count, device=place, names=replace(names_in(model), whose="model")
    ):
        start = time.perf_counter()
        logits.append(predict(model, samples.images, batch_size, workers, first=seen, output=output))
        wait_for(samples.images)
        seconds += time.perf_counter() - start
        labels.append(samples.labels)
        if isinstance(reference, nn.Module):
            references.append(predict(reference, samples.images, batch_size, workers, first=seen, output=output))
        seen += len(samples)
        if source is not None and cloned is not None:
            wanted = _of_source(source, cloned, samples, batch_size, workers, output)
            likeness.append(wanted[:, list(cloned.classes)])
            known_to_source.append(_right(wanted, cloned, samples.labels))
    given, known_labels = torch.cat(logits), torch.cat(labels)
    width = given.shape[1]
    own = tuple(own_columns(cast(fx.GraphModule, model))) if of_clones else tuple(range(width))
    old_columns = own if old is None else tuple(old)
    new_columns = tuple(column for part in of_clones.values() for column in part) if new is None else tuple(new)
    known = torch.cat(references) if references else reference if isinstance(reference, Tensor) else None
    if known is not None:
        if known.dim() != 2 or len(known) != len(given):
            raise OutputError(
                f"reference: logits of shape {tuple(known.shape)} for {len(given)} images; expected ({len(given)}, "
                "columns), or the target itself"
            )
        is_old = torch.isin(known_labels, torch.tensor(old_columns, dtype=known_labels.dtype, device=given.device))
        known = known.to(given.device)[is_old]
    alike = None if cloned is None else _likeness(given, known_labels, cloned, torch.cat(likeness))
    gates = [
        own for clone, own in of_clones.items() if modules_of(cast(fx.GraphModule, model))[clone].router is not None
    ]
    found = score(given, known_labels, old=old_columns, new=new_columns, known=known, similarity=alike, gates=gates)
    new_source = _mean(torch.cat(known_to_source)) if known_to_source else None
    return replace(found, ms_per_image=1000 * seconds / seen, new_source=new_source)


def score(
    logits: Tensor,
    labels: Tensor,
    *,
    old: Sequence[int],
    new: Sequence[int],
    known: Tensor | None = None,
    similarity: float | None = None,
    gates: Sequence[Sequence[int]] = (),
) -> Scores:
    """The scores of :func:`evaluate`, from logits ``(N, columns)`` and labels ``(N,)``.

    Parameters
    ----------
    logits, labels
        A label without a column counts as wrong.
    old, new
        Which labels count as old and as new.
    known
        The reference's logits ``(M, columns)`` for the M samples of old classes, for ``locality_closed``.
    similarity
        The result of :func:`beside_source`.
    gates
        The columns of each clone that has a gate. What it does not see has logits of minus infinity there.

    Raises
    ------
    ArgumentError
        If old and new overlap, or ``known`` has too few columns.
    DataError
        If a label is neither old nor new.

    Examples
    --------
    >>> score(torch.eye(3), torch.tensor([0, 1, 2]), old=[0, 1], new=[2]).all
    1.0
    """
    if set(old) & set(new):
        raise ArgumentError(f"old and new share the labels {sorted(set(old) & set(new))}")
    stray = sorted(set(labels.unique().tolist()) - set(old) - set(new))
    if stray:
        raise DataError(f"data: label {stray[0]} is neither old {tuple(old)} nor new {tuple(new)}")
    predicted = logits.argmax(1)
    right = predicted == labels
    is_old = torch.isin(labels, torch.tensor(tuple(old), dtype=labels.dtype, device=labels.device))
    present = [column for column in old if column < logits.shape[1]]
    within = torch.tensor(present, device=logits.device)[logits[:, present].argmax(1)] if present else predicted
    closed, old_before = None, None
    if known is not None and bool(is_old.any()):
        if present and known.shape[1] <= max(present):
            raise ArgumentError(
                f"reference: {known.shape[1]} columns, but old classes up to {max(present)}; give the target before "
                "grafting, or say with old=... which of the columns are its own"
            )
        before = known[:, present].argmax(1)
        taken = torch.tensor(present, device=logits.device)[before]
        closed, old_before = _mean(taken != within[is_old]), _mean(taken == labels[is_old])
    return Scores(
        old=_mean(right[is_old]),
        new=_mean(right[~is_old]),
        all=float(right.double().mean()),
        locality_open=_mean((predicted != within)[is_old]),
        locality_closed=closed,
        samples=len(labels),
        calibration_error=_calibration_error(logits, right),
        similarity=similarity,
        sent_old=_share([_sent(logits, own)[is_old] for own in gates]),
        sent_new=_share(
            [_sent(logits, own)[torch.isin(labels, torch.tensor(tuple(own), device=labels.device))] for own in gates]
        ),
        old_before=old_before,
    )


def predict(
    model: nn.Module,
    images: Tensor,
    batch_size: int = 64,
    workers: Workers = ALONE,
    *,
    first: int = 0,
    output: Output = None,
) -> Tensor:
    """Logits ``(N, classes)`` of all images in eval mode; modes and random state are restored.

    Each of several workers takes whole batches, so the result is the same to the bit. ``first`` is the number of the
    first image, for messages, and ``output`` as for :func:`netclone.trace`.

    Raises
    ------
    DataError, OutputError
        If the model fails on the images, or does not return logits for them.
    """
    starts = range(0, len(images), batch_size)
    team = workers.team(len(starts))
    with in_eval_mode(model):
        parts = [_logits(model, images[i : i + batch_size], first + i, output) for i in starts[team.own(len(starts))]]
    return team.joined(torch.cat(parts))


def _logits(model: nn.Module, images: Tensor, first: int, output: Output) -> Tensor:
    """A model's logits for a batch whose first image has the number ``first``; raises for any other output."""
    with taken_by(model, images, f"data, batch of images {first} to {first + len(images) - 1}"):
        out = model(images)
    out = logits_of(out, output, type(model).__name__)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(images):
        shape = f" {tuple(out.shape)}" if isinstance(out, Tensor) else ""
        raise OutputError(
            f"{type(model).__name__} returns {type(out).__name__}{shape} for {len(images)} images; expected one tensor "
            f"({len(images)}, classes): wrap it"
        )
    return out


@entered()
def cost(model: nn.Module, *inputs: Tensor, repeats: int = 20) -> Cost:
    """Parameters, MACs and measured latency of a model in eval mode, and the size of a clone's file.

    Examples
    --------
    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4), repeats=1).macs
    8
    """
    with running(model), MacCounter() as counter:
        model(*inputs)
    with in_eval_mode(model):
        (seconds,) = seconds_in_turn([lambda _: model(*inputs)], inputs[0], repeats, repeats)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.macs,
        latency_ms=1000 * seconds,
        archive_bytes=_archive_bytes(model) if isinstance(model, CloneModule) else None,
    )


def costs(networks: Mapping[str, tuple[nn.Module, Sequence[Tensor]]]) -> dict[str, Cost]:
    """The cost of networks, each on its own inputs; each latency is the median of several runs, of all in turn.

    Examples
    --------
    >>> layer = nn.Linear(4, 2)
    >>> sorted(costs({"one": (layer, [torch.zeros(1, 4)]), "two": (layer, [torch.zeros(1, 4)])}))
    ['one', 'two']
    """
    found = {name: cost(network, *inputs, repeats=1) for name, (network, inputs) in networks.items()}
    with contextlib.ExitStack() as modes:
        for network, _ in networks.values():
            modes.enter_context(in_eval_mode(network))
        calls = [lambda _, run=network, given=inputs: run(*given) for network, inputs in networks.values()]
        waited = next((inputs[0] for _, inputs in networks.values()), torch.zeros(()))
        measured = seconds_in_turn(calls, waited)
    return {
        name: replace(one, latency_ms=1000 * seconds)
        for (name, one), seconds in zip(found.items(), measured, strict=True)
    }


def _archive_bytes(module: CloneModule) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clone.safetensors")
        try:
            save(module, path)
        except ArchiveError:
            return None
        return os.path.getsize(path)


def _columns_of_clones(model: nn.Module) -> dict[str, range]:
    if not isinstance(model, fx.GraphModule):
        return {}
    try:
        return columns(model)
    except ArgumentError:
        return {}


def _classes(model: nn.Module, name: str) -> tuple[int, ...]:
    return modules_of(cast(fx.GraphModule, model))[name].classes


def reliability(logits: Tensor, right: Tensor) -> tuple[Bin, ...]:
    """Accuracy of predictions by confidence, in bins of equal width, from low to high.

    ``logits`` are ``(N, columns)``; ``right`` ``(N,)`` says which predictions are correct.

    Examples
    --------
    >>> reliability(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([True, False]))[-1].accuracy
    0.5

    Reference: Guo et al., arXiv 1706.04599, section 2.
    """
    confidence = logits.double().softmax(1).amax(1)
    numbers = (confidence * BINS).ceil().clamp(1, BINS).nan_to_num(BINS)  # NaN logits make the result NaN
    found = []
    for number in range(1, BINS + 1):
        inside = numbers == number
        mean = float(confidence[inside].mean()) if bool(inside.any()) else None
        found.append(Bin((number - 1) / BINS, number / BINS, int(inside.sum()), mean, _mean(right[inside])))
    return tuple(found)


def _calibration_error(logits: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599, equation 3); ``right`` ``(N,)``: which are correct."""
    gaps = [
        part.samples * abs(part.accuracy - part.confidence)
        for part in reliability(logits, right)
        if part.accuracy is not None and part.confidence is not None
    ]
    return sum(gaps) / len(logits)


def beside_source(
    model: nn.Module, name: str | None, source: nn.Module, samples: Samples, logits: Tensor, batch_size: int = 64
) -> tuple[float | None, Tensor]:
    """``Scores.similarity`` of a clone and its source, and which samples ``(M,)`` of its classes the source gets right.

    ``logits`` are the grafted model's ``(N, columns)``.

    Raises
    ------
    CloneNameError, ArgumentError
        As :func:`evaluate`.
    """
    cloned = _cloned(model, _columns_of_clones(model), name)
    if cloned is None:
        return None, torch.zeros(0, dtype=torch.bool)
    wanted = _of_source(source, cloned, samples, batch_size, ALONE)
    alike = _likeness(logits, samples.labels, cloned, wanted[:, list(cloned.classes)])
    return alike, _right(wanted, cloned, samples.labels)


@dataclass(frozen=True)
class _Cloned:
    """A clone: its name, its classes among the source's, and its columns among the grafted network's."""

    name: str
    classes: tuple[int, ...]
    columns: range

    def own(self, labels: Tensor) -> Tensor:
        """Which samples belong to its classes."""
        return (labels >= self.columns.start) & (labels < self.columns.stop)


def _cloned(model: nn.Module, of_clones: dict[str, range], name: str | None) -> _Cloned | None:
    if not of_clones:
        return None
    listed = ", ".join(f"'{clone}'" for clone in of_clones)
    if name is None and len(of_clones) > 1:
        raise CloneNameError(f"name: the graph holds the clones {listed}; say which one was cloned from the source")
    name = next(iter(of_clones)) if name is None else name
    if name not in of_clones:
        raise CloneNameError(f"name: no clone {name!r} in the graph, which holds {listed}; name one of these")
    return _Cloned(name, _classes(model, name), of_clones[name])


def _of_source(
    source: nn.Module, cloned: _Cloned, samples: Samples, batch_size: int, workers: Workers, output: Output = None
) -> Tensor:
    """The source's logits ``(M, all of its classes)`` for samples of the cloned classes."""
    own = samples.images[cloned.own(samples.labels)]
    if not len(own):
        return torch.empty(0, max(cloned.classes) + 1, dtype=own.dtype, device=own.device)
    wanted = predict(source, own, batch_size, workers, output=output)
    if wanted.shape[1] <= max(cloned.classes):
        raise ArgumentError(
            f"source: {type(source).__name__} has classes 0 to {wanted.shape[1] - 1}, clone '{cloned.name}' was cloned "
            f"from classes {cloned.classes}; give the network that it was cloned from, or name another clone"
        )
    return wanted


def _right(wanted: Tensor, cloned: _Cloned, labels: Tensor) -> Tensor:
    """Which samples ``(M,)`` of the cloned classes the source gets right, over all of its classes."""
    asked = torch.tensor(cloned.classes, device=wanted.device)
    return wanted.argmax(1) == asked[labels[cloned.own(labels)] - cloned.columns.start]


def _likeness(logits: Tensor, labels: Tensor, cloned: _Cloned, wanted: Tensor) -> float | None:
    given = logits[cloned.own(labels)][:, cloned.columns.start : cloned.columns.stop]
    seen = (given > -torch.inf).any(1)
    return _correlation(given[seen], wanted[seen]) if bool(seen.any()) else None


def _correlation(one: Tensor, two: Tensor) -> float | None:
    """Pearson's r over all entries of two ``(N, K)``, less each column's mean; None if one does not vary."""
    one, two = one.double(), two.double()
    centred = one - one.mean(0), two - two.mean(0)
    norms = [part.norm() for part in centred]
    if any(norm <= 1e-12 * whole.norm() for norm, whole in zip(norms, (one, two), strict=True)):
        return None
    return float(((centred[0] / norms[0]) * (centred[1] / norms[1])).sum().clamp(-1, 1))


def _sent(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Which images ``(N,)`` a clone saw, from what its columns hold."""
    return (logits[:, list(columns)] > -torch.inf).any(1)


def _share(flags: Sequence[Tensor]) -> float | None:
    """The mean over clones of the share of images that they saw; None if there is no clone or no image."""
    shares = [share for one in flags if (share := _mean(one)) is not None]
    return statistics.mean(shares) if shares else None


def _mean(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
