"""What surgery costs, as ratios measured in one run: python examples/benchmarks/surgery.py

Prints one row per claim of README's "Cost" table with the bar it is held to, and exits with 1 if one is missed.
"""

from __future__ import annotations

import copy
from functools import partial

import timm
import torch
from timing import Row, ratio, reported, seconds
from torch import Tensor, nn

import netclone
from netclone.channels.grouping import channel_groups


class Chain(nn.Module):
    """A residual network of any length, to see how the time grows with the number of nodes."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = 0.7 * (x + block(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def surgery(model: nn.Module, example: Tensor) -> int:
    """Capture, group, slim with a certificate; returns the number of graph nodes."""
    groups = channel_groups(model, example)
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    netclone.extract(groups, mask)
    return len(groups.graph_module.graph.nodes)


def in_its_own_module(model: nn.Module, slim: nn.Module) -> nn.Module:
    """The slim weights in the model's own code: what the same network costs without netclone's graph."""
    native = copy.deepcopy(model)
    tensors = dict(native.named_parameters()) | dict(native.named_buffers())
    for name, tensor in (dict(slim.named_parameters()) | dict(slim.named_buffers())).items():
        tensors[name].data = tensor.data
    return native


def there_and_back(target: nn.Module, module: netclone.CloneModule, check: bool) -> nn.Module:
    return netclone.remove(netclone.inject(target, module, at="layer3", check=check))


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    image = torch.randn(2, 3, 224, 224)

    resnet = timm.create_model("resnet50").eval()
    traced = netclone.trace(resnet, image)
    groups = channel_groups(resnet, image)
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    slim = netclone.extract(groups, mask)
    module = netclone.extract(groups, mask, at="layer3", classes=[0, 1, 2])
    keep_all = netclone.localize(groups, method="magnitude", keep=1.0)
    fitting = netclone.extract(groups, keep_all, at="layer3", classes=[0, 1, 2])

    for check, claim, bar in (
        (False, "inject(check=False) + remove / copy.deepcopy(model), resnet50", 5.0),
        (True, "inject + remove / copy.deepcopy(model), resnet50, its bits compared", None),
    ):
        grafting = ratio(partial(there_and_back, traced, fitting, check), lambda: copy.deepcopy(resnet))
        rows.append((claim, grafting, bar))
    for name in ("resnet50", "vit_small_patch16_224"):
        model = timm.create_model(name).eval()
        rows.append((f"capture + grouping + extraction, {name}, s", seconds(partial(surgery, model, image), 3), 5.0))

    sizes, times = [], []
    for blocks in (9, 500):
        chain = Chain(blocks)
        small = torch.randn(2, 3, 8, 8)
        sizes.append(surgery(chain, small))
        times.append(seconds(partial(surgery, chain, small), 1 if blocks > 100 else 3))
    per_node = (times[1] / sizes[1]) / (times[0] / sizes[0])
    rows.append((f"time per node at {sizes[1]} nodes / at {sizes[0]}", per_node, 1.5))

    grafted = netclone.inject(traced, fitting, at="layer3").eval()
    with torch.no_grad():
        stem_to_layer3 = nn.Sequential(*list(resnet.children())[:7])
        tapped = stem_to_layer3(image)
        together = ratio(lambda: grafted(image), lambda: (resnet(image), fitting(tapped)))
        rows.append(("grafted latency / (target + module run separately)", together, 1.05))
        dense_macs = netclone.cost(resnet, image, repeats=1).macs
        slim_macs = netclone.cost(slim, image, repeats=1).macs
        latency = ratio(lambda: slim(image), lambda: resnet(image), 31)
        folded = netclone.extract(groups, mask, fold_batch_norm=True)
        folded_latency = ratio(lambda: folded(image), lambda: resnet(image), 31)
        native = in_its_own_module(resnet, slim.body)
        torch.testing.assert_close(native(image), slim(image))
        overhead = ratio(lambda: slim(image), lambda: native(image), 31)
    rows.append(("MACs slim/dense, resnet50 keep 0.5", slim_macs / dense_macs, None))
    rows.append(("latency slim/dense, resnet50 keep 0.5", latency, None))
    rows.append(("latency ratio / MACs ratio, plain extract", latency / (slim_macs / dense_macs), 1.25))
    rows.append(("latency ratio / MACs ratio, fold_batch_norm=True", folded_latency / (slim_macs / dense_macs), 1.25))
    rows.append(("latency slim / same weights in timm's own ResNet-50", overhead, None))
    rows.append(("parameters of the module cut at layer3 / source", parameters(module) / parameters(resnet), None))

    return reported(rows)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    raise SystemExit(main())
