"""netclone bench."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from netclone.cli.application import CHECK, Device, app, print_next, print_written, reported, shown
from netclone.errors import ArgumentError

Suite = Literal[
    "digits",
    "fashion",
    "cifar10",
    "zoo",
    "few",
    "vit",
    "pnc-fashion",
    "pnc-mnist",
    "pnc-cifar10",
    "pnc-cifar100",
    "pnc-tiny",
    "modules",
]
"""Names of the suites: those of :func:`netclone.benchmarking.suite_named`, and modules."""


@app.command(
    rich_help_panel=CHECK,
    help="Compare netclone with every baseline on a suite of data and networks, over several seeds.\n\n"
    "Writes results.json, results.md and plots into --out. Finished runs are kept there: run the same command again to "
    "continue a stopped benchmark.",
    epilog="Example: netclone bench fashion --data data --seeds 3 --out bench-fashion",
)
def bench(
    suite: Annotated[
        Suite, typer.Argument(help="What to run on. digits is bundled and takes a minute; the others need --data.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with the datasets and weights.")] = Path("data"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run: 0, 1, 2, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("netclone-bench"),
    cache: Annotated[Path | None, typer.Option(help="Folder for trained networks. Default: cache in --out.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="With vit: an ImageNet network as the target, instead of a small one that is trained. For example "
            "timm/vit_tiny_patch16_224@FILE.safetensors.",
        ),
    ] = None,
    device: Device = "cpu",
    development: Annotated[
        bool, typer.Option("--development", help="Score on held-out training images instead of the test split.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing; write tables and plots again from results.json in --out.")
    ] = False,
) -> None:
    """Run a suite, or write the results of an earlier run again."""
    console = Console()
    with reported("Interrupted: finished runs are kept; run the same command again to continue."):
        from netclone.benchmarking import (  # slow to import, and not needed to show help
            in_development,
            modularising,
            module_tables,
            report,
            run,
            suite_named,
            with_weights,
        )

        modules = suite == modularising.MODULES.name
        if report_only:
            (module_tables.report if modules else report)(out)
        else:
            folders = {"data": data, "out": out, "cache": cache}
            options = " ".join(f"--{name} {shown(path)}" for name, path in folders.items() if path is not None)
            command = f"netclone bench {suite} --seeds {seeds} {options}" + " --development" * development
            command += f" --device {shlex.quote(device)}" * (device != "cpu")
            how: dict[str, Any] = {"seeds": seeds, "cache": cache, "device": device, "console": console}
            change = in_development if development else lambda chosen: chosen
            if modules:
                if weights is not None:
                    raise ArgumentError("weights: the suite modules has given networks; only vit takes weights")
                chosen = replace(modularising.MODULES, base=change(modularising.MODULES.base))
                modularising.run(chosen, data, out, **how, command=command)
            else:
                asked = suite_named(suite)
                if weights is not None:
                    asked = with_weights(asked, weights)
                    command += f" --weights {shlex.quote(asked.target.name)}"
                run(change(asked), data, out, **how, command=command)
        print_written(console, out / "results.json", out / "results.md", more=" and plots")
        print_next("read the tables", shlex.quote(str(out / "results.md")))
