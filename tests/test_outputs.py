"""What models return beside one tensor: the logits in it are found, or the caller says which they are."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import netclone
from netclone.errors import ArgumentError, OutputError
from netclone.graph.outputs import chosen, logits_of

LOGITS, FEATURES, MAPS = torch.randn(2, 5), torch.randn(2, 7), torch.randn(2, 7, 4, 4)


class Pair(NamedTuple):
    features: Tensor
    logits: Tensor


@dataclass
class Parts:
    features: Tensor
    logits: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("value", "output", "key"),
    [
        (LOGITS, None, None),
        (LOGITS, "anything", None),
        ((LOGITS,), None, 0),
        ([MAPS, LOGITS], None, 1),
        ((None, LOGITS, (MAPS, MAPS)), None, 1),
        ({"scores": LOGITS, "maps": MAPS}, None, "scores"),
        ({"features": FEATURES, "logits": LOGITS}, None, "logits"),
        ({"features": FEATURES, "logits": LOGITS}, "features", "features"),
        ((FEATURES, LOGITS), 1, 1),
        (Pair(FEATURES, LOGITS), None, "logits"),
        (Parts(FEATURES, LOGITS), None, "logits"),
    ],
)
def test_the_logits_are_found_in_what_a_model_returns(value, output, key):
    assert chosen(value, output, "Net") == key
    wanted = FEATURES if key == "features" else LOGITS
    assert logits_of(value, output, "Net") is wanted


@pytest.mark.parametrize(
    ("value", "output", "error", "message"),
    [
        ((FEATURES, LOGITS), None, OutputError, r"Net returns tuple of 2: 0 \(2, 7\), 1 \(2, 5\); say .* output=0"),
        ((MAPS, MAPS, LOGITS, FEATURES), None, OutputError, "output=2"),
        ({"a": MAPS, "b": MAPS}, None, OutputError, "output='a'"),
        ((FEATURES, LOGITS), 2, OutputError, "it has no tensor 2; name one that it has"),
        ({"logits": LOGITS, "loss": None}, "loss", OutputError, "it has no tensor 'loss'"),
        (None, None, OutputError, "returns NoneType; expected one tensor"),
        ({}, "logits", OutputError, "returns dict; expected one tensor"),
        (((LOGITS,),), None, OutputError, "wrap the model"),
        ((FEATURES, LOGITS), True, ArgumentError, "output: got True, expected the key or index"),
        ((FEATURES, LOGITS), 1.0, ArgumentError, "output: got 1.0"),
    ],
)
def test_what_is_not_clear_is_refused_with_what_was_seen(value, output, error, message):
    with pytest.raises(error, match=message):
        chosen(value, output, "Net")


class Several(nn.Module):
    """A classifier that returns its features too, and that torch can trace."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.stem(images).mean((2, 3))
        return {"features": features, "scores": self.head(features)}


class Exported(Several):
    """The same, where only torch.export can follow it."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[1] != 3:
            raise ValueError("three channels")
        return super().forward(images)


@pytest.mark.parametrize("kind", [Several, Exported])
def test_models_that_return_several_tensors_are_sources_and_targets_everywhere(kind):
    torch.manual_seed(0)
    source, target = kind(6).eval(), kind(3).eval()
    images, labels = torch.randn(18, 3, 8, 8), torch.arange(18) % 3
    own = target(images)["scores"]
    with pytest.raises(OutputError, match="returns dict of 2: 'features' .*output='features'"):
        netclone.trace(target, images)
    said = {"output": "scores"}
    module = netclone.clone(
        source, target, (images, labels + 3), classes=[3, 4, 5], target_data=(images, labels), at="stem.1", epochs=1,
        method="magnitude", distill_steps=0, **said,
    )  # fmt: skip
    grafted = netclone.inject(target, module, **said)
    assert torch.equal(grafted(images)[:, :3], own)
    removed = netclone.remove(grafted)
    assert torch.equal(removed(images), own)
    assert removed.state_dict().keys() == target.state_dict().keys()
    assert netclone.verify(grafted, target, images, **said).passed
    scores = netclone.evaluate(grafted, (images, labels), reference=target, source=source, **said)
    assert scores.locality_closed == 0
    assert netclone.evaluate(target, (images, labels), **said).samples == 18
    assert len(netclone.latents(module, target, (images, labels + 3), **said)) == 18
    mask = netclone.localize(source, (images, labels), classes=[0, 1], method="taylor", **said)
    assert netclone.extract(source, mask, classes=[1], example_inputs=images, **said).certificate < 1e-9
    assert type(target(images)) is dict  # the caller's models return what they did
