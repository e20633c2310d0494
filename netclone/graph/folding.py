"""Folding BatchNorm into the convolution before it: fewer, faster operators, the same function up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from netclone.graph.calls import arguments
from netclone.graph.capturing import drop_unused_tensors, set_tensor, tensor_at
from netclone.graph.operators import kind_of

aten = torch.ops.aten


def fold_batch_norms(graph_module: fx.GraphModule) -> int:
    """Fold, in place, every BatchNorm that is the only reader of a convolution; returns how many were folded.

    The product is computed in float64 and rounded once to the weights' dtype.
    """
    folded = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.batch_norm.default or not isinstance(node.args[0], fx.Node):
            continue
        convolution = node.args[0]
        _, scale, shift, mean, variance, training, _, epsilon, *_ = arguments(node)
        alone = kind_of(convolution.target) == "convolution" and len(convolution.users) == 1
        if not alone or training or mean is None or variance is None or len(arguments(convolution)[1].users) > 1:
            continue
        weight_node, bias_node = arguments(convolution)[1], (*arguments(convolution), None)[2]
        weight = tensor_at(graph_module, weight_node.target)

        def value(parameter: fx.Node | None, default: float, like: Tensor = weight) -> Tensor:
            if parameter is None:
                return torch.full((len(like),), default, dtype=torch.float64, device=like.device)
            return tensor_at(graph_module, str(parameter.target)).detach().double()

        factor = value(scale, 1.0) / (value(variance, 1.0) + epsilon).sqrt()
        bias = (value(bias_node, 0.0) - value(mean, 0.0)) * factor + value(shift, 0.0)
        name = str(weight_node.target).removesuffix("weight") + "bias" if bias_node is None else str(bias_node.target)
        set_tensor(
            graph_module,
            str(weight_node.target),
            nn.Parameter((weight.detach().double() * factor.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)),
        )
        set_tensor(graph_module, name, nn.Parameter(bias.to(weight.dtype)))
        if bias_node is None:
            with graph_module.graph.inserting_before(convolution):
                bias_node = graph_module.graph.create_node("get_attr", name)
            convolution.args = (*convolution.args[:2], bias_node, *convolution.args[3:])
        node.replace_all_uses_with(convolution)
        graph_module.graph.erase_node(node)
        folded += 1
    graph_module.graph.eliminate_dead_code()
    drop_unused_tensors(graph_module)
    graph_module.recompile()
    return folded
