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
    help="Measure a network on pictures: accuracy on old, new and all classes, locality, calibration, size, speed.\n\n"
    "--data holds pictures of the cloned classes, in folders named as they were cloned, and may hold the target's own "
    "beside them; or give these with --target-data. With --source, how like the source's logits the clone's are is "
    "measured too.",
    epilog="Example: netclone evaluate grafted.safetensors --data pictures --target-data birds",
)
def evaluate(
    model: Model,
    data: Data = None,
    target_data: TargetData = None,
    split: Split = "validation",
    source: Annotated[str | None, typer.Option(help="What the clone was cloned from.")] = None,
    name: Annotated[str | None, typer.Option(help="Which clone that is, where there are several.")] = None,
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
    """Print scores and cost."""
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
        "pictures": f"{scores.samples:,}",
        "accuracy, old classes": percent(scores.old),
        "accuracy, new classes": percent(scores.new),
        "accuracy, all": percent(scores.all),
        "open locality": percent(scores.locality_open) and f"{percent(scores.locality_open)} of old pictures go to new",
        "closed locality": percent(scores.locality_closed)
        and f"{percent(scores.locality_closed)} of old pictures change among old classes",
        "calibration error": f"{scores.calibration_error:.3f}",
        "similarity to the source": "" if scores.similarity is None else f"{scores.similarity:.3f}",
        "parameters": f"{cost.parameters:,}",
        "MACs": f"{cost.macs:,}",
        "latency": f"{cost.latency_ms:.2f} ms, one picture on this machine",
    }
    for what, fact in facts.items():
        if fact:
            table.add_row(f"[bold]{what}[/bold]", fact)
    console.print(table)
