"""pcsd(problem, recipe): fine-tuning that keeps pooled features, and old logits, close to the frozen target's."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.distilling import matching, taught
from netclone.baselines.finetuning import stages, unfrozen
from netclone.baselines.problems import InapplicableError, Problem, Recipe
from netclone.baselines.training import train_on

CUBES = (1, 2, 4)
"""Along how many parts the height, the width and the channels are cut into cubes."""


class Watched(nn.Module):
    """A network that remembers the feature maps ``(N, C, H, W)`` that its stages gave for the last images.

    Tokens ``(N, T, C)`` are a map of width 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.maps: dict[str, Tensor] = {}
        self.hooks = [stage.register_forward_hook(partial(self._keep, name)) for name, stage in stages(model)]

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            self.maps[name] = output if output.dim() == 4 else output.transpose(1, 2).unsqueeze(3)

    def forward(self, x: Tensor) -> Tensor:
        self.maps.clear()
        logits: Tensor = self.model(x)
        return logits


def pcsd(problem: Problem, recipe: Recipe) -> nn.Module:
    """Fine-tuning whose loss also has the distance of pooled feature maps to the target's, and LwF's distillation.

    Every stage's map is averaged over cubes, of several sizes, and over strips: over its height, and over its width.
    The distance of one map is the mean squared one over all of these, each divided by the mean square of the target's.
    ``recipe.distillation`` weighs both terms.

    From the paper are what is pooled, cubes and strips of intermediate features, and that old and new network are
    compared on it. It is about the decoder of a network that segments forgeries. Here maps are those of a classifier's
    stages. The numbers of cubes (1, 2 and 4 along height, width and channels) and the scale of the distance are ours.
    Old logits change.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    FitError
        If training diverges.
    InapplicableError
        If no stage of the target gives feature maps.

    Reference: Liu et al., CMFDFormer: Transformer-based Copy-Move Forgery Detection with Continual Learning (arXiv
    2311.13263), the part on pooled cube and strip distillation.
    """
    teacher = Watched(copy.deepcopy(problem.target).eval())
    taught(teacher, problem.train.images[:1])
    if not teacher.maps:
        raise InapplicableError(f"pcsd: no stage of {type(problem.target).__name__} gives feature maps")
    student = problem.extended_target(recipe)
    watched = Watched(student)

    def distillation(images: Tensor, logits: Tensor) -> Tensor:
        wanted = taught(teacher, images)
        pairs = [(watched.maps[name], given) for name, given in teacher.maps.items()]
        pooled = torch.stack([distance(new, old) for new, old in pairs]).mean()
        return recipe.distillation * (pooled + matching(wanted, logits[:, : problem.old]))

    train_on(problem, watched, recipe, unfrozen(problem, student, recipe), distillation)
    for hook in watched.hooks:
        hook.remove()
    return student


def pools(maps: Tensor) -> list[Tensor]:
    """Averages of feature maps ``(N, C, H, W)``: along both axes of the plane, and over cubes of each size.

    Examples
    --------
    >>> strips = pools(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]))
    >>> strips[0].tolist(), strips[1].tolist(), strips[2].tolist()
    ([[[3.0, 5.0]]], [[[2.0, 6.0]]], [[[[4.0]]]])
    """
    depth, height, width = maps.shape[1:]
    sizes = [(min(parts, depth), min(parts, height), min(parts, width)) for parts in CUBES]
    return [maps.mean(2), maps.mean(3), *(F.adaptive_avg_pool3d(maps, size) for size in sizes)]


def distance(new: Tensor, old: Tensor) -> Tensor:
    """The mean over all pools of the mean squared distance, relative to the mean square of the old one."""
    pairs = zip(pools(new), pools(old), strict=True)
    return torch.stack([(a - b).square().mean() / b.square().mean().clamp_min(1e-12) for a, b in pairs]).mean()
