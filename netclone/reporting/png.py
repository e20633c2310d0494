"""draw(grafted, name, path): plot the layout of a grafted graph as a PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from netclone.cloning.grafted import modules_of
from netclone.errors import ArchiveError, ArgumentError
from netclone.reporting.layout import ACROSS, SIZES, Box, Edge, Layout, Text, lay_out
from netclone.reporting.style import LIGHT, WIDTH, figure, points, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_STAGES = 5
"""The most boxes in a lane of a plot; neighbours are joined if a network has more stages."""

_HEAD, _FOOT = 34, 30  # above and below the graph, for the title and the legend
_COLOURS = {"images": "faint", "target": "blue", "source": "orange", "trained": "green", "logits": "faint"}
_EDGES = {"target": "blue", "tap": "red", "source": "orange", "features": "blue"}


def draw(grafted: fx.GraphModule, name: str, path: str | os.PathLike[str]) -> Figure:
    """Draw a clone in its target: the target's stages, the branch, and the share of each block that was cloned.

    Parameters
    ----------
    grafted
        The graph that :func:`netclone.inject` returned.
    name
        The clone to draw.
    path
        Where to write the PNG, at twice the pixels of the page that it is for.

    Returns
    -------
    The matplotlib figure, drawn without pyplot and so without global state.

    Raises
    ------
    CloneNameError
        If the graph holds no clone of that name.
    ArgumentError
        If the file cannot be written.

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
    [690, 308]

    Reference: Partial Network Cloning (arXiv 2303.10597), figure 2.
    """
    layout = lay_out(grafted, name, None, MOST_STAGES, ACROSS)
    module = modules_of(grafted)[name]
    width, height = max(layout.width, WIDTH), _HEAD + layout.height + _FOOT
    made = figure(height, width)
    axes = made.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height - _HEAD, -_HEAD))
    axes.set_axis_off()
    labels = ", ".join(map(str, module.class_names or module.classes))
    title = f"Clone '{name}' ({labels}) grafted onto {type(grafted).__name__} at '{layout.tapped}'"
    _text(axes, Text("title", title, 12, -10, width - 24), align="left")
    _graph(axes, layout)
    _legend(axes, layout, layout.height + _FOOT / 2)
    try:
        save(made, Path(path))
    except ArchiveError as error:
        raise ArgumentError(f"path: {error}") from error
    return made


def _graph(axes: Axes, layout: Layout) -> None:
    for edge in layout.edges:
        _arrow(axes, edge)
    for box in layout.boxes:
        _box(axes, box)
        for text in box.texts:
            _text(axes, text)
    _tap(axes, *layout.tap)


def _box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    colour = _COLOURS[box.kind]
    _rounded(axes, box.kind, box.x, box.y, box.width, box.height, 8)
    if box.kept is not None:
        x, y, width, height = box.bar
        axes.add_patch(Rectangle((x, y), width, height, facecolor=LIGHT["line"], zorder=4))
        axes.add_patch(Rectangle((x, y), width * box.kept, height, facecolor=LIGHT[colour], zorder=4))


def _rounded(axes: Axes, kind: str, x: float, y: float, width: float, height: float, radius: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour = _COLOURS[kind]
    face = LIGHT.get(f"{colour}-pale", LIGHT["page"])
    style = f"round,pad=0,rounding_size={radius}"
    patch = FancyBboxPatch((x, y), width, height, style, facecolor=face, edgecolor=LIGHT[colour], zorder=3)
    patch.set_linewidth(points(1.5))
    axes.add_patch(patch)


def _arrow(axes: Axes, edge: Edge) -> None:
    colour = LIGHT[_EDGES[edge.kind]]
    xs, ys = zip(*edge.points, strict=True)
    style = (0, (4, 2.5)) if edge.kind == "features" else "solid"
    axes.plot(xs, ys, color=colour, lw=points(2), linestyle=style, solid_joinstyle="round", zorder=2)
    head = {"arrowstyle": "-|>", "color": colour, "lw": 0, "shrinkA": 0, "shrinkB": 0, "mutation_scale": points(14)}
    axes.annotate("", xy=edge.points[-1], xytext=edge.points[-2], arrowprops=head, zorder=4)


def _tap(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, "o", ms=points(11), mfc=LIGHT["page"], mec=LIGHT["red"], mew=points(2.5), zorder=6)


def _text(axes: Axes, text: Text, align: str = "center") -> float:
    """Write a text, smaller if it is wider than its room, and return its width."""
    size = points(SIZES.get(text.kind, 15))
    made = axes.text(text.x, text.y, text.words, size=size, color=LIGHT["ink"], ha=align, zorder=5)
    if text.kind in ("name", "title"):
        made.set_fontweight("bold")
    if text.kind == "name":
        made.set_fontfamily("monospace")
    if text.kind == "faint":
        made.set_color(LIGHT["faint"])
    wide = made.get_window_extent().width
    if wide > text.width:
        made.set_fontsize(size * text.width / wide)
    return min(wide, text.width)


def _legend(axes: Axes, layout: Layout, y: float) -> None:
    x = 12.0
    for kind, words in layout.legend:
        if kind == "tap":
            _tap(axes, x + 8, y)
        else:
            _rounded(axes, kind, x, y - 6, 16, 12, 3)
        x += 24 + _text(axes, Text("faint", words, x + 22, y + 4, WIDTH), align="left") + 16
