"""survey(name) -> Survey: what a named network is to netclone: its input, its classes, and where it can be cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import fx

from netclone.cloning.placing import Place, candidates, passed_over, places
from netclone.errors import NetcloneError, first_line
from netclone.files.bundling import is_plain_checkpoint
from netclone.files.graphdata import unsavable
from netclone.graph.capturing import capture
from netclone.graph.describing import column_names, described
from netclone.graph.preparing import preparation
from netclone.graph.tracing import example_input, logits_node, shape_of, trace
from netclone.models.loading import CHECKPOINTS, PRETRAINED, open_model, weights_digest

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cut:
    """A position of a network: its name, the shape of its features without the batch, and its depth in [0, 1].

    ``tried`` is whether the search of :func:`netclone.clone` tries it; any other can be asked for. ``reason`` is empty,
    or why no clone can be there.
    """

    at: str
    shape: tuple[int, ...]
    depth: float
    tried: bool
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """A network before anything is cloned.

    ``config`` is how it takes its images, by timm's names. ``classes`` are the names of its columns, or their numbers.
    ``weights`` is the digest of its tensors, as a clone's file names it; empty if they were not loaded.
    As a target it has ``positions``, and as a source ``cuts``, both deep to shallow. ``unsavable`` names each node of a
    source whose operator a clone's file cannot hold. ``no_target`` and ``no_source`` are empty, or why it is none.
    """

    model: str
    architecture: str
    parameters: int
    weights: str
    config: dict[str, object]
    classes: tuple[str, ...]
    positions: tuple[Cut, ...]
    cuts: tuple[Cut, ...]
    unsavable: tuple[str, ...]
    no_target: str
    no_source: str


def is_network(name: str) -> bool:
    """Whether a name is that of a network, and not of a clone's file.

    Examples
    --------
    >>> is_network("timm/resnet18"), is_network("herons.safetensors")
    (True, False)
    """
    if os.path.isdir(name):
        return False
    is_file = os.path.isfile(name)
    return (
        is_plain_checkpoint(name)
        or (is_file and Path(name).suffix in CHECKPOINTS[1:])
        or not (is_file or (Path(name).suffix == CHECKPOINTS[0] and "@" not in name))
    )


def survey(name: str) -> Survey:
    """Look at a named network as a target and as a source. No image is needed; timm's weights are not downloaded.

    Raises
    ------
    NetcloneError
        As for :func:`netclone.load_model`.

    Examples
    --------
    >>> found = survey("timm/test_resnet")
    >>> [cut.at for cut in found.positions if cut.tried], found.unsavable
    (['layer4', 'layer3', 'layer2', 'layer1', 'act1'], ())
    """
    weights = None if name.startswith("timm/") and "@" not in name else PRETRAINED
    opened = open_model(name, weights)
    network = opened.network
    example = example_input(network)
    traced, no_target = _unless_refused(lambda: trace(network, example))
    source, no_source = _unless_refused(lambda: capture(network, example))
    graph = traced or source
    width = None if graph is None else shape_of(logits_node(graph))
    count = width[0] if width else getattr(network, "num_classes", 0)
    return Survey(
        model=name,
        architecture=opened.architecture,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        weights="" if weights is None else f"sha256:{weights_digest(network)}",
        config=preparation(network).as_config(),
        classes=column_names(described(network), count) or tuple(map(str, range(count))),
        positions=() if traced is None else _cuts(traced, candidates(traced)),
        cuts=() if source is None else _cuts(source, candidates(source)),
        unsavable=() if source is None else tuple(unsavable(source.graph)),
        no_target=no_target,
        no_source=no_source,
    )


def _unless_refused(make: Callable[[], _T]) -> tuple[_T | None, str]:
    try:
        return make(), ""
    except NetcloneError as error:
        return None, first_line(error)


def _cuts(graph: fx.GraphModule, tried: tuple[Place, ...]) -> tuple[Cut, ...]:
    names = {place.at for place in tried}
    found = [Cut(place.at, place.shape, place.depth, place.at in names) for place in places(graph)]
    found += [Cut(place.at, place.shape, place.depth, False, why) for place, why in passed_over(graph)]
    return tuple(sorted(found, key=lambda cut: -cut.depth))
