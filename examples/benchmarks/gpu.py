"""Old logits on a GPU, in ways of calling a network that CPUs do not have: python examples/benchmarks/gpu.py [OUT.json]

Each target gets a clone at its input. Its old logits, and those after removal, are compared with the target's, bit by
bit: called eagerly, under autocast, with cuDNN's search for the fastest kernel, without TF32, from a CUDA graph, and on
another stream. Exits with 1 if a bit differs. ``netclone zoo --device cuda`` compares dtypes, layouts and batch sizes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import netclone

SIDES = {
    "test_resnet": 128,
    "test_vit": 160,
    "mobilenetv2_100": 128,
    "convnext_atto": 128,
    "resnet50": 128,
    "swin_tiny_patch4_window7_224": 224,
}
"""Targets of timm, and the side of their images."""

Call = Callable[[nn.Module, Tensor], Tensor]


def plainly(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def in_autocast(dtype: torch.dtype) -> Call:
    def call(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return plainly(model, images)

    return call


def with_cudnn(*, benchmark: bool, allow_tf32: bool) -> Call:
    def call(model: nn.Module, images: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=allow_tf32):
            return plainly(model, images)

    return call


def on_a_stream(model: nn.Module, images: Tensor) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        logits = plainly(model, images)
    torch.cuda.synchronize()
    return logits


def from_a_graph(model: nn.Module, images: Tensor) -> Tensor:
    for _ in range(3):
        on_a_stream(model, images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = plainly(model, images)
    graph.replay()
    torch.cuda.synchronize()
    return logits.clone()


CALLS: dict[str, Call] = {
    "eager": plainly,
    "autocast, bfloat16": in_autocast(torch.bfloat16),
    "autocast, float16": in_autocast(torch.float16),
    "cuDNN's search for kernels": with_cudnn(benchmark=True, allow_tf32=True),
    "without TF32": with_cudnn(benchmark=False, allow_tf32=False),
    "a CUDA graph": from_a_graph,
    "another stream": on_a_stream,
}


def row_of(name: str) -> dict[str, bool]:
    """By call, whether old logits, and all of them after removal, are the target's bits."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIDES[name], SIDES[name], device="cuda")
    target = timm.create_model(name, num_classes=5).eval().cuda()
    groups = netclone.channel_groups(timm.create_model("test_efficientnet", num_classes=6).eval().cuda(), images[:2])
    module = netclone.extract(groups, netclone.localize(groups, method="magnitude", keep=0.5), classes=[1, 2])
    grafted = netclone.inject(target, module, at="input", name="probe")
    networks = target, grafted, netclone.remove(grafted)
    row = {}
    for words, call in CALLS.items():
        want, got, back = (call(network, images) for network in networks)
        row[words] = torch.equal(got[:, :5], want) and torch.equal(back, want)
    return row


def main() -> int:
    rows = {name: row_of(name) for name in SIDES}
    title = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    table = Table("target", *CALLS, title=title)
    for name, row in rows.items():
        table.add_row(name, *("bitwise" if equal else "[red]differs[/]" for equal in row.values()))
    Console(width=150).print(table)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"made_with": title, "rows": rows}, indent=2) + "\n")
    return int(not all(equal for row in rows.values() for equal in row.values()))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU that torch can use.")
    raise SystemExit(main())
