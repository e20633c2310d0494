"""with_weights(suite, name): the suite vit with a pretrained network as its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netclone.baselines.problems import classifier
from netclone.benchmarking.suites import HALVES, ZOO_SIZE, Network, Suite
from netclone.errors import ArgumentError, OutputError
from netclone.graph.preparing import preparation
from netclone.models.loading import load_model

CLASSES = 1000  # of ImageNet-1k


def with_weights(suite: Suite, name: str) -> Suite:
    """The suite ``vit`` with a network of ImageNet as its target, of whose classifier the old classes' rows stay.

    Parameters
    ----------
    name
        The network and its weights, as :func:`netclone.load_model` takes them: ``"timm/vit_tiny_patch16_224@FILE"``.

    Raises
    ------
    ArgumentError
        If it is another suite, or the network does not end in a linear layer for the classes of ImageNet, or its first
        convolution pads images.
    LoadError
        If there is no such network, or the file does not fit it.
    """
    if suite.name != "vit":
        raise ArgumentError(f"weights: the target of the suite {suite.name} is trained; only vit takes weights")
    model, at, file = name.partition("@")
    shown = (Path(model).name if Path(model).is_file() else model) + at + Path(file).name
    read_target(name, range(1))  # what is wrong with it is said before anything runs
    about = (
        f"Ten classes of Tiny-ImageNet at {ZOO_SIZE} pixels: the target, {shown} of ImageNet, keeps of its classifier "
        "the rows of the first five, and has seen the others; the source, an ImageNet MobileNetV2"
    )
    target = Network(shown, suite.target.build, weights=shown, read=partial(read_target, name))
    return replace(suite, about=about, target=target)


def read_target(name: str, rows: Sequence[int]) -> nn.Module:
    """A network of ImageNet for the images of the suite, with some rows of its classifier.

    Images are normalised for the source. What the network expects instead goes into its first convolution, which is
    exact up to rounding where that does not pad. A vision transformer's positions are resampled to the images' size, as
    timm does it.

    Raises
    ------
    ArgumentError, LoadError
        As :func:`with_weights`.
    """
    model: Any = load_model(name)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=ZOO_SIZE)
    _renormalise(model, name)
    try:
        linear = classifier(model, CLASSES)[1]
    except OutputError as error:
        raise ArgumentError(
            f"weights: '{name}' does not end in a linear layer for the {CLASSES} classes of ImageNet-1k, of which the "
            "target keeps those of its old classes; give weights with that classifier"
        ) from error
    with torch.no_grad():
        linear.weight = nn.Parameter(linear.weight[list(rows)])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[list(rows)])
    linear.out_features = len(rows)
    target: nn.Module = model.eval()
    return target


def _renormalise(model: nn.Module, name: str) -> None:
    """Make the first convolution read ``x`` where it expects ``(x HALVES + HALVES - mean) / std``."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != len(HALVES) or first.groups != 1 or any(_padding(first)):
        raise ArgumentError(
            f"weights: the first convolution of '{name}' pads images, or does not read their {len(HALVES)} channels; "
            "give a ViT or a ConvNeXt"
        )
    wanted = preparation(model)
    half, mean, std = (torch.tensor(values).to(first.weight) for values in (HALVES, wanted.mean, wanted.std))
    with torch.no_grad():
        shift = (first.weight * ((half - mean) / std)[None, :, None, None]).sum((1, 2, 3))
        first.weight.mul_((half / std)[None, :, None, None])
        first.bias = nn.Parameter(shift if first.bias is None else first.bias + shift)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    return (1,) if isinstance(layer.padding, str) else layer.padding
