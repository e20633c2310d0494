"""netclone export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from netclone.cli.application import (
    SHIP,
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

Format = Literal["onnx", "pt2"]
"""File formats that other runtimes read."""


@app.command(
    rich_help_panel=SHIP,
    help="Write a network, with its clones, for other runtimes: as ONNX, or as an archive of torch.export (.pt2).\n\n"
    "The exported network takes batches of any size. The file is written only if it gives the same logits: ONNX in "
    "onnxruntime, to 1e-4 of the largest logit; the archive in torch, to the bit.",
    epilog="Example: netclone export grafted.safetensors --to onnx --out grafted.onnx",
)
def export(
    model: Model,
    to: Annotated[Format, typer.Option(help="Format of the file.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    as_json: Json = False,
) -> None:
    """Export a network, and print how far its logits differ."""
    console = Console(stderr=as_json)
    with reported():
        from netclone.models.loading import load_model  # slow to import, and not needed to show help
        from netclone.workflows.translating import to_onnx, to_pt2

        with Console(stderr=True).status(Text(f"Exporting {model}")):
            images = images_of(img_size, mean, std, interpolation, crop_pct)
            network = load_model(model, use_ema=use_ema, images=images)
            done = (to_onnx if to == "onnx" else to_pt2)(network, out)
        if as_json:
            print_json({"file": str(out), "to": to, "bytes": done.bytes, "difference": done.difference})
            return
        checked = "logits not compared, as onnxruntime is not installed"
        if done.difference is not None:
            checked = f"logits differ by {done.difference:.1e} of the largest"
        print_written(console, out, more=f", {done.bytes:,} bytes; {checked}")
