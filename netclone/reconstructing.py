"""Refitting what reads removed channels: layer by layer least squares to what the full source computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from netclone.capturing import arguments, call, tensor_at
from netclone.data import Samples
from netclone.slimming import Resizer

aten = torch.ops.aten
RIDGE = 1e-4  # of the mean square of the inputs


def reconstruct_slim(
    full: fx.GraphModule, slimmed: fx.GraphModule, new: Resizer, samples: Samples, at: str | None
) -> None:
    """Refit, in place, every dense convolution and linear layer of the slim graph that lost inputs.

    Both graphs run side by side, node by node. Where a layer reads fewer channels than before, its weight and bias
    become the ridge solution (float64) that maps what the slim network sees there, after all earlier refits, to
    what the full network computes. Behind a cut at ``at`` the slim network starts from the full one's features.
    """
    twins = {node.name: node for node in slimmed.graph.nodes}
    wide: dict[fx.Node, Any] = {}
    slim: dict[str, Any] = {}
    last_use = {n: node for node in full.graph.nodes for n in node.all_input_nodes}
    with torch.no_grad():
        for node in full.graph.nodes:
            if node.op == "output":
                break
            wide[node] = _run(full, node, wide, samples.images)
            twin = twins[node.name]
            if node.op == "call_function" and node.name != at and _lost_inputs(new, node):
                _refit(slimmed, twin, slim, wide[node], new, node)
            if node.name == at:
                slim[node.name] = _narrowed(new, node, wide[node])
            else:
                slim[node.name] = _run(
                    slimmed, twin, {t: slim.get(t.name) for t in twin.all_input_nodes}, samples.images
                )
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    del wide[used], slim[used.name]


def _run(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], images: Tensor) -> Any:
    if node.op == "placeholder":
        return images
    if node.op == "get_attr":
        return tensor_at(graph_module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    return call(node, args, kwargs)


def _lost_inputs(new: Resizer, node: fx.Node) -> bool:
    if node.target not in (aten.conv2d.default, aten.linear.default):
        return False
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    groups = arguments(node)[6] if len(node.args) > 6 else 1
    return bool(groups == 1) and not bool(new.kept_slices(str(weight.target), 1).all())


def _narrowed(new: Resizer, node: fx.Node, value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    for axis in range(1, value.dim()):
        kept = new.kept_along(node, axis)
        value = value.index_select(axis, kept.nonzero().flatten().to(value.device))
    return value


def _refit(
    slimmed: fx.GraphModule, twin: fx.Node, slim: dict[str, Any], want: Any, new: Resizer, node: fx.Node
) -> None:
    weight_node, bias_node = twin.args[1], twin.args[2] if len(twin.args) > 2 else None
    assert isinstance(weight_node, fx.Node) and isinstance(twin.args[0], fx.Node)
    weight = tensor_at(slimmed, str(weight_node.target))
    inputs, targets = slim[twin.args[0].name], _narrowed(new, node, want)
    assert isinstance(inputs, Tensor) and isinstance(targets, Tensor)
    if twin.target is aten.conv2d.default:
        given = list(arguments(twin)[3:6])
        stride, padding, dilation = given + [[1, 1], [0, 0], [1, 1]][len(given) :]
        targets = targets.flatten(2).transpose(1, 2)
    size = weight[0].numel() + (bias_node is not None)
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(size, len(weight), dtype=torch.float64, device=weight.device)
    step = max(1, 2**24 // max(1, weight[0].numel() * targets[0, ..., 0].numel()))
    for start in range(0, len(inputs), step):
        part = inputs[start : start + step]
        if twin.target is aten.conv2d.default:
            part = F.unfold(part, weight.shape[2:], dilation, padding, stride).transpose(1, 2)
        rows = part.reshape(-1, weight[0].numel()).double()
        if bias_node is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        gram += rows.T @ rows
        cross += rows.T @ targets[start : start + step].reshape(-1, len(weight)).double()
    old = weight.reshape(len(weight), -1).double()
    if bias_node is not None:
        assert isinstance(bias_node, fx.Node)
        old = torch.cat([old, tensor_at(slimmed, str(bias_node.target)).double().unsqueeze(1)], 1)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(size, dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, cross + ridge @ old.T).T
    if not bool(torch.isfinite(solution).all()):
        return  # the plain copy stays: nothing was learned from these samples
    if bias_node is not None:
        tensor_at(slimmed, str(bias_node.target)).copy_(solution[:, -1])
        solution = solution[:, :-1]
    weight.copy_(solution.reshape(weight.shape))
