"""minimise(parts, loss): the minimum of a smooth convex loss, by L-BFGS; and where to look for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

FEW = 2**21
"""How many numbers are few: see :func:`place_to_solve`."""


def minimise(parts: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, history: int = 100) -> None:
    """Bring tensors that need gradients, in place, to where a convex loss is least, in ``steps`` steps at most.

    ``history`` is the number of steps that the curvature is estimated from.

    Examples
    --------
    >>> x = torch.zeros(2, requires_grad=True)
    >>> minimise([x], lambda: (x - torch.tensor([1.0, 2.0])).square().sum(), steps=10)
    >>> [round(value, 3) for value in x.tolist()]
    [1.0, 2.0]

    Reference: Nocedal and Wright, Numerical Optimization (2006), algorithms 7.5 (L-BFGS) and 3.5 (line search).
    """
    optimizer = torch.optim.LBFGS(list(parts), max_iter=steps, history_size=history, line_search_fn="strong_wolfe")

    def evaluated() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(cast("Callable[[], float]", evaluated))


def place_to_solve(rows: Tensor) -> torch.device:
    """Where many short steps over these rows take the least time: on the CPU, if there are at most ``FEW`` numbers.

    An accelerator works on so few in less time than the CPU takes to tell it to.

    Examples
    --------
    >>> place_to_solve(torch.zeros(3, 2))
    device(type='cpu')
    """
    return torch.device("cpu") if rows.numel() <= FEW else rows.device
