"""trace says which modules do in train mode what its graph does not hold, and only where something is lost."""

import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import netclone

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does = does

    def forward(self, x):
        return self.does(self, x)


class Net(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.inner = Inner(does)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.drop(self.inner(self.norm(self.conv(x))).mean((2, 3))))


def stochastic_depth(self, x):
    return x if not self.training else x * torch.rand(1)


LOSES = {
    "dropout": lambda self, x: F.dropout(x, 0.5, self.training),
    "dropout of channels": lambda self, x: F.dropout2d(x, 0.5, self.training),
    "stochastic depth": stochastic_depth,
    "batch statistics": lambda self, x: F.batch_norm(x, torch.zeros(8), torch.ones(8), training=self.training),
    "a failure": lambda self, x: F.relu(x) if not self.training else x[bool(x.sum() > 0)],
}
KEEPS = {
    "nothing": lambda self, x: x,
    "zero rate": lambda self, x: F.dropout(x, 0.0, self.training),
    "rate as keyword": lambda self, x: F.dropout(x, p=0.0, training=self.training),
    "always": lambda self, x: F.relu(x, inplace=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", list(LOSES))
def test_what_is_lost_is_said(kind, training):
    named = "the model itself" if kind == "a failure" else "'inner'"
    with pytest.warns(netclone.LostInTrainingWarning, match=f"does more: {named}\\."):
        traced = netclone.trace(Net(LOSES[kind]).train(training), IMAGES)
    assert traced.training == training


def test_further_outputs_are_lost():
    class Auxiliary(Net):
        def forward(self, x):
            out = super().forward(x)
            return (out, out) if self.training else out

    with pytest.warns(netclone.LostInTrainingWarning, match="the model itself"):
        netclone.trace(Auxiliary(KEEPS["nothing"]), IMAGES)


@pytest.mark.parametrize("kind", list(KEEPS))
def test_nothing_is_said_where_nothing_is_lost(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        netclone.trace(Net(KEEPS[kind]), IMAGES)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_byobnet"])
def test_models_of_timm_lose_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        netclone.trace(timm.create_model(name, num_classes=3))


def test_the_model_is_left_as_it_was():
    model = Net(LOSES["dropout"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(netclone.LostInTrainingWarning):
        netclone.trace(model, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
