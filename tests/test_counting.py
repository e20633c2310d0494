"""Fused operators take the MACs of what they compute: as counted step by step, and by hand."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import netclone
from netclone.graph.counting import MacCounter
from netclone.metrics.evaluating import cost


def macs(module, *inputs, grad=False):
    with torch.set_grad_enabled(grad), MacCounter() as counter:
        module(*inputs)
    return counter.macs


def test_attention_takes_what_its_two_products_take():
    query, key, value = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 7, 4), torch.zeros(3, 2, 7, 4)
    assert macs(F.scaled_dot_product_attention, query, key, value) == 3 * 2 * (5 * 7 * 4 + 5 * 7 * 4)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), 3),
        (nn.TransformerEncoderLayer(8, 2, 24, batch_first=True), 1),
        (nn.TransformerEncoderLayer(8, 4, 16, activation="gelu", norm_first=True, batch_first=True), 1),
    ],
    ids=["attention", "encoder", "encoder, gelu, norm first"],
)
def test_torchs_fast_paths_take_what_the_slow_ones_take(module, inputs):
    x = torch.randn(3, 5, 8)
    module.eval()
    assert macs(module, *[x] * inputs) == macs(module, *[x] * inputs, grad=True) > 0


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_an_lstm_takes_its_weights_at_every_step(layers, bidirectional):
    lstm = nn.LSTM(8, 6, layers, bidirectional=bidirectional, batch_first=True).eval()
    weights = sum(tensor.numel() for name, tensor in lstm.named_parameters() if name.startswith("weight"))
    assert macs(lstm, torch.zeros(3, 5, 8)) == 3 * 5 * weights
    assert macs(lstm.double(), torch.zeros(3, 5, 8).double()) == 3 * 5 * weights


def test_costs_and_budgets_count_fused_attention():
    model = timm.create_model("test_vit", num_classes=4).eval()
    image = torch.zeros(1, 3, 160, 160)
    fused = cost(model, image, repeats=1).macs
    mask = netclone.localize(model, method="magnitude", keep=0.4, budget="macs")
    module = netclone.extract(model, mask)
    assert 0.39 * fused < macs(module, image) <= 0.4 * fused
    attentions = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    assert attentions
    for attention in attentions:
        attention.fused_attn = False
    assert cost(model, image, repeats=1).macs == fused
