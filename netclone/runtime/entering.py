"""deterministic() and entered(): what a call leaves as it was for its caller, and what it does not take from there.

This is where it is decided for all public functions: each is decorated with :func:`entered`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Give Python's, numpy's and torch's random states back as they were: a caller's model may draw from any.

    Examples
    --------
    >>> state = random.getstate()
    >>> with deterministic():
    ...     _ = random.random()
    >>> random.getstate() == state
    True
    """
    python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Run a public function: random states come back, and ``no_grad`` around it does not keep it from learning.

    Tensors made inside are normal ones in ``torch.inference_mode()``, too.

    Examples
    --------
    >>> with torch.inference_mode(), entered():
    ...     torch.is_grad_enabled(), torch.zeros(1).is_inference()
    (True, False)
    """
    with deterministic(), torch.inference_mode(False), torch.enable_grad():
        yield
