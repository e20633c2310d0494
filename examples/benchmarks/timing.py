"""Timing that a drifting machine does not upset, and the table of claims and bars that benchmarks end in."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

Row = tuple[str, float, float | None]
"""What is claimed, what was measured, and the bar it must not exceed."""


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratio(first: Callable[[], object], second: Callable[[], object], repeats: int = 9) -> float:
    """Median of first/second, the two timed in turn so that a drifting machine cancels out."""
    first(), second()
    found = []
    for _ in range(repeats):
        found.append(seconds(first, 1) / seconds(second, 1))
    return statistics.median(found)


def reported(rows: list[Row]) -> int:
    """Print the rows, write them to the file named by the first argument, and give 1 if a bar is missed, else 0."""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    table = Table("claim", "measured", "bar", title=f"torch {torch.__version__}, timm {timm.__version__}, {threads}")
    for claim, value, bar in rows:
        missed = bar is not None and value > bar
        table.add_row(claim, f"[red]{value:.3g}[/]" if missed else f"{value:.3g}", "" if bar is None else f"<= {bar}")
    Console(width=110).print(table)
    if len(sys.argv) > 1:
        record = {"torch": torch.__version__, "timm": timm.__version__, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")
    return int(any(bar is not None and value > bar for _, value, bar in rows))
