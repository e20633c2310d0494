"""netclone pull."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from netclone.cli.application import SHIP, Json, Token, app, print_next, reported
from netclone.cli.inspect import show


@app.command(
    rich_help_panel=SHIP,
    help="Download a clone from a repository on the Hugging Face Hub, check it, and write it to a file.\n\n"
    "It is read as plain data: no pickle, no code.",
    epilog="Example: netclone pull me/herons --out herons.safetensors",
)
def pull(
    repo: Annotated[str, typer.Argument(help="The repository: USER/NAME.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: the newest on main.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Download a clone and write it."""
    with reported():
        from netclone.files import publishing  # slow to import, and not needed to show help

        with Console(stderr=True).status(Text(f"Pulling {repo}")):
            publishing.pull(repo, out, revision=revision, token=token)
        show(out, as_json, written=True)
        if not as_json:
            words = ("netclone inject TARGET", shlex.quote(str(out)), "--out grafted.safetensors")
            print_next("graft it onto the target that it was made for", *words)
