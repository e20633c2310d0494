"""quick(graph), for_gradients(graph): the same network, laid out for passes without gradients, or with them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from netclone.graph.calls import arguments
from netclone.graph.capturing import set_tensor, tensor_at
from netclone.graph.folding import fold_batch_norms
from netclone.graph.operators import kind_of

CONTIGUOUS = torch.ops.aten.contiguous.default
CLOSE = 1e-3  # of the largest output; rounding in float32 is far below


def for_gradients(graph_module: fx.GraphModule, *, fold: bool = False) -> fx.GraphModule:
    """A copy of an operator graph whose convolutions read weights and features in the usual layout.

    With channels last, torch 2.14's gradient of a convolution with an odd number of channels overwrites memory: the
    process hangs, or ends. Slim networks have odd widths, and any network may permute its features into that layout, or
    be given such images. What lies as usual already is not copied.

    Parameters
    ----------
    fold
        Whether to fold BatchNorms as well.
    """
    copied = copy.deepcopy(graph_module)
    if fold:
        fold_batch_norms(copied)
    _laid_out(copied, torch.contiguous_format)
    for node in copied.graph.nodes:
        if "convolution" in (kind_of(node.target) or ""):
            with copied.graph.inserting_before(node):
                node.replace_input_with(node.args[0], copied.graph.call_function(CONTIGUOUS, (node.args[0],)))
    copied.recompile()
    return copied


def quick(graph_module: fx.GraphModule, *examples: Tensor) -> fx.GraphModule:
    """An operator graph that gives the same up to rounding in less time, or the graph itself.

    A network with BatchNorms and depthwise convolutions takes about half of its time on a CPU. The graph itself
    comes back if nothing in it can be made faster, or if the faster form does not run on the examples or does not give
    the same there: a network may view its features in a way that only one layout allows.

    It is for passes without gradient (see :func:`for_gradients`).

    Parameters
    ----------
    examples
        Inputs ``(N, ...)`` to compare both forms on.
    """
    copied = copy.deepcopy(graph_module)
    changed = fold_batch_norms(copied) + _laid_out(copied, torch.channels_last)
    if not changed or not _agree(copied, graph_module, examples):
        return graph_module
    return copied.requires_grad_(False)


def _laid_out(graph_module: fx.GraphModule, layout: torch.memory_format) -> int:
    """Give the weights of 2-d convolutions a layout; returns how many had another."""
    laid = 0
    for node in graph_module.graph.nodes:
        if node.op != "get_attr" or not all(_reads_weight(user, node) for user in node.users):
            continue
        weight = tensor_at(graph_module, str(node.target))
        if weight.dim() == 4 and not weight.is_contiguous(memory_format=layout):
            moved = weight.detach().contiguous(memory_format=layout)
            is_parameter = isinstance(weight, nn.Parameter)
            set_tensor(
                graph_module, str(node.target), nn.Parameter(moved, weight.requires_grad) if is_parameter else moved
            )
            laid += 1
    return laid


def _reads_weight(user: fx.Node, weight: fx.Node) -> bool:
    return kind_of(user.target) == "convolution" and arguments(user)[1] is weight


def _agree(one: fx.GraphModule, other: fx.GraphModule, examples: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        want = other(*examples)
        try:
            got = one(*examples)
        except RuntimeError:  # torch's, of a view that this layout does not allow
            return False
    return bool((got - want).abs().max() <= CLOSE * want.abs().max())
