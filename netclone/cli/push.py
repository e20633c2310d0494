"""netclone push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from netclone.cli.application import SHIP, Json, Token, app, print_json, reported


@app.command(
    rich_help_panel=SHIP,
    help="Put a clone's file and a model card made from it into a repository of the Hugging Face hub.\n\n"
    "The repository is made if there is none. You are known by your login (hf auth login), HF_TOKEN, or --token.",
    epilog="Example: netclone push herons.safetensors me/herons --license mit",
)
def push(
    file: Annotated[Path, typer.Argument(help="A clone's file.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME, or a name of your own.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="What a repository that is made is; none: as the account.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; none: the main one.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as mit or apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="For the card: the source's own repository.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Publish a clone."""
    console = Console(stderr=True)
    with reported("Interrupted: the repository may have been made, no commit was."):
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
