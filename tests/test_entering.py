"""entered: random states come back from every public function, and no_grad around it keeps nothing from learning."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import netclone
from netclone.reporting.page import report

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
DATA = [(IMAGES, LABELS)]


class Drawing(nn.Module):
    """Draws from all three generators in every forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        drawn = random.random() + float(np.random.rand()) + torch.rand(1)
        return self.head(self.stem(x).relu().mean((2, 3))) + 0 * drawn


class Plain(Drawing):
    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


def mask_of(model):
    return netclone.localize(model, method="magnitude", keep=0.5, example_inputs=IMAGES)


def target_and_module():
    source, target = Plain().eval(), Drawing().eval()
    module = netclone.extract(source, mask_of(source), classes=[1], example_inputs=IMAGES).with_spec(at="input")
    return target, module


def clone(path, **options):
    given = {"method": "magnitude", "at": "input", "epochs": 1, "distill_steps": 1, **options}
    return netclone.clone(Plain().eval(), Drawing().eval(), DATA, classes=[1, 2], target_data=DATA, **given)


CALLS = {
    "trace": lambda path: netclone.trace(nn.Sequential(nn.Dropout(0.5)), IMAGES),
    "channel_groups": lambda path: netclone.channel_groups(Drawing().eval(), IMAGES),
    "localize": lambda path: netclone.localize(Drawing().eval(), DATA, classes=[1], steps=2),
    "extract": lambda path: target_and_module(),
    "clone": clone,
    "evaluate": lambda path: netclone.evaluate(Drawing().eval(), DATA),
    "cost": lambda path: netclone.cost(Drawing().eval(), IMAGES, repeats=1),
    "load_model": lambda path: netclone.load_model("timm/test_resnet", None),
    "report": lambda path: report(
        netclone.inject(*target_and_module(), example_inputs=IMAGES), DATA, path / "page.html"
    ),
}


def states():
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", list(CALLS))
def test_random_states_come_back(name, tmp_path, monkeypatch):
    for layer in (nn.Conv2d, nn.Linear):  # so that what moves a state is netclone, and not the making of a model
        monkeypatch.setattr(layer, "reset_parameters", _filled)
    before = states()
    CALLS[name](tmp_path)
    assert states() == before


def _filled(layer):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            values = torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter)
            parameter.copy_(values.roll(index + 1).sin())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_clones_are_learned_within_modes_without_gradients(mode, tmp_path):
    torch.manual_seed(0)
    source, target = Plain().eval(), Plain().eval()
    want = {}
    for context in (torch.enable_grad, mode):
        given = {"method": "local", "at": "stem", "epochs": 1, "distill_steps": 1, "keep": 0.7}
        with context():
            module = netclone.clone(source, target, DATA, classes=[1, 2], target_data=DATA, **given)
            assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        assert not any(tensor.is_inference() for tensor in tensors.values())
        want = want or tensors
        assert all(torch.equal(tensors[name], want[name]) for name in want)
