"""The table of operators: what it does not follow is kept whole and said, never a fault of Python."""

import pytest
import torch
from architectures import Net, random_mask
from torch import nn
from torch.nn import functional as F

from netclone.channels.grouping import channel_groups
from netclone.channels.labels import Labels
from netclone.cloning.extracting import extract


def pooled(net, x):
    return net.head(x.flatten(2).mean(2))


def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network(function, **parts):
    torch.manual_seed(0)
    usual = {"stem": nn.Conv2d(3, 8, 1), "body": nn.Conv2d(8, 8, 1), "head": nn.Linear(8, 4)}
    return Net(function, **(usual | parts)).eval()


def vector():
    return nn.Parameter(torch.rand(8) + 0.5)


def by_sample(net, x):
    """Every sample is convolved with its own weights, as one group each."""
    y = net.stem(x)
    weight = net.body.weight.repeat(x.shape[0], 1, 1, 1)
    return pooled(net, F.conv2d(y.reshape(1, -1, 6, 6), weight, groups=x.shape[0]).reshape(-1, 8, 6, 6))


KEPT = {
    "slopes computed from parameters": (lambda net, x: pooled(net, F.prelu(net.stem(x), net.a * 2)), {"a": vector()}),
    "slopes computed from the input": (lambda net, x: pooled(net, F.prelu(net.stem(x), x.mean()[None])), {}),
    "group norm with a computed weight": (
        lambda net, x: pooled(net, net.body(F.group_norm(net.stem(x), 2, net.a * x.mean()))),
        {"a": vector()},
    ),
    "batch norm with a computed weight": (
        lambda net, x: pooled(
            net, F.batch_norm(net.stem(x), net.bn.running_mean, net.bn.running_var, net.a * x.mean())
        ),
        {"a": vector(), "bn": nn.BatchNorm2d(8)},
    ),
    "transposed convolution with a computed bias": (
        lambda net, x: pooled(net, F.conv_transpose2d(net.stem(x), net.body.weight, net.a * x.mean())),
        {"a": vector()},
    ),
    "a number of groups that is the batch size": (by_sample, {}),
    "a roll of everything": (lambda net, x: pooled(net, net.stem(x).roll(1)), {}),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_the_table_does_not_follow_is_kept_whole_and_said(name):
    function, parts = KEPT[name]
    groups = channel_groups(network(function, **parts), images())
    assert "stem.weight" in {item.name for item in groups.unprunable if item.node and item.reason}
    assert extract(groups, random_mask(groups, 0.5)).certificate <= 1e-9


def test_a_matrix_asks_once_which_units_can_be_removed(monkeypatch):
    asked = []
    removable = Labels.removable
    monkeypatch.setattr(Labels, "removable", lambda self, labels: (asked.append(1), removable(self, labels))[1])
    model = network(lambda net, x: net.head(x).mean((1, 2, 3)))
    channel_groups(model, torch.zeros(2, 2, 3, 4, 8))
    assert len(asked) == 1
