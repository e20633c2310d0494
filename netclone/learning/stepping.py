"""One step of learning: what mask, distillation and fit have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from netclone.errors import ArgumentError, FitError
from netclone.runtime.resuming import Unfinished
from netclone.runtime.sharing import ALONE, Workers

PRECISIONS = {"no": None, "bf16": torch.bfloat16}
"""The precisions of a step, by accelerate's names; float16 is missing because it would need loss scaling."""


def precision_of(name: str) -> torch.dtype | None:
    """The dtype that :func:`step` takes, for a name of :data:`PRECISIONS`.

    Raises
    ------
    ArgumentError
        If there is no such name.
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ArgumentError(f"mixed_precision: got {name!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Loop:
    """How a loop of steps is run: samples per step, randomness, and settings that do not change the result.

    Parameters
    ----------
    batch_size
        Samples per step.
    generator
        The source of all randomness.
    workers
        The processes that share the work; all of them learn the same weights.
    precision
        As for :func:`step`.
    progress
        Called with ``(step, steps)``.
    unfinished
        Where to keep the state of the learning, and to continue from.
    """

    batch_size: int
    generator: torch.Generator
    workers: Workers = ALONE
    precision: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None
    unfinished: Unfinished | None = None

    def tell(self, done: int, total: int) -> None:
        """Report progress, if anyone asked for it."""
        if self.progress is not None:
            self.progress(done, total)

    def restored(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """Restore the state of an earlier run; returns its number of steps (0 if there is none) and its last batch."""
        return (0, None) if self.unfinished is None else self.unfinished.restore(parameters, optimizer, self.generator)

    def keep(
        self,
        steps: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        """Store the state after so many steps, if there is a place for it and it is time."""
        if self.unfinished is not None:
            self.unfinished.keep(steps, parameters, optimizer, self.generator, batch)


def step(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[..., Tensor],
    batch: Sequence[Tensor],
    what: str,
    workers: Workers = ALONE,
    precision: torch.dtype | None = None,
) -> None:
    """Move the optimizer's parameters down the mean loss of a batch.

    Several workers divide the rows of the batch among them and sum their gradients, so that all take the same step.

    Parameters
    ----------
    loss_of
        The loss of some rows, ``loss_of(*parts)``. It has to be a mean over rows.
    batch
        Tensors ``(N, ...)`` with the same number of rows.
    precision
        The dtype in which :class:`torch.autocast` computes the loss. None: the tensors' own.

    Raises
    ------
    FitError
        If the loss is not finite; no parameter has changed then.

    Examples
    --------
    >>> weight = torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> step(optimizer, lambda rows: (rows * weight).square().mean(), [torch.ones(4)], "example")
    >>> weight.item()
    0.0
    """
    rows = len(batch[0])
    team = workers.team(rows)
    own = team.own(rows)
    with nullcontext() if precision is None else torch.autocast(batch[0].device.type, precision):
        loss = loss_of(*(tensor[own] for tensor in batch))
    if team.count > 1:
        loss = loss * ((own.stop - own.start) / rows)
    total = loss.detach().clone()
    team.add([total])
    if not torch.isfinite(total):
        raise FitError(f"{what}: the loss is {total.item()}; check the data's scale")
    optimizer.zero_grad()
    loss.backward()
    team.add([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
    optimizer.step()


def fast_forward(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Advance a schedule by the steps that an earlier run has made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # these steps were made then
        for _ in range(steps):
            schedule.step()
