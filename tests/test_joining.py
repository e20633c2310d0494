"""Logits side by side, also where there is no clone."""

import torch
from torch import fx

from netclone.graph.joining import join


def test_columns_without_a_clone():
    logits = torch.ones(2, 1)
    assert join(logits, [0, 2]).tolist() == [[1, -torch.inf, -torch.inf]] * 2
    assert join(logits, []).data_ptr() != logits.data_ptr()


def test_a_second_trace_keeps_one_node():
    traced = fx.symbolic_trace(lambda logits, other: join(logits, [other, 2]))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [join]
    assert traced(torch.zeros(1, 1), 1).tolist() == [[0, -torch.inf, -torch.inf, -torch.inf]]
