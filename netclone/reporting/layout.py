"""lay_out(grafted, name, image) -> Layout: the target's graph with a clone beside it, as boxes and edges.

Two lanes, the target's and the branch's, run down a page or across a PNG. Shapes and MACs in the boxes are measured by
running the graph once for one image. Values that cannot be measured are left out. The page of a report and the PNG draw
the layout as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from netclone.cloning.grafted import clones, modules_of
from netclone.cloning.modules import CloneModule
from netclone.errors import CloneNameError
from netclone.graph.capturing import FACTS
from netclone.graph.measuring import Measured, measure
from netclone.graph.tracing import INPUT
from netclone.reporting.rendering import short, shortened, times
from netclone.reporting.stages import CLASSIFIER, Stage, branch, kept, reads, stages

MOST_BOXES = 24
"""The most boxes in a lane; neighbours are joined if a network has more stages."""

LEGEND = (
    ("target", "target, frozen"),
    ("source", "cloned from the source; the bar is the share kept"),
    ("trained", "fitted: adapter, classifier"),
    ("tap", "tap"),
)
"""The meaning of each colour, by the kind of box."""

SIZES = {"name": 13, "plain": 12, "faint": 11}
"""Font sizes in pixels, by the kind of text; names are set in monospace."""

_LETTER = 8  # width of a name's letter, in pixels
_PAD = 3  # between a text and the edge of its box
_BAR, _BELOW = 3, 8  # height of a bar, and of what is below a text
_MOST_OWNERS = 12  # of logits, in lines of their own


@dataclass(frozen=True)
class Text:
    """Words centred on ``x`` above the baseline ``y``, in at most ``width`` pixels; ``kind`` is a key of SIZES."""

    kind: str
    words: str
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Box:
    """A part of a network: its place in the layout, its label, its output shape, its cost and its texts.

    ``kind`` is ``"images"``, ``"target"``, ``"source"``, ``"trained"`` (adapter, classifier) or ``"logits"``.
    ``kept`` is the share of the source's units that it holds; None if it does not come from the source.
    """

    kind: str
    label: str
    title: str
    shape: tuple[int, ...]
    parameters: int = 0
    macs: int | None = None
    kept: float | None = None
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0
    texts: tuple[Text, ...] = ()

    @property
    def bar(self) -> tuple[float, float, float, float]:
        """The bar that shows ``kept``: left, top, full width, height."""
        return self.x + 12, self.y + self.height - _BELOW, self.width - 24, _BAR


@dataclass(frozen=True)
class Edge:
    """An arrow through points; ``kind`` is ``"target"``, ``"tap"``, ``"source"`` or ``"features"``."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Layout:
    """Boxes, edges, and the clone's tap with its name, on a sheet of ``width`` by ``height`` pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    tap: tuple[float, float]
    tapped: str

    @property
    def legend(self) -> tuple[tuple[str, str], ...]:
        """The part of LEGEND that applies to its boxes."""
        kinds = {"tap", *(box.kind for box in self.boxes)}
        return tuple(entry for entry in LEGEND if entry[0] in kinds)


@dataclass(frozen=True)
class Way:
    """The direction of the lanes, and sizes in pixels: of a box, and of the space behind it, between lanes, around."""

    across: bool
    width: float
    height: float
    gap: float
    between: float
    margin: float
    joined: float  # how long the box of the logits is

    @property
    def long(self) -> float:
        """The length of a box along its lane."""
        return self.width if self.across else self.height

    @property
    def wide(self) -> float:
        """The width of a box across its lane."""
        return self.height if self.across else self.width

    def begins(self, index: int) -> float:
        """The start of a box along its lane, by its number."""
        return self.margin + index * (self.long + self.gap)

    def side(self, lane: int) -> float:
        """The start of a lane, across."""
        return self.margin + lane * (self.wide + self.between)

    def turned(self, along: float, aside: float) -> tuple[float, float]:
        """Lengths along and across the lane as ``(x, y)``."""
        return (along, aside) if self.across else (aside, along)

    def edge(self, kind: str, *points: tuple[float, float]) -> Edge:
        """An edge through points that are given along and across the lane."""
        return Edge(kind, tuple(self.turned(*point) for point in points))

    def placed(self, box: Box, index: int, lane: int) -> Box:
        """A box placed in a lane; the logits go across both."""
        ends = box.kind == "logits"
        x, y = self.turned(self.begins(index), self.side(lane))
        width, height = self.turned(
            self.joined if ends else self.long, self.side(1) + self.wide - self.margin if ends else self.wide
        )
        box = replace(box, x=x, y=y, width=width, height=height)
        return replace(box, texts=_texts(box, _said(box, self.across)))


DOWN = Way(False, width=184, height=66, gap=30, between=64, margin=16, joined=66)
"""Down a page that can be scrolled."""

ACROSS = Way(True, width=94, height=94, gap=18, between=44, margin=6, joined=104)
"""Across a picture."""


def lay_out(
    grafted: fx.GraphModule, name: str, image: Tensor | None = None, most: int = MOST_BOXES, way: Way = DOWN
) -> Layout:
    """Measure a grafted graph for one image ``(1, C, H, W)``, a black one if none is given, and lay it out.

    A lane has at most ``most`` boxes, and both run ``DOWN`` or ``ACROSS``.

    Raises
    ------
    CloneNameError
        If the graph holds no clone of that name.
    """
    if name not in clones(grafted):
        raise CloneNameError(
            f"name: no clone {name!r} in the graph, which holds {', '.join(map(repr, clones(grafted)))}; name one"
        )
    module = modules_of(grafted)[name]
    _, tap, features = reads(grafted, name)
    parts = stages(grafted, name, most)
    at = next((index for index, part in enumerate(parts) if part.nodes[-1] == tap.name), -1)  # -1: the images
    example = grafted.meta[FACTS]["example"][:1]
    measured = measure(grafted, torch.zeros_like(example) if image is None else image)
    target = [Box("images", "images", "what the target is given", tuple(example.shape[1:]))] + [
        _box(part, measured) for part in parts
    ]
    clone = list(branch_boxes(module, most))
    begin = max(1, min(at + 2, len(target) - len(clone)))  # behind the tap, or before it to end with the target
    last = max(len(target), begin + len(clone))
    boxes = [way.placed(box, index, 0) for index, box in enumerate(target)]
    boxes += [way.placed(box, begin + index, 1) for index, box in enumerate(clone)]
    boxes.append(way.placed(_joined(grafted, parts[-1].shape[0]), last, 0))

    edges = []
    for lane, kind, first, count in ((0, "target", 0, len(target)), (1, "source", begin, len(clone))):
        middle = way.side(lane) + way.wide / 2
        for index in range(first, first + count):
            after = index + 1 if index < first + count - 1 else last
            edges.append(way.edge(kind, (way.begins(index) + way.long, middle), (way.begins(after), middle)))
    middle, far = way.side(0) + way.wide / 2, way.side(1)

    def leaves(index: int) -> float:
        """The middle of the gap behind a box of the target."""
        return way.begins(index) + way.long + way.gap / 2

    def enters(index: int) -> float:
        """The middle of a box of the branch."""
        return way.begins(begin + index) + way.long / 2

    point, into, aside = leaves(at + 1), enters(0), far - 2 * way.between / 3
    edges.append(way.edge("tap", (point, middle), (point, aside), (into, aside), (into, far)))
    reader = next((index for index, box in enumerate(clone) if (box.kind, box.label) == ("trained", CLASSIFIER)), None)
    if features is not None and reader is not None:
        read = next((index for index, part in enumerate(parts) if part.nodes[-1] == features.name), len(parts) - 1)
        out, into, aside = leaves(read + 1) + (6 if read == at else 0), enters(reader), far - way.between / 3
        edges.append(way.edge("features", (out, middle), (out, aside), (into, aside), (into, far)))
    width, height = way.turned(way.begins(last) + way.joined + way.margin, far + way.wide + way.margin)
    tapped = parts[at].paths[-1] if at >= 0 else INPUT
    return Layout(width, height, tuple(boxes), tuple(edges), way.turned(point, middle), tapped)


def branch_boxes(module: CloneModule, most: int = MOST_BOXES) -> tuple[Box, ...]:
    """The parts of a clone in order (adapter, blocks of the source, classifier), not yet placed."""
    kind = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.zeros(()))
    shapes = [shape for shape in (module.spec.input_shape, module.spec.feature_shape) if shape is not None]
    measured = measure(module.body, *(torch.zeros(1, *shape, dtype=kind.dtype, device=kind.device) for shape in shapes))
    found = branch(module, {node: one.shape for node, one in measured.items()}, most)
    return tuple(_box(stage, measured, kept(module, stage)) for stage in found)


def _box(stage: Stage, measured: Mapping[str, Measured], share: float | None = None) -> Box:
    count = len(stage.nodes)
    title = f"{stage.label}, {count} node" + "s" * (count != 1)
    title += "" if share is None else f", {share:.0%} of its units"
    macs = sum(measured[node].macs for node in stage.nodes) if set(stage.nodes) <= set(measured) else None
    return Box(stage.kind, stage.label, title, stage.shape, stage.parameters, macs, share)


def _joined(grafted: fx.GraphModule, own: int) -> Box:
    """The box of the joined logits, with the count of each network's own."""
    counts = {"the target": own}
    counts |= {f"'{name}'": len(module.classes) for name, module in modules_of(grafted).items()}
    words = " + ".join(f"{count} of {whose}" for whose, count in counts.items())
    return Box("logits", words, "the target's logits, to the bit, then those of the clones", (sum(counts.values()),))


def _said(box: Box, across: bool) -> list[tuple[str, str]]:
    """The lines of text in a box, with their kinds: short ones if lanes run across, else few and long ones."""
    if box.kind == "images":
        return [("name", box.label), ("plain", times(box.shape))]
    if box.kind == "logits":
        whose = box.label.split(" + ") if across else [box.label]
        whose[_MOST_OWNERS:] = [f"and {len(whose) - _MOST_OWNERS} more"] if len(whose) > _MOST_OWNERS else []
        return [("name", f"{box.shape[0]} logits"), *(("plain", line) for line in whose)]
    first, _, last = box.label.partition(" to ")
    names = [f"{first} to", last] if last and across else [box.label]
    counts = [f"{short(count)} {what}" for count, what in ((box.macs, "MACs"), (box.parameters, "params")) if count]
    faint = counts if across else [" \N{MIDDLE DOT} ".join(counts)] * bool(counts)
    return [*(("name", name) for name in names), ("plain", times(box.shape)), *(("faint", line) for line in faint)]


def _texts(box: Box, lines: Sequence[tuple[str, str]]) -> tuple[Text, ...]:
    """Lines centred in a box, above its bar if there is one; long lines are shortened in the middle."""
    room = box.width - 2 * _PAD
    letters = int(room // _LETTER)
    high = [SIZES[kind] + 4 for kind, _ in lines]
    top = box.y + (box.height - (_BELOW if box.kept is not None else 0) - sum(high)) / 2
    return tuple(
        Text(
            kind,
            shortened(words, letters if kind == "name" else letters * 7 // 5),
            box.x + box.width / 2,
            top + sum(high[: index + 1]) - 4,
            room,
        )
        for index, (kind, words) in enumerate(lines)
    )
