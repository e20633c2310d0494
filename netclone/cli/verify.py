"""netclone verify."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from netclone.cli.application import IMAGES, SHIP, Device, Json, Model, Split, app, print_json, print_next, reported

if TYPE_CHECKING:
    from netclone.cloning.verifying import Verification


@app.command(
    rich_help_panel=SHIP,
    help="Check that a grafted network gives the target's own logits, bit by bit, however it is called.\n\n"
    "It is called with gradients, under no_grad and in inference_mode; in float32, bfloat16 and float16; with channels "
    "last; for batches of 1 to 9; on one and two threads. Exits with 1 if a bit differs, and names mode and node.",
    epilog="Example: netclone verify grafted.safetensors --target timm/resnet18@birds.safetensors --data images",
)
def verify(
    grafted: Model,
    target: Annotated[
        str | None,
        typer.Option(
            help="The network it was grafted onto, named in the same ways as GRAFTED. Default: the one in the file."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Images to compare on: {IMAGES}. Default: random noise.")] = None,
    split: Split = "validation",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Try all 324 combinations of modes instead of 75.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare, and print the outcome."""
    with reported():
        from netclone.workflows import verifying  # slow to import, and not needed to show help

        found = verifying.verify(grafted, target, data, split=split, thorough=thorough, device=device)
        if as_json:
            print_json({"passed": found.passed, **asdict(found)})
        else:
            _print(found, Console())
        if not found.passed:
            raise typer.Exit(1)


def _print(found: Verification, console: Console) -> None:
    compared = len(found.equal) + len(found.different)
    answer = f"Old logits are the target's bits in {len(found.equal)} of {compared} modes."
    console.print(answer, style="bold", highlight=False)
    if found.different:
        table = Table("mode", "first node that differs", "seen", title="Old logits differ", title_justify="left")
        for difference in found.different:
            table.add_row(str(difference.mode), escape(difference.node or "not known"), escape(difference.seen))
        console.print(table)
    for reason, count in Counter(reason for _, reason in found.unsupported).items():
        console.print(f"In {count} modes the target itself fails: {escape(reason)}", highlight=False)
    if found.passed:
        print_next("write it for other runtimes with netclone export, or serve it as it is")
    else:
        print_next("is it the very target? If so, please report this, with the node")
