"""Refitting the layers that read removed channels, one by one, by least squares to the full source's outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from netclone.channels.slimming import Resizer
from netclone.graph.calls import arguments, call
from netclone.graph.capturing import tensor_at
from netclone.graph.operators import kind_of
from netclone.learning.data import Samples
from netclone.runtime.sharing import ALONE, Workers

RIDGE = 1e-4  # of the mean square of the inputs
ROWS = 200  # equations per unknown that are enough; a larger map's further positions are skipped
BATCH = 64  # images per step
IN_MEMORY = 2**31  # bytes of features held in memory; further ones go to unnamed temporary files


def reconstruct_slim(
    full: fx.GraphModule,
    slimmed: fx.GraphModule,
    new: Resizer,
    samples: Samples,
    at: str | None,
    in_memory: int = IN_MEMORY,
    workers: Workers = ALONE,
) -> None:
    """Refit every convolution and linear layer of the slim graph that lost inputs, in place, group by group.

    Both graphs run side by side, node by node and batch by batch. A layer that reads fewer channels than before gets
    the weight and bias of a ridge regression (normal equations summed in float64) from its inputs in the slim network,
    after all earlier refits, to its outputs in the full one. A constant that took the place of a layer becomes the mean
    of that layer's outputs in the full network, and dense layers behind it are refitted whether or not they lost
    inputs. Behind a cut at ``at`` the slim network starts from the full one's features. Only features that a later node
    still reads are held, and at most ``in_memory`` bytes of them in memory, however many samples there are. Each of
    several workers takes whole batches. Their equations are summed, and each worker solves them.
    """
    twins = {node.name: node for node in slimmed.graph.nodes}
    batches = samples.images.split(BATCH)
    team = workers.team(len(batches))
    own = team.own(len(batches))
    batches = batches[own]
    ops = {node.name: node.op for node in full.graph.nodes}
    held = _Held(in_memory)
    wide: dict[str, list[Any]] = {}
    slim: dict[str, list[Any]] = {}
    reads = {node: _names_read(node, ops) | _names_read(twins.get(node.name), ops) for node in full.graph.nodes}
    last_use = {name: node for node, names in reads.items() for name in names}
    moved: set[str] = set()  # nodes with other values than in the full network, because a constant took a layer's place
    behind = at is None  # the cut: earlier nodes are not part of the slim network
    with torch.no_grad():
        for node in full.graph.nodes:
            if node.op == "output":
                break
            twin = twins.get(node.name)  # None: the slim network does without it
            keep = held.keep if node.op == "call_function" else _as_it_is  # weights are refitted where they lie
            wide[node.name] = [keep(_run(full, node, wide, i, images)) for i, images in enumerate(batches)]
            if twin is not None and behind and node.op == "call_function":
                if twin.op == "get_attr":
                    _refit_constant(tensor_at(slimmed, str(twin.target)), wide[node.name], new, node, team)
                    moved.add(node.name)
                elif _lost_inputs(new, node) or _reads_moved(new, node, moved):
                    _refit(slimmed, twin, slim, wide[node.name], new, node, own.start, team)
                if any(used.name in moved for used in twin.all_input_nodes):
                    moved.add(node.name)
            if node.name == at:
                behind = True
                slim[node.name] = [held.keep(_narrowed(new, node, value)) for value in wide[node.name]]
            elif twin is not None and (behind or node.op == "get_attr"):
                slim[node.name] = [keep(_run(slimmed, twin, slim, i, images)) for i, images in enumerate(batches)]
            else:  # read later, if at all, only for its sizes
                slim[node.name] = wide[node.name]
            for name in reads[node]:
                if last_use[name] is node:
                    seen = wide.pop(name), slim.pop(name)
                    if ops[name] == "call_function":
                        held.drop(seen[0])
                        if seen[1] is not seen[0]:
                            held.drop(seen[1])


class _Held:
    """Features that are still needed: in memory up to a limit, beyond it in files that vanish with the tensor."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    def keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().filename is not None:
            return value
        size = value.nbytes
        if value.device.type != "cpu" or self.bytes + size <= self.limit:
            self.bytes += size
            return value
        with tempfile.NamedTemporaryFile(prefix="netclone-features-") as file:
            moved = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
        return moved.view(value.shape).copy_(value)

    def drop(self, values: list[Any]) -> None:
        self.bytes -= sum(v.nbytes for v in values if isinstance(v, Tensor) and v.untyped_storage().filename is None)


def _as_it_is(value: Any) -> Any:
    return value


def _run(graph_module: fx.GraphModule, node: fx.Node, known: dict[str, list[Any]], batch: int, images: Tensor) -> Any:
    if node.op == "placeholder":
        return images
    if node.op == "get_attr":
        return tensor_at(graph_module, str(node.target))

    def value(used: fx.Node) -> Any:
        if used.name in known:
            return known[used.name][batch]
        return _run(graph_module, used, known, batch, images)  # of the slim network alone, such as a pad with zeros

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    return call(node, args, kwargs)


def _lost_inputs(new: Resizer, node: fx.Node) -> bool:
    if kind_of(node.target) not in ("convolution", "linear"):
        return False
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    if len(weight.users) > 1:  # a refit for one reader would change the outputs of another
        return False
    return not bool(new.kept_slices(str(weight.target), 1).all())


def _reads_moved(new: Resizer, node: fx.Node, moved: set[str]) -> bool:
    """Whether a dense layer, of which no other node reads the weight, reads values that have moved."""
    if kind_of(node.target) not in ("convolution", "linear"):
        return False
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    dense = (str(weight.target), 1) in new.labelling.slots
    return dense and len(weight.users) == 1 and source.name in moved


def _names_read(node: fx.Node | None, full: Mapping[str, str]) -> set[str]:
    """The names of the full network's nodes that a node reads, perhaps through nodes of the slim one alone."""
    if node is None:
        return set()
    return set[str]().union(*({u.name} if u.name in full else _names_read(u, full) for u in node.all_input_nodes))


def _refit_constant(constant: Tensor, want: list[Any], new: Resizer, node: fx.Node, team: Workers) -> None:
    """Set the constant that took the place of a node to the mean of what the full source computes there."""
    aligned = [1] * (want[0].dim() - constant.dim()) + list(constant.shape)
    axes = [axis for axis, size in enumerate(aligned) if size == 1]
    total, count = (constant.new_zeros(shape, dtype=torch.float64) for shape in (constant.shape, ()))
    for value in want:
        narrowed = _narrowed(new, node, value)
        total += narrowed.double().sum(axes).reshape(constant.shape)
        count += narrowed.numel() // max(1, constant.numel())
    team.add([total, count])
    if bool(torch.isfinite(total).all()) and float(count):
        constant.copy_(total / count)


def _narrowed(new: Resizer, node: fx.Node, value: object) -> Tensor:
    assert isinstance(value, Tensor)
    for axis in range(1, value.dim()):
        kept = new.kept_along(node, axis)
        if not bool(kept.all()):
            value = value.index_select(axis, kept.nonzero().flatten().to(value.device))
    return value


def _refit(
    slimmed: fx.GraphModule,
    twin: fx.Node,
    slim: dict[str, list[Any]],
    want: list[Any],
    new: Resizer,
    node: fx.Node,
    first: int,
    team: Workers,
) -> None:
    weight_node, bias_node = twin.args[1], twin.args[2] if len(twin.args) > 2 else None
    assert isinstance(weight_node, fx.Node) and isinstance(twin.args[0], fx.Node)
    weight = tensor_at(slimmed, str(weight_node.target))
    axes = weight.dim() - 2  # that a convolution moves along; a linear layer has none
    groups = int(arguments(twin)[6]) if len(twin.args) > 6 else 1
    size, width = weight[0].numel() + (bias_node is not None), len(weight) // groups
    gram = torch.zeros(groups, size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(groups, size, width, dtype=torch.float64, device=weight.device)
    values = torch.tensor(sum(value.numel() for value in want))
    team.add([values])
    total = int(values) // want[0].shape[1 if axes else -1]
    stride = 1
    while axes and total // (stride + 1) ** axes >= ROWS * size:
        stride += 1
    for number, (given, wanted) in enumerate(zip(slim[twin.args[0].name], want, strict=True), first):
        parts = given.chunk(groups, 1), _narrowed(new, node, wanted).chunk(groups, 1)
        for group, (inputs, targets) in enumerate(zip(*parts, strict=True)):
            if axes:
                inputs, targets = _patches(twin, inputs, targets, weight, stride, number)
            rows = inputs.reshape(-1, weight[0].numel())
            if bias_node is not None:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            gram[group] += rows.T @ rows  # summed in float64
            cross[group] += rows.T @ targets.reshape(-1, width)
    team.add([gram, cross])
    old = weight.reshape(len(weight), -1).double()
    if bias_node is not None:
        assert isinstance(bias_node, fx.Node)
        old = torch.cat([old, tensor_at(slimmed, str(bias_node.target)).double().unsqueeze(1)], 1)
    solution = torch.cat([_ridge(*equations) for equations in zip(gram, cross, old.split(width), strict=True)])
    if not bool(torch.isfinite(solution).all()):
        return  # the plain copy stays, since these samples determine nothing
    if bias_node is not None:
        tensor_at(slimmed, str(bias_node.target)).copy_(solution[:, -1])
        solution = solution[:, :-1]
    weight.copy_(solution.reshape(weight.shape))


def _ridge(gram: Tensor, cross: Tensor, old: Tensor) -> Tensor:
    """Solve normal equations, regularised towards the old rows ``(b, a)``."""
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + ridge, cross + ridge @ old.T)
    return solution.T


def _patches(
    twin: fx.Node, inputs: Tensor, targets: Tensor, weight: Tensor, every: int, number: int
) -> tuple[Tensor, Tensor]:
    """A convolution's inputs ``(N, L, a)`` and wanted outputs ``(N, L, b)`` on a grid of every n-th position.

    The grid starts at another offset in every batch, so that all positions count.
    """
    kernel, axes = weight.shape[2:], weight.dim() - 2
    given = list(arguments(twin)[3:6])
    strides, padding, dilations = given + [[1] * axes, [0] * axes, [1] * axes][len(given) :]
    if padding == "same":
        around = [reach * (size - 1) for reach, size in zip(dilations, kernel, strict=True)]
    else:
        around = [0] * axes if padding == "valid" else [2 * amount for amount in padding]
    inputs = F.pad(inputs, [side for total in reversed(around) for side in (total // 2, total - total // 2)])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
        start = number % min(every, targets.shape[axis])
        number //= every
        targets = targets[(slice(None),) * axis + (slice(start, None, every),)]
        inputs = inputs[(slice(None),) * axis + (slice(start * stride, None),)]
        inputs = inputs.unfold(axis, dilation * (size - 1) + 1, stride * every)[..., ::dilation]
    places = inputs.movedim(1, 1 + axes).flatten(1, axes).flatten(2)  # (N, L, a * kernel)
    return places, targets.flatten(2).transpose(1, 2)
