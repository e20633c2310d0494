"""kernel_modulation(problem, recipe): one learned multiplier per kernel of the frozen target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netclone.baselines.problems import Problem, Recipe, classifier
from netclone.baselines.training import train_on
from netclone.errors import ArgumentError


class Modulator(nn.Module):
    """Multiplies kernel ``weight[o, i]`` by ``(1 + a[o]) (1 + b[i])``: ``out + in`` weights a layer, initially zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rest = (1,) * (weight.dim() - 2)
        self.a = nn.Parameter(weight.new_zeros(weight.shape[0], 1, *rest))
        self.b = nn.Parameter(weight.new_zeros(1, weight.shape[1], *rest))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.a) * (1 + self.b)


def kernel_modulation(problem: Problem, recipe: Recipe) -> nn.Module:
    """The extended target with every kernel scaled, and a new classifier; everything else is frozen.

    From the paper's abstract is that light modulators, which have another 1.4% of the weights, adapt the kernels of all
    layers. Their form was not at hand. Here a layer's modulator is the cheapest that still treats each kernel
    separately: a factor per output channel times a factor per input channel. It has 0.3% of the weights of a 3x3
    convolution with 64 channels, and 1.4% with 16. Linear layers count as convolutions of size 1. The factors start at
    one and are multiplied into the kernels at the end, so the result is a plain module of the target's kind. Old logits
    change.

    Raises
    ------
    ArgumentError
        If the target has no layer before its classifier.
    FitError
        If training diverges.

    Reference: Hu and Liu, Kernel Modulation: A Parameter-Efficient Method for Training Convolutional Neural Networks
    (ICPR 2022, arXiv 2203.15297).
    """
    model = problem.extended_target(recipe)
    last = classifier(model, problem.columns)[1]
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not last]
    if not layers:
        raise ArgumentError(f"kernel_modulation: {type(model).__name__} has no layer before its classifier")
    modulators = [Modulator(layer.weight.detach()) for layer in layers]
    for layer, modulator in zip(layers, modulators, strict=True):
        parametrize.register_parametrization(layer, "weight", modulator)
    strengths = [parameter for modulator in modulators for parameter in modulator.parameters()]
    train_on(problem, model, recipe, [*strengths, *last.parameters()])
    with torch.no_grad():
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")
    return model
