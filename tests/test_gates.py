"""Soft gates: 1 is the network, 0 is the mask, and in between a unit is scaled where it is read."""

import torch
from architectures import relative_error
from torch import nn

from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def perceptron():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    return net, channel_groups(net, X)


def test_the_constant_one_comes_first():
    _, groups = perceptron()
    assert (
        gate_vector([torch.tensor([0.1, 0.2, 0.3, 0.4])]).tolist() == torch.tensor([1.0, 0.1, 0.2, 0.3, 0.4]).tolist()
    )


def test_a_unit_is_scaled_where_it_is_read_as_by_hand():
    net, groups = perceptron()
    gates = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    by_hand = net[2](torch.tanh(net[0](X)) * gates)
    assert relative_error(Gated(groups)(gate_vector([gates]), X), by_hand) <= 1e-14


def test_gates_of_zero_and_one_are_a_mask():
    _, groups = perceptron()
    flags = [True, False, False, True]
    mask = ChannelMask.from_kept(groups, {groups.groups[0].name: flags})
    gates = gate_vector([torch.tensor(flags).double()])
    assert relative_error(Gated(groups)(gates, X), mask.apply(groups)(X)) <= 1e-14


def test_gradients_reach_the_gates_alone():
    net, groups = perceptron()
    gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
    Gated(groups)(gate_vector([gates]), X).sum().backward()
    assert gates.grad is not None and bool((gates.grad != 0).all())
    assert all(parameter.grad is None for parameter in (*net.parameters(), *groups.graph_module.parameters()))


def test_a_norm_leaves_out_what_is_gated_to_zero():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double().eval()
    groups = channel_groups(net, X, through_norms=True)
    flags = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    kept = flags.bool()
    narrow = nn.functional.layer_norm(net[0](X)[:, kept], (3,), net[1].weight[kept], net[1].bias[kept], net[1].eps)
    by_hand = narrow @ net[2].weight[:, kept].T + net[2].bias
    assert relative_error(Gated(groups)(gate_vector([flags]), X), by_hand) <= 1e-12
