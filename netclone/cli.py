"""The command line: arguments in, tables out; what it does is done elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import netclone
from netclone.errors import NetcloneError, NetcloneWarning

if TYPE_CHECKING:
    from netclone.demo import DemoResult
    from netclone.zoo import Row

app = typer.Typer(
    name="netclone",
    help="Clone a capability out of one network and graft it onto another, removable without a trace.",
    epilog="Example: netclone demo --seed 0 --out netclone-demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"netclone {netclone.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What every command shares."""


@app.command(
    help="Give a network that knows the digits 0 to 6 what another knows of 7, 8 and 9, and take it back.\n\n"
    "Handwritten digits that come with scikit-learn, two small networks, nothing to download, about a minute. "
    "Every claim printed at the end was checked in that run; one that is not true ends the demo with exit code 1.",
    epilog="Example: netclone demo --seed 1 --out demo-1",
)
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture, the module and the figures.")] = Path(
        "netclone-demo"
    ),
) -> None:
    """Run the demo and print what it measured."""
    console = Console()
    with _reported():
        from netclone.demo import run  # slow to import, and not needed to show help

        result = run(seed, out, console)
        _print(result, console)


@app.command(
    help="Show what a clone's file says about itself: classes, position, size, certificate, scores, what was kept.\n\n"
    "Only the header is read and checked, so this is quick and safe for files from anyone.",
    epilog="Example: netclone inspect birds.safetensors",
)
def inspect(
    file: Annotated[Path, typer.Argument(help="A file that netclone.save wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print a file's header."""
    with _reported():
        from netclone import inspecting  # slow to import, and not needed to show help

        inspection = inspecting.inspect(file)
        if as_json:
            typer.echo(json.dumps(inspection.as_dict(), indent=2))
        else:
            inspecting.show(inspection, Console())


@app.command(
    help="Clone classes of one network for another, from pictures, and write the clone to a file.\n\n"
    "Pictures are read by timm (a folder for each class, a tar file of such, or torch/..., hfds/...) and prepared as "
    "the target wants them; where the source wants others, the conversion is part of the clone. Without --target-data "
    "the new logits are calibrated by the source's own odds alone.",
    epilog="Example: netclone clone timm/mobilenetv2_100 timm/resnet18@birds.safetensors --classes heron,ibis "
    "--data pictures --target-data birds --out herons.safetensors",
)
def clone(
    source: Annotated[str, typer.Argument(help="Knows the classes: timm/..., torchvision/..., hf-hub:..., NAME@FILE.")],
    target: Annotated[str, typer.Argument(help="Gets them.")],
    classes: Annotated[str, typer.Option(help="Names of their folders, or the source's columns: heron,ibis or 5,7.")],
    data: Annotated[str, typer.Option(help="Pictures of them.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    target_data: Annotated[str | None, typer.Option(help="Pictures of the target's classes.")] = None,
    split: Annotated[str, typer.Option(help="Part of the data, where there are several.")] = "train",
    keep: Annotated[float, typer.Option(help="Share of the source to keep, in (0, 1].")] = 0.5,
    budget: Annotated[str, typer.Option(help="Of what: params, macs or channels.")] = "params",
    at: Annotated[str, typer.Option(help="Position in the target; auto: search.")] = "auto",
    search: Annotated[str, typer.Option(help="early: stop when it gets no better; all: try every position.")] = "early",
    method: Annotated[str, typer.Option(help="How channels are chosen: local, taylor, magnitude or random.")] = "local",
    epochs: Annotated[int, typer.Option(min=1, help="Length of the last fit.")] = 20,
    distill_steps: Annotated[int, typer.Option(min=0, help="Steps of distillation from the source.")] = 150,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures in a step.")] = 64,
    mirror: Annotated[bool, typer.Option("--mirror", help="Mirrored pictures show the same: learn from both.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a clone."""
    errors = Console(stderr=True)
    with _reported("Interrupted: the same command goes on from what was found."), _bar(errors) as tell:
        from netclone import deploying, inspecting, sharing  # slow to import, and not needed to show help

        options = {"keep": keep, "budget": budget, "at": at, "search": search, "method": method, "epochs": epochs}
        options |= {"distill_steps": distill_steps, "batch_size": batch_size, "seed": seed}
        with warnings.catch_warnings(record=True) as weak:
            warnings.simplefilter("always", NetcloneWarning)
            deploying.clone(
                source,
                target,
                classes,
                data,
                out,
                target_data=target_data,
                split=split,
                mirror=mirror,
                progress=tell,
                **options,
            )
        if not sharing.is_main():
            return
        for warning in dict.fromkeys(str(w.message) for w in weak if issubclass(w.category, NetcloneWarning)):
            errors.print(f"[yellow]Warning: {escape(warning)}[/yellow]", soft_wrap=True, highlight=False)
        inspection = inspecting.inspect(out)
    if as_json:
        typer.echo(json.dumps(inspection.as_dict(), indent=2))
    else:
        inspecting.show(inspection, Console())
        Console().print(f"Written: {escape(str(out))}", soft_wrap=True, highlight=False)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for what is going on, told as :func:`netclone.clone` tells it."""
    columns = TextColumn("{task.description:<40}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell


@app.command(
    help="Graft clones onto a target and write the network to one file, which every command takes as a model.\n\n"
    "The target's own logits stay what they are, to the bit. The file holds the target's architecture and tensors, and "
    "the clones as their files were: netclone remove takes them out again.",
    epilog="Example: netclone inject timm/resnet18@birds.safetensors herons.safetensors --out grafted.safetensors",
)
def inject(
    target: Annotated[str, typer.Argument(help="timm/..., torchvision/..., hf-hub:..., NAME@FILE, or a file.")],
    files: Annotated[list[Path], typer.Argument(help="Clones, named after their files.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    at: Annotated[
        str | None, typer.Option(help="Position, such as layer2. None: the one each clone was fitted for.")
    ] = None,
) -> None:
    """Write a grafted network."""
    with _reported():
        from netclone import deploying  # slow to import, and not needed to show help

        columns = deploying.inject(target, files, out, at)
        table = Table("columns", "of", "classes", title="Logits of the grafted network", title_justify="left")
        for first, last, owner, classes in columns:
            table.add_row(f"{first}-{last}", escape(owner), escape(classes))
        console = Console()
        console.print(table)
        console.print(f"Written: {escape(str(out))}", soft_wrap=True, highlight=False)


@app.command(
    help="Take a clone out of a grafted network; without its last one, the target's checkpoint is left as it was.",
    epilog="Example: netclone remove grafted.safetensors herons --out birds.safetensors",
)
def remove(
    grafted: Annotated[Path, typer.Argument(help="A file that netclone inject wrote.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    name: Annotated[str | None, typer.Argument(help="The clone; may be left out where there is only one.")] = None,
) -> None:
    """Write what is left."""
    with _reported():
        from netclone import deploying  # slow to import, and not needed to show help

        left = deploying.remove(grafted, name, out)
        what = f"with {', '.join(left)}" if left else "the target as it was"
        Console().print(f"Written: {escape(str(out))}, {escape(what)}", soft_wrap=True, highlight=False)


@app.command(
    help="Measure clone() against every baseline, over seeds and clone sets: digits (bundled data, a minute), fashion, "
    "cifar10 or zoo.\n\n"
    "Writes results.json, results.md and plots into --out. Every finished run is kept there too: started again, the "
    "benchmark goes on where it was.",
    epilog="Example: netclone bench fashion --data data --seeds 3 --out bench-fashion",
)
def bench(
    suite: Annotated[str, typer.Argument(help="digits, fashion, cifar10 or zoo.")],
    data: Annotated[Path, typer.Option(help="Folder of the data and weights.")] = Path("data"),
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, 2 and so on.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("netclone-bench"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for trained networks. By default 'cache' in --out.")
    ] = None,
    development: Annotated[
        bool, typer.Option("--development", help="Hold out training images in place of the test split, to try things.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing: write tables and plots again from results.json in --out.")
    ] = False,
) -> None:
    """Run a suite, or write up one that was run."""
    console = Console()
    with _reported("Interrupted: finished runs are kept; the same command goes on from there."):
        from netclone.benchmarking import (  # slow to import, and not needed to show help
            in_development,
            report,
            run,
            suite_named,
        )

        chosen = suite_named(suite)
        if report_only:
            report(out)
        else:
            folders = {"data": data, "out": out, "cache": cache}
            shown = " ".join(f"--{name} {_shown(path)}" for name, path in folders.items() if path is not None)
            command = f"netclone bench {suite} --seeds {seeds} {shown}" + " --development" * development
            if development:
                chosen = in_development(chosen)
            run(chosen, data, out, seeds=seeds, cache=cache, console=console, command=command)
        files = ", ".join(escape(str(out / name)) for name in ("results.json", "results.md"))
        console.print(f"Written: {files} and plots", soft_wrap=True, highlight=False)


@app.command(
    help="Check networks of timm, torchvision and transformers: as targets, and as sources slimmed to half.\n\n"
    "One row per network with what holds and why the rest does not, written as zoo.json, zoo.md and zoo.html. Every "
    "network runs in a process of its own, under limits of time and memory; started again, the sweep goes on.",
    epilog="Example: netclone zoo 'resnet*' 'torchvision/*' --out zoo",
)
def zoo(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Names such as 'resnet*' (timm), 'torchvision/*'. None: everything.")
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Of what matches only the smallest network of each family.")
    ] = False,
    targets_only: Annotated[bool, typer.Option("--targets-only", help="Do not check them as sources.")] = False,
    real: Annotated[
        float, typer.Option(min=0, help="Million parameters up to which a network gets weights; others have none.")
    ] = 60,
    seconds: Annotated[float, typer.Option(min=1, help="Limit of time for each network.")] = 180,
    memory: Annotated[float, typer.Option(min=500, help="Limit of memory for each network, in MB.")] = 6000,
    processes: Annotated[int, typer.Option(min=1, help="How many at once, of one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("netclone-zoo"),
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the table again from zoo.json in --out.")
    ] = False,
) -> None:
    """Sweep the zoo, or write up one that was swept; leaves with 1 if a network fails."""
    console = Console()
    with _reported("Interrupted: finished networks are kept; the same command goes on from there."):
        from netclone.zoo import Limits, names, read, smallest, sweep, write  # slow to import, not needed to show help

        if report_only:
            rows, command = read(out)
        else:
            chosen = names(patterns or ["*", "torchvision/*", "transformers/*"])
            if families:
                with console.status("Looking for the smallest network of each family"):
                    chosen = smallest(chosen)
            flags = ["--families"] * families + ["--targets-only"] * targets_only
            command = " ".join(
                [
                    "netclone zoo",
                    *(f"'{p}'" for p in patterns or ()),
                    *flags,
                    f"--real {real:g} --seconds {seconds:g} --memory {memory:g} --processes {processes}",
                    f"--out {_shown(out)}",
                ]
            )
            limits = Limits(seconds, memory, processes)
            rows = sweep(chosen, out, source=not targets_only, real=int(real * 1e6), limits=limits, console=console)
        write(rows, out, command)
        _print_zoo(rows, console)
        console.print(f"Written: {escape(str(out))}/zoo.json, zoo.md and zoo.html", soft_wrap=True, highlight=False)
        if not all(row.passed for row in rows):
            raise typer.Exit(1)


def _print_zoo(rows: Sequence[Row], console: Console) -> None:
    failed = [row for row in rows if not row.passed]
    asked = [row.source for row in rows if row.source is not None]
    console.print(
        f"{sum(row.target.passed for row in rows)} of {len(rows)} pass as targets, "
        f"{sum(source.passed for source in asked)} of {len(asked)} as sources.",
        highlight=False,
    )
    if not failed:
        return
    table = Table("network", "as", "why not", title="Failed", title_justify="left")
    for row in failed:
        for what, result in (("target", row.target), ("source", row.source)):
            if result is not None and not result.passed:
                table.add_row(row.name, what, escape(result.reason))
    console.print(table)


def _shown(path: Path) -> str:
    """A path without what is particular to this machine."""
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


@contextmanager
def _reported(interrupted: str = "Interrupted: nothing was written.") -> Iterator[None]:
    """Show netclone's errors in one red line and leave with 1; leave with 130 when interrupted."""
    errors = Console(stderr=True)
    try:
        yield
    except NetcloneError as error:
        errors.print(f"[red]Error: {escape(' '.join(str(error).split()))}[/red]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print(f"[red]{interrupted}[/red]", soft_wrap=True)
        raise typer.Exit(130) from None


def _print(result: DemoResult, console: Console) -> None:
    titles = {
        "target": "target before",
        "grafted": "target with the clone",
        "removed": "target, clone removed",
        "source": "source",
    }
    table = Table(title="Accuracy on test images", title_justify="left")
    table.add_column("")
    for heading in ("old: 0-6", "new: 7-9", "all ten"):
        table.add_column(heading, justify="right")
    for name, scores in result.scores:
        table.add_row(titles[name], *(_percent(share) for share in (scores.old, scores.new, scores.all)))
    console.print(table)

    costs = dict(result.costs)
    table = Table(title="What the module costs, and what the source would", title_justify="left")
    table.add_column("")
    for heading in ("parameters", "MACs", "latency, ms"):
        table.add_column(heading, justify="right")
    for name in ("module", "source"):
        cost = costs[name]
        table.add_row(name, f"{cost.parameters:,}", f"{cost.macs:,}", f"{cost.latency_ms:.2f}")
    small, big = costs["module"], costs["source"]
    table.add_row(
        "share",
        _percent(small.parameters / big.parameters),
        _percent(small.macs / big.macs),
        _percent(small.latency_ms / big.latency_ms),
    )
    console.print(table)

    where = f"cut behind '{result.source_at}' of the source, grafted at '{result.at}' of the target"
    console.print(f"The module: {where}.", soft_wrap=True, highlight=False)
    console.print("Checked in this run:", soft_wrap=True)
    for check in result.checks:
        verdict = "[green]true[/green] " if check.holds else "[red]false[/red]"
        console.print(f"  {verdict} {escape(check.claim)} ({escape(check.seen)})", soft_wrap=True, highlight=False)
    files = ", ".join(escape(str(path)) for path in (result.picture, result.module, result.results))
    console.print(f"Written: {files}", soft_wrap=True, highlight=False)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
