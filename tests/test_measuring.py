"""Shapes and MACs by node: against what was counted by hand, and what cannot be run is left out."""

import torch
from torch import fx, nn

from netclone.graph.measuring import Measured, measure


def test_counted_by_hand():
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)))
    found = measure(graph, torch.zeros(1, 3, 8, 8))
    assert list(found.values()) == [
        Measured((3, 8, 8), 0),
        Measured((4, 8, 8), 4 * 8 * 8 * 3 * 9),
        Measured((4, 8, 8), 0),
        Measured((256,), 0),
        Measured((5,), 5 * 256),
        Measured((5,), 0),
    ]


def test_what_cannot_be_run_is_left_out():
    class Wrong(nn.Module):
        def forward(self, images):
            return torch.reshape(torch.relu(images), (7, 7)) * 2

    found = measure(fx.symbolic_trace(Wrong()), torch.zeros(1, 3))
    assert list(found) == ["images", "relu"]


def test_modes_and_inputs_are_left_as_they_were():
    graph = fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(inplace=True))).train()
    images = -torch.ones(1, 3)
    measure(graph, images)
    assert all(part.training for part in graph.modules())
    assert all(parameter.requires_grad for parameter in graph.parameters())
    assert torch.equal(images, -torch.ones(1, 3))
    assert int(graph.get_submodule("0").num_batches_tracked) == 0
