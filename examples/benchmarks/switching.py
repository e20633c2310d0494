"""How long switching and swapping a clone takes: python examples/benchmarks/switching.py [FILE.json]

A ResNet-50 as target, with half of a MobileNetV2 grafted onto it. The medians of many calls on one thread, in ms.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timing import Row, reported, seconds

import netclone

REPEATS = 50


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = timm.create_model("mobilenetv2_100", num_classes=10).eval()
    module = netclone.extract(source, netclone.localize(source, method="magnitude", keep=0.5), classes=[4, 5])
    grafted = netclone.inject(timm.create_model("resnet50", num_classes=4).eval(), module, at="input", name="birds")
    other = module.with_bias(0.5)

    def block() -> None:
        with netclone.disabled(grafted, "birds"):
            pass

    def both() -> None:
        netclone.disable(grafted, "birds")
        netclone.enable(grafted, "birds")

    calls: dict[str, Callable[[], object]] = {
        "a block of disabled()": block,
        "disable() and enable()": both,
        "replace(), the whole call": lambda: netclone.replace(grafted, "birds", other),
    }
    bars = {"a block of disabled()": 1.0, "disable() and enable()": 1.0}
    size = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    rows: list[Row] = [("parameters of the clone, millions", size, None)]
    rows += [(f"{words}, ms", 1000 * seconds(call, REPEATS), bars.get(words)) for words, call in calls.items()]
    return reported(rows)


if __name__ == "__main__":
    raise SystemExit(main())
