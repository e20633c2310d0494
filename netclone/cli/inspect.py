"""netclone inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from netclone.cli.application import SEE, Json, app, print_json, print_written, reported


@app.command(
    rich_help_panel=SEE,
    help="Show what a file holds. Of a clone: classes, position, size, certificate, scores, kept channels.\n\n"
    "Of a grafted network: its target and its clones. Only the header of a clone is read, as data: quick, and safe "
    "for files from anyone.",
    epilog="Example: netclone inspect birds.safetensors",
)
def inspect(
    file: Annotated[Path, typer.Argument(help="A file that netclone clone, pull or inject wrote.")],
    as_json: Json = False,
) -> None:
    """Print a file's header."""
    with reported():
        from netclone.files import (
            bundling,
            inspecting,  # slow to import, and not needed to show help
        )

        if not bundling.is_bundle(file):
            show(file, as_json)
            return
        inspection = inspecting.inspect_bundle(file)
        if as_json:
            print_json(inspection.as_dict())
        else:
            inspecting.show_bundle(inspection, Console())


def show(file: Path, as_json: bool, written: bool = False) -> None:
    """Print the content of a clone's header and, unless as JSON, that the file was written."""
    from netclone.files import inspecting  # slow to import, and not needed to show help

    inspection = inspecting.inspect(file)
    if as_json:
        print_json(inspection.as_dict())
        return
    console = Console()
    inspecting.show(inspection, console)
    if written:
        print_written(console, file)
