"""app: the command line, and what its commands share: options, errors in one line, warnings, logs, JSON."""

from __future__ import annotations

import json
import logging
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
    help="Clone classes from one image classifier into another, as a side branch that can be removed again.\n\n"
    "Clone classes of a source (netclone clone), graft the clone onto a target (inject), measure the result "
    "(evaluate), and take the clone out again (remove). The target's own logits stay the same to the bit.",
    epilog="Example: netclone demo --seed 0 --out netclone-demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

GRAFT, SEE, SHIP, CHECK = "Clone and graft", "Measure and see", "Ship", "Try and check"
"""Headings of commands in the help."""

NAMES = (
    "timm/NAME, torchvision/NAME, transformers/NAME, transformers/FOLDER, hf-hub:USER/NAME, local-dir:FOLDER, or a "
    "checkpoint file that records its architecture (netclone inject and timm's training script write such files). With "
    "your own weights: timm/NAME@FILE or torchvision/NAME@FILE"
)
"""Every way to name a model, for the help of an argument; see :func:`netclone.load_model`."""

IMAGES = (
    "a folder with one subfolder per class, a tar file of such a folder, or a dataset that timm reads (torch/cifar10, "
    "hfds/USER/NAME)"
)
"""Every way to name images, for the help of an argument."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Argument(help=f"The network: {NAMES}.")]
Data = Annotated[str | None, typer.Option(help=f"Images of the cloned classes: {IMAGES}.")]
TargetData = Annotated[str | None, typer.Option(help="Images of the target's own classes, named like --data.")]
Split = Annotated[
    str, typer.Option(help="Part of the data to use, if there are several: a subfolder, or a split of the dataset.")
]
SkipBroken = Annotated[
    bool,
    typer.Option("--skip-broken", help="Skip images that cannot be read, and say how many, instead of failing."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
ImgSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the input images in pixels. Default: the model's own.")
]
Mean = Annotated[
    str | None,
    typer.Option(help="Mean to normalise images by, such as 0.5 or 0.485,0.456,0.406. Default: the model's own."),
]
Std = Annotated[str | None, typer.Option(help="Standard deviation to normalise images by. Default: the model's own.")]
Interpolation = Annotated[
    str | None,
    typer.Option(
        help="How images are resized. Default: the model's own.",
        autocompletion=lambda: ["bilinear", "bicubic", "nearest", "lanczos", "hamming", "box"],
    ),
]
CropPct = Annotated[
    float | None,
    typer.Option(help="Share of an image's side that the centre crop keeps, such as 0.875. Default: the model's own."),
]
UseEma = Annotated[
    bool | None,
    typer.Option(
        "--use-ema/--no-use-ema",
        help="Load a checkpoint's averaged (EMA) weights, or its plain ones. Default: averaged, if it has any.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, ..., or auto (an accelerator with float64 if there is one, else the "
        "CPU).",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", help="Hugging Face access token. Default: the one you logged in with.")
]

By = Annotated[
    str | None,
    typer.Option(
        envvar="NETCLONE_BY", help="Who does this, for the record in the file. Default: the file does not say."
    ),
]


_DEBUG = ContextVar("debug", default=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"netclone {netclone.__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, and what was chosen, to stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""
    _DEBUG.set(debug)
    if verbose:
        context.with_resource(_logged())


class _Log(logging.Handler):
    """Prints log records to the current stderr, above any progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.name}: {record.getMessage()}"
        typer.echo("\n".join(as_plain_text(line) for line in text.splitlines()), err=True)


@contextmanager
def _logged() -> Iterator[None]:
    """Print everything that netclone logs."""
    logger, handler = logging.getLogger("netclone"), _Log()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@dataclass
class Telling:
    """Whether warnings are shown; if several processes share a run, only the first one's are."""

    warnings: bool = True


@contextmanager
def reported(interrupted: str = "Interrupted: nothing was written.") -> Iterator[Telling]:
    """Print each warning and error in one line, and exit with 1, or with 130 if interrupted.

    The message of an interrupt says what is kept. With ``netclone --debug``, errors keep their traceback.
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
                what = f"unexpected {type(error).__name__}: {first_line(error)}"
                text = f"{what}; run `netclone --debug ...` for the traceback"
            _say(errors, f"Error: {text}", "red")
            raise typer.Exit(1) from None
        finally:
            weak = (str(w.message) for w in caught if issubclass(w.category, NetcloneWarning))
            for text in dict.fromkeys(weak) if telling.warnings else ():
                _say(errors, f"Warning: {text}", "yellow")


def images_of(
    img_size: int | None, mean: str | None, std: str | None, interpolation: str | None, crop_pct: float | None
) -> dict[str, Any]:
    """The options for the preprocessing of images, by timm's names."""
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
        raise typer.BadParameter(f"got {text!r}, expected numbers separated by commas", param_hint=option) from None


def note(line: str) -> None:
    """Print a line for the user to stderr, apart from the result."""
    _say(Console(stderr=True), f"Note: {line}")


def print_json(facts: Mapping[str, Any]) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(facts, indent=2, default=str).replace("\x7f", "\\u007f"))


def print_written(console: Console, *paths: Path, more: str = "") -> None:
    """Print the names of the written files."""
    files = ", ".join(str(path) for path in paths)
    _say(console, f"Written: {files}{more}")


def print_next(what: str, *command: str) -> None:
    """Print what to do next in one line: words, and a command that can be copied."""
    _say(Console(), f"Next: {what}{': ' * bool(command)}{' '.join(command)}")


def _say(console: Console, line: str, style: str = "") -> None:
    """Print a line as plain text, so that quotations from files are neither markup nor control characters."""
    plain = "\n".join(as_plain_text(part) for part in line.splitlines())
    console.print(plain, style=style, markup=False, soft_wrap=True, highlight=False)


def shown(path: Path) -> str:
    """A path without its machine-specific part, for a command that others can repeat."""
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def percent(share: float | None) -> str:
    """A share in [0, 1], for a table."""
    return "" if share is None else f"{share:.1%}"
