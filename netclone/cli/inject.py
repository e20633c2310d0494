"""netclone inject."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.cli.application import (
    GRAFT,
    CropPct,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    Model,
    Std,
    UseEma,
    app,
    images_of,
    print_json,
    print_written,
    reported,
)


@app.command(
    rich_help_panel=GRAFT,
    help="Graft clones onto a target and write the network to one file, which every command takes as a model.\n\n"
    "The target's own logits stay what they are, to the bit. The file holds the target's architecture and tensors, and "
    "the clones as their files were: netclone remove takes them out again.",
    epilog="Example: netclone inject timm/resnet18@birds.safetensors herons.safetensors --out grafted.safetensors",
)
def inject(
    target: Model,
    files: Annotated[list[Path], typer.Argument(help="Clones, named after their files.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    at: Annotated[
        str | None, typer.Option(help="Position, such as layer2. None: the one each clone was fitted for.")
    ] = None,
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    force: Annotated[
        bool, typer.Option("--force", help="Graft a clone that was fitted to another target all the same.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a grafted network."""
    with reported():
        from netclone.workflows import deploying  # slow to import, and not needed to show help

        columns = deploying.inject(
            target,
            files,
            out,
            at,
            images=images_of(img_size, mean, std, interpolation, crop_pct),
            use_ema=use_ema,
            allow_mismatch=force,
        )
        if as_json:
            rows = [{"first": a, "last": b, "of": owner, "classes": names} for a, b, owner, names in columns]
            print_json({"file": str(out), "columns": rows})
            return
        table = Table("columns", "of", "classes", title="Logits of the grafted network", title_justify="left")
        for first, last, owner, classes in columns:
            table.add_row(f"{first}-{last}", Text(owner), Text(classes))
        console = Console()
        console.print(table)
        print_written(console, out)
