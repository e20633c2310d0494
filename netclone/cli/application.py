"""app: the command line itself, and what its commands share: errors in one line, warnings, JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import netclone
from netclone.errors import NetcloneError, NetcloneWarning, first_line
from netclone.runtime.text import as_plain_text

app = typer.Typer(
    name="netclone",
    help="Clone a capability out of one network and graft it onto another, removable without a trace.",
    epilog="Example: netclone demo --seed 0 --out netclone-demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

GRAFT, SEE, SHIP, CHECK = "Clone and graft", "Measure and see", "Ship", "Try and check"
"""Headings of commands in the help."""

Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_NAMED = "timm/..., torchvision/..., hf-hub:..., NAME@FILE"
Model = Annotated[str, typer.Argument(help=f"{_NAMED}, or a file that netclone inject wrote.")]
Source = Annotated[str, typer.Argument(help=f"Knows the classes: {_NAMED}.")]
Data = Annotated[str | None, typer.Option(help="Pictures of new classes: a folder for each, a tar file, torch/...")]
TargetData = Annotated[str | None, typer.Option(help="Pictures of the target's classes.")]
Split = Annotated[str, typer.Option(help="Part of the data, where there are several.")]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out pictures that cannot be read, and count them.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
ImgSize = Annotated[int | None, typer.Option(min=1, help="Side of its images, in pixels. None: as it says.")]
Mean = Annotated[str | None, typer.Option(help="Their mean, such as 0.5 or 0.485,0.456,0.406. None: as it says.")]
Std = Annotated[str | None, typer.Option(help="Their standard deviation.")]
Interpolation = Annotated[str | None, typer.Option(help="How they are scaled: bilinear, bicubic, nearest, lanczos...")]
CropPct = Annotated[float | None, typer.Option(help="Share of a picture's side that is kept, in (0, 1].")]
UseEma = Annotated[
    bool | None,
    typer.Option("--use-ema/--no-use-ema", help="Averaged weights of a checkpoint; none: where it has some."),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, ..., or auto (an accelerator with float64 if there is one, else the "
        "CPU).",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Of the hub; none: the one you logged in with.")]


_DEBUG = ContextVar("debug", default=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"netclone {netclone.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """What every command shares."""
    _DEBUG.set(debug)


@dataclass
class Telling:
    """Whether warnings are shown: of several processes that share a run, the first one's are enough."""

    warnings: bool = True


@contextmanager
def reported(interrupted: str = "Interrupted: nothing was written.") -> Iterator[Telling]:
    """Show warnings and errors in a line each and leave with 1, or with 130 when interrupted.

    An interrupt that has a message says what is kept.

    With ``netclone --debug`` an error is raised as it is.
    """
    errors, telling = Console(stderr=True), Telling()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NetcloneWarning)
        try:
            yield telling
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as stop:
            text = f"Interrupted: {stop}" if str(stop) else interrupted
            _say(errors, text, "red")
            raise typer.Exit(130) from None
        except Exception as error:
            if _DEBUG.get():
                raise
            text = " ".join(str(error).split())
            if not isinstance(error, NetcloneError):
                text = f"{type(error).__name__}: {first_line(error)}; nobody foresaw this: netclone --debug says where"
            _say(errors, f"Error: {text}", "red")
            raise typer.Exit(1) from None
        finally:
            weak = (str(w.message) for w in caught if issubclass(w.category, NetcloneWarning))
            for text in dict.fromkeys(weak) if telling.warnings else ():
                _say(errors, f"Warning: {text}", "yellow")


def images_of(
    img_size: int | None, mean: str | None, std: str | None, interpolation: str | None, crop_pct: float | None
) -> dict[str, Any]:
    """How images are prepared, of what the command line says about it, by timm's names."""
    said = {
        "input_size": None if img_size is None else [3, img_size, img_size],
        "mean": None if mean is None else _numbers(mean, "--mean"),
        "std": None if std is None else _numbers(std, "--std"),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }
    return {name: value for name, value in said.items() if value is not None}


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"got {text!r}, expected numbers with commas between them", param_hint=option
        ) from None


def note(line: str) -> None:
    """Tell a person something beside the result."""
    _say(Console(stderr=True), f"Note: {line}")


def print_json(facts: Mapping[str, Any]) -> None:
    """Print plain data for a machine."""
    typer.echo(json.dumps(facts, indent=2, default=str).replace("\x7f", "\\u007f"))


def print_written(console: Console, *paths: Path, more: str = "") -> None:
    """Say which files there are now."""
    files = ", ".join(str(path) for path in paths)
    _say(console, f"Written: {files}{more}")


def _say(console: Console, line: str, style: str = "") -> None:
    """Print a line in which names of files and of what is in them show as text: no markup, nothing that steers."""
    plain = "\n".join(as_plain_text(part) for part in line.splitlines())
    console.print(plain, style=style, markup=False, soft_wrap=True, highlight=False)


def shown(path: Path) -> str:
    """A path without what is particular to this machine."""
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def percent(share: float | None) -> str:
    """A share in [0, 1], for a table."""
    return "" if share is None else f"{share:.1%}"
