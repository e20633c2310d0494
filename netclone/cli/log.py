"""netclone log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.cli.application import SEE, Json, app, print_json, print_next, reported
from netclone.runtime.text import as_plain_text


@app.command(
    rich_help_panel=SEE,
    help="List which clones were injected into a grafted network's file, and which were removed again, and when.\n\n"
    "netclone inject, netclone remove and, in Python, save_grafted keep this log in the file. It stays when the last "
    "clone is gone. Like all of a file it is what the file claims: it is no signature.",
    epilog="Example: netclone log grafted.safetensors",
)
def log(
    file: Annotated[Path, typer.Argument(help="A file that netclone inject, netclone remove or save_grafted wrote.")],
    as_json: Json = False,
) -> None:
    """Print the log of a file."""
    with reported():
        from netclone.files import bundling  # slow to import, and not needed to show help

        events = bundling.log_of(file)
        held = [packed.name for packed in bundling.read_bundle(file).clones] if bundling.is_bundle(file) else []
        if as_json:
            print_json({"file": file.name, "clones": held, "log": [asdict(event) for event in events]})
            return
        console = Console()
        now = f"It holds {', '.join(held)}." if held else "It holds no clone: the target is alone."
        console.print(Text(as_plain_text(f"{len(events)} entries. {now}"), style="bold"), soft_wrap=True)
        if unknown := [name for name in held if name not in {event.clone for event in events}]:
            console.print(f"Not known how they came there: {', '.join(unknown)}", highlight=False, markup=False)
        table = Table("date", "what", "clone", "from", "by", "digest", "netclone")
        for event in events:
            facts = (event.date, event.action, event.clone, event.file, event.by, event.sha256[:12], event.version)
            table.add_row(*(Text(as_plain_text(fact)) for fact in facts))
        if events:
            console.print(table)
        print_next("see what a clone was made from", "netclone inspect on the clone's own file")
