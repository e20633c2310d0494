"""What the commands of the command line share: errors in one line, warnings, --debug, Ctrl-C, --json, completion."""

import re
import shlex
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

from netclone.arguments import Budget, Method, MixedPrecision, Search, words
from netclone.benchmarking.suites import SUITES
from netclone.cli import app
from netclone.cli.application import main, reported
from netclone.errors import ArgumentError, WeakDataWarning

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
            "Error: RuntimeError: shape mismatch; nobody foresaw this: netclone --debug says where",
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
    "export --to": ("onnx", "pt2"),
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
        ("netclone bench ", list(SUITES)),
    ],
)
def test_words_that_an_option_knows_are_completed(typed, offered):
    assert completed(typed) == offered


def test_a_word_that_is_none_of_a_choice_is_refused_with_the_words_there_are():
    result = CliRunner().invoke(app, ["clone", "a", "b", "--budget", "size"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    for word in ("--budget", "'size'", *words(Budget)):
        assert word in result.output
