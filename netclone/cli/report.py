"""netclone report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from netclone.cli.application import (
    SEE,
    BatchSize,
    CropPct,
    Data,
    Device,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    Model,
    SkipBroken,
    Split,
    Std,
    TargetData,
    UseEma,
    app,
    images_of,
    note,
    print_json,
    print_next,
    print_written,
    reported,
    shown,
)
from netclone.runtime.bars import Bars


@app.command(
    rich_help_panel=SEE,
    help="Write one HTML page about a clone in its target: graph, scores, confusion matrix, sample images, cost.\n\n"
    "The page is one file under 2 MB that loads nothing from the internet. Images are given as for netclone evaluate.",
    epilog="Example: netclone report grafted.safetensors --data images --target-data birds --out report.html",
)
def report(
    model: Model,
    out: Annotated[Path, typer.Option(help="The page to write (.html).")],
    data: Data = None,
    target_data: TargetData = None,
    split: Split = "validation",
    source: Annotated[
        str | None,
        typer.Option(
            help="The network that the clone was made from, named in the same ways as MODEL. Its cost is shown too."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The clone to report on, if there are several.")] = None,
    batch_size: BatchSize = 64,
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write the page."""
    with reported():
        from torch import fx  # slow to import, and not needed to show help

        from netclone.errors import ArgumentError
        from netclone.reporting import page
        from netclone.workflows import examining

        with Bars(Console(stderr=True)) as bars:
            subject = examining.opened(
                model,
                data,
                target_data,
                split=split,
                batch_size=batch_size,
                images=images_of(img_size, mean, std, interpolation, crop_pct),
                use_ema=use_ema,
                skip_broken=skip_broken,
                device=device,
                progress=bars.tell,
                note=note,
            )
            if not isinstance(subject.network, fx.GraphModule):
                raise ArgumentError(f"model: '{model}' has no clone; give a file that netclone inject wrote")
            options: dict[str, object] = {
                "data": data,
                "target-data": target_data,
                "split": split,
                "source": source,
                "name": name,
            }
            options |= {"img-size": img_size, "mean": mean, "std": std}
            options |= {"interpolation": interpolation, "crop-pct": crop_pct}
            words = [f"--{key} {shlex.quote(str(value))}" for key, value in options.items() if value is not None]
            found = page.report(
                subject.network,
                subject,
                out,
                name=name,
                old_names=subject.own_names,
                source=subject.source(source),
                pixels=subject.preparation.pixels,
                commands=[" ".join(["netclone report", shlex.quote(model), *words, f"--out {shown(out)}"])],
                progress=bars.tell,
            )
        if as_json:
            print_json({"file": str(out), "bytes": found.bytes, "clone": found.name, "differing": found.differing})
        else:
            print_written(Console(), out, more=f", {found.bytes:,} bytes")
            print_next("open the page in a browser; it loads nothing from elsewhere")
