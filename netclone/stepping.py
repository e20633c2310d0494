"""One step of learning: what mask, distillation and fit have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from netclone.errors import FitError


def step(optimizer: torch.optim.Optimizer, loss: Tensor, what: str) -> None:
    """Move the optimizer's parameters down a loss.

    Raises
    ------
    FitError
        If the loss is not finite; nothing is moved then.

    Examples
    --------
    >>> weight = torch.ones(1, requires_grad=True)
    >>> step(torch.optim.SGD([weight], lr=0.5), weight.square().sum(), "example")
    >>> weight.item()
    0.0
    """
    if not torch.isfinite(loss):
        raise FitError(f"{what}: the loss is {loss.item()}; check the data's scale")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
