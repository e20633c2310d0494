"""netclone evaluate."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    percent,
    print_json,
    reported,
)
from netclone.runtime.bars import Bars

if TYPE_CHECKING:
    from netclone.metrics.evaluating import Cost, Scores


@app.command(
    rich_help_panel=SEE,
    help="Measure a network on images: accuracy on old, new and all classes, locality, calibration, size, latency.\n\n"
    "--data holds images of the cloned classes, in folders named as when they were cloned. Images of the target's own "
    "classes may be in --data as well, or in --target-data. Without a clone, give --target-data alone.",
    epilog="Example: netclone evaluate grafted.safetensors --data images --target-data birds",
)
def evaluate(
    model: Model,
    data: Data = None,
    target_data: TargetData = None,
    split: Split = "validation",
    source: Annotated[
        str | None,
        typer.Option(
            help="The network that the clone was made from, named in the same ways as MODEL. Measures the similarity "
            "of their logits, too."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The clone to compare with --source, if there are several.")] = None,
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
    """Evaluate, and print scores and cost."""
    with reported():
        from netclone.workflows import examining  # slow to import, and not needed to show help

        with Bars(Console(stderr=True)) as bars:
            scores, cost = examining.evaluate(
                model,
                data,
                target_data,
                source=source,
                name=name,
                split=split,
                batch_size=batch_size,
                images=images_of(img_size, mean, std, interpolation, crop_pct),
                use_ema=use_ema,
                skip_broken=skip_broken,
                device=device,
                note=note,
                progress=bars.tell,
            )
        if as_json:
            print_json({"model": model, "scores": asdict(scores), "cost": asdict(cost)})
        else:
            _print(scores, cost, Console())


def _print(scores: Scores, cost: Cost, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    facts = {
        "images": f"{scores.samples:,}",
        "accuracy, old classes": percent(scores.old),
        "accuracy, new classes": percent(scores.new),
        "accuracy, all": percent(scores.all),
        "open locality": percent(scores.locality_open) and f"{percent(scores.locality_open)} of old images go to new",
        "closed locality": percent(scores.locality_closed)
        and f"{percent(scores.locality_closed)} of old images change among old classes",
        "calibration error": f"{scores.calibration_error:.3f}",
        "similarity to the source": "" if scores.similarity is None else f"{scores.similarity:.3f}",
        "sent to the clone": percent(scores.sent_old)
        and f"{percent(scores.sent_old)} of old images, {percent(scores.sent_new)} of new ones",
        "parameters": f"{cost.parameters:,}",
        "MACs": f"{cost.macs:,}",
        "latency": f"{cost.latency_ms:.2f} ms, one image on this machine",
        "time": "" if scores.ms_per_image is None else f"{scores.ms_per_image:.2f} ms an image, over all images",
    }
    for what, fact in facts.items():
        if fact:
            table.add_row(f"[bold]{what}[/bold]", fact)
    console.print(table)
