"""Attention whose queries and values differ in width: filled up, and the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netclone.channels.evening import even_attention
from netclone.channels.grouping import channel_groups

aten = torch.ops.aten


class Attention(nn.Module):
    """Queries and keys of ``summed`` dimensions, values of ``given``."""

    def __init__(self, summed, given, **options):
        super().__init__()
        self.summed, self.given, self.options = summed, given, options

    def forward(self, x):
        q, v = x[..., : self.summed], x[..., : self.given]
        return 2 * F.scaled_dot_product_attention(q, q, v, **self.options)


@pytest.mark.parametrize(("summed", "given"), [(8, 3), (3, 8), (8, 8)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"is_causal": True}])
def test_zeros_change_nothing(summed, given, options):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    model = Attention(summed, given, **options)
    graph = channel_groups(model, x).graph_module
    even_attention(graph)
    (kernel,) = (node for node in graph.graph.nodes if node.target is aten.scaled_dot_product_attention.default)
    assert {operand.meta["val"].shape[-1] for operand in kernel.args[:3]} == {max(summed, given)}
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)
    assert graph(x).shape == (2, 3, 5, given)
    added = [node for node in graph.graph.nodes if node.target is aten.constant_pad_nd.default]
    assert len(added) == {(8, 3): 1, (3, 8): 2, (8, 8): 0}[summed, given]
