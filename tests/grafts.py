"""Grafted networks for tests of what is drawn."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, fx, nn

import netclone


def graft(
    source: nn.Module, target: nn.Module, name: str = "digits", classes: tuple[int, ...] = (7, 9), **options: object
) -> fx.GraphModule:
    """A clone of some of ten classes in a target that knows five, made as fast as can be."""
    images, labels = torch.randn(20, 3, 64, 64), torch.arange(20) % 10
    given = {"target_data": [(images, labels % 5)], "budget": "channels", "method": "magnitude", "epochs": 1, **options}
    module = netclone.clone(source, target, [(images, labels)], classes=classes, distill_steps=1, **given)
    return netclone.inject(target, module, name=name)


def extracted(name: str, at: str) -> fx.GraphModule:
    """A clone without adapter and classifier, tapped at the first layer: ``odd``, and beside it ``even``."""
    source = timm.create_model(name, num_classes=4)
    mask = netclone.localize(source, method="magnitude", keep=0.25)
    module = netclone.extract(source, mask, at=at, classes=[1, 3])
    channels, height, width = module.spec.input_shape
    first = nn.Sequential(nn.AdaptiveAvgPool2d((height, width)), nn.Conv2d(3, channels, 1))
    target = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 25))
    grafted = netclone.inject(target, module, at="0", name="odd", example_inputs=torch.zeros(2, 3, 160, 160))
    return netclone.inject(grafted, module, at="0", name="even")


LONG = "a_clone_with_a_rather_long_name"


def cnn_graft() -> fx.GraphModule:
    """A CNN in a CNN, at a block of each; the clone is called ``digits``."""
    target = timm.create_model("test_resnet", num_classes=7)
    source = timm.create_model("test_efficientnet", num_classes=10)
    return graft(source, target, at="layer2", source_at="blocks.2", classes=(7, 8, 9))


def vit_graft() -> fx.GraphModule:
    """A ViT in a ViT of a thousand classes; the clone is called ``LONG``."""
    target = timm.create_model("test_vit", num_classes=1000, img_size=64)
    source = timm.create_model("test_vit", num_classes=10, img_size=64)
    return graft(source, target, LONG, (3,), at="blocks.1", source_at="blocks.2")


class Colours(nn.Module):
    """Logits of what a small layer sees on average."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def gated() -> tuple[fx.GraphModule, Tensor, Tensor]:
    """A clone ``late`` of two classes that half of the old images skip, in a target of four; and images and labels."""
    torch.manual_seed(0)
    images, labels = torch.randn(60, 3, 8, 8), torch.arange(60) % 6
    images[:, 0] += labels[:, None, None]
    source, target = Colours(6), Colours(4).eval()
    old = images[labels < 4], labels[labels < 4]
    options = {"method": "magnitude", "epochs": 1, "distill_steps": 1, "at": "input", "keep": 1.0, "gate": 0.5}
    module = netclone.clone(source, target, [(images, labels)], classes=(4, 5), target_data=[old], **options)
    return netclone.inject(target, module, name="late"), images, labels
