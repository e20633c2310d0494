"""lay_out(grafted, name, image) -> Drawing: the target's graph with a clone beside it, as boxes and lines to be drawn.

The target runs from top to bottom on the left, the branch on the right, from the height of its tap down; what a box
says is measured: shapes and MACs by running the graph once for one image. What could not be measured is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from netclone.capturing import FACTS, tensor_at
from netclone.errors import CloneNameError
from netclone.injecting import clones
from netclone.measuring import Measured, measure
from netclone.modules import CloneModule
from netclone.plotting import Stage, merged, reads, rows, shortened, stages
from netclone.tracing import INPUT

MOST_BOXES = 24
"""Boxes of a lane; neighbours are joined where a network has more stages."""

WIDTH = 464
"""Of a drawing, in pixels at its natural size."""

_BOX, _HEIGHT, _GAP, _EDGE = 184, 66, 30, 16  # width and height of a box, space below it, margin
_LETTERS = 21  # of a box's heading, which is set in letters of one width
_ADAPTER, _CLASSIFIER = "adapter", "classifier"


@dataclass(frozen=True)
class Box:
    """A stretch of a network: where it is drawn, what it is called, what it gives and takes.

    ``kind`` is ``"images"``, ``"target"``, ``"source"``, ``"trained"`` (adapter, classifier) or ``"logits"``.
    ``kept`` is the share of the source's units that it holds; None where it is not of the source.
    """

    kind: str
    label: str
    title: str
    shape: tuple[int, ...]
    parameters: int
    macs: int | None
    kept: float | None
    x: float
    y: float
    width: float
    height: float

    @property
    def short(self) -> str:
        """The label, shortened in its middle to the width of the box."""
        return shortened(self.label, int(_LETTERS * self.width / _BOX))


@dataclass(frozen=True)
class Line:
    """A line through points; ``kind`` is ``"target"``, ``"tap"``, ``"source"`` or ``"features"``."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Drawing:
    """Boxes, lines, and the point where the clone is tapped with its name, on a sheet of so many pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    tap: tuple[float, float]
    tapped: str


def lay_out(grafted: fx.GraphModule, name: str, image: Tensor, most: int = MOST_BOXES) -> Drawing:
    """Measure a grafted graph for one image ``(1, C, H, W)`` and lay it out with at most ``most`` boxes in a lane.

    Raises
    ------
    CloneNameError
        If the graph holds no clone of that name.
    """
    if name not in clones(grafted):
        raise CloneNameError(
            f"name: no clone {name!r} in the graph, which holds {', '.join(map(repr, clones(grafted)))}; name one"
        )
    module = grafted.get_submodule(name)
    assert isinstance(module, CloneModule)
    own, tap, features = reads(grafted, name)
    parts = stages(grafted, name, most)
    at = next((index for index, part in enumerate(parts) if part.node == tap.name), -1)  # -1: the images
    measured = measure(grafted, image)

    left, right = float(_EDGE), float(WIDTH - _EDGE - _BOX)
    step = float(_HEIGHT + _GAP)
    shape = tuple(grafted.meta[FACTS]["example"].shape[1:])
    boxes = [_box("images", "images", "what the target is given", shape, 0, None, None, left, _EDGE)]
    start = 0
    order = {node.name: index for index, node in enumerate(own)}
    for index, part in enumerate(parts):
        stretch, start = own[start : order[part.node] + 1], order[part.node] + 1
        macs = _macs(measured, [node.name for node in stretch])
        title = part.first if part.first == part.last else f"{part.first} to {part.last}"
        y = _EDGE + (index + 1) * step
        boxes.append(
            _box("target", title, _counted(title, len(stretch)), part.shape, part.parameters, macs, None, left, y)
        )
    begin = _EDGE + (at + 2) * step
    branch = [replace(box, x=right, y=begin + index * step) for index, box in enumerate(branch_boxes(module, most))]
    boxes += branch

    bottom = max(box.y for box in boxes) + step
    counts = {"the target": parts[-1].shape[0]}
    for clone in clones(grafted):
        counts[f"'{clone}'"] = len(grafted.get_submodule(clone).spec.classes)  # type: ignore[union-attr, arg-type]
    words = " + ".join(f"{count} of {whose}" for whose, count in counts.items())
    says = "the target's logits, to the bit, then those of the clones"
    joined = _box("logits", words, says, (sum(counts.values()),), 0, None, None, left, bottom)
    boxes.append(replace(joined, width=WIDTH - 2 * _EDGE))

    middle, other = left + _BOX / 2, right + _BOX / 2
    lane = [box.y for box in boxes if box.kind in ("images", "target")]
    lines = [Line("target", ((middle, y + _HEIGHT), (middle, y + step))) for y in lane[:-1]]
    lines.append(Line("target", ((middle, lane[-1] + _HEIGHT), (middle, bottom))))
    point = (middle, lane[at + 1] + _HEIGHT + _GAP / 2)
    lines.append(Line("tap", (point, (other, point[1]), (other, begin))))
    lines += [Line("source", ((other, box.y + _HEIGHT), (other, box.y + step))) for box in branch[:-1]]
    lines.append(Line("source", ((other, branch[-1].y + _HEIGHT), (other, bottom))))
    reader = next((box for box in branch if box.label == _CLASSIFIER), None)
    if features is not None and reader is not None:
        read = next((index for index, part in enumerate(parts) if part.node == features.name), len(parts) - 1)
        y = lane[read + 1] + _HEIGHT + _GAP / 2 - (6 if read == at else 0)
        between, enters = (left + _BOX + right) / 2, reader.y + _HEIGHT / 2
        lines.append(Line("features", ((middle, y), (between, y), (between, enters), (right, enters))))
    tapped = parts[at].last if at >= 0 else INPUT
    return Drawing(WIDTH, bottom + _HEIGHT + _EDGE, tuple(boxes), tuple(lines), point, tapped)


def branch_boxes(module: CloneModule, most: int = MOST_BOXES) -> tuple[Box, ...]:
    """The stretches of a clone in order (adapter, blocks of the source, classifier), not yet placed.

    A node belongs to the module whose tensors it reads, or else to that of what it was given last.
    """
    places = _places(module)
    order = list(dict.fromkeys(places.values()))
    if _CLASSIFIER in order:
        order = [*(key for key in order if key != _CLASSIFIER), _CLASSIFIER]
    kind = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.zeros(()))
    shapes = [shape for shape in (module.spec.input_shape, module.spec.feature_shape) if shape is not None]
    measured = measure(module.body, *(torch.zeros(1, *shape, dtype=kind.dtype, device=kind.device) for shape in shapes))
    nodes = {key: [node for node, place in places.items() if place == key] for key in order}
    found = []
    for key in order:
        given = [measured[node].shape for node in nodes[key] if node in measured]
        shape = next((shape for shape in reversed(given) if shape is not None), None)
        found.append(Stage(key, key, nodes[key][-1], shape or (), _parameters(module, key, places)))
    fixed = {part.node for part in found if part.first in (_ADAPTER, _CLASSIFIER)}
    boxes = []
    groups = rows(module, 10**6)
    for part in merged(found, fixed, most):
        keys = order[order.index(part.first) : order.index(part.last) + 1]
        inside = [node for key in keys for node in nodes[key]]
        trained = part.first in (_ADAPTER, _CLASSIFIER)
        own = [row for row in groups if any(f"{row.label.split('#')[0]}.".startswith(f"{key}.") for key in keys)]
        kept = sum(row.kept for row in own) / sum(row.total for row in own) if own and not trained else None
        title = part.first if part.first == part.last else f"{part.first} to {part.last}"
        says = _counted(title, len(inside)) + ("" if kept is None else f", {kept:.0%} of its units")
        macs = _macs(measured, inside)
        boxes.append(
            _box("trained" if trained else "source", title, says, part.shape, part.parameters, macs, kept, 0, 0)
        )
    return tuple(boxes)


def _places(module: CloneModule) -> dict[str, str]:
    """For every node of a clone that computes something, in order, the stretch it belongs to."""
    place: dict[fx.Node, str | None] = {}
    fitted = any(key.startswith("body.classifier.") for key in module.state_dict())
    inputs = [node for node in module.body.graph.nodes if node.op == "placeholder"]
    for node in module.body.graph.nodes:
        if node in inputs:
            place[node] = _CLASSIFIER if node is not inputs[0] else None
        elif node.op == "get_attr":
            place[node] = _stretch(str(node.target), fitted)
        elif node.op != "output":
            held = [place[given] for given in node.all_input_nodes if given.op == "get_attr"]
            passed = [place[given] for given in node.all_input_nodes if given.op != "get_attr"]
            known = [key for key in passed if key is not None]
            place[node] = _CLASSIFIER if _CLASSIFIER in known else held[0] if held else known[-1] if known else None
    computes = {node: key for node, key in place.items() if node.op not in ("get_attr", "placeholder")}
    first = next((key for key in computes.values() if key is not None), "source")
    return {node.name: first if key is None else key for node, key in computes.items()}


def _stretch(tensor: str, fitted: bool) -> str:
    """Adapter, classifier, or the block of the source that a tensor belongs to, by its name."""
    if fitted:
        top, _, rest = tensor.partition(".")
        if top in (_ADAPTER, _CLASSIFIER):
            return top
        tensor = rest
    first, *rest_of = tensor.split(".")
    return f"{first}.{rest_of[0]}" if rest_of and rest_of[0].isdigit() else first


def _parameters(module: CloneModule, key: str, places: Mapping[str, str]) -> int:
    """Parameters read by the nodes of a stretch."""
    found = {}
    for node in module.body.graph.nodes:
        if places.get(node.name) == key:
            for given in node.all_input_nodes:
                if given.op == "get_attr":
                    tensor = tensor_at(module.body, str(given.target))
                    found.update({id(tensor): tensor} if isinstance(tensor, nn.Parameter) else {})
    return sum(tensor.numel() for tensor in found.values())


def _macs(measured: Mapping[str, Measured], nodes: Sequence[str]) -> int | None:
    """MACs of some nodes; None where one of them was not measured."""
    if any(node not in measured for node in nodes):
        return None
    return sum(measured[node].macs for node in nodes)


def _counted(title: str, nodes: int) -> str:
    return f"{title}, {nodes} node" + "s" * (nodes != 1)


def _box(
    kind: str,
    label: str,
    title: str,
    shape: tuple[int, ...],
    parameters: int,
    macs: int | None,
    kept: float | None,
    x: float,
    y: float,
) -> Box:
    return Box(kind, label, title, shape, parameters, macs, kept, x, y, _BOX, _HEIGHT)
