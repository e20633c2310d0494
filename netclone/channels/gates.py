"""Soft gates: running a captured network with every unit scaled, through the consumers' weights.

A gate multiplies the weight columns that read a unit, not the activations. That costs a fraction of a forward pass, and
equals a mask exactly where a gate is 0 or 1. Norms over prunable channels use the gates themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from netclone.channels.grouping import ChannelGroups
from netclone.channels.masks import across
from netclone.channels.normalising import Norm, gated, norm_over_channels
from netclone.graph.capturing import tensor_at
from netclone.graph.quickening import for_gradients, quick


def gate_vector(gates: Sequence[Tensor]) -> Tensor:
    """All gates in one vector ``(1 + units,)``; its first entry is the constant 1, for channels that always stay."""
    one = torch.ones(1, device=gates[0].device if gates else None)
    return torch.cat([one, *gates])


class Gated:
    """A captured network that takes a gate vector and images; differentiable in the gates alone.

    ``sizes`` are the numbers of units, group by group.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self._source, self._example = groups.graph_module, groups.example
        self.sizes = [group.size for group in groups.groups]
        self._numbers = {unit: i + 1 for i, unit in enumerate(u for group in groups.groups for u in group.units)}
        labelling = groups.labelling
        columns = [
            (name, axis, self._index(groups, labels))
            for (name, axis), labels in labelling.slots.items()
            if labelling.roles[name, axis] == "in"
        ]
        self._columns = [column for column in columns if bool((column[2] > 0).any())]
        self._inside: dict[str, Tensor] = {}  # gates that norms and products read
        self._graph_module = for_gradients(groups.graph_module, fold=True)
        norms = {name: self._index(groups, labels) for name, labels in labelling.norms.items()}
        norms = {name: index for name, index in norms.items() if bool((index > 0).any())}
        read = {node.name: [used.name for used in node.all_input_nodes] for node in groups.graph_module.graph.nodes}
        products = {
            each.node: (read[each.node].index(each.operand), each.axis, self._index(groups, each.labels))
            for each in labelling.summed
        }
        if norms or products:
            self._gate_inside(norms, products)
        self._weights = {name: parameter.detach() for name, parameter in self._graph_module.named_parameters()}

    @cached_property
    def full(self) -> fx.GraphModule:
        """The network without gates, for passes without gradient."""
        return quick(self._source, self._example)

    def __call__(self, gates: Tensor, *inputs: Tensor) -> Tensor:
        """Logits ``(N, classes)`` with unit ``i`` scaled by its gate in ``gates`` ``(1 + units,)``."""
        tensors = dict(self._weights)
        for name, axis, index in self._columns:
            weight = tensors.get(name)
            weight = tensor_at(self._graph_module, name).detach() if weight is None else weight
            tensors[name] = weight * across(_both(gates, index).to(weight.dtype), weight, axis)
        for name, index in self._inside.items():
            tensors[name] = _both(gates, index)
        out: Tensor = functional_call(self._graph_module, tensors, inputs)
        return out

    def _index(self, groups: ChannelGroups, labels: Tensor) -> Tensor:
        """The index of each label's two gates in the gate vector, ``(2, labels)``."""
        known = groups.labelling.labels
        units = known.parts(known.roots(labels)).tolist()
        return torch.tensor([[self._numbers.get(unit, 0) for unit in part] for part in units])

    def _gate_inside(self, norms: dict[str, Tensor], products: dict[str, tuple[int, int, Tensor]]) -> None:
        """A graph on the same tensors in which norms and products over units read gates."""
        source, graph = self._graph_module, fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        root: dict[str, Any] = {}
        for node in source.graph.nodes:
            norm = norm_over_channels(node) if node.name in norms else None
            if norm is not None:
                name = f"gated_{node.name}"
                root[name] = _GatedNorm(norm, norms[node.name].size(1))
                self._inside[f"{name}.gate"] = norms[node.name]
                operands = [operand and copied[operand] for operand in (norm.source, norm.weight, norm.bias)]
                copied[node] = graph.call_module(name, tuple(operands))
                continue
            if node.op == "get_attr":
                root[str(node.target)] = tensor_at(source, str(node.target))
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.name in products:
                place, axis, index = products[node.name]
                name = f"gated_{node.name}"
                root[name] = _Gate(axis, index.size(1))
                self._inside[f"{name}.gate"] = index
                operand = copied[node.all_input_nodes[place]]
                with graph.inserting_before(copied[node]):
                    scaled = graph.call_module(name, (operand,))
                copied[node].replace_input_with(operand, scaled)
        self._graph_module = fx.GraphModule(root, graph, "GatedGraph").eval()


def _both(gates: Tensor, index: Tensor) -> Tensor:
    """What scales each label: the product of its two gates."""
    of_unit, of_dim = gates[index.to(gates.device)].unbind(0)
    return of_unit * of_dim


class _Gate(nn.Module):
    """Scales a tensor along an axis by a gate that it reads from a buffer."""

    def __init__(self, axis: int, channels: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("gate", torch.ones(channels), persistent=False)

    def forward(self, source: Tensor) -> Tensor:
        assert isinstance(self.gate, Tensor)
        return source * across(self.gate.to(source.dtype), source, self.axis)


class _GatedNorm(nn.Module):
    """A norm that reads its gate from a buffer."""

    def __init__(self, norm: Norm, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("gate", torch.ones(channels), persistent=False)

    def forward(self, source: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert isinstance(self.gate, Tensor)
        return gated(source, weight, bias, self.gate, self.norm)
