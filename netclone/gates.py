"""Soft gates: running a captured network with every unit scaled, through the consumers' weights.

No activation is multiplied: the columns of the weights that read a unit are, which costs a fraction of a forward
pass and is exactly what a mask does where a gate is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from netclone.capturing import tensor_at
from netclone.channels import ChannelGroups


def gate_vector(groups: ChannelGroups, gates: Sequence[Tensor]) -> Tensor:
    """All gates in one vector ``(1 + units,)`` whose first entry is the constant 1 of what always stays."""
    one = torch.ones(1, device=gates[0].device if gates else None)
    return torch.cat([one, *gates])


def gated_outputs(groups: ChannelGroups, gates: Tensor, *inputs: Tensor) -> Tensor:
    """Outputs of the captured network with unit ``i`` scaled by its gate; differentiable in the gates alone."""
    parameters = {name: parameter.detach() for name, parameter in groups.graph_module.named_parameters()}
    for name, axis, index in consumer_columns(groups):
        weight = parameters.get(name)
        weight = tensor_at(groups.graph_module, name).detach() if weight is None else weight
        shape = [1] * weight.dim()
        shape[axis] = -1
        parameters[name] = weight * gates[index.to(gates.device)].to(weight.dtype).reshape(shape)
    out: Tensor = functional_call(groups.graph_module, parameters, inputs)
    return out


def consumer_columns(groups: ChannelGroups) -> list[tuple[str, int, Tensor]]:
    """``(parameter, axis, index into the gate vector per column)`` of every consumer that reads a prunable unit."""
    labelling = groups.labelling
    numbers = {unit: i + 1 for i, unit in enumerate(u for group in groups.groups for u in group.units)}
    columns = []
    for (name, axis), labels in labelling.slots.items():
        if labelling.roles[name, axis] == "in":
            index = torch.tensor([numbers.get(unit, 0) for unit in labelling.labels.roots(labels).tolist()])
            if bool((index > 0).any()):
                columns.append((name, axis, index))
    return columns
