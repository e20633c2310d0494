"""lora(problem, recipe): low-rank updates of every layer of the frozen target, merged into its weights at the end."""

from __future__ import annotations

import re

from torch import nn

from netclone.baselines.problems import Problem, Recipe, classifier
from netclone.baselines.training import seeded, train_on
from netclone.errors import ArgumentError

RANK = 8
ALPHA = 16


def lora(problem: Problem, recipe: Recipe) -> nn.Module:
    """The extended target with rank-8 updates on all linear and ungrouped convolution layers, and a new classifier.

    A weight becomes ``W + (alpha / r) B A`` with ``r = 8`` and ``alpha = 16``; ``B`` starts at zero. The classifier is
    trained completely, and everything else (BatchNorm too) is frozen. The updates are merged at the end, so the result
    is a plain module of the target's kind. The paper updates the projections of attention alone, and has no
    convolutions: there ``A`` is a convolution of ``r`` outputs, and ``B`` one of size 1. Old logits change.

    Raises
    ------
    ArgumentError
        If the target has no such layer, or the ``peft`` library is missing.
    FitError
        If training diverges.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022, arXiv 2106.09685), section
    4.1, equation 3.
    """
    try:
        from peft import LoraConfig, get_peft_model  # takes seconds to import
    except ImportError as error:
        raise ArgumentError(f'lora: the peft library is missing ({error}); pip install "netclone[bench]"') from error
    model = problem.extended_target(recipe)
    head, last = classifier(model, problem.columns)
    names = [
        name
        for name, module in model.named_modules()
        if name != head and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    if not names:
        raise ArgumentError(f"lora: {type(model).__name__} has no linear or ungrouped convolution layer to update")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="|".join(map(re.escape, names)))
    with seeded(recipe.seed, problem.train.images.device):
        adapted = get_peft_model(model, config)
    updates = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    train_on(problem, adapted, recipe, [*updates, *last.parameters()])
    return adapted.merge_and_unload().eval()
