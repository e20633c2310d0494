"""One style for all drawings: the colours of pages and plots; figures, panels and labels.

The target is blue and the clone orange, in graphs and in plots. Other methods are grey, and labelled next to their
points. A plot is made for a page of 690 pixels, and sizes are in these pixels.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from netclone.runtime.writing import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 690
"""Width of a plot on a page, in pixels."""

NETCLONE = "#E69F00"
"""The colour of netclone, everywhere; one of Okabe and Ito's, which the colour-blind can tell apart."""

LIGHT = {
    **{"page": "#FFFFFF", "panel": "#F5F7F9", "ink": "#1F2933", "faint": "#5B6670", "line": "#DFE4E9"},
    **{"blue": "#0072B2", "orange": NETCLONE, "green": "#009E73", "red": "#D55E00", "grey": "#8A949E"},
    **{"blue-pale": "#DCEBF5", "orange-pale": "#FBEBCB", "green-pale": "#D5EFE6", "orange-ink": "#8A5A00"},
    "deep": "#FFFFFF",
}
"""Colours on white, for plots and pages."""

DARK = {
    **{"page": "#12161B", "panel": "#1B2128", "ink": "#E8ECF0", "faint": "#9AA7B3", "line": "#303943"},
    **{"blue": "#56B4E9", "orange": NETCLONE, "green": "#1FBD91", "red": "#EF7D2E", "grey": "#7D8893"},
    **{"blue-pale": "#17303F", "orange-pale": "#3B2D0E", "green-pale": "#113629", "orange-ink": "#F3BD4F"},
    "deep": "#0B1015",
}
"""The same colours on dark pages."""

Point = tuple[float, float]

_UNIT = 100  # pixels of a page in an inch of a figure
_SHARP = 2  # pixels of a file for one of the page
_LETTERS = 12  # size of letters
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 34, 46  # around the axes of a panel
_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # where a label may stand
_AWAY = (8, 12, 18, 26, 36, 50, 70, 100)  # from its point
_CLOSE = 4  # of these places are so near that a label needs no line to its point
_ROOM = 6  # around a point; half of it around lines


def points(pixels: float) -> float:
    """A size in pixels of a page as the points that matplotlib takes."""
    return pixels * 72 / _UNIT


def figure(height: float, width: float = WIDTH) -> Figure:
    """A white figure of ``width`` by ``height`` pixels of a page, without pyplot and so without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width / _UNIT, height / _UNIT), dpi=_UNIT, facecolor=LIGHT["page"])
    FigureCanvasAgg(made)
    return made


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG at twice the pixels of the page, completely or not at all; the file is reproducible."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_SHARP * _UNIT, metadata={"Software": None})
    write_file(path, content.getvalue())


def panel(figure: Figure, title: str, x: str, y: str, better: str, part: Point = (0, 1)) -> Axes:
    """Axes with a title, axis labels and an arrow for better, in ``part`` of the figure, counted from the top."""
    width, height = figure.get_size_inches() * _UNIT
    top, bottom = part[0] * height + _TOP, part[1] * height - _BOTTOM
    place = (_LEFT / width, 1 - bottom / height, 1 - (_LEFT + _RIGHT) / width, (bottom - top) / height)
    axes = figure.add_axes(place)
    size = points(_LETTERS)
    axes.set_title(title, loc="left", size=points(_LETTERS + 1), weight="bold", color=LIGHT["ink"], pad=points(10))
    axes.set_title(f"{better} better", loc="right", size=points(_LETTERS + 3), color=LIGHT["green"], pad=points(10))
    axes.set_xlabel(x, size=size, color=LIGHT["ink"], labelpad=points(5))
    axes.set_ylabel(y, size=size, color=LIGHT["ink"], labelpad=points(5))
    axes.tick_params(labelsize=size, labelcolor=LIGHT["faint"], length=0)
    axes.grid(color=LIGHT["line"], lw=points(1))
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return axes


def label(
    axes: Axes, named: Mapping[str, Point], ours: Callable[[str], bool], avoid: Sequence[Sequence[Point]]
) -> None:
    """Label every point next to it, if possible without covering another point, a label or a line of ``avoid``."""
    from matplotlib.transforms import Bbox

    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # where all that was drawn until here puts them
    places = {name: axes.transData.transform(point) for name, point in named.items()}
    names = [Bbox([place - _ROOM, place + _ROOM]) for place in places.values()]  # the points and what is written
    lines = []
    for line in map(axes.transData.transform, avoid):
        between = [one + (two - one) * step / 40 for one, two in itertools.pairwise(line) for step in range(41)]
        lines += [Bbox([place - _ROOM / 2, place + _ROOM / 2]) for place in (*line, *between)]
    back = axes.transData.inverted()
    for name in sorted(named, key=lambda name: not ours(name)):
        colour, weight = (LIGHT["orange-ink"], "bold") if ours(name) else (LIGHT["faint"], "normal")
        text = axes.text(0, 0, name, size=points(_LETTERS), color=colour, weight=weight, transform=None)
        extent = text.get_window_extent()
        size = np.array([extent.width, extent.height])
        tried: list[tuple[bool, int, int, Bbox, np.ndarray]] = []  # the least is the best; the third tells all apart
        for away, sides in itertools.product(_AWAY, np.array(_AROUND)):
            near = places[name] + away * sides
            low = near + (sides - 1) * size / 2
            box = Bbox([low, low + size])
            outside = not (axes.bbox.contains(*low) and axes.bbox.contains(*(low + size)))
            crossed = sum(other.contains(*(places[name] + near) / 2) for other in names[len(named) :])
            hidden = 4 * (box.padded(2).count_overlaps(names) + crossed) + box.count_overlaps(lines)
            tried.append((outside, hidden, len(tried), box, near))
        *_, number, box, near = min(tried)
        names.append(box)
        x, y = back.transform((box.x0 - extent.x0, box.y0 - extent.y0))
        text.set(position=(x, y), transform=axes.transData)
        if number >= _CLOSE:
            xs, ys = back.transform([places[name], near]).T
            axes.plot(xs, ys, color=LIGHT["grey"], lw=points(1), zorder=1)
