"""netclone bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from netclone.cli.application import CHECK, app, print_written, reported, shown

Suite = Literal["digits", "fashion", "cifar10", "zoo"]
"""Names of the suites, as :func:`netclone.benchmarking.suite_named` takes them."""


@app.command(
    rich_help_panel=CHECK,
    help="Measure clone() against every baseline, over seeds and clone sets: digits (bundled data, a minute), fashion, "
    "cifar10 or zoo.\n\n"
    "Writes results.json, results.md and plots into --out. Every finished run is kept there too: started again, the "
    "benchmark goes on where it was.",
    epilog="Example: netclone bench fashion --data data --seeds 3 --out bench-fashion",
)
def bench(
    suite: Annotated[Suite, typer.Argument(help="digits is bundled and takes a minute; the others need --data.")],
    data: Annotated[Path, typer.Option(help="Folder of the data and weights.")] = Path("data"),
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, 2 and so on.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("netclone-bench"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for trained networks. By default 'cache' in --out.")
    ] = None,
    development: Annotated[
        bool, typer.Option("--development", help="Hold out training images in place of the test split, to try things.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing: write tables and plots again from results.json in --out.")
    ] = False,
) -> None:
    """Run a suite, or write up one that was run."""
    console = Console()
    with reported("Interrupted: finished runs are kept; the same command goes on from there."):
        from netclone.benchmarking import (  # slow to import, and not needed to show help
            in_development,
            report,
            run,
            suite_named,
        )

        chosen = suite_named(suite)
        if report_only:
            report(out)
        else:
            folders = {"data": data, "out": out, "cache": cache}
            options = " ".join(f"--{name} {shown(path)}" for name, path in folders.items() if path is not None)
            command = f"netclone bench {suite} --seeds {seeds} {options}" + " --development" * development
            if development:
                chosen = in_development(chosen)
            run(chosen, data, out, seeds=seeds, cache=cache, console=console, command=command)
        print_written(console, out / "results.json", out / "results.md", more=" and plots")
