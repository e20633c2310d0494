"""What the commands of the command line share: errors in one line, warnings, --debug, Ctrl-C, --json, completion."""

import logging
import re
import shlex
import subprocess
import sys
import traceback
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

from netclone.arguments import Budget, Method, MixedPrecision, Search, words
from netclone.benchmarking.suites import SUITES
from netclone.cli import app
from netclone.cli.application import main, reported
from netclone.cli.export import Format
from netclone.errors import ArgumentError, WeakDataWarning
from netclone.graph.tracing import trace

COMMANDS = typer.main.get_command(app).commands


def failing(error, debug=False):
    """What a command that fails like this prints, and its exit code."""
    shared = typer.Typer(pretty_exceptions_enable=False)

    shared.callback()(main)

    @shared.command()
    def fail() -> None:
        with reported("Interrupted: half is kept."):
            warnings.warn("few pictures", WeakDataWarning, stacklevel=1)
            warnings.warn("few pictures", WeakDataWarning, stacklevel=1)
            raise error

    return CliRunner().invoke(shared, ["--debug", "fail"] if debug else ["fail"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ArgumentError("keep: got 2,\n   expected [one] in (0, 1]"), 1, "Error: keep: got 2, expected [one] in (0, 1]"),
        (KeyboardInterrupt(), 130, "Interrupted: half is kept."),
        (
            RuntimeError("\nshape mismatch\n  File x"),
            1,
            "Error: unexpected RuntimeError: shape mismatch; run `netclone --debug ...` for the traceback",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line):
    result = failing(error)
    assert result.exit_code == code
    assert result.stderr.splitlines() == [line, "Warning: few pictures"]
    assert result.stdout == ""


def test_debug_shows_where_an_error_came_from():
    error = ArgumentError("keep")
    assert failing(error, debug=True).exception is error
    done = subprocess.run(
        [sys.executable, "-m", "netclone", "--debug", "inspect", "none.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "archiving.py" in done.stderr


def test_verbose_shows_the_log_of_this_call_alone():
    app = typer.Typer()
    app.callback()(main)
    logger = logging.getLogger("netclone.graph")

    @app.command()
    def work() -> None:
        logger.debug("%d nodes\n\x1b[2J", 3)

    assert CliRunner().invoke(app, ["-v", "work"]).stderr == "netclone.graph: 3 nodes\n?[2J\n"
    result = CliRunner().invoke(app, ["work"])
    assert (result.stderr, result.stdout) == ("", "")
    assert not logging.getLogger("netclone").handlers
    assert logging.getLogger("netclone").level == logging.NOTSET


def test_debug_shows_the_tracebacks_of_both_captures():
    def capture() -> None:
        with reported():
            trace(Branches(), torch.zeros(2, 4))

    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    shared = typer.Typer(pretty_exceptions_enable=False)
    shared.callback()(main)
    shared.command()(capture)
    error = CliRunner().invoke(shared, ["--debug", "capture"]).exception
    shown = "".join(traceback.format_exception(error))
    assert "torch/fx" in shown and "torch/export" in shown


WAYS = ("timm/NAME", "torchvision/NAME", "hf-hub:", "local-dir:", "checkpoint file", "@FILE")


@pytest.mark.parametrize("name", ["clone", "evaluate", "export", "inject", "inspect", "predict", "report", "verify"])
def test_the_help_mentions_every_way_to_name_a_model(name):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "500"}).output
    assert [way for way in WAYS if way not in shown] == []
    models = [p for p in COMMANDS[name].params if p.name in ("source", "target", "model", "grafted")]
    assert all("timm/NAME" in model.help or "named in the same ways as" in model.help for model in models)


@pytest.mark.parametrize("arguments", [["clone"], ["clon"], ["inspect", "--jason"], ["export", "x", "--to", "tflite"]])
def test_a_wrong_call_is_exit_code_2_as_everywhere(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_says_what_it_does_with_an_example_that_parses(name):
    command = COMMANDS[name]
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert command.epilog.startswith(f"Example: netclone {name} ")
    _, _, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    with command.make_context(name, arguments) as context:
        assert set(context.params) >= {parameter.name for parameter in command.params if parameter.name != "help"}
    for parameter in command.params:
        assert parameter.help or parameter.name == "help", parameter.name


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"bench", "zoo"}))
def test_every_command_speaks_to_machines(name):
    """Those two write JSON files."""
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


def completed(words):
    """What the shell offers for the last of some words."""
    count = str(len(words.split(" ")) - 1)
    environment = {"_NETCLONE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    return CliRunner().invoke(app, [], prog_name="netclone", env=environment).output.split()


def test_the_shell_can_complete_commands():
    assert completed("netclone ev") == ["evaluate"]


CHOICES = {
    "clone --budget": words(Budget),
    "clone --method": words(Method),
    "clone --search": words(Search),
    "clone --mixed-precision": words(MixedPrecision),
    "export --to": words(Format),
}


@pytest.mark.parametrize("option", CHOICES)
def test_choices_are_completed_and_stand_in_the_help(option):
    assert completed(f"netclone {option} ") == list(CHOICES[option])
    name, flag = option.split()
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    assert re.search(rf"{flag} +\W{re.escape('|'.join(CHOICES[option]))}\W", shown)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("netclone clone --at ", ["auto", "input"]),
        ("netclone clone --at a", ["auto"]),
        ("netclone report --device c", ["cpu", "cuda"]),
        ("netclone bench ", [*SUITES, "modules"]),
    ],
)
def test_words_that_an_option_knows_are_completed(typed, offered):
    assert completed(typed) == offered


def test_a_word_that_is_none_of_a_choice_is_refused_with_the_words_there_are():
    result = CliRunner().invoke(app, ["clone", "a", "b", "--budget", "size"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    for word in ("--budget", "'size'", *words(Budget)):
        assert word in result.output
