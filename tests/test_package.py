"""The package as a whole: imports point one way, and every public name is documented."""

import ast
import configparser
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

import netclone

PACKAGE = Path(netclone.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Every module by its name behind ``netclone.``, a package by that of its ``__init__``."""

MODULES = sorted({name.partition(".")[0] for name in FILES})


def files_of(module):
    """The file of a module, or all those of a package."""
    return [path for name, path in FILES.items() if name.partition(".")[0] == module]


def imports(name):
    """The modules that one imports when it runs; those for type checking alone do not count."""
    tree = ast.parse(FILES[name].read_text())
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            assert not any(alias.name == "*" for alias in node.names), f"{name}: star import in line {node.lineno}"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [other if other.removeprefix("netclone.") in FILES else node.module for other in within]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for other in names:
            first, _, rest = other.partition(".")
            if first == "netclone":
                found.add(rest or "__init__")
    return found - {name}


def test_imports_have_no_cycle():
    found = {(name, other) for name in FILES for other in imports(name) - {"__init__"}}
    assert {other for _, other in found} <= set(FILES)
    graph = networkx.DiGraph(found)
    assert graph.number_of_edges() > len(FILES)
    assert list(networkx.simple_cycles(graph)) == []


def test_every_room_imports_only_from_those_below():
    """The contract in setup.cfg, which has no exception and names every room."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr
    text = (PACKAGE.parent / "setup.cfg").read_text()
    assert "ignore_imports" not in text


def test_only_one_module_knows_each_of_the_special_libraries():
    """Plots and demonstration data are for what stands on top; nothing needs pickle."""
    for module in MODULES:
        text = "\n".join(file.read_text() for file in files_of(module))
        names = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))
        assert not names & {"pickle", "dill", "cloudpickle"}, module
        assert "matplotlib" not in names or module in ("reporting", "demo", "benchmarking"), module
        assert "sklearn" not in names or module in ("demo", "benchmarking"), module
        assert "huggingface_hub" not in names or module in ("files", "models"), module


@pytest.mark.parametrize(
    ("run", "heavy"),
    [
        ("import netclone", ["torch", "timm", "matplotlib", "typer", "sklearn"]),
        ("from netclone.cli import app; app(['--help'], standalone_mode=False)", ["torch", "timm", "matplotlib"]),
        ("import netclone; netclone.clone", ["matplotlib", "typer", "sklearn.datasets"]),
        ("import netclone; netclone.CloneModule", ["huggingface_hub", "timm", "rich"]),
    ],
)
def test_what_is_not_needed_is_not_loaded(run, heavy):
    """Help is there at once, and importing netclone costs nothing: what a name needs is loaded when it is used."""
    code = f"import sys\n{run}\nprint([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.splitlines()[-1] == "[]"


NOT_INSTALLED = """
import importlib.metadata as installed
version = installed.version
def known(name):
    if name == "netclone":
        raise installed.PackageNotFoundError(name)
    return version(name)
installed.version = known
import netclone, timm, torch
source, target = (timm.create_model("test_resnet", num_classes=count) for count in (4, 2))
images = torch.randn(8, 3, 32, 32)
module = netclone.clone(
    source, target, [(images, torch.tensor([2, 3] * 4))], classes=[2, 3], method="magnitude", at="input",
    epochs=1, distill_steps=0,
)
print(dict(module.spec.versions)["netclone"])
from netclone.files.provenance import event
print(event("inject", "birds", "0" * 64).version)
"""


def test_it_need_not_be_installed():
    """A copy on the path has no metadata of a package."""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NOT_INSTALLED], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert out.stdout.split() == [netclone.__version__] * 2, out.stderr


def test_contributing_says_where_things_go():
    """Every room is in the table, once, from the lowest to the highest as in setup.cfg."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## Where things go")[2].partition("\n## ")[0]
    told = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    contract = configparser.ConfigParser()
    contract.read(PACKAGE.parent / "setup.cfg")
    layers = contract["importlinter:contract:rooms"]["layers"].split("\n")
    layers = [set(line.replace(" ", "").split("|")) for line in layers if line and line != "__main__"]
    assert [set(names) for names in told] == layers[::-1]


def test_every_public_name_is_one_of_the_stub():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert imported == set(ast.literal_eval(listed)) == set(netclone.__all__)


def test_no_module_is_a_drawer():
    assert not {"utils", "util", "helpers", "helper", "common", "misc", "tools"} & set(MODULES)


TESTS = PACKAGE.parent / "tests"
AS_ONE = ("baselines", "benchmarking", "cli", "zoo")
"""Rooms whose modules are tested together, in ``tests/test_<room>.py``."""

ELSEWHERE = {
    "channels.grouping": "test_channels.py",
    "cloning.method": "test_cloning.py",
    "cloning.modules": "test_archiving.py",
    **dict.fromkeys(("cloning.grafted", "cloning.requirements", "cloning.rewriting"), "test_injecting.py"),
    **dict.fromkeys(("cloning.planning", "cloning.problem", "cloning.searching"), "test_cloning.py"),
    "cloning.target_features": "test_timm.py",
    "errors": "test_package.py",
    "files.bundling": "test_deploying.py",
    "graph.budgets": "test_dry_run.py",
    "graph.holding": "test_injecting.py",
    "graph.cutting": "test_extracting.py",
    "graph.modes": "test_verifying.py",
    "graph.preparing": "test_checkpoints.py",
    "graph.recurrent": "test_exporting.py",
    "graph.signatures": "test_dry_run.py",
    "metrics.held_out": "test_examining.py",
    "models.recipes": "test_checkpoints.py",
    "reporting.page": "test_reporting.py",
}
"""Modules whose behaviour is tested under another name, with the file."""


@pytest.mark.parametrize("name", [n for n in FILES if not FILES[n].stem.startswith("__")])
def test_every_module_has_a_mirror_among_the_tests(name):
    """``netclone/room/slimming.py`` is tested in ``tests/test_slimming.py``, or where ELSEWHERE says."""
    room, _, stem = name.rpartition(".")
    if room in AS_ONE:
        assert (TESTS / f"test_{room}.py").exists()
    elif name in ELSEWHERE:
        assert (TESTS / ELSEWHERE[name]).exists()
    else:
        assert (TESTS / f"test_{stem}.py").exists(), f"write tests/test_{stem}.py for netclone.{name}"


def test_the_exceptions_are_needed():
    assert set(AS_ONE) | set(ELSEWHERE) <= set(FILES)
    mirrored = [name for name in ELSEWHERE if (TESTS / f"test_{FILES[name].stem}.py").exists()]
    assert mirrored == []


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__main__"])
def test_every_module_says_what_it_is_for(module):
    doc = importlib.import_module("netclone" if module == "__init__" else f"netclone.{module}").__doc__
    assert doc
    assert len(doc.strip().splitlines()[0]) > 20


def test_the_public_names_are_listed_and_exist():
    assert len(netclone.__all__) == len(set(netclone.__all__))
    assert {
        *("trace", "position", "channel_groups", "ChannelGroups", "localize", "ChannelMask", "extract", "CloneModule"),
        *("clone", "inject", "clones", "remove", "save", "load", "evaluate", "NetcloneError"),
    } <= set(netclone.__all__)
    for name in netclone.__all__:
        assert hasattr(netclone, name), name
    assert not [name for name in netclone.__all__ if inspect.ismodule(getattr(netclone, name))]


@pytest.mark.parametrize("name", [n for n in netclone.__all__ if not n.startswith("__")])
def test_every_public_name_is_documented(name):
    """A claim, and for functions an example (run as a doctest)."""
    public = getattr(netclone, name)
    doc = inspect.getdoc(public)
    assert doc and re.match(r"\S.*[.:]", doc), f"{name} has no one-line claim"
    assert not doc.startswith(f"{name}("), f"{name} has the docstring that dataclasses make"
    if inspect.isfunction(public) and name not in ("load", "save"):  # these are shown by README and test_archiving
        assert doctest.DocTestParser().get_examples(doc), f"{name} has no example"
    if inspect.isfunction(public):
        assert public.__module__.startswith("netclone.")
        for parameter in inspect.signature(public).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name} has no type"


def test_errors_share_one_root_and_refine_builtins():
    errors = [e for e in vars(netclone.errors).values() if inspect.isclass(e) and issubclass(e, Exception)]
    for error in errors:
        root = netclone.NetcloneWarning if issubclass(error, Warning) else netclone.NetcloneError
        assert issubclass(error, root)
        if error not in (netclone.NetcloneError, netclone.NetcloneWarning) and not issubclass(error, Warning):
            assert len(error.__mro__) > 4, f"{error.__name__} refines no builtin"
        assert error.__name__ in netclone.__all__
