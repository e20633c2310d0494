"""The documentation builds strictly, covers every name and command, and its code runs as a reader would run it."""

from __future__ import annotations

import configparser
import contextlib
import html
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.main
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from typer.testing import CliRunner

import netclone
from netclone.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMMAND = typer.main.get_command(app)
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"adr", "zoo"} & set(path.relative_to(DOCS).parts))
RUN_ELSEWHERE = {DOCS / "examples.md"}  # its code is that of examples/, which test_examples runs
AFTER_TUTORIAL = [
    path
    for path in PAGES
    if path not in RUN_ELSEWHERE
    and path.stem != "tutorial"
    and re.search(r"^```(python|bash)$", path.read_text(), re.M)
]
IN_DEFAULT = ("index",)  # the code of the other pages is run in the long tier
INSTALLED = "pip install -e ../netclone"
PARSED_ONLY = ("push", "pull")  # they speak to a hub: test_publishing has one

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves pictures open


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as .ci/run builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    missing = [name for name in netclone.__all__ if f'id="netclone.{name}"' not in pages]
    assert not missing


def test_every_command_is_in_the_reference(site):
    page = (site / "reference" / "cli.html").read_text()
    assert len(COMMAND.commands) >= 7
    assert not [name for name in COMMAND.commands if f'id="netclone-{name}"' not in page]


def test_no_page_shows_markup_of_another_language(site):
    """Roles of reST, places that a hook should have filled, code that only the tests run."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        for left in (":func:", ":class:", ":meth:", "<!-- netclone", "invisible-code"):
            assert left not in text, f"{page.name}: {left}"


def test_nothing_is_fetched_to_look_at_a_page(site):
    asset = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        found = [tag for tag in asset.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert not found, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", sheet.read_text()), sheet


def test_results_on_the_pages_are_the_committed_ones(site):
    for suite in ("fashion", "cifar10", "zoo"):
        committed = (DOCS / "results" / suite / "results.md").read_text()
        page = (site / "results" / suite / "results.html").read_text()
        row = next(line for line in committed.splitlines() if line.startswith("| **netclone 50%**"))
        for cell in re.findall(r"\d+\.\d%", row):
            assert cell in page
    networks = re.findall(r"^\| ((?:timm|torchvision)/\w+)", (DOCS / "zoo" / "zoo.md").read_text(), re.M)
    zoo = (site / "zoo" / "index.html").read_text()
    assert len(networks) >= 129
    assert not [name for name in set(networks) if zoo.count(f"<td>{name}</td>") != networks.count(name)]
    shown = re.findall(r"<td>((?:timm|torchvision|transformers)/\w+)</td>", zoo)
    assert shown == sorted(shown) and zoo.count("<details>") >= len(networks)


def test_the_map_is_the_contract(site):
    """Every room of setup.cfg is a box on the floor it has there, says what it is, and has its modules listed."""
    page = (site / "explanation" / "architecture.html").read_text()
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    floors = [line.split(" | ") for line in contract["importlinter:contract:rooms"]["layers"].split("\n")[1:]]
    drawn = re.findall(r'<div class="floor">(.*)</div>', page)
    assert [re.findall(r"<code>(\w+)</code></a> \S", floor) for floor in drawn] == floors
    for module in (ROOT / "netclone").glob("[a-z]*/[a-z]*.py"):
        assert f"<td><code>{module.stem}</code></td>" in page, module


def test_every_decision_is_in_the_index(site):
    page = (site / "adr" / "index.html").read_text()
    for decision in (DOCS / "adr").glob("[0-9]*.md"):
        assert f'<a href="{decision.stem}.html">' in page, decision


def test_the_page_of_examples_shows_them(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "examples.html").read_text()))
    for script in (ROOT / "examples").glob("[0-9]*.py"):
        assert script.read_text().strip().splitlines()[-1] in text, script


# The code


def test_the_code_of_readme_is_that_of_the_first_page():
    """Which is run."""
    shown = [
        re.findall(r"^```python\n.*?^```$", page.read_text(), re.M | re.S)
        for page in (ROOT / "README.md", DOCS / "index.md")
    ]
    assert shown[0] == shown[1] and len(shown[0]) == 1


def commands_of(text):
    """The lines of a block of shell, continuations joined."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def all_commands():
    """Every line with netclone in a block of shell of any page, and of README."""
    for page in (*PAGES, ROOT / "README.md"):
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```", page.read_text(), re.M | re.S):  # sh: run by other tests
            for line in commands_of(block):
                for part in line.split("&&"):
                    found = re.search(r"^(?:.* -m )?(netclone .*)", part.strip())
                    if found:
                        yield pytest.param(found[1], id=f"{page.relative_to(ROOT)}: {found[1][:60]}")


@pytest.mark.parametrize("line", list(all_commands()))
def test_every_command_on_a_page_parses(line):
    """No command, argument or option that there is not, and none missing."""
    words = shlex.split(line, comments=True)[1:]
    try:
        with COMMAND.make_context("netclone", words) as context:
            name, command, rest = COMMAND.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)
    except typer.Exit as left:  # --version and --help are done when they are read
        assert left.exit_code == 0


def run_shell(example: Example) -> None:
    """Run the commands of a block as a shell would, but within this process."""
    for line in commands_of(example.parsed):
        words = shlex.split(line, comments=True)
        if line == INSTALLED or (words[:1] == ["netclone"] and words[1] in PARSED_ONLY):
            continue
        assert words[0] == "netclone", f"{example.path}: nothing runs '{line}'"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        print(result.stdout)


def lines_of(text):
    """The lines of what was printed, without frames and blanks, every number as 0: these depend on the machine."""
    without = re.sub(r"[\u2500-\u259f]", " ", text)
    return [" ".join(re.sub(r"\d([\d,.]*\d)?(e-\d+)?", "0", line).split()) for line in without.splitlines()]


def check_printed(example: Example) -> None:
    """A block of text shows lines that the block before it printed; three dots stand for others."""
    printed = lines_of(example.namespace["_printed"])
    missing = [line for line in lines_of(example.parsed) if line not in (*printed, "...", "")]
    assert not missing, f"{example.path}: {missing} is not among {printed}"


def run_page(path: Path, namespace: dict) -> dict:
    """Run all blocks of a page, in order, in the current folder, and give the names it leaves."""
    parsers = PythonCodeBlockParser(), CodeBlockParser("bash", run_shell), CodeBlockParser("text", check_printed)
    document = Document.parse(str(path), *parsers)
    document.namespace.update(namespace)
    examples = list(document.examples())
    assert examples
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            example.evaluate()
        document.namespace["_printed"] = printed.getvalue()
    return document.namespace


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """The folder that the tutorial leaves, and its names."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = run_page(DOCS / "tutorial.md", {})
    return folder, {name: value for name, value in names.items() if not name.startswith("__")}


def test_the_tutorial_runs_and_is_as_good_as_it_says(tutorial):
    folder, names = tutorial
    assert names["scores"].old > 0.85 and names["scores"].new > 0.8
    assert {path.name for path in folder.iterdir()} == {
        *("digits", "source", "target"),
        *("digits.safetensors", "grafted.safetensors", "report.html", "restored.safetensors"),
    }


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in IN_DEFAULT else pytest.mark.long, id=str(path.relative_to(DOCS)))
        for path in AFTER_TUTORIAL
    ],
)
def test_the_code_of_a_page_runs_after_the_tutorial(path, tutorial, tmp_path, monkeypatch):
    folder, names = tutorial
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(path, names)
