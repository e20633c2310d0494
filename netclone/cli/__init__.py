"""The command line, one module per command: it reads options, calls other rooms, and prints results."""

# ruff: noqa: I001  the order of the imports is that of the commands in the help
from netclone.cli.application import app
from netclone.cli import clone, inject, remove
from netclone.cli import inspect, predict, evaluate, report, log
from netclone.cli import verify, export, push, pull
from netclone.cli import demo, bench, zoo

__all__ = [
    "app",
    "bench",
    "clone",
    "demo",
    "evaluate",
    "export",
    "inject",
    "inspect",
    "log",
    "predict",
    "pull",
    "push",
    "remove",
    "report",
    "verify",
    "zoo",
]
