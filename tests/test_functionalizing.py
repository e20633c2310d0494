"""make_functional: what a model writes into a part of a tensor is put between the parts around it."""

import pytest
import torch
from architectures import Net, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import TraceError
from netclone.graph.capturing import capture
from netclone.learning.localizing import localize


def captured(function):
    net = Net(function, stem=nn.Linear(6, 12), head=nn.Linear(12, 4)).eval()
    images = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with untouched(net):
        return capture(net, images), net


def same(graph_module, net):
    images = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(graph_module(images.clone()), net(images.clone()))


def zeroed(net, x):
    y = net.stem(x)
    y[:, 0] = 0
    return net.head(y)


def twice(net, x):
    y = net.stem(x)
    y[:, 2:5] = y[:, 6:9] * 2
    y[:, -1] = y[:, 3]
    return net.head(y)


def deep(net, x):
    y = net.stem(x).reshape(-1, 3, 4)
    y[:, 1:, 1:3] = y[:, :2, :2] + 1
    return net.head(y.flatten(1))


def worked_on(net, x):
    y = net.stem(x)
    y[:, 4:].relu_()
    part = y[:, :4]
    part.mul_(2)
    return net.head(y) + part.sum(1, keepdim=True)


def copied_then_changed(net, x):
    y, z = net.stem(x), torch.sin(x)
    y[:, :6] = z
    z.add_(1)
    return net.head(y) + z[:, :4]


@pytest.mark.parametrize("function", [zeroed, twice, deep, worked_on, copied_then_changed])
def test_what_is_written_into_a_part_of_a_tensor_is_captured(function):
    graph_module, net = captured(function)
    assert not any(
        node.target._schema.is_mutable for node in graph_module.graph.nodes if hasattr(node.target, "_schema")
    )
    assert same(graph_module, net)


@settings(max_examples=5, deadline=None)
@given(st.integers(-14, 14), st.integers(-14, 14), st.integers(0, 11))
def test_any_bounds_are_those_of_python(start, end, index):
    def function(net, x):
        y = net.stem(x)
        y[:, start:end] = y[:, start:end] * 3
        y[:, index] = 1.5
        return net.head(y)

    assert same(*captured(function))


def test_a_network_that_writes_into_a_part_is_slimmed_exactly():
    def function(net, x):
        y = torch.relu(net.wide(net.stem(x)))
        y[:, 1:5] = y[:, 1:5] * 2
        return net.head(y)

    net = Net(function, stem=nn.Linear(6, 12), wide=nn.Linear(12, 12), head=nn.Linear(12, 4)).double().eval()
    images = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    groups = channel_groups(net, images)
    slim = extract(groups, localize(groups, method="magnitude", keep=0.5))
    assert slim.certificate < 1e-12
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.parameters())


def under_a_view_of_a_part(net, x):
    y = net.stem(x)
    view = y.view(-1, 3, 4)
    y[:, 0] = 0
    return net.head(view.flatten(1))


def into_one_sample(net, x):
    y = net.stem(x)
    y[0] = 0
    return net.head(y)


@pytest.mark.parametrize("function", [under_a_view_of_a_part, into_one_sample])
def test_what_cannot_be_put_together_again_is_refused_by_node(function):
    with pytest.raises(TraceError, match=r"node '\w+' \(aten\.\w+.*\) of Net writes into a part.*without in-place"):
        captured(function)
