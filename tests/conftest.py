"""What every test starts from: the same seed, as many threads as asked for, and no display."""

import os

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"  # matplotlib reads it once, when first imported: a fixture would come too late


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Seed torch and bound its threads, so that a test gives the same numbers alone and in the whole suite."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
