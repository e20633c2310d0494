"""netclone predict."""

from __future__ import annotations

import csv
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.cli.application import (
    SEE,
    BatchSize,
    CropPct,
    Device,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    Model,
    Std,
    UseEma,
    app,
    images_of,
    note,
    percent,
    print_json,
    print_next,
    reported,
)
from netclone.runtime.bars import Bars
from netclone.runtime.text import as_plain_text

if TYPE_CHECKING:
    from netclone.workflows.predicting import Predictions

_ROWS = 20  # of the table for people
_FIELDS = ("path", "label", "column", "probability", "clone", "error")


@app.command(
    rich_help_panel=SEE,
    help="Say for each image of a folder which class a network predicts, how likely that is, and by which clone.\n\n"
    "All images in the folder and below it are read; what the folders are called does not matter. The probability is "
    "that of the softmax over all columns. Images that cannot be read are listed and do not stop the command.",
    epilog="Example: netclone predict grafted.safetensors photos --csv",
)
def predict(
    model: Model,
    images: Annotated[str, typer.Argument(help="A folder of images, or one image.")],
    as_csv: Annotated[
        bool, typer.Option("--csv", help=f"Print the result as CSV, with the columns {', '.join(_FIELDS)}.")
    ] = False,
    batch_size: BatchSize = 64,
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Predict, and print one line for each image."""
    with reported():
        from netclone.workflows import predicting  # slow to import, and not needed to show help

        with Bars(Console(stderr=True)) as bars:
            found = predicting.predict(
                model,
                images,
                batch_size=batch_size,
                images=images_of(img_size, mean, std, interpolation, crop_pct),
                use_ema=use_ema,
                device=device,
                progress=bars.tell,
                note=note,
            )
        for path, why in found.broken:
            note(f"images: '{path}' cannot be read: {why}")
        if as_json:
            broken = [{"path": path, "error": why} for path, why in found.broken]
            print_json({"model": model, "images": [asdict(one) for one in found.images], "broken": broken})
        elif as_csv:
            rows = csv.DictWriter(sys.stdout, _FIELDS, lineterminator="\n")
            rows.writeheader()
            rows.writerows(asdict(one) for one in found.images)
            rows.writerows({"path": path, "error": why} for path, why in found.broken)
        else:
            _print(found, Console())
            print_next("get all rows as a table", f"netclone predict {shlex.quote(model)} {shlex.quote(images)} --csv")


def _print(found: Predictions, console: Console) -> None:
    counts = Counter(one.label for one in found.images)
    new = sum(one.clone is not None for one in found.images)
    told = ", ".join(f"{count} {label}" for label, count in counts.most_common(8))
    more = "" if len(counts) <= 8 else f" and {len(counts) - 8} other classes"
    answer = f"{len(found.images):,} images, {new:,} of them in a clone's class: {told}{more}"
    console.print(Text(as_plain_text(answer)), soft_wrap=True)
    table = Table("image", "label", "probability", "clone")
    for one in found.images[:_ROWS]:
        path, label = (Text(as_plain_text(text)) for text in (one.path, one.label))
        table.add_row(path, label, percent(one.probability), one.clone)
    console.print(table)
    if len(found.images) > _ROWS:
        console.print(f"{len(found.images) - _ROWS:,} more are not shown.", highlight=False)
