"""Distilling: gradient steps that bring a slim network nearer to the full one, after its closed-form refit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from netclone.graph.quickening import for_gradients, quick
from netclone.learning.data import in_batches
from netclone.learning.neighbourhoods import Neighbourhoods, answered
from netclone.learning.stepping import Loop, fast_forward, step

TEMPERATURE = 2.0
REUSE = 2  # steps that a point is used in: the full network's answer for it is computed once
LEARNING_RATE = 5e-4


def distill(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    around: Neighbourhoods,
    held_out: Tensor,
    *,
    columns: Sequence[int] | None = None,
    steps: int,
    loop: Loop,
) -> None:
    """Train the slim network, in place, to give the full network's logits around the samples.

    No label is used. The loss is the divergence of the two distributions at temperature 2, plus a tenth of the scaled
    square error of the logits. Half of each batch are samples, the other half points around them. Normalisation
    statistics do not change. If the distance on held-out images has grown at the end, all weights stay as they were.

    Parameters
    ----------
    student, teacher
        Operator graphs from images ``(N, C, H, W)`` to logits; the teacher is not changed.
    around
        The samples, and the way to draw points around them.
    columns
        The teacher's columns that the student has. None: all.
    steps, loop
        Number of steps, and how they are run.

    Raises
    ------
    FitError
        If the loss is not finite.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network (2015); docs/adr/0005-distilled-refit.md.
    """
    if steps <= 0 or not any(p.is_floating_point() for p in student.parameters()):
        return
    batch_size, generator, workers = loop.batch_size, loop.generator, loop.workers
    teacher = quick(teacher, held_out[:2])
    learner = for_gradients(student)
    learned = {name: p for name, p in learner.named_parameters() if p.is_floating_point()}
    parameters = list(learned.values())

    def drawn(count: int) -> Tensor:
        near = around.nearby((count + 1) // 2, generator)
        return torch.cat([around.samples(count - len(near), generator), near])

    def taught(images: Tensor) -> Tensor:
        logits = in_batches(teacher, images, workers.portion(len(images), batch_size), workers)
        return logits if columns is None else logits[:, list(columns)]

    goal = taught(held_out)
    scale = goal.std().clamp_min(1e-6)

    def distance() -> float:
        return float(_loss(in_batches(learner, held_out, batch_size, workers), goal, scale))

    def loss_of(points: Tensor, want: Tensor) -> Tensor:
        return _loss(learner(points).to(points.dtype), want, scale)

    start = distance()
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 20), pct_start=0.1)
    for parameter in parameters:
        parameter.requires_grad_(True)
    first, last = loop.restored(parameters, optimizer)
    fast_forward(schedule, first)
    batches = islice(answered(drawn, taught, batch_size, REUSE, last), steps - first)
    for done, batch in enumerate(batches, first):
        step(optimizer, loss_of, batch, f"distilling the clone, step {done}", workers, loop.precision)
        schedule.step()
        loop.keep(done + 1, parameters, optimizer, batch)
        loop.tell(done + 1, steps)
    if distance() <= start:
        with torch.no_grad():
            for name, parameter in learned.items():
                student.get_parameter(name).copy_(parameter)


def _loss(got: Tensor, want: Tensor, scale: Tensor) -> Tensor:
    soft, goal = (logits.div(TEMPERATURE).log_softmax(1) for logits in (got, want))
    divergence = F.kl_div(soft, goal, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return divergence + 0.1 * F.mse_loss(got / scale, want / scale)
