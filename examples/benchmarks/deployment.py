"""Where grafted networks go, on real architectures: python examples/benchmarks/deployment.py [FILE.json]

ResNet, MobileNet and ViT, each grafted onto another (random weights: it is the arithmetic that is looked at): compiled,
exported, as ONNX, in other formats. Prints a row for each bar, and exits with 1 if one is missed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import timm
import torch
from timing import Row, ratio, reported
from torch import Tensor, nn

import netclone
from netclone.workflows.translating import Translation, to_onnx, to_pt2

NAMES = {"ResNet-18": "resnet18", "MobileNetV2": "mobilenetv2_100", "ViT-Tiny": "vit_tiny_patch16_224"}
PAIRS = (("MobileNetV2", "ResNet-18"), ("ViT-Tiny", "MobileNetV2"), ("ResNet-18", "ViT-Tiny"))
"""Source and target."""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(NAMES[name], num_classes=10).eval()
    classifier = cast("Callable[[], nn.Linear]", model.get_classifier)()  # timm's, which create_model's type hides
    nn.init.normal_(classifier.weight, std=0.05)
    return model


def difference(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|."""
    return float((got.float() - want.float()).abs().amax() / want.float().abs().amax())


def tried(written: Translation) -> float:
    """The difference that a file makes, which has to have been tried."""
    assert written.difference is not None
    return written.difference


def rows_of(source: str, target: str) -> list[Row]:
    donor, deployed = network(source), network(target)
    module = netclone.extract(donor, netclone.localize(donor, method="magnitude", keep=0.5), classes=[1, 4])
    grafted = netclone.inject(deployed, module, at="input", name="clone")
    alone = netclone.remove(grafted)
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    what = f"{source} in {target}"
    rows: list[Row] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = grafted(images)
        torch.compiler.reset()
        compiled = torch.compile(grafted, fullgraph=True)  # a graph break is an error
        got = compiled(images)
        rows.append((f"{what}: torch.compile, max difference / max logit", difference(got, want), 1e-5))
        torch.compiler.reset()
        compiled_alone = torch.compile(alone, fullgraph=True)
        own = compiled_alone(images)
        rows.append((f"{what}: old columns, compiled with the clone and without", difference(got[:, :10], own), 1e-5))
        rows.append((f"{what}: compiled latency, grafted / (target and module)", both(compiled, alone, module), 1.05))
        rows.append((f"{what}: torch.export, saved and loaded", tried(to_pt2(grafted, Path(folder, "m.pt2"))), 0))
        rows.append((f"{what}: ONNX in onnxruntime", tried(to_onnx(grafted, Path(folder, "m.onnx"))), 1e-4))
        for dtype, bar in ((torch.bfloat16, 0.1), (torch.float16, 0.01)):
            low, low_alone = copy.deepcopy(grafted).to(dtype), copy.deepcopy(alone).to(dtype)
            got = low(images.to(dtype))
            assert torch.equal(got[:, :10], low_alone(images.to(dtype)))
            rows.append((f"{what}: {str(dtype).removeprefix('torch.')} to float32", difference(got, want), bar))
        last = images.to(memory_format=torch.channels_last)
        turned = copy.deepcopy(grafted).to(memory_format=torch.channels_last)
        got = turned(last)
        assert torch.equal(got[:, :10], copy.deepcopy(alone).to(memory_format=torch.channels_last)(last))
        rows.append((f"{what}: channels_last", difference(got, want), 1e-5))
    return rows


def both(compiled: Callable[..., Tensor], target: nn.Module, module: nn.Module) -> float:
    """Latency of the compiled graft, as a share of the two parts compiled and run one after the other."""
    image = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    one, two = torch.compile(target, fullgraph=True), torch.compile(module, fullgraph=True)
    return ratio(lambda: compiled(image), lambda: (one(image), two(image)), 15)


def main() -> int:
    torch.set_num_threads(1)
    return reported([row for source, target in PAIRS for row in rows_of(source, target)])


if __name__ == "__main__":
    raise SystemExit(main())
