"""lay_out(grafted, name, image) -> Drawing: the target's graph with a clone beside it, as boxes and lines.

The target runs from top to bottom on the left. The branch is on the right, and starts at the height of its tap. Shapes
and MACs in the boxes are measured by running the graph once for one image. Values that cannot be measured are left
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from netclone.cloning.injecting import clones
from netclone.cloning.modules import CloneModule
from netclone.errors import CloneNameError
from netclone.graph.capturing import FACTS, tensor_at
from netclone.graph.measuring import Measured, measure
from netclone.graph.tracing import INPUT
from netclone.reporting.plotting import Stage, merged, reads, rows, shortened, stages

MOST_BOXES = 24
"""The most boxes in a lane; neighbours are joined if a network has more stages."""

WIDTH = 464
"""Width of a drawing, in pixels at its natural size."""

_BOX, _HEIGHT, _GAP, _EDGE = 184, 66, 30, 16  # width and height of a box, space below it, margin
_LETTERS = 21  # of a box's heading, which is set in monospace
_ADAPTER, _CLASSIFIER = "adapter", "classifier"


@dataclass(frozen=True)
class Box:
    """A part of a network: its place in the drawing, its label, its output shape and its cost.

    ``kind`` is ``"images"``, ``"target"``, ``"source"``, ``"trained"`` (adapter, classifier) or ``"logits"``.
    ``kept`` is the share of the source's units that it holds; None if it does not come from the source.
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
        """The label, shortened in the middle to the width of the box."""
        return shortened(self.label, int(_LETTERS * self.width / _BOX))


@dataclass(frozen=True)
class Line:
    """A line through points; ``kind`` is ``"target"``, ``"tap"``, ``"source"`` or ``"features"``."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Drawing:
    """Boxes, lines, and the clone's tap with its name, on a sheet of ``width`` by ``height`` pixels."""

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
    reader = next((box for box in branch if (box.kind, box.label) == ("trained", _CLASSIFIER)), None)
    if features is not None and reader is not None:
        read = next((index for index, part in enumerate(parts) if part.node == features.name), len(parts) - 1)
        y = lane[read + 1] + _HEIGHT + _GAP / 2 - (6 if read == at else 0)
        between, enters = (left + _BOX + right) / 2, reader.y + _HEIGHT / 2
        lines.append(Line("features", ((middle, y), (between, y), (between, enters), (right, enters))))
    tapped = parts[at].last if at >= 0 else INPUT
    return Drawing(WIDTH, bottom + _HEIGHT + _EDGE, tuple(boxes), tuple(lines), point, tapped)


def branch_boxes(module: CloneModule, most: int = MOST_BOXES) -> tuple[Box, ...]:
    """The parts of a clone in order (adapter, blocks of the source, classifier), not yet placed.

    A node belongs to the module whose tensors it reads, or else to the module of its last argument.
    """
    nodes = _stretches(module)
    kind = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.zeros(()))
    shapes = [shape for shape in (module.spec.input_shape, module.spec.feature_shape) if shape is not None]
    measured = measure(module.body, *(torch.zeros(1, *shape, dtype=kind.dtype, device=kind.device) for shape in shapes))
    found = []
    for (_, label), inside in nodes.items():
        given = [measured[node.name].shape for node in inside if node.name in measured]
        shape = next((shape for shape in reversed(given) if shape is not None), None)
        found.append(Stage(label, label, inside[-1].name, shape or (), _parameters(module, inside)))
    fixed = {inside[-1].name for (trained, _), inside in nodes.items() if trained}
    groups = rows(module, 10**6)
    boxes = []
    left = list(nodes.items())
    for part in merged(found, fixed, most):
        ends = next(index for index, (_, inside) in enumerate(left) if inside[-1].name == part.node)
        joined, left = left[: ends + 1], left[ends + 1 :]
        trained = joined[0][0][0]
        own = [row for row in groups if any(_is_within(row.label, label) for (_, label), _ in joined)]
        kept = sum(row.kept for row in own) / sum(row.total for row in own) if own and not trained else None
        title = part.first if part.first == part.last else f"{part.first} to {part.last}"
        names = [node.name for _, some in joined for node in some]
        says = _counted(title, len(names)) + ("" if kept is None else f", {kept:.0%} of its units")
        macs = _macs(measured, names)
        boxes.append(
            _box("trained" if trained else "source", title, says, part.shape, part.parameters, macs, kept, 0, 0)
        )
    return tuple(boxes)


_Key = tuple[bool, str]  # whether it was fitted to the target, and its name


def _stretches(module: CloneModule) -> dict[_Key, list[fx.Node]]:
    """The computing nodes of a clone by the part that they belong to, with the classifier last."""
    last: _Key = (True, _CLASSIFIER)
    tensors = {node: str(node.target) for node in module.body.graph.nodes if node.op == "get_attr"}
    fitted = module.spec.feature_shape is not None
    own = [name.partition(".")[2] if fitted else name for name in tensors.values() if not fitted or _of_source(name)]
    common = _common([name.split(".")[:-1] for name in own])
    inputs = [node for node in module.body.graph.nodes if node.op == "placeholder"]
    place: dict[fx.Node, _Key | None] = {node: last if node is not inputs[0] else None for node in inputs}
    for node in module.body.graph.nodes:
        if node in tensors:
            place[node] = _key(tensors[node], fitted, common)
        elif node.op not in ("placeholder", "output"):
            held = [place[given] for given in node.all_input_nodes if given in tensors and place[given] is not None]
            passed = [place[given] for given in node.all_input_nodes if given not in tensors]
            known = [key for key in passed if key is not None]
            place[node] = last if last in known else held[0] if held else known[-1] if known else None
    computing = {node: key for node, key in place.items() if node not in tensors and node not in inputs}
    first = next((key for key in computing.values() if key is not None), (False, "source"))
    found: dict[_Key, list[fx.Node]] = {}
    for node, key in computing.items():
        found.setdefault(first if key is None else key, []).append(node)
    if last in found:
        found[last] = found.pop(last)
    return found


def _common(paths: Sequence[list[str]]) -> int:
    """The number of leading parts that all module paths share; paths without parts are ignored."""
    levels = list(zip(*(path for path in paths if path), strict=False))
    return next((depth for depth, level in enumerate(levels) if len(set(level)) > 1), len(levels))


def _of_source(tensor: str) -> bool:
    """Whether a tensor of a fitted clone comes from the source, and not from adapter or classifier."""
    return tensor.startswith("body.")


def _key(tensor: str, fitted: bool, common: int) -> _Key | None:
    """The adapter, classifier or source block of a tensor, by its name without its ``common`` leading parts."""
    if fitted:
        top, _, rest = tensor.partition(".")
        if not _of_source(tensor):
            return (True, top) if top in (_ADAPTER, _CLASSIFIER) else None
        tensor = rest
    parts = tensor.split(".")
    deep = common + 2 if len(parts) > common + 1 and parts[common + 1].isdigit() else common + 1
    return False, ".".join(parts[:deep])


def _is_within(group: str, label: str) -> bool:
    """Whether a group of channels belongs to a block."""
    return f"{group.split('#')[0]}.".startswith(f"{label}.")


def _parameters(module: CloneModule, nodes: Sequence[fx.Node]) -> int:
    """The number of parameters that some nodes read."""
    read = {str(given.target) for node in nodes for given in node.all_input_nodes if given.op == "get_attr"}
    tensors = {id(tensor): tensor for tensor in (tensor_at(module.body, name) for name in read)}
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def _macs(measured: Mapping[str, Measured], nodes: Sequence[str]) -> int | None:
    """The MACs of some nodes; None if one of them was not measured."""
    if any(node not in measured for node in nodes):
        return None
    return sum(measured[node].macs for node in nodes)


def _counted(title: str, nodes: int) -> str:
    return f"{title}, {nodes} node" + "s" * (nodes != 1)


_box = partial(Box, width=_BOX, height=_HEIGHT)
