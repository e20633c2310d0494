"""One session for each single check: ``nox -l`` lists them, ``nox -s types`` runs one, ``nox`` all but the long ones.

Each session has an environment of its own, which ``nox -r`` uses again. ``nox --no-venv`` takes the one you are in.
"""

import nox

nox.needs_version = ">=2024.3.2"
nox.options.sessions = ["lint", "imports", "types", "docs", "tests"]


def prepare(session: nox.Session) -> None:
    """Install netclone, editable, with all that its tests need."""
    if session.virtualenv.venv_backend != "none":
        session.install("-e", ".[test]")


@nox.session
def lint(session: nox.Session) -> None:
    """Look for mistakes and check the format."""
    prepare(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def imports(session: nox.Session) -> None:
    """Check that each room imports only from those below it."""
    prepare(session)
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    prepare(session)
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error."""
    prepare(session)
    session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def quick(session: nox.Session) -> None:
    """Run the quick tier of the tests."""
    prepare(session)
    session.run("pytest", "-n", "2", "--dist", "loadfile", "-m", "not slow", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, and the examples in docstrings; ``nox -s tests -- tests/test_gates.py`` runs some."""
    prepare(session)
    session.run("pytest", "-n", "2", "--dist", "loadfile", "--durations=25", *session.posargs)


@nox.session
def long(session: nox.Session) -> None:
    """Run what the default leaves out, for a release: more networks, every example, every page. Half an hour."""
    prepare(session)
    session.run("pytest", "-n", "2", "--dist", "loadfile", "-m", "long", *session.posargs)


@nox.session
def zoo(session: nox.Session) -> None:
    """Check every network of timm and torchvision: hours."""
    prepare(session)
    session.run("pytest", "-m", "zoo", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Try random networks, files and operators: an hour."""
    prepare(session)
    session.run("pytest", "-m", "fuzz", *session.posargs)
