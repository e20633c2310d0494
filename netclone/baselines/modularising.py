"""Masks by the losses of SeaM and GradSplitter: which channels a sub-problem needs, learned with a head of its own.

Both papers learn a mask of zeros and ones beside weights that stay. The mask starts with ones. A value above zero
counts as one, gradients pass through that step (clipped to -1 and 1), and a head reads the source's logits. What is
learned minimises a cross entropy plus ``alpha`` times what is retained. SeaM has a mask for every weight and counts
weights. GradSplitter has one for every kernel and counts kernels, for each class in a module of its own.

Here both masks are over units of channels, so that a slim network is really smaller, and there is one module for a
sub-problem. Neither paper takes a budget. Here the units with the highest values stay, as many as a budget of MACs
allows, and the head is then learned again.

References: Qi et al., Reusing Deep Neural Network Models through Model Re-engineering (ICSE 2023, arXiv 2304.00245);
its code, github.com/qibinhang/SeaM, ``src/binary_class/reengineer.py``. Qi et al., Reusing Convolutional Neural Network
Models through Modularization and Composition (arXiv 2311.04438); its code, github.com/qibinhang/GradSplitter,
``src/grad_splitter.py``. Losses, heads, starts and constants are those of the authors' code, and no equation is cited:
the papers' texts were not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.problems import Recipe
from netclone.baselines.subproblems import Part, SubProblem
from netclone.baselines.training import seeded
from netclone.channels.budgeting import Allocation, Measure
from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import ChannelGroups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import slim_down
from netclone.errors import FitError
from netclone.learning.neighbourhoods import drawn
from netclone.metrics.evaluating import predict

HEAD_ALONE = 0.2  # of the steps, at the start: one epoch in five with SeaM, the first five with GradSplitter
HEAD_STEPS = 200  # of the head on the logits of the slim network, which are computed once


@dataclass(frozen=True)
class MaskLoss:
    """What a paper minimises: cross entropy of its head's output, plus ``alpha`` times what is retained.

    ``head(outputs, answers)`` makes the head, which learns at ``head_lr``; ``retained(groups)`` gives a function of the
    masks, one tensor of zeros and ones for each group, whose value is in [0, 1].
    """

    head: Callable[[int, int], nn.Module]
    retained: Callable[[ChannelGroups], Callable[[Sequence[Tensor]], Tensor]]
    alpha: float
    head_lr: float

    def value(self, outputs: Tensor, labels: Tensor, weights: Tensor, retained: Tensor) -> Tensor:
        """The loss of a batch: outputs ``(N, answers)``, labels and weights ``(N,)``."""
        return (F.cross_entropy(outputs, labels, reduction="none") * weights).mean() + self.alpha * retained


def weights_retained(groups: ChannelGroups) -> Callable[[Sequence[Tensor]], Tensor]:
    """The share of the source's weights that read and write only channels that are kept."""
    sizes = Allocation(groups, Measure("params"))
    return lambda masks: torch.as_tensor(sizes.amount([mask.sum() for mask in masks]) / sizes.whole)


def kernels_retained(groups: ChannelGroups) -> Callable[[Sequence[Tensor]], Tensor]:
    """The share of the units that are kept: kernels, or the kernels of several layers that can only go together."""
    return lambda masks: torch.cat(list(masks)).mean()


def _linear(outputs: int, answers: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Linear(outputs, answers))


def _sigmoid(outputs: int, answers: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Linear(outputs, 10), nn.ReLU(), nn.Linear(10, answers), nn.Sigmoid())


SEAM = MaskLoss(_linear, weights_retained, alpha=1.0, head_lr=0.1)
GRADSPLITTER = MaskLoss(_sigmoid, kernels_retained, alpha=0.1, head_lr=0.01)


class _Sign(torch.autograd.Function):
    """1 above zero and else 0; the gradient passes, clipped to -1 and 1."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (values > 0).to(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return F.hardtanh(gradient)


def masks_of(values: Sequence[Tensor]) -> list[Tensor]:
    """The mask of each group for its values, differentiable; the highest value counts as one, since a group cannot go.

    Examples
    --------
    >>> masks_of([torch.tensor([0.5, -1.0]), torch.tensor([-1.0, -2.0])])
    [tensor([1., 0.]), tensor([1., 0.])]
    """
    masks: list[Tensor] = []
    for value in values:
        mask = _Sign.apply(value)
        masks.append(mask + F.one_hot(value.detach().argmax(), len(value)).to(mask) * (1 - mask.detach()))
    return masks


def learned_values(problem: SubProblem, loss: MaskLoss, recipe: Recipe) -> list[Tensor]:
    """One value per unit, group by group: the higher, the more the sub-problem needs it. ``recipe.lr`` is the mask's.

    Raises
    ------
    FitError
        If the loss is not finite.
    """
    groups = problem.groups
    gated, retained = Gated(groups), loss.retained(groups)
    samples = problem.train
    weights = problem.weights(samples.labels)
    values = [torch.ones(size, device=samples.images.device, requires_grad=True) for size in gated.sizes]
    with seeded(recipe.seed, samples.images.device):
        head = loss.head(problem.outputs, problem.answers).to(samples.images.device)
    optimizer = torch.optim.Adam(
        [{"params": values, "lr": recipe.lr}, {"params": list(head.parameters()), "lr": loss.head_lr}]
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        chosen = drawn(weights, recipe.batch_size, generator)
        images, labels = samples.images[chosen], samples.labels[chosen]
        if problem.augment is not None:
            images = problem.augment(images, generator)
        alone = step < HEAD_ALONE * recipe.steps
        masks = masks_of([value.detach() for value in values] if alone else values)
        outputs = head(gated(gate_vector(masks), images))
        value = loss.value(outputs, labels, torch.ones_like(weights[chosen]), retained(masks))
        if not torch.isfinite(value):
            raise FitError(f"mask: the loss is {value.item()} at step {step}; lower the learning rate {recipe.lr}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return [value.detach() for value in values]


def module_of_values(
    problem: SubProblem, loss: MaskLoss, values: Sequence[Tensor], keep: float, recipe: Recipe
) -> Part:
    """The slim network of the highest values that a share of the MACs allows, with the source's weights and a new head.

    Raises
    ------
    ArgumentError
        If the budget cannot be reached.
    """
    groups = problem.groups
    flags = Allocation(groups, Measure("macs")).exact_flags(values, keep)
    kept = {group.name: flag.tolist() for group, flag in zip(groups.groups, flags, strict=True)}
    body = slim_down(groups, ChannelMask.from_kept(groups, kept), None).graph_module
    samples = problem.train
    logits, weights = predict(body, samples.images), problem.weights(samples.labels)
    with seeded(recipe.seed, logits.device):
        head = loss.head(problem.outputs, problem.answers).to(samples.images.device)
    optimizer = torch.optim.Adam(head.parameters(), loss.head_lr)
    for _ in range(HEAD_STEPS):
        value = loss.value(head(logits), samples.labels, weights, logits.new_zeros(()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return Part(body, head)
