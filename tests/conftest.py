"""What every test starts from: the same seed, one thread unless more are asked for, and no display."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

# Of this process, for fixtures too, and of those that tests start: sums, and so learned masks, depend on it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)
os.environ["MPLBACKEND"] = "Agg"  # matplotlib reads it once, when first imported: a fixture would come too late


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Seed torch and bound its threads, so that a test gives the same numbers alone and in the whole suite."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


SLOW = Path(__file__).with_name("slow.txt")
"""Tests that took more than ``QUICK`` seconds when ``pytest --record-slow`` was last run; marked slow, as by hand."""

QUICK = 0.5
_seconds: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-slow", action="store_true", help=f"write the tests that take over {QUICK} s to {SLOW.name}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is run on request only is slow, too, so that ``-m "not slow"`` alone is the quick tier."""
    slow = frozenset(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in slow or any(item.get_closest_marker(tier) for tier in ("long", "zoo", "fuzz")):
            item.add_marker("slow")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-slow") and not hasattr(session.config, "workerinput"):
        SLOW.write_text("".join(f"{name}\n" for name in sorted(_seconds) if _seconds[name] > QUICK))
