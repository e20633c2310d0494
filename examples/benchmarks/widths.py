"""What the widths of slim layers cost and lose: python examples/benchmarks/widths.py FILE.json [--data DATA]

The measurements behind docs/adr/0015 (attention whose queries and values differ in width) and docs/adr/0018 (widths in
multiples of eight, and no bottlenecks), on one thread: a ResNet-20 with the scores of `cifar10`'s new classes, in
batches of 32, and the narrow VGG16 of the suite `modules`, trained here, slimmed for four classes and refitted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from pairs import Pair, networks_of
from timing import Row, reported, seconds
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import netclone
from netclone.arguments import Budget, Sharing
from netclone.benchmarking.modularising import MODULES
from netclone.benchmarking.networks import train_network
from netclone.channels import budgeting
from netclone.channels.budgeting import Allocation
from netclone.graph.counting import MacCounter
from netclone.graph.timing import relative_time

VEHICLES = (0, 1, 8, 9)
BREADTHS = (0.5, 0.7, 0.85)
"""Least widths that are compared, as shares of the width that all groups would have if they were equally narrow."""


def attention() -> list[Row]:
    """The kernel of a ViT-Tiny's attention by the dimensions of queries and values."""
    rows: list[Row] = []
    for summed, given in ((64, 64), (64, 32), (32, 64)):
        q, v = (torch.randn(1, 3, 197, width) for width in (summed, given))
        took = 1000 * min(seconds(lambda q=q, v=v: scaled_dot_product_attention(q, q, v), 1) for _ in range(20))  # type: ignore[misc]
        rows.append((f"attention with {summed} dimensions of queries and {given} of values, ms", took, None))
    return rows


def in_eights(asked: argparse.Namespace) -> list[Row]:
    """Half of the MACs, and half of the time, in any widths and in eights."""
    networks = networks_of("cifar10", asked)
    pair, rows = Pair.of(networks.suite, networks, 0, "10%"), list[Row]()
    groups, images = netclone.channel_groups(pair.source, pair.new_images[0][:2]), pair.images[:32]
    for budget, step in ((budget, step) for budget in ("macs", "latency") for step in (1, 8)):
        mask = netclone.localize(
            groups,
            [pair.new_images],
            classes=pair.classes,
            method="taylor",
            allocation="global",
            budget=cast(Budget, budget),
            round_to=step,
            latency_batch=32,
        )
        module = netclone.extract(groups, mask, classes=pair.classes, fold_batch_norm=True)
        left = macs(module, images) / macs(groups.graph_module, images)
        time = relative_time(module, groups.graph_module, images)
        about = f"ResNet-20, half of the {budget}, widths in multiples of {step}"
        rows += [(f"{about}: MACs", left, None), (f"{about}: time", time, None)]
    return rows


def macs(model: nn.Module, images: Tensor) -> int:
    with torch.no_grad(), MacCounter() as counter:
        model(images)
    return int(counter.macs)


def bottlenecks(asked: argparse.Namespace) -> list[Row]:
    """Accuracy on four classes of a slim plain network, refitted: with least widths, without one, with equal shares."""
    network, data = MODULES.sources[1], MODULES.base.load(asked.data)
    assert network.training is not None
    source = network.build(10, 0)
    train_network(source, data.images, data.labels, network.training, 0, augment=MODULES.base.augment)
    groups = netclone.channel_groups(source, data.images[:2])
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:100] for label in range(10)])
    samples = [(data.images[chosen], data.labels[chosen])]
    of_these = torch.isin(data.test_labels, torch.tensor(VEHICLES))
    images = data.test_images[of_these]
    labels = torch.searchsorted(torch.tensor(VEHICLES), data.test_labels[of_these])

    def accuracy(model: nn.Module, columns: tuple[int, ...] | None = None) -> float:
        with torch.no_grad():
            logits = torch.cat([model(batch) for batch in images.split(250)])
        return 100 * float(((logits if columns is None else logits[:, columns]).argmax(1) == labels).double().mean())

    rows: list[Row] = [("VGG16, narrow, whole: accuracy on four classes, %", accuracy(source, VEHICLES), None)]
    ways: list[tuple[str, Sharing, object]] = [
        (f"with a least width of {breadth}", "global", mock.patch.object(budgeting, "BREADTH", breadth))
        for breadth in BREADTHS
    ]
    one_each = mock.patch.object(Allocation, "least", lambda self, keep: [1] * len(self.groups.groups))
    ways += [("without one", "global", one_each), ("equal shares", "uniform", contextlib.nullcontext())]
    for keep, (words, allocation, changed) in itertools.product((0.5, 0.25, 0.125), ways):
        with cast("contextlib.AbstractContextManager[object]", changed):
            mask = netclone.localize(
                groups, samples, classes=VEHICLES, method="taylor", budget="macs", keep=keep, allocation=allocation
            )
        module = netclone.extract(groups, mask, classes=VEHICLES, reconstruct=samples)
        rows.append((f"VGG16, narrow, {keep:.1%} of the MACs, {words}: the same, %", accuracy(module), None))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    given = parser.parse_args()
    given.development = False
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.argv = [sys.argv[0], str(given.out)]
    raise SystemExit(reported([*attention(), *in_eights(given), *bottlenecks(given)]))
