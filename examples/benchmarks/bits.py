"""Old logits against the target's, bit by bit, on 17 targets: python examples/benchmarks/bits.py [OUT.json]

Each target gets a clone at its input and is called plainly, under no_grad and in inference_mode, in float32 and
bfloat16, for batches of one and three. Beside the bits it says in how many modes a frozen target would differ, which is
why netclone keeps the flags, and what that costs in training against a frozen target. Exits with 1 if a bit differs.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from timing import ratio
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vit_b_16

import netclone
from netclone.cloning.verifying import compare
from netclone.graph.modes import GRADIENTS, Mode
from netclone.zoo.building import randomised
from netclone.zoo.checking import probe

MODES = tuple(
    Mode(gradients, batch, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for gradients in GRADIENTS
    for batch in (1, 3)
)


class Tokens(nn.Module):
    """torch's own encoder over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 16, 16)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))
        return logits


class Attention(nn.Module):
    """nn.MultiheadAttention over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 16, 16)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        logits: Tensor = self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return logits


def of_timm(name: str) -> tuple[Callable[[], nn.Module], int]:
    """How to build a network of timm, and the side of its images."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return lambda: timm.create_model(name, num_classes=10), cfg.input_size[-1]


def targets() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """How to build each target, and the side of its images."""
    named = [
        "coatnet_nano_rw_224",
        "coatnet_rmlp_nano_rw_224",
        "maxvit_tiny_tf_224",
        "maxxvit_rmlp_nano_rw_256",
        "beit_base_patch16_224",
        "beitv2_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "convnext_atto",
        "mixer_s32_224",
        "resnet18",
    ]
    return {
        **{f"timm/{name}": of_timm(name) for name in named},
        "torchvision/vit_b_16": (lambda: vit_b_16(num_classes=10), 224),
        "torchvision VisionTransformer, small": (lambda: VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=10), 64),
        "nn.TransformerEncoder": (Tokens, 64),
        "nn.MultiheadAttention": (Attention, 64),
    }


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, (build, side) in targets().items():
        images = torch.randn(3, 3, side, side)
        target = randomised(build().eval(), images)
        grafted = netclone.inject(target, probe((3, side, side)), at="input", example_inputs=images, check=False)
        found = compare(grafted, target, images, MODES)
        frozen = compare(grafted.requires_grad_(False), target, images, MODES)
        row = {"target": name, "modes": len(MODES), "equal": len(found.equal), "frozen_differs": len(frozen.different)}
        row["nodes"] = sorted({difference.node for difference in found.different})
        rows.append(row)
        print(row, flush=True)
    bitwise = sum(row["equal"] == row["modes"] for row in rows)

    table = Table("target", "bitwise in", "frozen, it would differ in", title=f"torch {torch.__version__}")
    for row in rows:
        table.add_row(str(row["target"]), f"{row['equal']} of {row['modes']} modes", f"{row['frozen_differs']}")
    Console(width=110).print(table)
    cost = training()
    print(f"{bitwise} of {len(rows)} targets bitwise; a training step, held / frozen: {cost}")
    if len(sys.argv) > 1:
        versions = {"torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
        record = {**versions, "rows": rows, "bitwise": bitwise, "targets": len(rows), "step_held_over_frozen": cost}
        Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")
    return int(bitwise < len(rows))


def training() -> dict[str, float]:
    """A training step of the clone in a grafted network, over one with the target frozen: ratios of times, in turn."""
    found = {}
    for name in ("resnet18", "vit_tiny_patch16_224"):
        images = torch.randn(8, 3, 224, 224)
        target = timm.create_model(name, num_classes=10).eval()
        held = netclone.inject(target, probe((3, 224, 224)), at="input", check=False).train()
        frozen = netclone.inject(target.requires_grad_(False), probe((3, 224, 224)), at="input", check=False).train()

        def step(model: nn.Module, images: Tensor = images) -> None:
            model.zero_grad()
            model(images).square().sum().backward()

        found[name] = round(ratio(partial(step, held), partial(step, frozen)), 3)
    return found


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raise SystemExit(main())
