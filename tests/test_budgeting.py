"""Budgets in channels, parameters and MACs."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from netclone.budgeting import channel_share
from netclone.channels import channel_groups
from netclone.errors import ArgumentError
from netclone.extracting import extract
from netclone.localizing import localize


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def groups(request):
    torch.manual_seed(0)
    return channel_groups(timm.create_model(request.param, num_classes=4), torch.randn(2, 3, 160, 160))


def size(model, budget, image):
    if budget == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.4, 0.5, 0.8])
def test_the_slim_network_uses_up_its_budget_and_no_more(groups, budget, keep):
    image = torch.randn(1, 3, 160, 160)
    whole = size(groups.graph_module, budget, image)
    within = extract(groups, localize(groups, method="magnitude", keep=keep, budget=budget))
    assert size(within, budget, image) <= keep * whole
    more = channel_share(groups, keep, budget) + 2e-3
    beyond = extract(groups, localize(groups, method="magnitude", keep=more))
    assert size(beyond, budget, image) > keep * whole


def test_a_share_of_the_channels_is_taken_as_it_is(groups):
    assert channel_share(groups, 0.3, "channels") == 0.3
    assert channel_share(groups, 1.0, "params") == 1.0


def test_a_budget_out_of_reach_is_refused(groups):
    with pytest.raises(ArgumentError, match=r"keep: 1e-06 of the params cannot be reached.*leaves 0\.\d+; ask for"):
        localize(groups, method="magnitude", keep=1e-6, budget="params")


def test_an_unknown_budget_is_refused(groups):
    with pytest.raises(ArgumentError, match="budget: got 'flops', expected one of 'channels', 'params', 'macs'"):
        localize(groups, method="magnitude", budget="flops")
