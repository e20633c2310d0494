"""write(result, old, record): the graph of a target with the branches of a record. Nothing else edits target graphs.

A grafted graph is always written from two things: the target's own nodes, with their order and names, and the list of
branches in ``GraphModule.meta``. So it depends on which clones it holds, and never on the steps that led there.
"""

from __future__ import annotations

import copy
import operator
import uuid
from typing import TypeVar, cast

import torch
from torch import fx, nn
from torch.fx.node import Argument, Target
from torch.fx.passes.shape_prop import TensorMetadata

from netclone.cloning.grafted import (
    BRANCH,
    RECORD,
    Branch,
    GraftedModule,
    Record,
    added_names,
    columns_without,
    modules_of,
    own_columns,
    own_logits,
    record_of,
    seat_of,
)
from netclone.cloning.modules import CloneModule, Slot
from netclone.cloning.target_features import HEAD
from netclone.graph.capturing import FACTS
from netclone.graph.describing import describe, widened
from netclone.graph.holding import hold
from netclone.graph.joining import join
from netclone.graph.tracing import logits_node, shape_of

_READING_MODULES = (  # modules that never write into their inputs and return new memory
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
)
_READING_FUNCTIONS = {  # the same for functions; operators declare it in their schema
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.cat,
    nn.functional.conv2d,
    nn.functional.layer_norm,
    nn.functional.linear,
}

_AnyGraph = TypeVar("_AnyGraph", bound=fx.GraphModule)


def copy_as(
    source: fx.GraphModule, kind: type[_AnyGraph], memo: dict[int, object] | None, without: str | None = None
) -> _AnyGraph:
    """Copy a graph module into another class, without its graph and without the clone ``without``.

    ``memo`` is that of :func:`copy.deepcopy`. None: move what ``source`` holds instead of copying it.
    """
    result = kind(nn.Module(), fx.Graph(), type(source).__name__)
    state = {key: value for key, value in source.__dict__.items() if key != "_graph"}
    state["_modules"] = {path: part for path, part in source._modules.items() if path != without}
    if memo is not None:
        memo[id(source)] = result
        state = copy.deepcopy(state, memo)
    result.__dict__.update(state)
    return result


def write(result: fx.GraphModule, old: fx.Graph, record: Record) -> None:
    """Write the target's part of ``old`` and a record's branches into a module; set its flags and record to match."""
    graph = fx.Graph(tracer_cls=old._tracer_cls)
    graph.set_codegen(copy.deepcopy(old._codegen))
    copied: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        if BRANCH not in node.meta:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        elif node.target is join:
            copied[node] = copied[node.args[0].args[0]]  # the target's logits, which a node holds
    own = list(graph.nodes)
    assert [node.name for node in own] == [node.name for node in old.nodes if BRANCH not in node.meta]
    if record.branches:
        _graft(result, graph, record.branches)
    graph.owning_module = result
    graph.lint()
    result.graph = graph  # recompiles

    clone_paths = set(record.names)
    for path, part in result.named_modules():
        if path.partition(".")[0] not in clone_paths:
            part.training = not record.branches and path in record.training
    for path, parameter in result.named_parameters():
        if path.partition(".")[0] not in clone_paths:
            parameter.requires_grad_(path in record.trainable)
    if record.branches:
        result.meta[RECORD] = record
        for branch in record.branches:
            cast(CloneModule, result.get_submodule(branch.name)).slot = new_slot(
                cast(GraftedModule, result), branch.name
            )
        tell(cast(GraftedModule, result))
    else:
        del result.meta[RECORD]
        result.meta.pop(HEAD, None)
        describe(result, copy.deepcopy(record.attributes))


def new_slot(grafted: GraftedModule, name: str) -> Slot:
    """A slot of its own for a clone in a graph, off if the clone is."""
    seat, clone = seat_of(grafted, name), modules_of(grafted)[name]
    return Slot(uuid.uuid4().hex, seat.off, 0 if seat.first is None else len(clone.classes))


def tell(grafted: GraftedModule) -> None:
    """Bring what a grafted graph says of its columns up to date: their number, and the target's attributes."""
    own = len(own_columns(grafted))
    added = added_names(grafted, columns_without(grafted, lambda slot: slot.off))
    logits_node(grafted).meta["tensor_meta"] = _logits_meta(grafted, own_logits(grafted), own + len(added))
    describe(grafted, widened(record_of(grafted).attributes, own, added))


def _graft(result: fx.GraphModule, graph: fx.Graph, branches: tuple[Branch, ...]) -> None:
    """Add to the target's own graph one call per branch, right behind the nodes it reads, and one join at the end."""
    own = {node.name: index for index, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    behind: dict[fx.Node, fx.Node] = {}

    def insert(after: fx.Node, op: str, target: Target, args: tuple[Argument, ...], name: str | None = None) -> fx.Node:
        while after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(behind.get(after, after)):
            node = graph.create_node(op, target, args, name=name)
        node.meta[BRANCH] = True
        behind[after] = node
        return node

    output = nodes[-1]
    images = next(node for node in nodes if node.op == "placeholder")
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    calls = []
    for branch in branches:
        reads = [nodes[own[name]] for name in branch.reads]
        last = max(reads, key=lambda node: own[node.name])
        args = []
        for node in reads:
            copied = node is not last and _may_be_written(result, nodes, node, last)
            given = (node, images, True) if copied else (node, images)
            direct = node is images and not copied
            args.append(node if direct else insert(node, "call_function", hold, given, f"{branch.name}_input"))
        calls.append(insert(last, "call_module", branch.name, tuple(args), branch.name))
        clone = cast(CloneModule, result.get_submodule(branch.name))
        calls[-1].meta["tensor_meta"] = _logits_meta(result, logits, len(clone.spec.classes))
    held = insert(output.prev, "call_function", hold, (logits, images), f"{logits.name}_held")
    parts: list[Argument] = []
    (end,) = shape_of(logits) or (0,)
    for branch, call in zip(branches, calls, strict=True):
        if branch.first is not None and branch.first > end:  # columns of clones that were removed
            parts.append(branch.first - end)
        parts.append(call)
        end = (end if branch.first is None else branch.first) + (shape_of(call) or (0,))[0]
    joined = insert(output.prev, "call_function", join, (held, parts))
    joined.meta["tensor_meta"] = _logits_meta(result, logits, end)
    output.replace_input_with(logits, joined)


def _logits_meta(result: fx.GraphModule, logits: fx.Node, width: int) -> TensorMetadata:
    like = logits.meta.get("tensor_meta")
    dtype = (like if isinstance(like, TensorMetadata) else logits.meta["val"]).dtype
    shape = torch.Size((len(result.meta[FACTS]["example"]), width))
    return TensorMetadata(shape, dtype, False, (width, 1), torch.contiguous_format, False, {})


def _may_be_written(root: fx.GraphModule, nodes: list[fx.Node], value: fx.Node, last: fx.Node) -> bool:
    """Whether a node after ``value``, up to ``last``, may work in place on its memory. Unknown operators may.

    An operator that is not known to return new memory may also return the memory of any of its inputs.
    """
    memory: dict[fx.Node, set[fx.Node]] = {}  # by node, the nodes whose memory it may share
    for node in nodes:
        memory[node] = {node}
        if not _only_reads(root, node):
            memory[node].update(*(memory[read] for read in node.all_input_nodes))
            if value in memory and node is not value and not memory[node].isdisjoint(memory[value]):
                return True
        if node is last:
            break
    return False


def _only_reads(root: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _READING_MODULES)
    if isinstance(node.target, torch._ops.OpOverload):
        return all(argument.alias_info is None for argument in node.target._schema.arguments)
    return node.target in _READING_FUNCTIONS
