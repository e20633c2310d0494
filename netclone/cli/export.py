"""netclone export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from netclone.cli.application import (
    IMAGES,
    SHIP,
    CropPct,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    Model,
    Split,
    Std,
    UseEma,
    app,
    images_of,
    print_json,
    print_next,
    print_written,
    reported,
)
from netclone.errors import ArgumentError
from netclone.runtime.text import as_plain_text

Format = Literal["onnx", "pt2", "aoti", "openvino"]
"""File formats that other runtimes read."""


@app.command(
    rich_help_panel=SHIP,
    help="Write a network, with its clones, for other runtimes.\n\n"
    "onnx: for ONNX runtimes. pt2: an archive of torch.export. aoti: a package that AOTInductor compiled for this kind "
    "of CPU (.pt2). openvino: for OpenVINO, FILE.xml with the weights beside it in FILE.bin.\n\n"
    "The exported network takes batches of any size. The file is written only if it gives the same logits: to 1e-4 of "
    "the largest logit, the archive of torch.export to the bit. Name images in --data to compare on them, too.\n\n"
    "With --int8 the ONNX file computes in int8, calibrated on every second image of --data. The others measure how "
    "often it still takes an image for the same class.",
    epilog="Example: netclone export grafted.safetensors --to onnx --out grafted.onnx",
)
def export(
    model: Model,
    to: Annotated[Format, typer.Option(help="Format of the file.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the ONNX file; needs --data.")] = False,
    data: Annotated[
        str | None, typer.Option(help=f"Images to compare on, and to calibrate --int8 with: {IMAGES}.")
    ] = None,
    split: Split = "validation",
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
        from netclone.graph.preparing import preparation  # slow to import, and not needed to show help
        from netclone.models.loading import load_model
        from netclone.workflows.translating import WRITERS, check_format, some_images, to_int8_onnx

        if int8 and (data is None or to != "onnx"):
            raise ArgumentError("int8: --int8 goes with --to onnx and with --data, images to calibrate with")
        check_format(to, out)
        with Console(stderr=True).status(Text(f"Exporting {model}")):
            images = images_of(img_size, mean, std, interpolation, crop_pct)
            network = load_model(model, use_ema=use_ema, images=images)
            some = None if data is None else some_images(network, data, split)
            if int8 and some is not None:
                done = to_int8_onnx(network, out, some)
            else:
                done = WRITERS[to](network, out, images=some)
        if as_json:
            facts = {"file": str(out), "to": to, "bytes": done.bytes, "difference": done.difference}
            print_json(facts if done.agreement is None else {**facts, "agreement": done.agreement})
            return
        checked = "logits not compared, as onnxruntime is not installed"
        if done.difference is not None:
            checked = f"logits differ by {done.difference:.1e} of the largest"
        if done.agreement is not None:
            checked += f", {done.agreement:.1%} of images keep their class"
        print_written(console, out, more=f", {done.bytes:,} bytes; {checked}")
        size = ", ".join(map(str, preparation(network).size))
        print_next(f"give it images (N, {size}), preprocessed as netclone inspect shows for {as_plain_text(model)}")
