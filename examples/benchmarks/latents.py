"""What a latent clone set takes and gives: python examples/benchmarks/latents.py [FILE.json]

The pair of `netclone demo`. For each position a clone is fitted, its clone set is kept as latents, and the clone is
fitted again from the file. Prints a row for each bar, and exits with 1 if one is missed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from timing import Row, reported
from torch import nn

import netclone
from netclone.demo import NEW, OLD, SOURCE, TARGET, Digits, load_data, make_network, train_network

POSITIONS = ("layer1", "layer2", "layer3", "layer4", "input")


def rows_of(at: str, digits: Digits, source: nn.Module, target: nn.Module) -> list[Row]:
    new, old = [digits.training(NEW)], [digits.training(OLD)]
    test = [(digits.test_images, digits.test_labels)]
    module = netclone.clone(
        source, target, new, classes=NEW, target_data=old, at=at, method="taylor", distill_steps=40, epochs=16
    )
    kept = netclone.latents(module, target, new, target_data=old)
    pictures = sum(images.numel() * images.element_size() for images, _ in (*new, *old))
    again = netclone.refit(module, kept, epochs=16)

    def mean(fitted: netclone.CloneModule) -> float:
        scores = netclone.evaluate(netclone.inject(target, fitted, name="digits"), test, reference=target)
        assert scores.old is not None and scores.new is not None
        return 50 * (scores.old + scores.new)

    rows: list[Row] = [(f"{at}: features of a sample", kept.features[0].numel(), None)]
    rows.append((f"{at}: mean of old and new accuracy, %, as cloned", mean(module), None))
    with tempfile.TemporaryDirectory() as folder:
        for words, dtype in (("float32", None), ("bf16", "bf16")):
            file = Path(folder, words)
            kept.save(file, "bf16" if dtype else None)
            read = netclone.refit(module, netclone.Latents.load(file), epochs=16)
            rows.append((f"{at}: bytes in {words} / the pictures' in float32", file.stat().st_size / pictures, None))
            rows.append((f"{at}: the same, fitted again from {words}", mean(read), None))
            pairs = zip(again.state_dict().values(), read.state_dict().values(), strict=True)
            changed = sum(not torch.equal(one, other) for one, other in pairs)
            rows.append(
                (f"{at}: tensors that differ from a fit without a file, {words}", changed, None if dtype else 0)
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = load_data()
    donor, receiver = make_network(SOURCE, 10, 0), make_network(TARGET, len(OLD), 0)
    train_network(donor, data.images, data.labels, 0, epochs=6)
    train_network(receiver, *data.training(OLD), 0, epochs=5)
    raise SystemExit(reported([row for at in POSITIONS for row in rows_of(at, data, donor, receiver)]))
