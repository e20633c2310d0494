"""Queries, keys and values that one layer makes are cut apart before they are given heads."""

import pytest
import torch
from torch import nn

from netclone.graph.capturing import capture

aten = torch.ops.aten


class Stacked(nn.Module):
    """A layer whose output is split into parts, of which some are read."""

    def __init__(self, parts, layer):
        super().__init__()
        self.layer, self.head, self.parts = layer, nn.Linear(4, 2), parts

    def forward(self, x):
        first, second, third = self.parts(self.layer(x))
        return self.head((first * second + third).reshape(x.shape[0], -1, 4).mean(1))


def unbound(x):
    return x.reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)


def selected(x):
    x = x.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return x[0], x[-2], x[2]


def convolved(x):
    x = x.reshape(x.shape[0], 3, 8, 5)
    return x[:, 0], x[:, 1], x[:, 2]


def interleaved(x):
    x = x.reshape(x.shape[0], 5, 8, 3)
    return x[..., 0], x[..., 1], x[..., 2]


def made(parts, channels_first=False):
    torch.manual_seed(0)
    layer = nn.Conv1d(6, 24, 1) if channels_first else nn.Linear(6, 24)
    shape = (3, 6, 5) if channels_first else (3, 5, 6)
    return Stacked(parts, layer).eval(), torch.randn(shape)


@pytest.mark.parametrize(("parts", "channels_first"), [(unbound, False), (selected, False), (convolved, True)])
def test_parts_are_cut_out_of_the_layer(parts, channels_first):
    model, x = made(parts, channels_first)
    graph_module = capture(model, x[:2])
    layer = next(node for node in graph_module.graph.nodes if node.name in ("linear", "conv1d"))
    assert [user.target for user in layer.users] == [aten.slice.Tensor] * 3
    assert sorted(user.args[2:4] for user in layer.users) == [(0, 8), (8, 16), (16, 24)]
    assert not any(node.target is aten.unbind.int for node in graph_module.graph.nodes)
    with torch.no_grad():
        assert torch.equal(graph_module(x), model(x))


def test_parts_that_are_not_in_front_stay_together():
    model, x = made(interleaved)
    graph_module = capture(model, x[:2])
    layer = next(node for node in graph_module.graph.nodes if node.name == "linear")
    assert [user.target for user in layer.users] == [aten.reshape.default]
    with torch.no_grad():
        assert torch.equal(graph_module(x), model(x))


def test_a_selection_of_positions_is_left_alone():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.layer(x).reshape(x.shape[0], 4, 2, 8).select(2, 1).mean(2)

    x = torch.randn(2, 3, 4, 4)
    graph_module = capture(Positions().eval(), x)
    assert [node.target for node in graph_module.graph.nodes if "select" in node.name] == [aten.select.int]
    assert not any(node.target is aten.slice.Tensor for node in graph_module.graph.nodes)
