"""netclone remove."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from netclone.cli.application import GRAFT, By, Json, app, print_json, print_next, print_written, reported


@app.command(
    rich_help_panel=GRAFT,
    help="Take a clone out of a grafted network and write what is left.\n\n"
    "Without its last clone, the file holds the target alone, with the same tensors to the bit.",
    epilog="Example: netclone remove grafted.safetensors herons --out birds.safetensors",
)
def remove(
    grafted: Annotated[Path, typer.Argument(help="A file that netclone inject wrote.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    name: Annotated[
        str | None, typer.Argument(help="The clone to remove, as netclone inspect lists it. Default: the only one.")
    ] = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Remove a clone, and print which ones are left."""
    with reported():
        from netclone.workflows import deploying  # slow to import, and not needed to show help

        left = deploying.remove(grafted, name, out, by=by)
        if as_json:
            print_json({"file": str(out), "clones": left})
            return
        print_written(Console(), out, more=f", with {', '.join(left)}" if left else ", the target as it was")
        print_next("see what the file has been through", "netclone log", shlex.quote(str(out)))
