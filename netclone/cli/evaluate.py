"""netclone evaluate."""

from __future__ import annotations

import shlex
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
    print_next,
    reported,
)
from netclone.runtime.bars import Bars

if TYPE_CHECKING:
    from netclone.metrics.evaluating import Scores
    from netclone.workflows.examining import Evaluation


@app.command(
    rich_help_panel=SEE,
    help="Measure a network on images, before and with its clones: accuracy, locality, calibration, size, latency.\n\n"
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
            help="The network that the clone was made from, named in the same ways as MODEL: its accuracy, its cost "
            "and the similarity of its logits are shown beside those of the clone."
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
        from netclone.metrics import held_out  # slow to import, and not needed to show help
        from netclone.workflows import examining

        with Bars(Console(stderr=True)) as bars:
            found = examining.evaluate(
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
        apart = found.far_apart
        if as_json:
            costs = {"target": found.target, "source": found.source}
            print_json(
                {
                    "model": model,
                    "scores": asdict(found.scores),
                    "cost": asdict(found.cost),
                    "costs": {role: asdict(cost) for role, cost in costs.items() if cost is not None},
                    "promised": found.promised,
                    "far_apart": sorted(apart),
                }
            )
            return
        _print(found, Console())
        for kind, (promised, now) in apart.items():
            note(held_out.said(kind, promised, now))
        if found.target is not None and data is not None and target_data is not None:
            words = ["--data", shlex.quote(data), "--target-data", shlex.quote(target_data), "--out report.html"]
            print_next("see which images changed", "netclone report", shlex.quote(model), *words)


def _print(found: Evaluation, console: Console) -> None:
    scores, clones = found.scores, found.target is not None
    answer = [f"old {_change(scores)}"] if scores.old is not None else []
    if scores.new is not None:
        beside = "" if scores.new_source is None else f" (source {percent(scores.new_source)})"
        answer.append(f"new {percent(scores.new)}{beside}")
    told = f"{', '.join(answer)}, on {scores.samples:,} images"
    console.print(told, style="bold", soft_wrap=True, highlight=False)
    table = Table("", box=None, pad_edge=False)
    for role in ("target", "with clones") if clones else ("network",):
        table.add_column(role, justify="right")
    if found.source is not None:
        table.add_column("source", justify="right")
    costs = [cost for cost in (found.target, found.cost, found.source) if cost is not None]
    rows = {
        "accuracy, old classes": [*[percent(scores.old_before)] * clones, percent(scores.old)],
        "accuracy, new classes": [*[""] * clones, percent(scores.new), percent(scores.new_source)],
        "accuracy, all": [*[""] * clones, percent(scores.all)],
        "parameters": [f"{cost.parameters:,}" for cost in costs],
        "MACs": [f"{cost.macs:,}" for cost in costs],
        "latency, ms": [f"{cost.latency_ms:.2f}" for cost in costs],
    }
    for what, figures in rows.items():
        if any(figures):
            table.add_row(f"[bold]{what}[/bold]", *figures[: len(table.columns) - 1])
    console.print(table)
    table = Table(show_header=False, box=None, pad_edge=False)
    facts = {
        "open locality": percent(scores.locality_open) and f"{percent(scores.locality_open)} of old images go to new",
        "closed locality": percent(scores.locality_closed)
        and f"{percent(scores.locality_closed)} of old images change among old classes",
        "calibration error": percent(scores.calibration_error),
        "similarity to the source": "" if scores.similarity is None else f"{scores.similarity:.3f}",
        "sent to the clone": percent(scores.sent_old)
        and f"{percent(scores.sent_old)} of old images, {percent(scores.sent_new)} of new ones",
        "latency": f"of one image on this machine, the median of several runs{' in turn' * (len(costs) > 1)}",
        "time": "" if scores.ms_per_image is None else f"{scores.ms_per_image:.2f} ms an image, over all images",
    }
    for what, fact in facts.items():
        if fact:
            table.add_row(f"[bold]{what}[/bold]", fact)
    console.print(table)


def _change(scores: Scores) -> str:
    """Accuracy on old classes before and with the clones."""
    before = "" if scores.old_before is None else f"{percent(scores.old_before)} to "
    return f"{before}{percent(scores.old)}"
