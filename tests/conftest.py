"""What every test starts from: the same seed, one thread unless more are asked for, and no display."""

import os

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is run on request only is slow, too, so that ``-m "not slow"`` alone is the quick tier."""
    for item in items:
        if any(item.get_closest_marker(tier) for tier in ("long", "zoo", "fuzz")):
            item.add_marker("slow")
