"""verify(grafted, target, data): compare a named grafted network with its target, in every mode."""

from __future__ import annotations

import torch
from torch import nn

from netclone.cloning.verifying import Verification
from netclone.cloning.verifying import verify as compare
from netclone.errors import ArgumentError
from netclone.files.bundling import is_bundle
from netclone.graph.preparing import preparation
from netclone.graph.tracing import example_input
from netclone.models.loading import load_model, open_target
from netclone.models.reading import read
from netclone.runtime.devices import device_named, model_on

MOST = 9
"""Images to compare on: as many as in the largest batch."""


def verify(
    grafted: str,
    target: str | None = None,
    data: str | None = None,
    *,
    split: str = "validation",
    thorough: bool = False,
    device: str | None = None,
) -> Verification:
    """Compare a grafted network's old logits with its target's, on images or on noise.

    Parameters
    ----------
    grafted, target
        As for :func:`netclone.load_model`. No target: the one that the grafted network's file holds.
    data
        As for :func:`netclone.models.reading.read`. None: noise of the size that the target takes.
    split
        Which part of the data to use, if there are several.
    thorough
        As for :func:`netclone.verify`.
    device
        As for :func:`netclone.evaluate`.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model`, :func:`netclone.models.reading.read` and :func:`netclone.verify`.
    """
    place = device_named(device)
    if target is None and not is_bundle(grafted):
        raise ArgumentError(f"target: '{grafted}' is no file that netclone inject wrote; name its target with --target")
    network = load_model(grafted)
    reference = open_target(grafted).network if target is None else load_model(target)
    images = _images(reference, data, split).to(place)
    return compare(model_on(network, place), model_on(reference, place), images, thorough=thorough)


def _images(target: nn.Module, data: str | None, split: str) -> torch.Tensor:
    given = preparation(target)
    if data is None:
        cfg = getattr(target, "pretrained_cfg", None)
        return example_input(target, None if cfg else torch.zeros(MOST, *given.size).normal_(generator=_seeded()))
    images, _ = next(iter(read(data, given.transform(), split, "data", MOST)))
    return images


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
