"""Operator graphs as data: what could not be saved is known from the captured graph, before anything is learned."""

import pytest
import torch
from torch import nn

import netclone
from netclone.channels.grouping import channel_groups
from netclone.files.graphdata import unsavable


class Between(nn.Module):
    """Some function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.function(self.first(x)))


def test_a_graph_of_known_operators_can_be_saved():
    groups = channel_groups(Between(torch.relu).eval(), torch.randn(2, 6))
    assert unsavable(groups.graph_module.graph) == []


def test_every_node_that_cannot_be_saved_is_said_and_is_what_save_refuses(tmp_path):
    model = Between(lambda y: torch.special.airy_ai(torch.special.airy_ai(y))).eval()
    groups = channel_groups(model, torch.randn(2, 6))
    reasons = unsavable(groups.graph_module.graph)
    assert [reason.split("'")[1] for reason in reasons[:2]] == ["special_airy_ai", "special_airy_ai_1"]
    module = netclone.extract(groups, netclone.localize(groups, method="magnitude", keep=0.5))
    with pytest.raises(netclone.ArchiveError, match="special_airy_ai"):
        netclone.save(module, tmp_path / "clone.safetensors")


def test_a_tensor_of_complex_numbers_is_said():
    graph = torch.fx.Graph()
    node = graph.get_attr("rotation")
    node.meta["val"] = torch.zeros(2, dtype=torch.complex64)
    graph.output(node)
    [reason] = unsavable(graph)
    assert "rotation" in reason and "complex64" in reason
