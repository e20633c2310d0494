"""evaluate(model, data) -> Scores: accuracy on old, new and all classes, and locality; cost(model) -> Cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from netclone.capturing import deterministic
from netclone.data import Batches, gather
from netclone.errors import ArgumentError, DataError, OutputError
from netclone.injecting import clones


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1]; None where there is no sample of that kind.

    ``locality_open`` is the share of old-class samples whose prediction over all columns differs from the one over
    the old columns alone; ``locality_closed`` the share whose prediction over the old columns differs from the
    reference's (None without a reference): 0 for a grafted model.
    """

    old: float | None
    new: float | None
    all: float
    locality_open: float | None
    locality_closed: float | None
    samples: int


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and median latency in ms of one forward pass at the given input."""

    parameters: int
    macs: int
    latency_ms: float


def evaluate(
    model: nn.Module,
    data: Batches,
    *,
    old: Sequence[int] | None = None,
    new: Sequence[int] | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 256,
) -> Scores:
    """Accuracy of a model over its old, its new and all classes.

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
        The target before grafting, for ``locality_closed``.

    Raises
    ------
    DataError
        If the data are empty, not finite, or a label is neither old nor new.
    OutputError
        If the model does not return logits ``(N, classes)``.

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
    logits = predict(model, samples.images, batch_size)
    width = logits.shape[1]
    added = _added_columns(model)
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
        before = predict(reference, samples.images[is_old], batch_size)[:, present].argmax(1)
        closed = float((torch.tensor(present, device=logits.device)[before] != within[is_old]).double().mean())
    return Scores(
        old=_mean(right[is_old]),
        new=_mean(right[~is_old]),
        all=float(right.double().mean()),
        locality_open=_mean((predicted != within)[is_old]),
        locality_closed=closed,
        samples=len(samples),
    )


def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits ``(N, classes)`` of all images in eval mode; modes and random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), deterministic():
            parts = [model(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(parts[0], Tensor) or parts[0].dim() != 2:
        raise OutputError(
            f"{type(model).__name__} returns {type(parts[0]).__name__}; expected one tensor (N, classes): wrap it"
        )
    return torch.cat(parts)


def cost(model: nn.Module, *inputs: Tensor, repeats: int = 20) -> Cost:
    """Parameters, MACs and measured latency of a model at some inputs.

    Examples
    --------
    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4), repeats=1).macs
    8
    """
    with torch.no_grad(), deterministic():
        with FlopCounterMode(display=False) as counter:
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
    )


def _added_columns(model: nn.Module) -> int:
    if not isinstance(model, fx.GraphModule):
        return 0
    try:
        names = clones(model)
    except ArgumentError:
        return 0
    return sum(len(model.get_submodule(name).classes) for name in names)  # type: ignore[arg-type, misc]


def _mean(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
