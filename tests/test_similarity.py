"""Debiased linear CKA: by hand, and what it does not depend on."""

import pytest
import torch
from architectures import Net
from torch import nn

from netclone.graph.capturing import capture
from netclone.learning.similarity import cka, debiased_hsic, similarities

FIRST, SECOND = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]).double()


def kernels(*features):
    return torch.stack([one.reshape(len(one), -1) @ one.reshape(len(one), -1).T for one in features])


def test_by_hand():
    """Of each kernel the diagonal is dropped. tr KL + sum K sum L / 6 - (row sums of K) (row sums of L), over 4."""
    hsic = debiased_hsic(kernels(FIRST, SECOND))
    own, both = (12 + (-4) * (-4) / 6 - 4) / 4, (-4 + (-4) * (-4) / 6 - 4) / 4
    torch.testing.assert_close(hsic, torch.tensor([[own, both], [both, own]], dtype=torch.float64))
    torch.testing.assert_close(cka(hsic), torch.tensor([[1, -0.5], [-0.5, 1]], dtype=torch.float64))


def test_layers_that_share_nothing_are_not_alike_though_they_are_wide():
    """The plain estimate says 0.9 for noise of 400 channels and 40 samples."""
    torch.manual_seed(0)
    features = torch.randn(2, 40, 400).double()
    centred = features - features.mean(1, keepdim=True)
    grams = kernels(*centred)
    biased = torch.einsum("aij,bij->ab", grams, grams)
    assert cka(biased)[0, 1] > 0.85
    assert abs(cka(debiased_hsic(grams))[0, 1]) < 0.05


def test_neither_a_rotation_nor_a_scale_nor_a_shift_matters():
    torch.manual_seed(0)
    features = torch.randn(12, 5).double()
    rotation = torch.linalg.qr(torch.randn(5, 5).double())[0]
    hsic = debiased_hsic(kernels(features, 3 * features @ rotation + 1))
    torch.testing.assert_close(cka(hsic), torch.ones(2, 2).double())


@pytest.mark.parametrize("batch_size", [20, 7])
def test_nodes_are_compared_in_batches_and_a_short_rest_is_left_out(batch_size):
    torch.manual_seed(0)
    images = torch.randn(20 if batch_size == 20 else 23, 3, 4, 4).double()
    net = Net(lambda net, x: net.head(net.stem(x).relu().mean((2, 3))), stem=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 5))
    graph = capture(net.double(), images[:2])
    found = similarities(graph, ["relu", "linear"], images, batch_size)
    total = torch.zeros(2, 2).double()
    for part in images.split(batch_size)[:3]:
        with torch.no_grad():
            total += debiased_hsic(kernels(net.stem(part).relu(), net(part)))
    torch.testing.assert_close(found, cka(total))
