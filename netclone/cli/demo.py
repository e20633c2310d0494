"""netclone demo."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from netclone.cli.application import CHECK, Json, app, percent, print_json, print_next, print_written, reported

if TYPE_CHECKING:
    from netclone.demo import DemoResult, LaidOut


@app.command(
    rich_help_panel=CHECK,
    help="Try it: clone the digits 7, 8 and 9 into a network that knows 0 to 6, and remove them again.\n\n"
    "Trains two small networks on the digits that come with scikit-learn: nothing to download, about a minute. "
    "Every claim printed at the end is checked in that run; the demo exits with 1 if one is false.\n\n"
    "With --folders it leaves the digits as images in folders by class, and both networks on disk, so that you can try "
    "every other command on them. The tutorial starts there.",
    epilog="Example: netclone demo --seed 1 --out demo-1",
)
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers: same seed, same result.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the plot, the clone and the results.")] = Path("netclone-demo"),
    folders: Annotated[
        Path | None,
        typer.Option(help="Leave images in folders and two networks here, to clone between, and do nothing else."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the demo and print what it measured, or leave what to try the other commands on."""
    console = Console(stderr=as_json)
    with reported():
        from netclone.demo import lay_out, run  # slow to import, and not needed to show help

        if folders is not None:
            left = lay_out(seed, folders, console)
            if as_json:
                print_json({"folder": str(left.folder), "images": left.images, "networks": ["source", "target"]})
            else:
                _print_folders(left, console)
            return
        result = run(seed, out, console)
        if as_json:
            print_json(json.loads(result.results.read_text(encoding="utf-8")))
        else:
            _print(result, console)


def _print(result: DemoResult, console: Console) -> None:
    titles = {
        "target": "target before",
        "grafted": "target with the clone",
        "removed": "target, clone removed",
        "source": "source",
    }
    table = Table(title="Accuracy on test images", title_justify="left")
    table.add_column("")
    for heading in ("old: 0-6", "new: 7-9", "all ten"):
        table.add_column(heading, justify="right")
    for name, scores in result.scores:
        table.add_row(titles[name], *(percent(share) for share in (scores.old, scores.new, scores.all)))
    console.print(table)

    costs = dict(result.costs)
    table = Table(title="What the module costs, and what the source would", title_justify="left")
    table.add_column("")
    for heading in ("parameters", "MACs", "latency, ms"):
        table.add_column(heading, justify="right")
    for name in ("module", "source"):
        cost = costs[name]
        table.add_row(name, f"{cost.parameters:,}", f"{cost.macs:,}", f"{cost.latency_ms:.2f}")
    small, big = costs["module"], costs["source"]
    table.add_row(
        "share",
        percent(small.parameters / big.parameters),
        percent(small.macs / big.macs),
        percent(small.latency_ms / big.latency_ms),
    )
    console.print(table)

    where = f"cut behind '{result.source_at}' of the source, grafted at '{result.at}' of the target"
    console.print(f"The module: {where}.", soft_wrap=True, highlight=False)
    console.print("Checked in this run:", soft_wrap=True)
    for check in result.checks:
        verdict = "[green]true[/green] " if check.holds else "[red]false[/red]"
        console.print(f"  {verdict} {escape(check.claim)} ({escape(check.seen)})", soft_wrap=True, highlight=False)
    print_written(console, result.picture, result.module, result.results)
    print_next("try every command on images in folders", "netclone demo --folders netclone-tutorial")


def _print_folders(left: LaidOut, console: Console) -> None:
    rows = {
        left.folder / "target": "a network that knows the digits 0 to 6",
        left.folder / "source": "a network that knows all ten",
    }
    rows |= {left.folder / name: f"{count} images, in a folder for each digit" for name, count in left.images.items()}
    table = Table("folder", "what is in it")
    for folder, what in sorted(rows.items()):
        table.add_row(escape(str(folder)), what)
    console.print(table)
    source, target = (shlex.quote(f"local-dir:{left.folder / role}") for role in ("source", "target"))
    data, old = (shlex.quote(str(left.folder / "digits" / "train" / kind)) for kind in ("new", "old"))
    options = f"--classes 7,8,9 --data {data} --target-data {old} --out digits.safetensors"
    print_next("clone 7, 8 and 9 from the source for the target", f"netclone clone {source} {target}", options)
