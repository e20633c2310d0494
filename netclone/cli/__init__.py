"""The command line: arguments in, tables out; what it does is done elsewhere. One module for each command."""

# ruff: noqa: I001  the order of the imports is that of the commands in the help
from netclone.cli.application import app
from netclone.cli import clone, inject, remove
from netclone.cli import inspect, evaluate
from netclone.cli import export
from netclone.cli import demo, bench, zoo

__all__ = ["app", "bench", "clone", "demo", "evaluate", "export", "inject", "inspect", "remove", "zoo"]
