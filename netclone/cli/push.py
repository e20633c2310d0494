"""netclone push."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from netclone.cli.application import SHIP, Json, Token, app, print_json, print_next, reported


@app.command(
    rich_help_panel=SHIP,
    help="Upload a clone, with a model card made from it, to a repository on the Hugging Face Hub.\n\n"
    "The repository is created if it does not exist. Log in with hf auth login, set HF_TOKEN, or pass --token.",
    epilog="Example: netclone push herons.safetensors me/herons --license mit",
)
def push(
    file: Annotated[Path, typer.Argument(help="A file that netclone clone wrote.")],
    repo: Annotated[str, typer.Argument(help="The repository: USER/NAME, or NAME alone for one of your own.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository. Default: your account's."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to. Default: main.")] = None,
    license: Annotated[str | None, typer.Option(help="License for the model card, such as mit or apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload a clone."""
    console = Console(stderr=True)
    with reported("Interrupted: nothing was uploaded, though the repository may have been created."):
        from netclone.files import publishing  # slow to import, and not needed to show help

        given = {"license": license, "base_model": base_model}
        with console.status(Text(f"Pushing {file}")):
            url = publishing.push(
                file,
                repo,
                private=private,
                token=token,
                message=message,
                revision=revision,
                metadata={key: value for key, value in given.items() if value is not None},
            )
        if as_json:
            print_json({"repo": repo, "url": url})
        else:
            Console().print(f"Pushed: {url}", soft_wrap=True, highlight=False, markup=False)
            print_next("others get it with", f"netclone pull {shlex.quote(repo)} --out clone.safetensors")
