"""report(grafted, data, path) -> Report: one self-contained HTML page about a clone in its target.

All facts are first measured on the networks and gathered as plain data; the page only shows them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, fx, nn

import netclone
from netclone.cloning.grafted import clones, columns, modules_of, own_columns
from netclone.cloning.injecting import remove
from netclone.errors import ArgumentError
from netclone.files.spec import CloneSpec
from netclone.learning.data import Batches, Samples, gather
from netclone.metrics.comparing import Change, Confusion, OfClass, by_class, changes, confusion
from netclone.metrics.evaluating import (
    Bin,
    Cost,
    Scores,
    beside_source,
    costs,
    predict,
    reliability,
    score,
)
from netclone.metrics.held_out import far_apart, held_out, said
from netclone.metrics.skipping import Point, at_threshold, seen_whole, skipping, ungated
from netclone.metrics.trading import TradeOff, trades
from netclone.reporting.layout import Layout, lay_out
from netclone.reporting.rendering import digest, render, shortened
from netclone.reporting.stages import Row, rows
from netclone.reporting.style import DARK, LIGHT
from netclone.reporting.thumbnails import thumbnails
from netclone.runtime.context import Progress
from netclone.runtime.entering import entered
from netclone.runtime.writing import check_place, write_file

MOST_BYTES = 2_000_000
"""A page has to be smaller than this."""

MOST_CONFUSED = 10
"""The most old classes, and the most new ones, in the confusion matrix."""

MOST_CLASSES = 200
"""The most classes in the table of classes."""

MOST_LAYERS = 200
"""The most layers in the table of layers; layers of a block are summed if there are more."""

MOST_PICTURES = 12
"""The most images shown as helped, and the most shown as hurt."""

_LEAST_CHANGE = 0.001  # change of a probability from which an image counts as helped or hurt, as rounded on the page
_LONGEST = 60  # letters of a class's name


@dataclass(frozen=True)
class Picture:
    """A sample, and its image as a ``data:`` URI; empty if it cannot be shown as an image."""

    change: Change
    uri: str


@dataclass(frozen=True)
class Report:
    """The content of a page about a clone.

    ``labels`` names every column. ``new`` are the clone's columns, ``old`` all others. ``scores`` and ``costs`` are by
    network. ``held_out`` are the accuracies that were measured when the clone was made, and ``far_apart`` says in words
    which of them differ from those of now. ``compared`` old logits of the grafted network were compared bit by bit with
    those of the network after removal, and ``differing`` of them differ. ``classes`` are those whose recall changed
    most, if there are more than the page shows, out of ``classes_seen``. ``gate`` is what the clone's gate does, and
    ``skipping`` what it would do if it skipped fewer or more images; None and empty without a gate. ``trade`` is what
    another bias of the clone would do; None if the images are of one kind alone.
    """

    path: Path
    bytes: int
    title: str
    name: str
    target: str
    source: str
    labels: tuple[str, ...]
    old: tuple[int, ...]
    new: tuple[int, ...]
    others: tuple[str, ...]
    spec: CloneSpec
    scores: tuple[tuple[str, Scores], ...]
    held_out: tuple[tuple[str, float], ...]
    far_apart: tuple[str, ...]
    compared: int
    differing: int
    costs: tuple[tuple[str, Cost], ...]
    layers: tuple[Row, ...]
    layout: Layout
    confusion: Confusion
    reliability: tuple[Bin, ...]
    classes: tuple[OfClass, ...]
    classes_seen: int
    helped: tuple[Picture, ...]
    hurt: tuple[Picture, ...]
    gate: Point | None
    skipping: tuple[Point, ...]
    trade: TradeOff | None
    commands: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    measured_on: str
    date: str

    @property
    def score_of(self) -> dict[str, Scores]:
        """Scores by network: ``"before"``, ``"grafted"``, ``"removed"``."""
        return dict(self.scores)

    @property
    def cost_of(self) -> dict[str, Cost]:
        """Costs by network: ``"target"``, ``"grafted"``, ``"clone"`` and, if it was given, ``"source"``."""
        return dict(self.costs)


@entered()
def report(  # noqa: PLR0913 - public
    grafted: fx.GraphModule,
    data: Batches,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    old_names: Sequence[str] = (),
    source: nn.Module | None = None,
    pixels: Callable[[Tensor], Tensor] | None = None,
    commands: Sequence[str] = (),
    title: str = "",
    progress: Progress | None = None,
) -> Report:
    """Measure a clone in its target, and write the findings as one HTML page of less than 2 MB.

    The page loads nothing, can be sorted and zoomed, and is written completely or not at all. *Before* stands for the
    old logits of the grafted network itself, and *removed* for the network that :func:`netclone.remove` leaves. The
    page says whether the two have the same bits. The same arguments give the same page, except for date and latencies.

    Parameters
    ----------
    grafted
        The graph that :func:`netclone.inject` returned. It is not changed.
    data
        As for :func:`netclone.evaluate`: batches ``(images, labels)`` whose labels are columns of ``grafted``.
    path
        The HTML file to write.
    name
        The clone. May be left out if there is only one. Everything else counts as old, other clones too.
    old_names
        Names of the target's own columns. Empty: their numbers.
    source
        The network that the clone was made from, for its cost and the similarity. It is given the same images.
    pixels
        Maps a batch of the target's input images to RGB ``(N, 3, H, W)`` in [0, 1], to be shown. None: scale each image
        from its darkest to its brightest value.
    commands
        Commands that reproduce the page, shown as they are.
    title
        Heading of the page. Empty: the clone's name.
    progress
        Called with ``(what, done, total)``.

    Raises
    ------
    CloneNameError
        If there is no clone of that name, or no name was given and there are several.
    ArgumentError
        If ``grafted`` holds no clones, the clone is off, names or pixels do not fit, or the page would be too large.
    ArchiveError
        If the page cannot be written.
    DataError
        If the data are empty or not finite, or a label is not a column.

    Examples
    --------
    >>> import tempfile, timm, torch, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> module = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[3])
    >>> target = timm.create_model("test_resnet", num_classes=2).eval()
    >>> grafted = netclone.inject(target, module, at="input", name="herons")
    >>> images, labels = torch.randn(6, 3, 160, 160), torch.arange(6) % 3
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = report(grafted, [(images, labels)], f"{folder}/herons.html", old_names=["gull", "<tern>"])
    >>> found.labels, found.differing, found.bytes < 2_000_000
    (('gull', '<tern>', '3'), 0, True)
    """
    path = Path(path)
    check_place(path)
    tell = progress or (lambda what, done, total: None)
    removed = remove(grafted, name)
    name = clones(grafted)[0] if name is None else name
    slot = modules_of(grafted)[name].slot
    if slot is not None and slot.is_off:
        raise ArgumentError(f"grafted: clone '{name}' is off; switch it on with netclone.enable(grafted, '{name}')")
    found = _gathered(grafted, removed, gather(data), name, old_names, source, pixels, tell)
    found = replace(found, path=path, title=title or f"Clone {name}", commands=tuple(map(str, commands)))
    text = page(found)
    size = len(text.encode("utf-8"))
    if size >= MOST_BYTES:
        raise ArgumentError(
            f"path: the page would have {size:,} bytes, expected less than {MOST_BYTES:,}; give shorter commands "
            f"({sum(map(len, found.commands)):,} letters) or a shorter title ({len(found.title):,})"
        )
    write_file(path, text.encode("utf-8"))
    tell("report", _STEPS, _STEPS)
    return replace(found, bytes=size)


def page(report: Report) -> str:
    """The page of a report."""
    return render(
        "reporting/templates/report.html.jinja",
        report=report,
        light=LIGHT,
        dark=DARK,
        script=digest(render("reporting/templates/report.js.jinja")),
    )


_STEPS = 5


def _gathered(
    grafted: fx.GraphModule,
    removed: fx.GraphModule,
    samples: Samples,
    name: str,
    old_names: Sequence[str],
    source: nn.Module | None,
    pixels: Callable[[Tensor], Tensor] | None,
    tell: Progress,
) -> Report:
    """All facts except those about the page itself."""
    module = modules_of(grafted)[name]
    labels = samples.labels.cpu()
    tell("report", 0, _STEPS)
    logits = predict(grafted, samples.images).cpu()
    tell("report", 1, _STEPS)
    left = predict(removed, samples.images).cpu()
    tell("report", 2, _STEPS)
    width = logits.shape[1]
    new = tuple(columns(grafted)[name])
    old = tuple(column for column in range(width) if column not in new)
    names = _names(grafted, width, old_names)
    given = logits[:, list(old)]

    if left.shape[1] == width:  # columns are stable, and the clone's are left empty
        left = left[:, list(old)]
    known = torch.zeros_like(logits)
    known[:, list(old)] = left
    is_old = torch.isin(labels, torch.tensor(old))
    alike, of_source = None, None
    if source is not None:
        alike, of_source = beside_source(grafted, name, source, samples, logits.to(samples.images.device))
    gates = () if module.router is None else (new,)
    after = score(logits, labels, old=old, new=new, known=known[is_old], similarity=alike, gates=gates)
    if of_source is not None and len(of_source):
        after = replace(after, new_source=float(of_source.double().mean()))
    place = torch.empty(width, dtype=labels.dtype)  # of a column once the clone's are moved to the end
    place[[*old, *new]] = torch.arange(width, dtype=labels.dtype)
    kept, gone = range(len(old)), range(len(old), width)
    scores = (
        ("before", score(given, place[labels], old=kept, new=gone)),
        ("grafted", after),
        ("removed", score(left, place[labels], old=kept, new=gone)),
    )
    gate, curve = _of_gate(grafted, name, samples, old, new)
    tell("report", 3, _STEPS)

    image = samples.images[:1]
    device = image.device
    shapes = [shape for shape in (module.spec.input_shape, module.spec.feature_shape) if shape is not None]
    inputs = [torch.zeros(1, *shape, dtype=image.dtype, device=device) for shape in shapes]
    networks = {
        "target": (removed, [image]),
        "grafted": (ungated(grafted), [image]),
        "clone": (module.ungated(), inputs),
    }
    networks |= {} if source is None else {"source": (source, [image])}
    measured = costs(networks)
    tell("report", 4, _STEPS)

    promised = held_out(module)
    taken = torch.tensor(old)[given.argmax(1)]
    predicted = logits.argmax(1)
    every = by_class(labels, taken, predicted, new, None if of_source is None else of_source.cpu())
    shown = sorted(every, key=lambda one: (not one.is_new, -abs(one.grafted - one.before), one.column))[:MOST_CLASSES]
    changed = sorted(changes(labels, given, logits, old), key=lambda change: (-change.gain, change.index))
    helped = [change for change in changed if change.label in new and change.gain >= _LEAST_CHANGE][:MOST_PICTURES]
    hurt = [c for c in reversed(changed) if c.label not in new and c.gain <= -_LEAST_CHANGE][:MOST_PICTURES]
    pictures = _pictures([*helped, *hurt], samples.images, pixels)
    return Report(
        path=Path(),
        bytes=0,
        title="",
        name=name,
        target=type(grafted).__name__,
        source="" if source is None else type(source).__name__,
        labels=names,
        old=old,
        new=new,
        others=tuple(other for other in clones(grafted) if other != name),
        spec=module.spec,
        scores=scores,
        held_out=tuple(promised.items()),
        far_apart=tuple(said(kind, *both) for kind, both in far_apart(promised, after).items()),
        compared=given.numel(),
        differing=_differing(given, left),
        costs=tuple(measured.items()),
        layers=rows(module, MOST_LAYERS),
        layout=lay_out(grafted, name, image),
        confusion=confusion(labels, predicted, old, new, MOST_CONFUSED),
        reliability=reliability(logits, predicted == labels),
        classes=tuple(sorted(shown, key=lambda one: one.column)),
        classes_seen=len(every),
        helped=pictures[: len(helped)],
        hurt=pictures[len(helped) :],
        gate=gate,
        skipping=curve,
        trade=None if bool(is_old.all()) or not bool(is_old.any()) else trades(logits, labels, new, module.spec.bias),
        commands=(),
        versions=(
            ("netclone", netclone.__version__),
            ("torch", torch.__version__),
            ("torchvision", torchvision.__version__),
            ("timm", timm.__version__),
            ("python", platform.python_version()),
        ),
        measured_on=f"{device.type}, {torch.get_num_threads()} thread(s), {platform.system()} {platform.machine()}",
        date=datetime.now(timezone.utc).isoformat(timespec="minutes"),
    )


def _names(grafted: fx.GraphModule, width: int, old_names: Sequence[str]) -> tuple[str, ...]:
    """A name for every column: the given names of the target's, then each clone's class names."""
    of_clones, count = columns(grafted), len(own_columns(grafted))
    if isinstance(old_names, str) or (len(old_names) and len(old_names) != count):
        raise ArgumentError(
            f"old_names: {len(old_names)} names for the {count} columns of the target; give one for each, in order"
        )
    found = [str(name) for name in old_names] or [str(column) for column in range(count)]
    found += ["none"] * (width - count)
    for name, module in modules_of(grafted).items():
        place = of_clones[name]
        found[place.start : place.stop] = [str(label) for label in module.class_names or module.classes][: len(place)]
    return tuple(shortened(name, _LONGEST) for name in found)


def _of_gate(
    grafted: fx.GraphModule, name: str, samples: Samples, old: Sequence[int], new: Sequence[int]
) -> tuple[Point | None, tuple[Point, ...]]:
    """What a clone's gate does and could do; nothing without a gate, or with images of one kind alone."""
    labels = samples.labels.cpu()
    is_old = torch.isin(labels, torch.tensor(old))
    if modules_of(grafted)[name].router is None or bool(is_old.all()) or not bool(is_old.any()):
        return None, ()
    scores, logits = (part.cpu() for part in seen_whole(grafted, name, samples.images))
    point = at_threshold(0.0, scores, logits, labels, is_old, new)
    return point, skipping(scores, logits, labels, old=old, new=new)


def _differing(one: Tensor, two: Tensor) -> int:
    """How many entries of two ``(N, K)`` differ in any bit."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return max(one.numel(), two.numel())
    bits = [tensor.contiguous().view(torch.uint8).view(tensor.numel(), -1) for tensor in (one, two)]
    return int((bits[0] != bits[1]).any(1).sum())


def _pictures(
    chosen: Sequence[Change], images: Tensor, pixels: Callable[[Tensor], Tensor] | None
) -> tuple[Picture, ...]:
    uris = thumbnails(images[[change.index for change in chosen]], pixels) or ("",) * len(chosen)
    return tuple(Picture(change, uri) for change, uri in zip(chosen, uris, strict=True))
