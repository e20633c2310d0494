"""lwf(problem, recipe), distilled(problem, recipe): fine-tuning with a teacher, the target or both networks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.finetuning import finetuned
from netclone.baselines.frozen import gated_ensemble
from netclone.baselines.problems import Problem, Recipe

TEMPERATURE = 2.0


def lwf(problem: Problem, recipe: Recipe) -> nn.Module:
    """Fine-tuning whose loss also has the cross entropy between the target's old logits and the new model's.

    Both are softened by a temperature of 2. ``recipe.distillation`` is the weight of the term (1 in the paper). Unlike
    in the paper, there are samples of old classes too, as for every other method here. Old logits change.

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
        return recipe.distillation * matching(taught(teacher, images), logits[:, : problem.old])

    return finetuned(problem, recipe, distillation)


def distilled(problem: Problem, recipe: Recipe) -> nn.Module:
    """Fine-tuning whose loss also has the cross entropy between a teacher's logits and the new model's.

    The teacher runs both networks: its old logits are the target's and its new ones the source's, gated
    (:func:`netclone.baselines.frozen.gated_ensemble`). It sees every batch as the student does, augmented. Logits are
    softened by a temperature of 2, and the term is multiplied by its square, as in the paper. ``recipe.distillation``
    is the weight of the term beside the labels' cross entropy. The paper has one teacher for all classes, and a student
    that starts at random; here it starts as the extended target. Old logits change.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    FitError
        If training diverges.
    OutputError
        If target or source does not end in a linear layer.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2,
    equation 1 (softened logits).
    """
    teacher = gated_ensemble(problem, recipe)

    def distillation(images: Tensor, logits: Tensor) -> Tensor:
        return recipe.distillation * TEMPERATURE**2 * matching(taught(teacher, images), logits)

    return finetuned(problem, recipe, distillation)


def taught(teacher: nn.Module, images: Tensor) -> Tensor:
    """A teacher's logits ``(N, classes)``, without gradient."""
    with torch.no_grad():
        logits: Tensor = teacher(images)
    return logits


def matching(wanted: Tensor, logits: Tensor) -> Tensor:
    """The mean cross entropy between a teacher's logits ``(N, classes)`` and a student's, both softened."""
    return F.cross_entropy(logits / TEMPERATURE, (wanted / TEMPERATURE).softmax(1))
