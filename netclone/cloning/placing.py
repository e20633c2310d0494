"""Where a clone can go: cut points of source and target, how they match, and the features at them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from netclone.errors import AdapterError, NetcloneError, PositionError, first_line
from netclone.graph.capturing import FACTS
from netclone.graph.tracing import no_batch, shape_of
from netclone.learning.adapting import grid_of
from netclone.runtime.sharing import ALONE, Workers
from netclone.runtime.text import as_plain_text


@dataclass(frozen=True)
class Place:
    """A position that every path from input to output passes: its name, node, shape and relative depth in [0, 1]."""

    at: str
    node: str
    shape: tuple[int, ...]
    depth: float


def places(graph_module: fx.GraphModule) -> tuple[Place, ...]:
    """The named cut points of a graph with one feature map or token tensor, shallow to deep.

    A cut point is a node that every path from the input to the output passes (a dominator of the output).

    Examples
    --------
    >>> import timm, netclone
    >>> [place.at for place in places(netclone.trace(timm.create_model("test_resnet")))][-4:]
    ['layer1', 'layer2', 'layer3', 'layer4']
    """
    found = _cut_points(graph_module)
    return tuple(place for place, why in found if why is None and math.prod(place.shape) > max(place.shape))


def passed_over(graph_module: fx.GraphModule) -> tuple[tuple[Place, str], ...]:
    """The named cut points at which no clone can be, deep to shallow, with the reason.

    There the first axis is not the batch, or no adapter exists for the features (volumes). Cut points inside another
    one are not listed.
    """
    found = [(place, why) for place, why in reversed(_cut_points(graph_module)) if why is not None]
    outer = {place.at for place, _ in found}
    return tuple((place, why) for place, why in found if outer.isdisjoint(_around(place.at)))


def _around(path: str) -> set[str]:
    """The paths of the modules that a module is in."""
    parts = path.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def _cut_points(graph_module: fx.GraphModule) -> list[tuple[Place, str | None]]:
    """The named nodes that every path passes, shallow to deep, and why no clone can be there (None if one can)."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    flow = nx.DiGraph((source, node) for node in order for source in node.all_input_nodes if _carries_features(source))
    start = next(node for node in order if node.op == "placeholder")
    output = next(node for node in order if node.op == "output")
    if start not in flow or output not in flow:
        return []
    above = nx.immediate_dominators(flow, start)
    chain: list[fx.Node] = []
    node = above.get(output)
    while node is not None and node is not start:
        chain.append(node)
        node = above.get(node)
    names = _names(graph_module)
    found = []
    for node in reversed(chain):
        shape = shape_of(node)
        if node.name in names and shape:
            place = Place(names[node.name], node.name, shape, order[node] / len(order))
            found.append((place, no_batch(graph_module, node) or _not_adapted(shape)))
    return found


def _not_adapted(shape: tuple[int, ...]) -> str | None:
    try:
        grid_of(shape)
    except AdapterError as error:
        return str(error)
    return None


def candidates(graph_module: fx.GraphModule, most: int = 8) -> tuple[Place, ...]:
    """Places worth trying, deepest first: the ends of stages, or evenly spaced blocks if nothing is resized.

    A stage is the part that works on one grid size; its end is the last place outside any smaller module. Networks of
    fewer than three stages (plain transformers) give at most ``most`` evenly spaced places.
    """
    deepest_first = places(graph_module)[::-1]
    stages: dict[int, list[Place]] = {}
    for place in deepest_first:
        grid = grid_of(place.shape)
        stages.setdefault(grid.height * grid.width, []).append(place)
    if len(stages) >= 3:
        return tuple(min(stage, key=lambda place: place.at.count(".")) for stage in stages.values())
    blocks: dict[str, Place] = {}
    for place in deepest_first:
        blocks.setdefault(".".join(place.at.split(".")[:2]), place)
    chosen = list(blocks.values())
    if len(chosen) > most:
        step = (len(chosen) - 1) / (most - 1)
        chosen = [chosen[round(i * step)] for i in range(most)]
    return tuple(chosen)


def matching(place: Place, source: Sequence[Place], unfit: Sequence[tuple[Place, str]] = ()) -> Place:
    """The source's cut point that fits a target position: similar in grid size and relative depth.

    ``unfit`` are the source's cut points that cannot be used, with the reason.

    Raises
    ------
    PositionError
        If the source has no cut point.
    """
    if not source:
        reasons = "".join(f"; '{other.at}' cannot be used: {why}" for other, why in unfit)
        raise PositionError(
            f"the source has no named position of maps or tokens that all its paths pass{reasons}; give source_at=..., "
            "or at='input' to run the whole source beside the target"
        )

    def distance(other: Place) -> float:
        a, b = grid_of(place.shape), grid_of(other.shape)
        ratio = math.log2(max(1, a.height * a.width) / max(1, b.height * b.width)) / 2
        return abs(ratio) + abs(place.depth - other.depth)

    return min(source, key=distance)


def features_at(
    graph_module: fx.GraphModule, images: Tensor, nodes: Sequence[str], batch_size: int, workers: Workers = ALONE
) -> dict[str, Tensor]:
    """The values of the named nodes for all images, computed in one pass up to the last of them, without gradient.

    Each of several workers takes whole batches, so the result is the same to the bit.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in nodes}
    batches = images.split(batch_size)
    team = workers.team(len(batches))
    with torch.no_grad():
        for part in batches[team.own(len(batches))]:
            recorder = _Recorder(graph_module, set(nodes))
            with contextlib.suppress(_AllSeen):
                recorder.run(part)
            for name in nodes:
                kept[name].append(recorder.seen[name])
    return {name: team.joined(torch.cat(parts)) for name, parts in kept.items()}


def reason(error: NetcloneError) -> str:
    """Why a candidate was rejected, in one line."""
    return as_plain_text(f"{type(error).__name__}: {first_line(error)}")


class _AllSeen(Exception):
    """Raised when every wanted node has been computed, so that the rest of the graph does not run."""


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if len(self.seen) == len(self.wanted):
            raise _AllSeen
        out = super().run_node(n)
        if n.name in self.wanted:
            assert isinstance(out, Tensor)
            self.seen[n.name] = out.clone()  # a later node may write into it
        return out


def _carries_features(node: fx.Node) -> bool:
    """Whether a node's value is activations: neither a parameter nor a size."""
    return node.op != "get_attr" and (
        "tensor_meta" in node.meta or isinstance(node.meta.get("val"), (Tensor, list, tuple))
    )


def _names(graph_module: fx.GraphModule) -> dict[str, str]:
    """Node name to the shortest module path that returns it."""
    found: dict[str, str] = {}
    for path, node in graph_module.meta.get(FACTS, {}).get("positions", {}).items():
        if node not in found or (path.count("."), len(path)) < (found[node].count("."), len(found[node])):
            found[node] = path
    return found
