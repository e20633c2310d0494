"""What a node calls, with what, and whether torch takes it apart."""

import operator

import torch
from torch import fx

from netclone.graph.calls import argument, arguments, call, is_composite

aten = torch.ops.aten


def node_of(function, *more, **kwargs):
    graph = fx.Graph()
    return graph.call_function(function, (graph.placeholder("x"), *more), kwargs)


def test_an_argument_is_found_by_name_however_it_was_given():
    assert argument(node_of(aten.softmax.int, 2), "dim") == 2
    assert argument(node_of(aten.sum.dim_IntList, [1], keepdim=True), "keepdim") is True
    assert argument(node_of(aten.sum.dim_IntList, [1]), "keepdim") is False  # the schema's default
    assert argument(node_of(aten.sum.dim_IntList, [1]), "dims", "dim") == [1]  # the first name there is
    assert argument(node_of(aten.relu.default), "dim") is None


def test_arguments_are_those_given_by_position():
    node = node_of(aten.softmax.int, 2)
    assert arguments(node) == (node.args[0], 2)


def test_a_node_calls_its_operator():
    x = torch.tensor([-1.0, 2.0])
    assert call(node_of(aten.relu.default), (x,), {}).tolist() == [0.0, 2.0]


def test_composite_is_what_torch_computes_from_others():
    assert is_composite(aten.hstack.default)
    assert not is_composite(aten.relu.default) and not is_composite(operator.add) and not is_composite(torch.relu)
