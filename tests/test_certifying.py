"""Certificates: what they compare, in what memory, and what they leave alone."""

import gc
import weakref

import pytest
import torch
from architectures import (
    Net,
    relative_error,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import certify_slim, extract, refit, slim_down
from netclone.errors import CertificateError
from netclone.learning.data import Samples
from netclone.learning.localizing import localize


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(net.stem(x).double().float()),
        lambda net, x: net.head(net.stem(x).to(torch.float16).to(net.head.weight)),
        lambda net, x: net.head(net.stem(x) @ torch.eye(6)),
        lambda net, x: net.head(net.stem(x) + torch.full((x.shape[0], 6), 0.1)),
        lambda net, x: net.head(net.stem(x)) + net.head(torch.ones(x.shape[0], 6)),
        lambda net, x: net.head(net.stem(x).cumsum(1, dtype=torch.float32)),
        lambda net, x: net.head(net.stem(x) @ torch.arange(36, dtype=torch.float32).view(6, 6)),
        lambda net, x: net.head((net.stem(x).to(torch.complex64) @ torch.eye(6, dtype=torch.complex64)).real),
    ],
)
def test_what_a_source_casts_or_makes_in_a_dtype_of_its_own_is_certified_in_float64(forward):
    net = Net(forward, stem=nn.Linear(4, 6), head=nn.Linear(6, 3))
    groups = channel_groups(net, torch.randn(2, 4))
    module = extract(groups, localize(groups, method="magnitude", keep=0.5))
    assert module.certificate < 1e-14
    x = torch.randn(3, 4)
    masked = localize(groups, method="magnitude", keep=0.5).apply(groups)
    assert relative_error(module(x), masked(x)) < 1e-2  # its own dtypes are as they were
    assert {str(tensor.dtype) for tensor in module.parameters()} == {"torch.float32"}


def _tensors():
    return [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) and one.device.type == "cpu"]


def test_certificates_leave_no_copies_behind():
    """With Python's collector of cycles off: groups and module hold a network of 8 MB, a certificate holds none."""
    net = Net(lambda net, x: net.head(net.stem(x).relu()), stem=nn.Linear(4, 2**18), head=nn.Linear(2**18, 4))
    groups = channel_groups(net, torch.randn(2, 4))
    mask = localize(groups, method="magnitude", keep=0.5)
    gc.collect()
    gc.disable()
    try:
        before = {id(tensor) for tensor in _tensors()}
        module = extract(groups, mask)
        found = [tensor for tensor in _tensors() if id(tensor) not in before]
    finally:
        gc.enable()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    size = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert sum(held.values()) < 2.5 * size  # the module, and the slim network it was cut from


class _Peak(TorchDispatchMode):
    """The most memory, in bytes, that what operators returned took at once."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self._count(one.untyped_storage().nbytes())
                weakref.finalize(one, self._count, -one.untyped_storage().nbytes())
        return out

    def _count(self, size):
        self.held += size
        self.most = max(self.most, self.held)


@pytest.mark.parametrize("through_norms", [False, True])
def test_a_certificate_takes_the_memory_of_one_layer(through_norms):
    """Twelve layers, and norms that leave channels out: never all of them, silenced or in float64, at once."""
    width, count = 128, 12
    norm = nn.LayerNorm if through_norms else nn.Identity
    layers = [nn.Sequential(nn.Linear(width, width), norm(width), nn.ReLU()) for _ in range(count)]
    net = nn.Sequential(*layers, nn.Linear(width, 3)).eval()
    groups = channel_groups(net, torch.randn(2, width), through_norms=through_norms)
    mask = localize(groups, method="magnitude", keep=0.5)
    assert mask.share == 0.5
    slimmed = slim_down(groups, mask, None)
    with _Peak() as peak:
        assert certify_slim(slimmed, None) < 1e-12
    layer = 8 * width**2
    assert layer <= peak.most < 3 * layer


def test_a_certificate_changes_neither_network():
    """In float64, and with an operator that moves its statistics though its schema does not say so."""

    def forward(net, x):
        x = net.stem(x)
        return net.head(F.batch_norm(x, net.norm.running_mean, net.norm.running_var, training=True).relu().mean(2))

    net = Net(forward, stem=nn.Conv1d(4, 6, 1), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 3)).double()
    groups = channel_groups(net, torch.randn(2, 4, 5, dtype=torch.float64))
    slimmed = slim_down(groups, localize(groups, method="magnitude", keep=0.5), None)
    graphs = groups.graph_module, slimmed.graph_module
    before = [{name: tensor.clone() for name, tensor in graph.state_dict().items()} for graph in graphs]
    assert any("mean" in name for name in before[0])
    certify_slim(slimmed, None)
    for graph, state in zip(graphs, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in graph.state_dict().items())


def test_a_refit_is_another_network_and_the_certificate_is_about_the_plain_one():
    net = Net(lambda net, x: net.head(net.stem(x).relu()), stem=nn.Linear(4, 6), head=nn.Linear(6, 3))
    groups = channel_groups(net, torch.randn(2, 4))
    slimmed = slim_down(groups, localize(groups, method="magnitude", keep=0.5), None)
    before = {name: tensor.clone() for name, tensor in slimmed.plain.items()}
    refitted = refit(slimmed, Samples(torch.randn(64, 4), torch.zeros(64, dtype=torch.long), "data"), None)
    own, other = slimmed.graph_module.state_dict(), refitted.graph_module.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.items())
    assert all(tensor.data_ptr() == slimmed.plain[name].data_ptr() for name, tensor in own.items())  # not kept twice
    assert not torch.equal(other["head.weight"], own["head.weight"])
    assert certify_slim(refitted, None) == certify_slim(slimmed, None)


def test_a_source_that_cannot_run_in_float64_is_refused_with_the_way_out():
    net = Net(
        lambda net, x: net.head(net.stem(x).view(torch.int32).float()), stem=nn.Linear(4, 6), head=nn.Linear(6, 3)
    )
    groups = channel_groups(net, torch.randn(2, 4))
    with pytest.raises(CertificateError, match=r"(?s)cannot be run in float64.*take them out of forward"):
        extract(groups, ChannelMask.from_kept(groups, {}))
