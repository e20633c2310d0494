"""netclone inspect."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.cli.application import NAMES, SEE, Json, app, print_json, print_next, print_written, reported
from netclone.runtime.text import as_plain_text

if TYPE_CHECKING:
    from netclone.workflows.surveying import Cut, Survey


@app.command(
    rich_help_panel=SEE,
    help="Show what a file holds, or what a network can be used for.\n\n"
    "Of a clone: classes, position, size, certificate, scores, kept channels, and where it comes from. Of a grafted "
    "network's file: its target and its clones. Only headers are read, as data: quick, and safe for files from anyone. "
    "Of a network: its input, its classes, the positions where a clone can read it or where it can be cut, and the "
    "operators that a clone's file cannot hold.",
    epilog="Example: netclone inspect timm/resnet18@birds.safetensors",
)
def inspect(
    model: Annotated[
        str, typer.Argument(help=f"A file that netclone clone, pull or inject wrote, or a network: {NAMES}.")
    ],
    as_json: Json = False,
) -> None:
    """Print a file's header, or what a network is to netclone."""
    with reported():
        from netclone.files import bundling, inspecting  # slow to import, and not needed to show help
        from netclone.workflows import surveying

        if bundling.is_bundle(model):
            inspection = inspecting.inspect_bundle(model)
            if as_json:
                print_json(inspection.as_dict())
            else:
                inspecting.show_bundle(inspection, Console())
                print_next("see how it came about", "netclone log", shlex.quote(model))
        elif surveying.is_network(model):
            with Console(stderr=True).status(Text(f"Looking at {as_plain_text(model)}")):
                found = surveying.survey(model)
            if as_json:
                print_json(asdict(found))
            else:
                _print(found, Console())
                command = "netclone clone SOURCE TARGET --classes NAMES --data IMAGES --out FILE --dry-run"
                print_next("see what cloning would take", command)
        else:
            show(Path(model), as_json)
            if not as_json:
                command = f"netclone inject TARGET {shlex.quote(model)} --out grafted.safetensors"
                print_next("graft it onto the target that it was made for", command)


def _print(found: Survey, console: Console) -> None:
    known = found.classes and found.classes[-1] != str(len(found.classes) - 1)
    some = ", ".join(found.classes[:5]) + (", ..." if len(found.classes) > 5 else "")
    facts = {
        "network": f"{found.architecture}, {found.parameters:,} parameters",
        "its images": ", ".join(f"{name} {value}" for name, value in found.config.items()),
        "classes": f"{len(found.classes)}: {some}" if known else f"{len(found.classes)}, without names",
        "as a target": found.no_target or _counted(found.positions, "a clone can read it at"),
        "as a source": found.no_source or _counted(found.cuts, "it can be cut at"),
        "in a clone's file": "" if found.no_source else _savable(found.unsavable),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, fact in facts.items():
        if fact:
            table.add_row(Text(name, style="bold"), Text(as_plain_text(fact)))
    console.print(table)
    same = [(cut.at, cut.reason) for cut in found.positions] == [(cut.at, cut.reason) for cut in found.cuts]
    tables = [("Positions that netclone clone tries, deep to shallow", "position", found.positions)]
    if not same:
        tables.append(("Where a source is cut for them", "cut behind", found.cuts))
    for title, first, cuts in tables:
        rows = [cut for cut in cuts if cut.tried or cut.reason]
        reasons = any(cut.reason for cut in rows)
        table = Table(first, "features", *["cannot be used because"] * reasons, title=title, title_justify="left")
        for cut in rows:
            cells = (cut.at, f"(N, {', '.join(map(str, cut.shape))})", *[cut.reason] * reasons)
            table.add_row(*(Text(as_plain_text(cell)) for cell in cells))
        if rows:
            console.print(table)


def _counted(cuts: tuple[Cut, ...], what: str) -> str:
    usable = sum(not cut.reason for cut in cuts)
    return f"{what} {usable} positions, and at the input" if usable else "only at the input"


def _savable(faults: tuple[str, ...]) -> str:
    if not faults:
        return "every operator of it can be saved"
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{len(faults)} operators cannot be saved: {'; '.join(faults[:5])}{more}"


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
