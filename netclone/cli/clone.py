"""netclone clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from netclone.arguments import Budget, Method, MixedPrecision, Search
from netclone.cli.application import (
    GRAFT,
    CropPct,
    Device,
    ImgSize,
    Interpolation,
    Json,
    Mean,
    SkipBroken,
    Source,
    Split,
    Std,
    TargetData,
    UseEma,
    app,
    images_of,
    note,
    reported,
)
from netclone.cli.inspect import show
from netclone.runtime.bars import Bars


@app.command(
    rich_help_panel=GRAFT,
    help="Clone classes of one network for another, from pictures, and write the clone to a file.\n\n"
    "Pictures are read by timm (a folder for each class, a tar file of such, or torch/..., hfds/...) and prepared as "
    "the target wants them, or as --img-size and the like say; where the source wants others, the conversion is part "
    "of the clone. Without --target-data the new logits are calibrated by the source's own odds alone.",
    epilog="Example: netclone clone timm/mobilenetv2_100 timm/resnet18@birds.safetensors --classes heron,ibis "
    "--data pictures --target-data birds --out herons.safetensors",
)
def clone(
    source: Source,
    target: Annotated[str, typer.Argument(help="Gets them.")],
    classes: Annotated[str, typer.Option(help="Names of their folders, or the source's columns: heron,ibis or 5,7.")],
    data: Annotated[str, typer.Option(help="Pictures of them.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    target_data: TargetData = None,
    split: Split = "train",
    keep: Annotated[float, typer.Option(help="Share of the source to keep, in (0, 1].")] = 0.5,
    budget: Annotated[Budget, typer.Option(help="What --keep is a share of.")] = "params",
    at: Annotated[
        str,
        typer.Option(
            help="Where the clone reads the target: a position such as layer3, input (the images themselves), or auto "
            "(search for the best one).",
            autocompletion=lambda: ["auto", "input"],
        ),
    ] = "auto",
    search: Annotated[
        Search,
        typer.Option(
            help="Which positions auto tries. early: from the deepest on until validation stops improving, then the "
            "input. all: every position."
        ),
    ] = "early",
    method: Annotated[
        Method,
        typer.Option(
            help="How channels are chosen. local: learned gates (best). taylor: first-order change of the loss. "
            "magnitude: norm of the weights. random: a baseline."
        ),
    ] = "local",
    epochs: Annotated[int, typer.Option(min=1, help="Length of the last fit.")] = 20,
    distill_steps: Annotated[int, typer.Option(min=0, help="Steps of distillation from the source.")] = 150,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures in a step.")] = 64,
    mirror: Annotated[bool, typer.Option("--mirror", help="Mirrored pictures show the same: learn from both.")] = False,
    mixed_precision: Annotated[
        MixedPrecision, typer.Option(help="bf16: learn in bfloat16 where torch.autocast does so.")
    ] = "no",
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    use_ema: UseEma = None,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a clone."""
    with reported() as telling:
        from netclone.runtime import sharing  # slow to import, and not needed to show help
        from netclone.workflows import deploying

        options: dict[str, Any] = {
            "keep": keep,
            "budget": budget,
            "at": at,
            "search": search,
            "method": method,
            "epochs": epochs,
        }
        options |= {
            "distill_steps": distill_steps,
            "batch_size": batch_size,
            "seed": seed,
            "mixed_precision": mixed_precision,
            "device": device,
        }
        telling.warnings = sharing.is_main()
        with Bars(Console(stderr=True) if sharing.is_main() else None) as bars:
            deploying.clone(
                source,
                target,
                classes,
                data,
                out,
                target_data=target_data,
                split=split,
                mirror=mirror,
                images=images_of(img_size, mean, std, interpolation, crop_pct),
                use_ema=use_ema,
                skip_broken=skip_broken,
                note=note,
                progress=bars.tell,
                **options,
            )
        if not sharing.is_main():
            return
        show(out, as_json, written=True)
