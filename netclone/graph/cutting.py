"""Cutting an operator graph: the part after a node, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from netclone.errors import PositionError
from netclone.graph.calls import arguments
from netclone.graph.capturing import FACTS, drop_unused_tensors, set_tensor, tensor_at
from netclone.graph.tracing import shape_of

aten = torch.ops.aten


def cut(graph_module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The part of an operator graph after a node; the node becomes its input, ``features``.

    Raises
    ------
    PositionError
        If the node's first axis is not the batch, or later nodes also read something before the node.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    at = nodes[name]
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    needed = _needed(output, at)
    around = [n for n in needed if n.op == "placeholder" and not all(_is_batch_size(u) for u in n.users if u in needed)]
    if around or at not in needed:
        through = next((u.name for n in around for u in n.users if u in needed), "output")
        raise PositionError(
            f"position '{name}': what follows also reads earlier features, through node '{through}'; cut where all "
            "paths meet, for example at the end of a block or stage"
        )
    graph = fx.Graph()
    copied = {at: graph.placeholder("features")}
    copied[at].meta = {"val": at.meta["val"]}
    for node in graph_module.graph.nodes:
        if node not in needed or node is at or node.op == "placeholder":
            continue
        if _is_batch_size(node) and node.args[0] not in copied:
            copied[node] = graph.call_function(aten.sym_size.int, (copied[at], 0))
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            set_tensor(root, str(node.target), tensor_at(graph_module, str(node.target)))
    graph.lint()
    part = fx.GraphModule(root, graph, "OperatorGraph")
    part.meta = {FACTS: {"positions": {}, "not_tensors": {}, "operators": True}}
    return part.eval()


def classifier_rows(graph_module: fx.GraphModule, classes: Sequence[int]) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``(classes, F)`` and bias, for some classes, of the linear layer at the end of a graph, or None."""
    if features_node(graph_module) is None:
        return None
    last = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    if last.op == "call_module":
        layer = cast(nn.Linear, graph_module.get_submodule(str(last.target)))
        found: list[Tensor | None] = [layer.weight, layer.bias]
    else:
        found = [tensor_at(graph_module, str(node.target)) for node in last.args[1:3]]
    weight, *bias = (tensor.detach()[list(classes)] for tensor in found if tensor is not None)
    return weight, bias[0] if bias else None


def features_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """The features ``(N, F)`` read by the last linear layer of a graph; None if it does not end in one."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node) or not output.args or not _is_linear(graph_module, output):
        return None
    features = output.args[0]
    assert isinstance(features, fx.Node)
    shape = shape_of(features)
    return features if shape is not None and len(shape) == 1 else None


def _is_linear(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) is nn.Linear
    return node.target is aten.linear.default


def _needed(output: fx.Node, at: fx.Node) -> set[fx.Node]:
    """All nodes that the output is computed from, going back no further than ``at``."""
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node is not at and not _is_batch_size(node):
                stack.extend(node.all_input_nodes)
    return seen


def _is_batch_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int and arguments(node)[1] == 0


def order_outputs(slimmed: fx.GraphModule, columns: list[int], count: int) -> None:
    """Reduce the output's ``count`` columns to some, in this order; heads that give none of them are dropped."""
    if columns == list(range(count)):
        return
    output = next(node for node in slimmed.graph.nodes if node.op == "output")
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    with slimmed.graph.inserting_before(output):
        read = [_behind_join(logits, c) for c in columns]
        parts = [slimmed.graph.call_function(aten.slice.Tensor, (head, 1, c, c + 1)) for head, c in read]
        ordered = slimmed.graph.call_function(aten.cat.default, (parts, 1))
    value = logits.meta["val"]
    for node, width in [*((part, 1) for part in parts), (ordered, len(columns))]:
        node.meta = {"val": value.new_empty((value.shape[0], width))}
    output.args = (ordered,)
    slimmed.graph.eliminate_dead_code()
    drop_unused_tensors(slimmed)
    slimmed.recompile()


def _behind_join(logits: fx.Node, column: int) -> tuple[fx.Node, int]:
    """The head that a column comes from, and its column there, if the logits are joined from several heads."""
    while logits.target is aten.cat.default and len(logits.args) > 1 and logits.args[1] in (1, -1):
        heads = logits.args[0]
        assert isinstance(heads, (list, tuple))
        for head in heads:
            assert isinstance(head, fx.Node)
            width = head.meta["val"].shape[1]
            if column < width:
                logits = head
                break
            column -= width
    return logits, column


def end_before_classifier(slimmed: fx.GraphModule) -> None:
    output = next(node for node in slimmed.graph.nodes if node.op == "output")
    output.args = (features_node(slimmed),)
    slimmed.graph.eliminate_dead_code()
    drop_unused_tensors(slimmed)
    slimmed.recompile()
