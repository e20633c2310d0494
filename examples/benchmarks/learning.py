"""What learning costs, as ratios measured in one run: python examples/benchmarks/learning.py

Prints one row per claim of README's "Cost" table with the bar it is held to, and exits with 1 if one is missed.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from timing import Row, ratio, reported, seconds
from torch import nn

import netclone
from netclone.benchmarking.networks import ResNet
from netclone.channels.grouping import channel_groups
from netclone.cloning.placing import candidates

IMAGES, CLASSES, BATCH, STEPS = 800, 10, 64, 10


def plain_steps(source: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """As many forward and backward passes of the source as a mask is learned by."""
    for step in range(STEPS):
        chosen = slice(step * BATCH, (step + 1) * BATCH)
        F.cross_entropy(source(images[chosen]), labels[chosen]).backward()


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source, target = (
        ResNet(1, classes, depth=1, widths=(16, 32, 64), shortcut="conv").eval() for classes in (CLASSES, 5)
    )
    images, labels = torch.randn(IMAGES, 1, 28, 28), torch.arange(IMAGES) % CLASSES
    is_new = labels >= 5
    new, old = ([(images[some], labels[some])] for some in (is_new, ~is_new))
    groups = channel_groups(source, images[:2])

    def learned(steps: int) -> None:
        netclone.localize(groups, new, classes=range(5, 10), budget="params", steps=steps, batch_size=BATCH)

    def plain() -> None:
        plain_steps(source, images, labels)

    steps = [
        (seconds(lambda: learned(STEPS), 1) - seconds(lambda: learned(0), 1)) / seconds(plain, 1) for _ in range(5)
    ]
    rows: list[Row] = [("a step of mask learning / a forward-backward of the source", statistics.median(steps), 1.2)]

    cloned = partial(netclone.clone, source, target, new, classes=range(5, 10), target_data=old)
    positions = len(candidates(netclone.trace(target, images[:2]))) + 1
    found = cloned(search="all")
    assert found.at is not None
    at, source_at = found.at, found.source_at
    whole = ratio(lambda: cloned(search="all"), lambda: cloned(at=at, source_at=source_at), repeats=1)
    rows.append((f"clone() searching all {positions} positions / clone() at the one found", whole, None))

    mask = netclone.localize(groups, method="magnitude", budget="params")
    brief = partial(cloned, reconstruct=False, mask=mask)
    fits = ratio(lambda: brief(search="all"), lambda: brief(at=at, source_at=source_at), repeats=1)
    rows.append((f"the same without learning a mask or refitting: {positions} positions / one", fits, 2.0))
    return reported(rows)


if __name__ == "__main__":
    raise SystemExit(main())
