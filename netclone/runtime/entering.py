"""deterministic() and entered(): how a public function is shielded from its caller's torch state, and the reverse.

Every public function is decorated with :func:`entered`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Restore Python's, numpy's and torch's random states afterwards, since a caller's model may draw from any.

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
    """Run a public function: restore random states afterwards, and enable gradients even inside ``no_grad``.

    Inside ``torch.inference_mode()``, new tensors are normal ones too.

    Examples
    --------
    >>> with torch.inference_mode(), entered():
    ...     torch.is_grad_enabled(), torch.zeros(1).is_inference()
    (True, False)
    """
    with deterministic(), torch.inference_mode(False), torch.enable_grad():
        yield
