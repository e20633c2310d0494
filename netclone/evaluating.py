"""evaluate(model, data) -> Scores: accuracy, locality, calibration, similarity; cost(model) -> Cost: size and time."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from netclone.archiving import save
from netclone.capturing import deterministic
from netclone.data import Batches, Samples, check_number, gather
from netclone.errors import ArgumentError, CloneNameError, DataError, OutputError
from netclone.injecting import clones
from netclone.modules import CloneModule
from netclone.sharing import ALONE, Workers

BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1]; None where there is no sample of that kind.

    ``locality_open`` is the share of old-class samples whose prediction over all columns differs from the one over
    the old columns alone; ``locality_closed`` the share whose prediction over the old columns differs from the
    reference's (None without a reference): 0 for a grafted model.

    ``calibration_error`` is the expected calibration error of the softmax over all columns: the mean distance between
    confidence and accuracy over 15 bins of confidence of equal width, in [0, 1].

    ``similarity`` is Pearson's correlation, in [-1, 1], between a clone's logits and the source's for the cloned
    classes, over the clone's own samples and all its classes, each class's mean logit taken off; so it is defined for
    a single class too, and neither a common scale nor an offset per class moves it. None without a source, a clone, or
    logits that vary.
    """

    old: float | None
    new: float | None
    all: float
    locality_open: float | None
    locality_closed: float | None
    samples: int
    calibration_error: float
    similarity: float | None


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and median latency in ms of one forward pass at the given input; bytes of a clone's archive.

    ``archive_bytes`` is the size of the file that :func:`netclone.save` writes; None for all but a CloneModule.
    """

    parameters: int
    macs: int
    latency_ms: float
    archive_bytes: int | None


def evaluate(
    model: nn.Module,
    data: Batches,
    *,
    old: Sequence[int] | None = None,
    new: Sequence[int] | None = None,
    reference: nn.Module | Tensor | None = None,
    source: nn.Module | None = None,
    name: str | None = None,
    batch_size: int = 64,
    workers: Workers = ALONE,
) -> Scores:
    """Accuracy of a model over its old, its new and all classes, its locality, calibration and likeness to a source.

    Parameters
    ----------
    model
        Any classifier; evaluated in eval mode, its modes are restored.
    data
        Iterable of ``(images, labels)``; labels are columns of the (grafted) model's output.
    old, new
        Which labels count as old and as new. By default the target's and the clones' columns of a grafted model; all
        are old for any other model. A label the model has no column for counts as wrong.
    reference
        The target before grafting, for ``locality_closed``; or its logits ``(N, columns)`` for the same images.
    source
        The network a clone was cloned from, for ``similarity``; it is given the same images.
    name
        Which clone that is; may be left out where there is only one.
    workers
        The processes that share the batches (see :func:`netclone.sharing.share`); each gets the same scores.

    Raises
    ------
    ArgumentError
        If old and new overlap, or the source has no output for a cloned class.
    CloneNameError
        If there is no clone of that name, or a source but no name and several clones.
    DataError
        If the data are empty, not finite, or a label is neither old nor new.
    OutputError
        If a model does not return logits ``(N, classes)``, or those given as reference are none.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> scores = netclone.evaluate(model, [(torch.zeros(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))])
    >>> scores.samples, scores.new
    (4, None)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 4 (accuracy and locality).
    """
    samples = gather(data)
    check_number(batch_size, "batch_size", 1)
    logits = predict(model, samples.images, batch_size, workers)
    width = logits.shape[1]
    columns_of = _columns_of_clones(model, width)
    added = sum(map(len, columns_of.values()))
    old_columns = tuple(range(width - added)) if old is None else tuple(old)
    new_columns = tuple(range(width - added, width)) if new is None else tuple(new)
    if set(old_columns) & set(new_columns):
        raise ArgumentError(f"old and new share the labels {sorted(set(old_columns) & set(new_columns))}")
    labels = samples.labels
    stray = sorted(set(labels.unique().tolist()) - set(old_columns) - set(new_columns))
    if stray:
        raise DataError(f"data: label {stray[0]} is neither old {old_columns} nor new {new_columns}")
    predicted = logits.argmax(1)
    right = predicted == labels
    is_old = torch.isin(labels, torch.tensor(old_columns, dtype=labels.dtype, device=labels.device))
    present = [column for column in old_columns if column < width]
    within = torch.tensor(present, device=logits.device)[logits[:, present].argmax(1)] if present else predicted
    closed = None
    if reference is not None and bool(is_old.any()):
        if isinstance(reference, Tensor):
            if reference.dim() != 2 or len(reference) != len(samples):
                raise OutputError(
                    f"reference: logits of shape {tuple(reference.shape)} for {len(samples)} images; expected "
                    f"({len(samples)}, columns), or the target itself"
                )
            known = reference.to(is_old.device)[is_old]
        else:
            known = predict(reference, samples.images[is_old], batch_size, workers)
        if present and known.shape[1] <= max(present):
            raise ArgumentError(
                f"reference: {known.shape[1]} columns, but old classes up to {max(present)}; give the target before "
                "grafting, or say with old=... which of the columns are its own"
            )
        before = known[:, present].argmax(1)
        closed = float((torch.tensor(present, device=logits.device)[before] != within[is_old]).double().mean())
    similarity = None
    if source is not None:
        similarity = _similarity(model, columns_of, name, source, samples, logits, batch_size, workers)
    return Scores(
        old=_mean(right[is_old]),
        new=_mean(right[~is_old]),
        all=float(right.double().mean()),
        locality_open=_mean((predicted != within)[is_old]),
        locality_closed=closed,
        samples=len(samples),
        calibration_error=_calibration_error(logits, right),
        similarity=similarity,
    )


def predict(model: nn.Module, images: Tensor, batch_size: int = 64, workers: Workers = ALONE) -> Tensor:
    """Logits ``(N, classes)`` of all images in eval mode; modes and random state are restored.

    Several workers take whole batches, so that the result is the same to the bit.
    """
    starts = range(0, len(images), batch_size)
    team = workers.team(len(starts))
    with _in_eval_mode(model):
        parts = [model(images[i : i + batch_size]) for i in starts[team.own(len(starts))]]
    if not isinstance(parts[0], Tensor) or parts[0].dim() != 2:
        raise OutputError(
            f"{type(model).__name__} returns {type(parts[0]).__name__}; expected one tensor (N, classes): wrap it"
        )
    return team.joined(torch.cat(parts))


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run without gradient and reproducibly, in eval mode; modes and random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), deterministic():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run with no parameter asking for a gradient (torch's counter of MACs trips over some); flags are restored."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def cost(model: nn.Module, *inputs: Tensor, repeats: int = 20) -> Cost:
    """Parameters, MACs and measured latency of a model in eval mode; of a clone, the bytes of its archive too.

    Raises
    ------
    ArchiveError
        If the model is a CloneModule that cannot be saved.

    Examples
    --------
    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4), repeats=1).macs
    8
    """
    with _in_eval_mode(model):
        with _frozen(model), FlopCounterMode(display=False) as counter:
            model(*inputs)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        latency_ms=1000 * statistics.median(times),
        archive_bytes=_archive_bytes(model) if isinstance(model, CloneModule) else None,
    )


def _archive_bytes(module: CloneModule) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clone.safetensors")
        save(module, path)
        return os.path.getsize(path)


def _columns_of_clones(model: nn.Module, width: int) -> dict[str, range]:
    """The columns of each clone, by name: they follow the target's, in order of injection."""
    if not isinstance(model, fx.GraphModule):
        return {}
    try:
        names = clones(model)
    except ArgumentError:
        return {}
    columns: dict[str, range] = {}
    first = width - sum(len(_classes(model, name)) for name in names)
    for name in names:
        columns[name] = range(first, first + len(_classes(model, name)))
        first = columns[name].stop
    return columns


def _classes(model: nn.Module, name: str) -> tuple[int, ...]:
    return model.get_submodule(name).classes  # type: ignore[return-value]


def _calibration_error(logits: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599, equation 3); ``right`` ``(N,)`` says what was hit."""
    confidence = logits.double().softmax(1).amax(1)
    bins = (confidence * BINS).ceil().clamp(1, BINS).nan_to_num(BINS)  # NaN logits are seen in the result
    gaps = right.double() - confidence
    return sum(abs(float(gaps[bins == number].sum())) for number in range(1, BINS + 1)) / len(logits)


def _similarity(
    model: nn.Module,
    columns_of: dict[str, range],
    name: str | None,
    source: nn.Module,
    samples: Samples,
    logits: Tensor,
    batch_size: int,
    workers: Workers,
) -> float | None:
    if not columns_of:
        return None
    listed = ", ".join(f"'{clone}'" for clone in columns_of)
    if name is None and len(columns_of) > 1:
        raise CloneNameError(f"name: the graph holds the clones {listed}; say which one was cloned from the source")
    name = next(iter(columns_of)) if name is None else name
    if name not in columns_of:
        raise CloneNameError(f"name: no clone {name!r} in the graph, which holds {listed}; name one of these")
    classes, columns = list(_classes(model, name)), columns_of[name]
    own = (samples.labels >= columns.start) & (samples.labels < columns.stop)
    if not bool(own.any()):
        return None
    wanted = predict(source, samples.images[own], batch_size, workers)
    if wanted.shape[1] <= max(classes):
        raise ArgumentError(
            f"source: {type(source).__name__} has classes 0 to {wanted.shape[1] - 1}, clone '{name}' was cloned from "
            f"classes {tuple(classes)}; give the network that it was cloned from, or name another clone"
        )
    return _correlation(logits[own][:, columns.start : columns.stop], wanted[:, classes])


def _correlation(one: Tensor, two: Tensor) -> float | None:
    """Pearson's r over all entries of two ``(N, K)``, each column's mean taken off; None if one does not vary."""
    one, two = one.double(), two.double()
    centred = one - one.mean(0), two - two.mean(0)
    norms = [part.norm() for part in centred]
    if any(norm <= 1e-12 * whole.norm() for norm, whole in zip(norms, (one, two), strict=True)):
        return None
    return float(((centred[0] / norms[0]) * (centred[1] / norms[1])).sum().clamp(-1, 1))


def _mean(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
