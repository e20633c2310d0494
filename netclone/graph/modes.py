"""Mode: a way to call a network, for which torch may choose other kernels; and sets of modes to compare in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GRADIENTS = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Mode:
    """One way to call a network: kind of gradients, batch size, dtype, layout, and number of threads.

    ``gradients`` is ``"plain"``, ``"no_grad"`` or ``"inference_mode"``. None leaves a setting as it is: the network's
    own dtype, or torch's number of threads.

    Examples
    --------
    >>> str(Mode("no_grad", 3, torch.bfloat16, channels_last=True, threads=2))
    'no_grad, batch of 3, bfloat16, channels last, 2 threads'
    """

    gradients: str
    batch: int
    dtype: torch.dtype | None = None
    channels_last: bool = False
    threads: int | None = None

    def __str__(self) -> str:
        parts = [self.gradients, f"batch of {self.batch}"]
        if self.dtype is not None:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.channels_last:
            parts.append("channels last")
        if self.threads is not None:
            parts.append(f"{self.threads} thread{'s' * (self.threads != 1)}")
        return ", ".join(parts)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply the mode inside the block; torch's settings are restored afterwards."""
        threads = torch.get_num_threads()
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            with torch.inference_mode(False), GRADIENTS[self.gradients]():
                yield
        finally:
            torch.set_num_threads(threads)


def _all(
    batches: tuple[int, ...], dtypes: tuple[torch.dtype, ...], layouts: tuple[bool, ...], threads: int
) -> tuple[Mode, ...]:
    each = itertools.product(dtypes, layouts, GRADIENTS, batches)
    return tuple(Mode(gradients, batch, dtype, last, threads) for dtype, last, gradients, batch in each)


QUICK = tuple(Mode(gradients, batch) for gradients in GRADIENTS for batch in (1, 2))
"""The modes in which :func:`netclone.inject` compares: the network as it is, called in the usual ways."""

COVERING = (
    *_all((1, 3), DTYPES, (False, True), threads=1),
    *_all((2, 4, 5, 6, 7, 8, 9), (torch.float32,), (False,), threads=1),
    *_all((1, 3), DTYPES, (False,), threads=2),
)
"""Each dtype in each layout, each batch size from 1 to 9, and one and two threads, with each kind of gradients."""

_KINDS = tuple(itertools.product(DTYPES, (False, True), GRADIENTS))
SPREAD = (
    *(Mode(g, (1, 3)[n % 2], dtype, last, 1) for n, (dtype, last, g) in enumerate(_KINDS)),
    *(Mode(tuple(GRADIENTS)[n % 3], n, torch.float32, False, 1) for n in (2, 4, 5, 6, 7, 8, 9)),
    *(Mode(g, (1, 3)[n % 2], dtype, False, 2) for n, (g, dtype) in enumerate(zip(GRADIENTS, DTYPES, strict=True))),
)
"""Each dtype in each layout and kind of gradients, but each batch size and number of threads in only one of them."""

EVERY = tuple(mode for threads in (1, 2) for mode in _all(tuple(range(1, 10)), DTYPES, (False, True), threads))
"""Every combination of these."""
