"""Clones of several sources side by side, without a target."""

import pytest
import torch
from test_switching import IMAGES, extracted, run
from torch import nn

import netclone
from netclone.cloning.composing import compose
from netclone.errors import AdapterError, ArgumentError

BIRDS = extracted(1, at=None, names=("heron", "ibis"))
CATS = extracted(2, (0, 1, 3), at=None, names=("cat", "lynx", "puma"))


def test_logits_are_those_of_the_modules_side_by_side():
    both = compose({"birds": BIRDS, "cats": CATS})
    birds, cats = run(BIRDS), run(CATS)
    assert torch.equal(run(both), torch.cat([birds, cats], 1))
    assert both.columns == {"birds": range(2), "cats": range(2, 5)} and both.num_classes == 5
    assert both.label_names == ("heron", "ibis", "cat", "lynx", "puma") == tuple(both.pretrained_cfg["label_names"])
    assert netclone.clones(compose([BIRDS, CATS])) == ("clone", "clone_2")


def test_the_verbs_of_grafted_models_work():
    both = compose({"birds": BIRDS, "cats": CATS})
    with netclone.disabled(both, "birds"):
        assert torch.equal(run(both), run(CATS))
    assert torch.equal(run(netclone.remove(both, "cats")), run(BIRDS))
    other = extracted(3, at=None, names=("heron", "ibis"))
    netclone.replace(both, "birds", other)
    assert torch.equal(run(both), run(compose([other, CATS])))
    assert netclone.evaluate(both, [(IMAGES, torch.tensor([0, 2, 4]))]).samples == 3


def test_what_cannot_be_composed():
    refused = {
        "modules: none were given": (ArgumentError, []),
        "expected a CloneModule, got Linear": (ArgumentError, [BIRDS, nn.Linear(2, 2)]),
        "modules: 'late' takes its source's features at 'conv', not images": (AdapterError, {"late": extracted(1)}),
        "modules: number 1 was fitted to a target": (AdapterError, [BIRDS, CATS.with_spec(feature_shape=(4,))]),
        r"takes images \(3, 9, 9\), the first one \(3, 8, 8\)": (
            AdapterError,
            [BIRDS, CATS.with_spec(input_shape=(3, 9, 9))],
        ),
        "tensors are torch.float32 on cpu and torch.float64": (
            ArgumentError,
            [extracted(1, at=None).double(), CATS],
        ),
        "already has a column called 'heron'": (ArgumentError, [BIRDS, BIRDS]),
    }
    for message, (error, modules) in refused.items():
        with pytest.raises(error, match=message):
            compose(modules)


def test_a_composed_model_has_no_file(tmp_path):
    with pytest.raises(ArgumentError, match="composed and has no target"):
        netclone.save_grafted(compose([BIRDS]), tmp_path / "composed.safetensors")
    assert not list(tmp_path.iterdir())
