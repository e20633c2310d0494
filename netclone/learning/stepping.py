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
"""What steps are computed in, by accelerate's names; float16 would need its losses scaled."""


def precision_of(name: str) -> torch.dtype | None:
    """What :func:`step` takes for a name of :data:`PRECISIONS`.

    Raises
    ------
    ArgumentError
        If it is none.
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ArgumentError(f"mixed_precision: got {name!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Loop:
    """How a loop of steps is run: samples in a step, what is drawn from, and what does not change the result.

    Parameters
    ----------
    batch_size
        Samples in one step.
    generator
        What is drawn is drawn from here.
    workers
        The processes that share the work; what is learned becomes the same in each.
    precision
        As for :func:`step`.
    progress
        Called with ``(step, steps)``.
    unfinished
        Where to keep what is learned on the way, and to go on from.
    """

    batch_size: int
    generator: torch.Generator
    workers: Workers = ALONE
    precision: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None
    unfinished: Unfinished | None = None

    def tell(self, done: int, total: int) -> None:
        """Tell of progress, if anyone asked."""
        if self.progress is not None:
            self.progress(done, total)

    def restored(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """Where an earlier run was: its number of steps (0: none) and its last batch; everything is put back there."""
        return (0, None) if self.unfinished is None else self.unfinished.restore(parameters, optimizer, self.generator)

    def keep(
        self,
        steps: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        """Keep the state after so many steps, if there is a place for it and it is time to."""
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

    Several workers take the rows of the batch among them and add up their gradients, so that each moves the same way.

    Parameters
    ----------
    loss_of
        The loss of some rows: ``loss_of(*parts)``, a mean over rows, so that the batch's is the rows' mean.
    batch
        Tensors ``(N, ...)`` of as many rows each.
    precision
        What :class:`torch.autocast` computes the loss in; None: in the tensors' own dtype.

    Raises
    ------
    FitError
        If the loss is not finite; nothing is moved then.

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
    """Bring a schedule to where it is after so many steps, which an earlier run has made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the optimizer's were made then
        for _ in range(steps):
            schedule.step()
