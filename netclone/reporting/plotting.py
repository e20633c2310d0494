"""draw(grafted, name, path): plot a grafted graph, and how much of each layer was cloned."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from torch import fx, nn

from netclone.cloning.injecting import clones, own_nodes, read_by
from netclone.cloning.modules import CloneModule
from netclone.errors import ArchiveError, ArgumentError, CloneNameError
from netclone.graph.capturing import FACTS, tensor_at
from netclone.graph.tracing import INPUT, shape_of
from netclone.reporting.rendering import times
from netclone.runtime.writing import write_file

SIZE = (1600, 900)
"""Width and height of the plot in pixels."""

MOST_STAGES = 7
"""Stages that a plot has room for; neighbours are joined if a target has more."""

MOST_ROWS = 14
"""Layers of a clone that a plot has room for; layers of a block are summed if there are more."""

_DPI = 100
_SMALLEST = 8.0  # font sizes in points
# Okabe and Ito's colours, which the colour-blind can tell apart; light tints of them as fills.
_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072B2", "#E69F00", "#009E73", "#8A8A8A", "#1F2933"
_TAP, _BROWN, _FAINT = "#D55E00", "#8A5A00", "#4A5560"
_PALE = {_BLUE: "#DCEBF5", _ORANGE: "#FBEBCB", _GREEN: "#D5EFE6", _GREY: "#EFEFEF"}


@dataclass(frozen=True)
class Stage:
    """A part of the target's graph: its first and last module paths, its last node and that node's shape."""

    first: str
    last: str
    node: str
    shape: tuple[int, ...]
    parameters: int

    @property
    def label(self) -> str:
        """The stage in words, on one line or two."""
        return self.first if self.first == self.last else f"{self.first} to\n{self.last}"


@dataclass(frozen=True)
class Row:
    """A layer (or block) of the source: its cloned units, and all its units."""

    label: str
    kept: int
    total: int


def draw(grafted: fx.GraphModule, name: str, path: str | os.PathLike[str]) -> Figure:
    """Draw a clone in its target: the target's stages, the branch, and the share of each layer that was cloned.

    Parameters
    ----------
    grafted
        The graph that :func:`netclone.inject` returned.
    name
        The clone to draw.
    path
        Where to write the PNG of 1600 x 900 pixels.

    Returns
    -------
    The matplotlib figure, drawn without pyplot and so without global state.

    Raises
    ------
    CloneNameError
        If the graph holds no clone of that name.
    ArgumentError
        If ``grafted`` holds no clones, or the file cannot be written.

    Examples
    --------
    >>> import tempfile, timm, torch, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> mask = netclone.localize(source, method="magnitude", keep=0.5)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[1, 3])
    >>> channels, *size = module.spec.input_shape
    >>> stem = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(size), torch.nn.Conv2d(3, channels, 1))
    >>> target = torch.nn.Sequential(stem, torch.nn.Flatten(), torch.nn.LazyLinear(5))
    >>> _ = target(torch.zeros(2, 3, 160, 160))
    >>> grafted = netclone.inject(target, module, at="0", name="odd", example_inputs=torch.zeros(2, 3, 160, 160))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = draw(grafted, "odd", f"{folder}/odd.png")
    >>> [int(size * figure.dpi) for size in figure.get_size_inches()]
    [1600, 900]

    Reference: Partial Network Cloning (arXiv 2303.10597), figure 2.
    """
    if name not in clones(grafted):
        raise CloneNameError(
            f"name: no clone {name!r} in the graph, which holds {', '.join(map(repr, clones(grafted)))}"
        )
    figure = Figure(figsize=(SIZE[0] / _DPI, SIZE[1] / _DPI), dpi=_DPI, facecolor="white")
    _show(_Sheet(figure), grafted, name)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    try:
        write_file(Path(path), content.getvalue())
    except ArchiveError as error:
        raise ArgumentError(f"path: {error}") from error
    return figure


def stages(grafted: fx.GraphModule, name: str, most: int = MOST_STAGES) -> tuple[Stage, ...]:
    """The target's part of a grafted graph in at most ``most`` stages; one of them ends at the clone's tap.

    A clone at the input has its tap before the first stage, so that no stage ends there.
    """
    own, tap, features = reads(grafted, name)
    positions = grafted.meta[FACTS]["positions"]
    order = {node.name: index for index, node in enumerate(own)}
    names: dict[str, str] = {}

    def call(node: str, path: str) -> None:
        """Name a node, unless it has a better name (fewer dots, then fewer letters)."""
        if node not in names or (path.count("."), len(path)) < (names[node].count("."), len(names[node])):
            names[node] = path

    for path, node in positions.items():
        if node in order and (_is_stage(path, positions) or node == tap.name):
            call(node, path)
    logits = _logits(grafted)
    for last in [tap, logits] if features is None else [tap, features, logits]:
        if last.name not in names and last.name in order:
            named = [path for path, node in positions.items() if node == last.name]
            call(last.name, min(named, key=len) if named else last.name)
    found = []
    start = 0
    for end in sorted(names, key=order.__getitem__):
        stretch, start = own[start : order[end] + 1], order[end] + 1
        shape = shape_of(own[order[end]])
        if shape is not None:
            found.append(Stage(names[end], names[end], end, shape, parameters_of(grafted, stretch)))
    keep = {tap.name, logits.name} | ({features.name} if features is not None else set())
    return merged(found, keep, most)


def rows(module: CloneModule, most: int = MOST_ROWS) -> tuple[Row, ...]:
    """The units that a clone holds of each of the source's layers, in order; 0 for a layer before the cut.

    Layers are the groups of ``module.spec.kept``; those of a block are summed if there are more than ``most``.
    """
    held = [key.removeprefix("body.").removeprefix("body.") for key in module.state_dict()]
    found: list[Row] = []
    for group, kept, total in module.spec.kept:
        plain = group.split("#")[0]
        inside = any(key == plain or key.startswith(f"{plain}.") for key in held)
        found.append(Row(group, kept if inside else 0, total))
    depth = max((row.label.count(".") for row in found), default=0)
    while len(found) > most and depth >= 0:
        summed: dict[str, Row] = {}
        for row in found:
            label = ".".join(row.label.split(".")[: depth + 1])
            before = summed.get(label, Row(label, 0, 0))
            summed[label] = Row(label, before.kept + row.kept, before.total + row.total)
        found, depth = list(summed.values()), depth - 1
    if len(found) > most:
        rest = found[most - 1 :]
        label = f"and {len(rest)} more"
        found = [*found[: most - 1], Row(label, sum(row.kept for row in rest), sum(row.total for row in rest))]
    return tuple(found)


# Reading the graph


def reads(grafted: fx.GraphModule, name: str) -> tuple[list[fx.Node], fx.Node, fx.Node | None]:
    """The target's own nodes, the one that a clone taps, and the node of its second input, if any."""
    nodes = own_nodes(grafted)
    own = [node for node in nodes[: nodes.index(_logits(grafted)) + 1] if node.op != "placeholder"]
    tap, *features = read_by(grafted, name)
    return own, tap, features[0] if features else None


def _logits(grafted: fx.GraphModule) -> fx.Node:
    """The node with the target's own logits: the first input of the cat at the end, behind the node that holds it."""
    joined = next(node for node in grafted.graph.nodes if node.op == "output").args[0]
    assert isinstance(joined, fx.Node)
    logits = joined.args[0][0].args[0]  # type: ignore[index, union-attr]
    assert isinstance(logits, fx.Node)
    return logits


def _is_stage(path: str, positions: Mapping[str, str]) -> bool:
    """Whether a path is a top-level module, or one of several blocks in a top-level sequence."""
    top, *below = path.split(".")
    if not below:
        return True
    siblings = {other.split(".")[1] for other in positions if other.startswith(f"{top}.")}
    return (
        len(below) == 1
        and all(sibling.isdigit() for sibling in siblings)
        and len(siblings) > 1
        and any(other.startswith(f"{path}.") for other in positions)
    )


def parameters_of(grafted: fx.GraphModule, nodes: Sequence[fx.Node]) -> int:
    """The number of parameters that the nodes read; one that is read twice counts once."""
    found = {}
    for node in nodes:
        if node.op == "call_module":
            found.update({id(p): p for p in grafted.get_submodule(str(node.target)).parameters()})
        elif node.op == "get_attr":
            value = tensor_at(grafted, str(node.target))
            found.update({id(value): value} if isinstance(value, nn.Parameter) else {})
    return sum(parameter.numel() for parameter in found.values())


def merged(found: list[Stage], keep: set[str], most: int) -> tuple[Stage, ...]:
    """Join neighbours: first a layer with its norm, then those that differ least, until ``most`` are left."""

    def price(index: int) -> tuple[bool, int]:
        first, second = found[index], found[index + 1]
        return first.shape != second.shape, min(first.parameters, second.parameters)

    while True:
        free = [index for index in range(len(found) - 2) if found[index].node not in keep]
        light = [i for i in free if not price(i)[0] and price(i)[1] <= 4 * max(found[i].shape, default=0)]
        if not light and (len(found) <= most or not free):
            return tuple(found)
        index = light[0] if light else min(free, key=price)
        first, second = found[index], found[index + 1]
        total = first.parameters + second.parameters
        found[index : index + 2] = [replace(second, first=first.first, parameters=total)]


# Drawing


class _Sheet:
    """A sheet of 16 x 9 units of 100 pixels, which fits text to a given width."""

    def __init__(self, figure: Figure) -> None:
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 16), ylim=(0, 9))
        self.axes.set_axis_off()
        self.canvas = FigureCanvasAgg(figure)

    def text(  # noqa: PLR0913 - how text looks
        self,
        x: float,
        y: float,
        words: str,
        *,
        width: float,
        size: float = 12,
        colour: str = _INK,
        bold: bool = False,
        mono: bool = False,
        align: str = "left",
    ) -> None:
        """Write words centred on ``y``; words wider than ``width`` become smaller, or are shortened in the middle."""
        text = self.axes.text(
            x,
            y,
            words,
            fontsize=size,
            color=colour,
            fontweight="bold" if bold else "normal",
            family="DejaVu Sans Mono" if mono else "DejaVu Sans",
            ha=align,
            va="center",
            parse_math=False,
            zorder=5,
        )
        renderer = self.canvas.get_renderer()

        def too_wide() -> bool:
            return bool(text.get_window_extent(renderer).width > width * _DPI)

        while too_wide() and size > _SMALLEST:
            size = max(_SMALLEST, size - 0.5)
            text.set_fontsize(size)
        cut = max(map(len, words.splitlines()), default=0)
        while too_wide() and cut > 4:
            cut -= 1
            text.set_text("\n".join(shortened(line, cut) for line in words.splitlines()))

    def box(self, x: float, y: float, width: float, height: float, colour: str, *, edge: float = 1.8) -> None:
        """A rounded box with its lower left corner at ``(x, y)``."""
        style = "round,pad=0,rounding_size=0.08"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, style, facecolor=_PALE[colour], edgecolor=colour, lw=edge, zorder=3)
        )

    def bar(self, x: float, y: float, width: float, height: float, share: float) -> None:
        """A bar for a layer: its cloned units (filled) and the others (hatched)."""
        self.axes.add_patch(
            Rectangle((x, y), width, height, facecolor="white", edgecolor="#B9B9B9", hatch="////", lw=0, zorder=4)
        )
        self.axes.add_patch(Rectangle((x, y), width * share, height, facecolor=_ORANGE, lw=0, zorder=4))
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_INK, lw=0.8, zorder=4))

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> None:
        """An arrow along a path of straight pieces."""
        xs, ys = zip(*points, strict=True)
        style = (0, (4, 2.5)) if dashed else "solid"
        self.axes.plot(xs, ys, color=colour, lw=2, linestyle=style, solid_joinstyle="round", zorder=2)
        self.axes.annotate(
            "",
            xy=points[-1],
            xytext=points[-2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": colour,
                "lw": 0,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 18,
            },
            zorder=4,
        )


def _show(sheet: _Sheet, grafted: fx.GraphModule, name: str) -> None:
    module = grafted.get_submodule(name)
    assert isinstance(module, CloneModule)
    parts = stages(grafted, name)
    _, tap, features = reads(grafted, name)
    at = next((index for index, stage in enumerate(parts) if stage.node == tap.name), -1)  # -1: the images
    tapped = parts[at].last if at >= 0 else INPUT
    model = type(grafted).__name__
    classes = ", ".join(map(str, module.class_names or module.classes))
    words = f"Clone '{name}' ({classes}) grafted onto {model} at '{tapped}'"
    sheet.text(0.5, 8.5, words, width=15, size=21, bold=True)
    words = "The target is frozen and its logits stay equal to the bit. Remove the branch, and the target is as it was."
    sheet.text(0.5, 8.03, words, width=15, size=13, colour=_FAINT)
    sheet.text(0.5, 7.36, f"target: {model}, frozen", width=8, size=13, bold=True, colour=_BLUE)

    # The target, from left to right, and its logits.
    middle, height, left, right = 6.2, 1.5, 0.5, 13.25
    shape = tuple(grafted.meta[FACTS]["example"].shape[1:])
    width = min(1.75, (right - left - 0.4 * len(parts)) / (len(parts) + 1))
    gap = (right - left - width * (len(parts) + 1)) / len(parts)
    sheet.box(left, middle - 0.45, width, 0.9, _GREY, edge=3 if at < 0 else 1.8)
    sheet.text(left + width / 2, middle + 0.17, "images", width=width - 0.1, bold=True, align="center")
    sheet.text(left + width / 2, middle - 0.17, times(shape), width=width - 0.1, size=11, align="center")
    ends = {-1: left + width + gap / 2}
    for index, stage in enumerate(parts):
        x = left + (index + 1) * (width + gap)
        sheet.line([(x - gap, middle), (x, middle)], _BLUE)
        sheet.box(x, middle - height / 2, width, height, _BLUE, edge=3 if index == at else 1.8)
        centre = x + width / 2
        sheet.text(centre, middle + 0.32, stage.label, width=width - 0.1, bold=True, mono=True, align="center")
        sheet.text(centre, middle - 0.2, times(stage.shape), width=width - 0.1, size=11, align="center")
        held = f"{stage.parameters:,} params" if stage.parameters else "no params"
        sheet.text(centre, middle - 0.5, held, width=width - 0.1, size=10, colour=_FAINT, align="center")
        ends[index] = x + width + gap / 2
    sheet.line([(right, middle), (14.0, middle)], _BLUE)
    joins = _logits_stack(sheet, grafted, name, parts[-1].shape[0], middle)

    # The branch, from left to right below it.
    low, lane = 2.55, 4.72
    sheet.axes.add_patch(Circle((ends[at], middle), 0.1, facecolor="white", edgecolor=_TAP, lw=3, zorder=6))
    trained = _trained(module)
    down = [(ends[at], middle - 0.1), (ends[at], lane), (1.4, lane)]
    to_left = ends[at] > 3.5
    sheet.text(
        ends[at] + (-0.15 if to_left else 0.15),
        lane + 0.3,
        f"tap: {tapped}",
        width=2.8 if to_left else 2.0,
        size=13,
        bold=True,
        colour=_TAP,
        align="right" if to_left else "left",
    )
    begin, end = 2.85, 11.15
    if any(key.startswith("body.adapter.") for key in trained):
        sheet.line([*down, (1.4, low + 0.8)], _TAP)
        sheet.box(0.5, low - 0.8, 1.8, 1.6, _GREEN)
        matrix = trained.get("body.adapter.map.weight")
        inside = "" if matrix is None else f"{matrix.shape[1]} → {matrix.shape[0]} channels"
        _lines(sheet, 1.4, low, 1.7, ["adapter", inside, f"{_count(trained, 'body.adapter.'):,} params"])
        sheet.line([(2.3, low), (begin, low)], _ORANGE)
    else:
        sheet.line([*down, (1.4, low), (begin, low)], _TAP)
    _module_panel(sheet, module, name, begin, end)
    if trained and features is not None:
        at_features = next((i for i, stage in enumerate(parts) if stage.node == features.name), len(parts) - 2)
        x = ends[at_features] + (0.14 if at_features == at else 0)
        sheet.line([(x, middle), (x, lane), (12.5, lane), (12.5, low + 0.8)], _BLUE, dashed=True)
        sheet.text(10.9, lane + 0.3, "target's logits", width=1.6, size=11, colour=_BLUE)
        sheet.line([(end, low), (11.6, low)], _ORANGE)
        sheet.box(11.6, low - 0.8, 1.8, 1.6, _GREEN)
        matrix = trained.get("body.classifier.linear.weight")
        inside = "" if matrix is None else f"{matrix.shape[1]} → {matrix.shape[0]} logits"
        _lines(sheet, 12.5, low, 1.7, ["classifier", inside, f"{_count(trained, 'body.classifier.'):,} params"])
        end = 13.4
    sheet.line([(end, low), (13.7, low), (13.7, joins), (14.0, joins)], _ORANGE)
    _legend(sheet, bool(trained))


def _logits_stack(sheet: _Sheet, grafted: fx.GraphModule, name: str, old: int, middle: float) -> float:
    """The joined logits as a stack of cells, the target's on top; returns the height at which the clone joins."""
    y = middle + 1.0
    sheet.text(14.75, y + 0.17, "logits", width=1.5, size=13, bold=True, align="center")
    _cells(sheet, y, 2.0, [str(index) for index in range(old)], f"{old} of the target", _BLUE)
    y -= 2.0
    joins = y
    others = len(clones(grafted)) - 1
    for other in clones(grafted):
        module = grafted.get_submodule(other)
        assert isinstance(module, CloneModule)
        labels = [str(label) for label in module.class_names or module.classes]
        if other == name:
            height = min(0.285 * len(labels), 1.2)
            _cells(sheet, y, height, labels, f"{len(labels)} of '{other}'", _ORANGE)
            joins = y - height / 2
        else:
            height = min(0.28, 2.4 / others)
            _cells(sheet, y, height, [], f"{len(labels)} of '{other}'", _GREY)
        y -= height
    return joins


def _cells(sheet: _Sheet, top: float, height: float, labels: Sequence[str], summary: str, colour: str) -> None:
    step = height / max(1, len(labels))
    if not labels or step < 0.17:
        labels, step = [summary], height
    for index, label in enumerate(labels):
        y = top - (index + 1) * step
        sheet.axes.add_patch(
            Rectangle((14.0, y), 1.5, step, facecolor=_PALE[colour], edgecolor=colour, lw=1.5, zorder=3)
        )
        sheet.text(14.75, y + step / 2 - 0.01, label, width=1.4, size=min(12, 62 * step * 0.7), align="center")


def _module_panel(sheet: _Sheet, module: CloneModule, name: str, begin: float, end: float) -> None:
    """The cloned part of the source, layer by layer."""
    bottom, top = 0.95, 4.15
    sheet.box(begin, bottom, end - begin, top - bottom, _ORANGE)
    found = rows(module)
    fitted = _trained(module)
    size = sum(parameter.numel() for key, parameter in module.named_parameters() if key not in fitted)
    cut = "at its input" if module.source_at is None else f"behind '{module.source_at}'"
    words = f"clone '{name}': the source, cut {cut}"
    sheet.text(begin + 0.2, top - 0.25, words, width=end - begin - 0.4, size=13, bold=True, colour=_BROWN)
    words = f"{size:,} parameters, frozen; each bar shows how many units of a layer were cloned"
    sheet.text(begin + 0.2, top - 0.56, words, width=end - begin - 0.4, size=11, colour=_FAINT)
    columns = 1 if len(found) <= 6 else 2
    deep = max(1, math.ceil(len(found) / columns))
    wide = (end - begin - 0.4 - 0.3 * (columns - 1)) / columns
    named, counted = (0.49, 0.2) if columns > 1 else (0.36, 0.12)
    step = min(0.4, (top - bottom - 0.9) / deep)
    longest = max((len(row.label) for row in found), default=1)
    letters = max(9.0, min(11.0, 11 * (wide * named - 0.1) / (0.093 * longest)))  # the same in all rows
    for index, row in enumerate(found):
        x = begin + 0.2 + (index // deep) * (wide + 0.3)
        y = top - 0.8 - (index % deep + 0.5) * step
        colour = _INK if row.kept else _FAINT
        sheet.text(x, y, row.label, width=wide * named - 0.05, size=letters, mono=True, colour=colour)
        sheet.bar(x + wide * named, y - 0.1, wide * (1 - named - counted) - 0.08, 0.2, row.kept / row.total)
        share = f"{row.kept} / {row.total}"
        sheet.text(x + wide * (1 - counted), y, share, width=wide * counted, size=11, colour=colour)


def _legend(sheet: _Sheet, trained: bool) -> None:
    y, x = 0.42, 0.5
    entries: list[tuple[str, str]] = [
        ("target", "target, frozen"),
        ("kept", "units cloned"),
        ("left", "units not cloned"),
    ]
    entries += [("trained", "trained to fit: adapter, classifier")] if trained else []
    for kind, words in [*entries, ("tap", "tap: what the clone reads")]:
        if kind == "tap":
            sheet.axes.add_patch(Circle((x + 0.17, y), 0.1, facecolor="white", edgecolor=_TAP, lw=3, zorder=6))
        elif kind in ("kept", "left"):
            sheet.bar(x, y - 0.1, 0.36, 0.2, float(kind == "kept"))
        else:
            sheet.box(x, y - 0.12, 0.36, 0.24, _BLUE if kind == "target" else _GREEN)
        sheet.text(x + 0.47, y, words, width=3.2)
        x += 0.95 + 0.097 * len(words)


def _lines(sheet: _Sheet, x: float, y: float, width: float, words: Sequence[str]) -> None:
    """Lines around ``y`` in the middle of a box: a heading, details, and a count."""
    for index, line in enumerate(words):
        below = y + 0.42 - 0.42 * index
        if index == 0:
            sheet.text(x, below, line, width=width, size=13, bold=True, align="center")
        elif line:
            last = index == len(words) - 1
            sheet.text(x, below, line, width=width, size=11, colour=_FAINT if last else _INK, align="center")


def _trained(module: CloneModule) -> dict[str, nn.Parameter]:
    """Parameters of adapter and classifier, which were fitted to a target; a plain extract has none."""
    if module.spec.feature_shape is None:
        return {}
    parts = ("body.adapter.", "body.classifier.")
    return {key: parameter for key, parameter in module.named_parameters() if key.startswith(parts)}


def _count(weights: Mapping[str, nn.Parameter], prefix: str) -> int:
    return sum(parameter.numel() for key, parameter in weights.items() if key.startswith(prefix))


def shortened(line: str, most: int) -> str:
    """A line of at most ``most`` letters, shortened in the middle."""
    if len(line) <= most:
        return line
    head = (most - 1) // 2
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"
