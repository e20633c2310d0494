"""Half of the time, on real architectures: python examples/benchmarks/latency.py [FILE.json]

Each source is halved by parameters, by MACs and by time. The time of what is left is then measured again beside the
whole source as its library has it, one image at a time. Weights are random: only time is looked at. Prints a row for
each, and exits with 1 if more than 0.55 of the time is left where half was asked for.
"""

from __future__ import annotations

import timm
import torch
from timing import Row, reported

import netclone
from netclone.graph.timing import relative_time

NAMES = {
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_100",
    "EfficientNet-B0": "efficientnet_b0",
    "ViT-Tiny": "vit_tiny_patch16_224",
    "ConvNeXt-Atto": "convnext_atto",
}


def rows_of(name: str) -> list[Row]:
    torch.manual_seed(0)
    source, images = timm.create_model(NAMES[name], num_classes=10).eval(), torch.randn(2, 3, 224, 224)
    groups = netclone.channel_groups(source, images)
    rows: list[Row] = []
    for budget in ("params", "macs", "latency"):
        mask = netclone.localize(
            groups, method="magnitude", allocation="global", keep=0.5, budget=budget, classes=[1, 4], round_to=8
        )
        module = netclone.extract(groups, mask, classes=[1, 4], fold_batch_norm=True)
        share = relative_time(module, source, images[:1])
        parameters = sum(tensor.numel() for tensor in module.parameters()) / groups.parameters
        rows.append(
            (f"{name}: half of the {budget}, time / the source's", share, 0.55 if budget == "latency" else None)
        )
        rows.append((f"{name}: half of the {budget}, parameters / the source's", parameters, None))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(reported([row for name in NAMES for row in rows_of(name)]))
