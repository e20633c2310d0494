"""lwf(problem, recipe): fine-tuning that keeps old logits close to the frozen target's."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.finetuning import finetuned
from netclone.baselines.problems import Problem, Recipe

TEMPERATURE = 2.0


def lwf(problem: Problem, recipe: Recipe) -> nn.Module:
    """Fine-tuning whose loss also has the cross entropy between the target's old logits and the new model's.

    Both are softened by a temperature of 2. ``recipe.distillation`` is the weight of the term (1 in the paper). Unlike
    in the paper, there are samples of old classes too, as for every other method here.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    FitError
        If training diverges.

    Reference: Li and Hoiem, Learning without Forgetting (ECCV 2016, arXiv 1606.09282), equations 2 to 4.
    """
    teacher = copy.deepcopy(problem.target).eval()

    def distillation(images: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher(images) / TEMPERATURE).softmax(1)
        return recipe.distillation * F.cross_entropy(logits[:, : problem.old] / TEMPERATURE, wanted)

    return finetuned(problem, recipe, distillation)
