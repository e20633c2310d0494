"""netclone clone."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.arguments import Budget, Effort, Method, MixedPrecision, Search, StoredDtype
from netclone.cli.application import (
    GRAFT,
    IMAGES,
    NAMES,
    By,
    CropPct,
    Device,
    ImgSize,
    Interpolation,
    Json,
    Mean,
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
    reported,
)
from netclone.cli.inspect import show
from netclone.runtime.bars import Bars
from netclone.runtime.text import as_plain_text

if TYPE_CHECKING:
    from netclone.workflows.rehearsing import Plan


@app.command(
    rich_help_panel=GRAFT,
    help="Clone classes of a source network, fit the clone to a target network, and write it to a file.\n\n"
    "The clone is a slim part of the source that recognises these classes. netclone inject grafts it onto the target. "
    "Images are preprocessed for the target, with its own settings unless you pass --img-size, --mean, ... If the "
    "source needs other preprocessing, the clone converts the images itself. Pass --target-data if you can: without "
    "images of the target's classes, new logits are calibrated against old ones only roughly.\n\n"
    "Stopped runs can be continued: run the same command again.",
    epilog="Example: netclone clone timm/mobilenetv2_100 timm/resnet18@birds.safetensors --classes heron,ibis "
    "--data images --target-data birds --out herons.safetensors",
)
def clone(
    source: Annotated[str, typer.Argument(help=f"The network that knows the classes: {NAMES}.")],
    target: Annotated[str, typer.Argument(help="The classifier to extend, named in the same ways as SOURCE.")],
    classes: Annotated[
        str,
        typer.Option(
            help="The classes to clone, separated by commas: names of their folders in --data, or columns of the "
            "source's logits, such as heron,ibis or 5,7. If a folder has a name of your own, say which class of the "
            "source it shows, by column or by name: ants=310,bees=309."
        ),
    ],
    data: Annotated[
        str, typer.Option(help=f"Images of classes that the source knows, among them those to clone: {IMAGES}.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write the clone to (.safetensors).")],
    target_data: TargetData = None,
    split: Split = "train",
    keep: Annotated[float, typer.Option(help="Share of the source to keep at most, above 0 and up to 1.")] = 0.5,
    budget: Annotated[
        Budget, typer.Option(help="What --keep is a share of. latency: the time it takes, measured here.")
    ] = "macs",
    at: Annotated[
        str,
        typer.Option(
            help="Where the clone reads the target: a module path such as layer3, input (the images themselves), or "
            "auto (search for the best position).",
            autocompletion=lambda: ["auto", "input"],
        ),
    ] = "auto",
    search: Annotated[
        Search,
        typer.Option(
            help="Which positions auto tries. early: from the deepest up until validation stops improving, then the "
            "input. all: every position."
        ),
    ] = "early",
    method: Annotated[
        Method,
        typer.Option(
            help="How the channels to keep are chosen. taylor: by how much the loss would change without them. local: "
            "by gates that are learned, which takes longer. magnitude: norm of the weights. random: a baseline. cka: "
            "whole residual blocks, the most similar ones (MPruner)."
        ),
    ] = "taylor",
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of fitting the clone's adapter and classifier at the chosen position.")
    ] = 20,
    effort: Annotated[
        Effort,
        typer.Option(
            help="How long to distil the source into the clone: 50, 250 or 600 steps. More steps give a better clone."
        ),
    ] = "balanced",
    distill_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps of distillation from the full source into the slim one. [default: as --effort says]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 64,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Train on horizontally flipped images too. Not for text or digits.")
    ] = False,
    round_to: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep layer widths that are multiples of this. [default: 8 with --budget macs or latency, else 1]",
        ),
    ] = None,
    latency_batch: Annotated[
        int, typer.Option(min=1, help="Images at a time when --budget latency measures the time.")
    ] = 1,
    gate: Annotated[
        float | None,
        typer.Option(
            help="Share of the old classes' images that the clone need not see, above 0 and below 1: saves their time. "
            "Needs --target-data."
        ),
    ] = None,
    save_dtype: Annotated[
        StoredDtype | None,
        typer.Option(help="Store the weights in fewer bits: bf16 halves a float32 file, int8 quarters it."),
    ] = None,
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers: same seed, same result.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be done, and about how long it takes and how much memory. Tries all of it on a few "
            "images and steps, and writes nothing.",
        ),
    ] = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Clone, print a description of the clone, and write it."""
    with reported() as telling:
        from netclone.runtime import sharing  # slow to import, and not needed to show help
        from netclone.runtime.writing import check_place
        from netclone.workflows import deploying, rehearsing

        options: dict[str, Any] = {
            "keep": keep,
            "budget": budget,
            "at": at,
            "search": search,
            "method": method,
            "epochs": epochs,
        }
        options |= {
            "effort": effort,
            "distill_steps": distill_steps,
            "batch_size": batch_size,
            "seed": seed,
            "mixed_precision": mixed_precision,
            "round_to": round_to,
            "latency_batch": latency_batch,
            "gate": gate,
            "device": device,
        }
        telling.warnings = sharing.is_main()
        with Bars(Console(stderr=True) if sharing.is_main() else None) as bars:
            options |= {
                "target_data": target_data,
                "split": split,
                "mirror": mirror,
                "images": images_of(img_size, mean, std, interpolation, crop_pct),
                "use_ema": use_ema,
                "skip_broken": skip_broken,
                "note": note,
                "progress": bars.tell,
            }
            if dry_run:
                check_place(out)
                plan = rehearsing.rehearse(source, target, classes, data, **options)
            else:
                deploying.clone(source, target, classes, data, out, by=by, save_dtype=save_dtype, **options)
        if dry_run:
            if as_json:
                print_json({"file": str(out), "dry_run": True, **asdict(plan)})
            else:
                _print(plan, out, Console())
            return
        if not sharing.is_main():
            return
        show(out, as_json, written=True)
        if not as_json:
            words = (shlex.quote(target), shlex.quote(str(out)), "--out grafted.safetensors")
            print_next("graft it onto the target", "netclone inject", *words)


def _print(plan: Plan, out: Path, console: Console) -> None:
    count, seconds = len(plan.classes), sum(plan.seconds.values())
    old = f" and {plan.old_images:,} of old ones" if plan.old_images else ""
    what = f"{count} class{'es' * (count > 1)} from {plan.images:,} images{old}"
    costs = f"about {_minutes(seconds)}, with about {plan.memory / 1e6:,.0f} MB of memory"
    console.print(f"Would clone {what} in {costs}.", style="bold", soft_wrap=True, highlight=False)
    console.print("Time and memory are estimates, from a few images and steps on this machine.", soft_wrap=True)
    table = Table("step", title="What would be done", title_justify="left")
    table.add_column("about", justify="right")
    for step, taken in plan.seconds.items():
        table.add_row(step, _minutes(taken))
    console.print(table)
    table = Table("position", "cannot be used because", title="Positions that may be tried", title_justify="left")
    for tried in plan.positions:
        table.add_row(*(Text(as_plain_text(cell)) for cell in (tried.at, tried.reason)))
    console.print(table)
    print_next("nothing was written; leave out --dry-run to write", shlex.quote(str(out)))


def _minutes(seconds: float) -> str:
    """A time as it is said: an estimate has no seconds in it once it is minutes."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
