"""netclone zoo."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from netclone.cli.application import CHECK, Device, app, print_next, print_written, reported, shown

if TYPE_CHECKING:
    from netclone.zoo import Row


@app.command(
    rich_help_panel=CHECK,
    help="Check which networks of timm, torchvision and transformers work as targets, and as sources cut to half.\n\n"
    "Writes a table of what works, and why the rest does not, as zoo.json, zoo.md and zoo.html. Each network runs in "
    "its own process with a limit of time and memory. Run the same command again to continue a stopped sweep. Exits "
    "with 1 if a network fails.",
    epilog="Example: netclone zoo 'resnet*' 'torchvision/*' --out zoo",
)
def zoo(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Names such as 'resnet*' (of timm), 'torchvision/*', 'transformers/*'. Default: all."),
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Check only the smallest network of each family.")
    ] = False,
    targets_only: Annotated[bool, typer.Option("--targets-only", help="Skip the check as sources.")] = False,
    real: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest network that gets random weights, in millions of parameters; of larger ones only the "
            "structure is checked.",
        ),
    ] = 60,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit per network, in seconds.")] = 180,
    memory: Annotated[float, typer.Option(min=500, help="Memory limit per network, in MB.")] = 6000,
    processes: Annotated[int, typer.Option(min=1, help="Networks to check at once, each on one thread.")] = 2,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("netclone-zoo"),
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing; write the table again from zoo.json in --out.")
    ] = False,
) -> None:
    """Check networks, or write the table of an earlier sweep again; exits with 1 if a network failed."""
    console = Console()
    with reported("Interrupted: finished networks are kept; run the same command again to continue."):
        from netclone.zoo import (  # slow to import, not needed to show help
            Limits,
            names,
            report,
            smallest,
            sweep,
            write,
        )

        if report_only:
            rows: Sequence[Row] = report(out)
        else:
            chosen = names(patterns or ["*", "torchvision/*", "transformers/*"])
            if families:
                with console.status("Looking for the smallest network of each family"):
                    chosen = smallest(chosen)
            flags = ["--families"] * families + ["--targets-only"] * targets_only
            command = " ".join(
                [
                    "netclone zoo",
                    *(f"'{p}'" for p in patterns or ()),
                    *flags,
                    f"--real {real:g} --seconds {seconds:g} --memory {memory:g} --processes {processes}",
                    *([f"--device {shlex.quote(device)}"] if device != "cpu" else []),
                    f"--out {shown(out)}",
                ]
            )
            limits = Limits(seconds, memory, processes)
            rows = sweep(
                chosen,
                out,
                source=not targets_only,
                real=int(real * 1e6),
                limits=limits,
                device=device,
                console=console,
            )
            write(rows, out, command)
        _print_zoo(rows, console)
        print_written(console, *(out / f"zoo.{kind}" for kind in ("json", "md", "html")[report_only:]))
        print_next("read the table", shlex.quote(str(out / "zoo.html")))
        if not all(row.passed for row in rows):
            raise typer.Exit(1)


def _print_zoo(rows: Sequence[Row], console: Console) -> None:
    failed = [row for row in rows if not row.passed]
    asked = [row.source for row in rows if row.source is not None]
    console.print(
        f"{sum(row.target.passed for row in rows)} of {len(rows)} pass as targets, "
        f"{sum(source.passed for source in asked)} of {len(asked)} as sources.",
        highlight=False,
    )
    if not failed:
        return
    table = Table("network", "as", "why not", title="Failed", title_justify="left")
    for row in failed:
        for what, result in (("target", row.target), ("source", row.source)):
            if result is not None and not result.passed:
                table.add_row(row.name, what, escape(result.reason))
    console.print(table)
