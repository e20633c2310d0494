"""quick(graph): the same network for passes without gradient: BatchNorms folded, convolutions with channels last."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from netclone.graph.calls import arguments
from netclone.graph.capturing import set_tensor, tensor_at
from netclone.graph.folding import fold_batch_norms
from netclone.graph.operators import kind_of

CLOSE = 1e-3  # of the largest output; rounding in float32 is far below


def folded(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of an operator graph with its BatchNorms folded, or the graph itself if there is nothing to fold."""
    copied = copy.deepcopy(graph_module)
    return copied if fold_batch_norms(copied) else graph_module


def quick(graph_module: fx.GraphModule, *examples: Tensor) -> fx.GraphModule:
    """An operator graph that gives the same up to rounding in less time, or the graph itself.

    A network with BatchNorms and depthwise convolutions takes about half of its time on a CPU. The graph itself
    comes back if nothing in it can be made faster, or if the faster form does not run on the examples or does not give
    the same there: a network may view its features in a way that only one layout allows.

    It is for passes without gradient. With channels last, torch 2.14's gradient of a convolution with an odd number of
    channels overwrites memory, and slim networks have odd widths.

    Parameters
    ----------
    examples
        Inputs ``(N, ...)`` to compare both forms on.
    """
    copied = copy.deepcopy(graph_module)
    changed = fold_batch_norms(copied) + _channels_last(copied)
    if not changed or not _agree(copied, graph_module, examples):
        return graph_module
    return copied.requires_grad_(False)


def _channels_last(graph_module: fx.GraphModule) -> int:
    """Lay out the weights of 2-d convolutions with their channels last; returns how many."""
    laid = 0
    for node in graph_module.graph.nodes:
        weight = node.op == "get_attr" and tensor_at(graph_module, str(node.target))
        if isinstance(weight, Tensor) and weight.dim() == 4 and all(_reads_weight(user, node) for user in node.users):
            laid_out = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
            set_tensor(graph_module, str(node.target), laid_out)
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
