"""stages(grafted, name), branch(module): both networks as a few stages; rows(module): cloned units of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from netclone.cloning.grafted import own_logits, own_nodes, read_by
from netclone.cloning.modules import CloneModule
from netclone.graph.capturing import FACTS, tensor_at
from netclone.graph.tracing import shape_of

ADAPTER, CLASSIFIER = "adapter", "classifier"


@dataclass(frozen=True)
class Stage:
    """A part of a graph: its module paths, its nodes, its output shape and its parameters.

    ``kind`` is ``"target"``, ``"source"`` or ``"trained"`` (adapter, classifier).
    """

    kind: str
    paths: tuple[str, ...]
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int

    @property
    def label(self) -> str:
        """The stage in words."""
        first, last = self.paths[0], self.paths[-1]
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class Row:
    """A layer (or block) of the source: its cloned units, and all its units."""

    label: str
    kept: int
    total: int


def stages(grafted: fx.GraphModule, name: str, most: int) -> tuple[Stage, ...]:
    """The target's part of a grafted graph in at most ``most`` stages; one of them ends at the clone's tap.

    A clone at the input has its tap before the first stage, so that no stage ends there.
    """
    own, tap, features = reads(grafted, name)
    positions = grafted.meta[FACTS]["positions"]
    order = {node.name: index for index, node in enumerate(own)}
    names: dict[str, str] = {}

    def call(node: str, path: str) -> None:
        """Name a node, unless it has a better name (fewer dots, then fewer letters)."""
        if node not in names or (path.count("."), len(path)) < (names[node].count("."), len(names[node])):
            names[node] = path

    for path, node in positions.items():
        if node in order and (_is_stage(path, positions) or node == tap.name):
            call(node, path)
    logits = own_logits(grafted)
    for last in [tap, logits] if features is None else [tap, features, logits]:
        if last.name not in names and last.name in order:
            named = [path for path, node in positions.items() if node == last.name]
            call(last.name, min(named, key=len) if named else last.name)
    found = []
    start = 0
    for end in sorted(names, key=order.__getitem__):
        shape = shape_of(own[order[end]])
        if shape is not None:
            stretch, start = own[start : order[end] + 1], order[end] + 1
            inside = tuple(node.name for node in stretch)
            found.append(Stage("target", (names[end],), inside, shape, _parameters(grafted, stretch)))
    keep = {tap.name, logits.name} | ({features.name} if features is not None else set())
    return merged(found, keep, most)


def branch(module: CloneModule, shapes: Mapping[str, tuple[int, ...] | None], most: int) -> tuple[Stage, ...]:
    """The parts of a clone in order (adapter, blocks of the source, classifier), given the shapes of its nodes.

    A node belongs to the module whose tensors it reads, or else to the module of its last argument.
    """
    found = []
    for (trained, label), inside in _stretches(module).items():
        sizes = [shape for node in inside if (shape := shapes.get(node.name)) is not None]
        nodes = tuple(node.name for node in inside)
        tensors = [given for node in inside for given in node.all_input_nodes if given.op == "get_attr"]
        kind, shape = "trained" if trained else "source", sizes[-1] if sizes else ()
        found.append(Stage(kind, (label,), nodes, shape, _parameters(module.body, tensors)))
    return merged(found, {stage.nodes[-1] for stage in found if stage.kind == "trained"}, most)


def rows(module: CloneModule, most: int) -> tuple[Row, ...]:
    """The units that a clone holds of each of the source's layers, in order; 0 for a layer before the cut.

    Layers are the groups of ``module.spec.kept``; those of a block are summed if there are more than ``most``.
    """
    held = [key.removeprefix("body.").removeprefix("body.") for key in module.state_dict()]
    found: list[Row] = []
    for group, kept, total in module.spec.kept:
        plain = group.split("#")[0]
        inside = any(key == plain or key.startswith(f"{plain}.") for key in held)
        found.append(Row(group, kept if inside else 0, total))
    depth = max((row.label.count(".") for row in found), default=0)
    while len(found) > most and depth >= 0:
        summed: dict[str, Row] = {}
        for row in found:
            label = ".".join(row.label.split(".")[: depth + 1])
            before = summed.get(label, Row(label, 0, 0))
            summed[label] = Row(label, before.kept + row.kept, before.total + row.total)
        found, depth = list(summed.values()), depth - 1
    if len(found) > most:
        rest = found[most - 1 :]
        label = f"and {len(rest)} more"
        found = [*found[: most - 1], Row(label, sum(row.kept for row in rest), sum(row.total for row in rest))]
    return tuple(found)


def kept(module: CloneModule, stage: Stage) -> float | None:
    """The share of the source's units that a stage of a clone holds; None if it does not come from the source."""
    own = [row for row in rows(module, 10**6) if any(_is_within(row.label, path) for path in stage.paths)]
    return sum(row.kept for row in own) / sum(row.total for row in own) if own and stage.kind == "source" else None


def reads(grafted: fx.GraphModule, name: str) -> tuple[list[fx.Node], fx.Node, fx.Node | None]:
    """The target's own nodes, the one that a clone taps, and the node of its second input, if any."""
    nodes = own_nodes(grafted)
    own = [node for node in nodes[: nodes.index(own_logits(grafted)) + 1] if node.op != "placeholder"]
    tap, *features = read_by(grafted, name)
    return own, tap, features[0] if features else None


def merged(found: list[Stage], keep: set[str], most: int) -> tuple[Stage, ...]:
    """Join neighbours: first a layer with its norm, then those that differ least, until ``most`` are left.

    A stage whose last node is in ``keep`` ends where it is.
    """

    def price(index: int) -> tuple[bool, int]:
        first, second = found[index], found[index + 1]
        return first.shape != second.shape, min(first.parameters, second.parameters)

    while True:
        free = [index for index in range(len(found) - 2) if found[index].nodes[-1] not in keep]
        light = [i for i in free if not price(i)[0] and price(i)[1] <= 4 * max(found[i].shape, default=0)]
        if not light and (len(found) <= most or not free):
            return tuple(found)
        index = light[0] if light else min(free, key=price)
        first, second = found[index], found[index + 1]
        paths, nodes = first.paths + second.paths, first.nodes + second.nodes
        total = first.parameters + second.parameters
        found[index : index + 2] = [replace(second, paths=paths, nodes=nodes, parameters=total)]


def _is_stage(path: str, positions: Mapping[str, str]) -> bool:
    """Whether a path is a top-level module, or one of several blocks in a top-level sequence."""
    top, *below = path.split(".")
    if not below:
        return True
    siblings = {other.split(".")[1] for other in positions if other.startswith(f"{top}.")}
    return (
        len(below) == 1
        and all(sibling.isdigit() for sibling in siblings)
        and len(siblings) > 1
        and any(other.startswith(f"{path}.") for other in positions)
    )


def _parameters(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> int:
    """The number of parameters that some nodes hold; one that is held twice counts once."""
    found: dict[int, torch.Tensor] = {}
    for node in nodes:
        if node.op == "call_module":
            found.update({id(p): p for p in graph.get_submodule(str(node.target)).parameters()})
        elif node.op == "get_attr":
            value = tensor_at(graph, str(node.target))
            found[id(value)] = value
    return sum(tensor.numel() for tensor in found.values() if isinstance(tensor, nn.Parameter))


_Key = tuple[bool, str]  # whether it was fitted to the target, and its name


def _stretches(module: CloneModule) -> dict[_Key, list[fx.Node]]:
    """The computing nodes of a clone by the part that they belong to, with the classifier last."""
    last: _Key = (True, CLASSIFIER)
    tensors = {node: str(node.target) for node in module.body.graph.nodes if node.op == "get_attr"}
    own = [_in_source(module, name) for name in tensors.values() if module.part_of(name) == "source"]
    common = _common([name.split(".")[:-1] for name in own])
    inputs = [node for node in module.body.graph.nodes if node.op == "placeholder"]
    place: dict[fx.Node, _Key | None] = {node: last if node is not inputs[0] else None for node in inputs}
    for node in module.body.graph.nodes:
        if node in tensors:
            place[node] = _key(module, tensors[node], common)
        elif node.op not in ("placeholder", "output"):
            held = [place[given] for given in node.all_input_nodes if given in tensors and place[given] is not None]
            passed = [place[given] for given in node.all_input_nodes if given not in tensors]
            known = [key for key in passed if key is not None]
            place[node] = last if last in known else held[0] if held else known[-1] if known else None
    computing = {node: key for node, key in place.items() if node not in tensors and node not in inputs}
    first = next((key for key in computing.values() if key is not None), (False, "source"))
    found: dict[_Key, list[fx.Node]] = {}
    for node, key in computing.items():
        found.setdefault(first if key is None else key, []).append(node)
    if last in found:
        found[last] = found.pop(last)
    return found


def _common(paths: Sequence[list[str]]) -> int:
    """The number of leading parts that all module paths share; paths without parts are ignored."""
    levels = list(zip(*(path for path in paths if path), strict=False))
    return next((depth for depth, level in enumerate(levels) if len(set(level)) > 1), len(levels))


def _in_source(module: CloneModule, tensor: str) -> str:
    """The name that a tensor of the source's part had in the source."""
    return tensor if module.spec.feature_shape is None else tensor.partition(".")[2]


def _key(module: CloneModule, tensor: str, common: int) -> _Key:
    """The adapter, classifier or source block of a tensor, by its name without its ``common`` leading parts."""
    if (part := module.part_of(tensor)) != "source":
        return True, part
    parts = _in_source(module, tensor).split(".")
    deep = common + 2 if len(parts) > common + 1 and parts[common + 1].isdigit() else common + 1
    return False, ".".join(parts[:deep])


def _is_within(group: str, label: str) -> bool:
    """Whether a group of channels belongs to a block."""
    return f"{group.split('#')[0]}.".startswith(f"{label}.")
