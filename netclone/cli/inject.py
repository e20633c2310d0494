"""netclone inject."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.cli.application import (
    GRAFT,
    NAMES,
    By,
    CropPct,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    Std,
    UseEma,
    app,
    images_of,
    print_json,
    print_next,
    print_written,
    reported,
)


@app.command(
    rich_help_panel=GRAFT,
    help="Graft clones onto a target and write the result to one file, which every command takes as a model.\n\n"
    "The target's own logits stay the same to the bit; the clones' classes follow them as new columns. netclone remove "
    "takes a clone out again.",
    epilog="Example: netclone inject timm/resnet18@birds.safetensors herons.safetensors --out grafted.safetensors",
)
def inject(
    target: Annotated[str, typer.Argument(help=f"The network to extend: {NAMES}.")],
    files: Annotated[
        list[Path],
        typer.Argument(help="Files that netclone clone wrote. herons.safetensors becomes the clone herons."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write the grafted network to (.safetensors).")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="What to call the clone. With several files, repeat it for each, in order. Default: the file's name."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Position to graft at, such as layer2. Default: the one that each clone was fitted for."),
    ] = None,
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    force: Annotated[
        bool, typer.Option("--force", help="Graft a clone even if it was fitted to another target; warn instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the columns, but write nothing.")
    ] = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Graft, and print what the columns of the result stand for."""
    with reported():
        from netclone.workflows import deploying  # slow to import, and not needed to show help

        columns = deploying.inject(
            target,
            files,
            out,
            at,
            names=name or (),
            images=images_of(img_size, mean, std, interpolation, crop_pct),
            use_ema=use_ema,
            allow_mismatch=force,
            by=by,
            write=not dry_run,
        )
        if as_json:
            rows = [{"first": a, "last": b, "of": owner, "classes": names} for a, b, owner, names in columns]
            print_json({"file": str(out), "columns": rows, **({"dry_run": True} if dry_run else {})})
            return
        console = Console()
        old, new = columns[0][1] + 1, columns[-1][1] - columns[0][1]
        answer = f"{old} old classes as they were, {new} new from {', '.join(owner for _, _, owner, _ in columns[1:])}"
        console.print(Text(answer, style="bold"), soft_wrap=True)
        table = Table("columns", "of", "classes", title="Logits of the grafted network", title_justify="left")
        for first, last, owner, classes in columns:
            table.add_row(f"{first}-{last}", Text(owner), Text(classes))
        console.print(table)
        if dry_run:
            print_next("nothing was written; leave out --dry-run to write", shlex.quote(str(out)))
            return
        print_written(console, out)
        words = ("netclone evaluate", shlex.quote(str(out)), "--data IMAGES --target-data IMAGES")
        print_next("measure it on images of the new and of the old classes", *words)
