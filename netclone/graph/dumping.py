"""dumper(model): with NETCLONE_DUMP=FOLDER, write a capture's graph as text before and after each of its passes."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

from torch import fx

VARIABLE = "NETCLONE_DUMP"
"""The environment variable that names the folder; without it nothing is written."""

Dump = Callable[[fx.Graph, str], None]
"""Called with a graph, and the name of what has just been done to it."""


def dumper(model: str) -> Dump:
    """A function that writes the graphs of one capture to a folder, ``01-ResNet/0-exported.txt`` and so on.

    Examples
    --------
    >>> dumper("ResNet")(fx.Graph(), "exported")  # does nothing: no folder is named
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return lambda graph, done: None
    folder, numbers = Path(given), count()
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"{len(list(folder.iterdir())) + 1:02}-{model}"
    own.mkdir(exist_ok=True)  # another process may have created it meanwhile

    def dump(graph: fx.Graph, done: str) -> None:
        (own / f"{next(numbers)}-{done}.txt").write_text(f"{graph}\n", encoding="utf-8")

    return dump
