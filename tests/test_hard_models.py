"""Models as people have them: names that code cannot hold, computed weights, .data, TorchScript, another dtype."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import netclone
from netclone.graph.capturing import capture

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network(name, inner=None):
    model = nn.Sequential()
    model.add_module(name, inner or nn.Conv2d(3, 8, 3))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(8, 5))
    return model.eval()


def halved(model):
    groups = netclone.channel_groups(model, IMAGES)
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    module = netclone.extract(groups, mask)
    with torch.no_grad():
        torch.testing.assert_close(module(IMAGES), mask.apply(groups)(IMAGES))
    return module


NAMES = ("1x1", "conv 1", "conv:0", "class", "self", "Größe", "a-b", "None", "__init", "lambda", "x/y", "code")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_may_be_called_anything(name, tmp_path):
    model = network(name)
    module = halved(model)
    netclone.save(module, tmp_path / "clone.safetensors")
    loaded = netclone.load(tmp_path / "clone.safetensors")
    traced = netclone.trace(model, IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), module(IMAGES))
        assert torch.equal(traced(IMAGES), model(IMAGES))
    assert netclone.position(traced, name) is not None


def test_names_that_fall_together_stay_apart():
    model = nn.Sequential()
    for index, name in enumerate(("a b", "a:b", "a_b", "class", "class_")):
        model.add_module(name, nn.Conv2d(3 if index == 0 else 8, 8, 1))
    with torch.no_grad():
        torch.testing.assert_close(capture(model.eval(), IMAGES)(IMAGES), model(IMAGES))


def old_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv2d(3, 8, 3))


def pruned():
    return prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.3)


COMPUTED = {
    "weight_norm": old_norm,
    "prune": pruned,
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)),
    "parametrization": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
}


@pytest.mark.parametrize("kind", list(COMPUTED))
def test_computed_weights_work(kind):
    model = network("conv", COMPUTED[kind]())
    halved(model)
    with torch.no_grad():
        want = model(IMAGES)
        assert torch.equal(netclone.trace(model, IMAGES)(IMAGES), want)


def test_what_an_earlier_forward_kept_is_copied():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            self.kept = self.linear(x)
            return self.kept

    model = Keeping()
    model(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert netclone.trace(model, torch.ones(2, 4))(torch.ones(2, 4)).shape == (2, 2)


def test_data_is_what_detach_is():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            y = self.conv(x).relu()
            return self.head(torch.cat([y.data, y], 1).mean((2, 3)))

    model = Shortcut().eval()
    halved(model)
    with torch.no_grad():
        assert torch.equal(netclone.trace(model, IMAGES)(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, IMAGES)])
@pytest.mark.parametrize(
    ("call", "part"), [(netclone.channel_groups, True), (netclone.channel_groups, False), (netclone.trace, False)]
)
def test_torchscript_is_refused_with_the_way_out(script, part, call):
    model = script(network("conv"))
    model = nn.Sequential(nn.Identity(), model) if part else model
    with pytest.raises(netclone.TraceError, match="give the Python module that it was made from"):
        call(model, IMAGES)


@pytest.mark.parametrize("call", [netclone.channel_groups, netclone.trace])
def test_dtypes_that_differ_are_named(call):
    with pytest.raises(netclone.TraceError, match=r"images are torch.float32, the model's parameters torch.bfloat16"):
        call(network("conv").bfloat16(), IMAGES)
