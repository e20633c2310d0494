"""05: a big network shrunk to three of its classes, as a small model of its own: no target, no graft.

    python examples/05_shrink.py

Three steps: which channels carry the classes, cut them out, refit what reads the removed ones.
"""

import torch

import netclone
from netclone.demo import load_data, make_network, train_network

CLASSES = [3, 5, 8]  # of ten

digits = load_data()
source = make_network("test_efficientnet", 10, seed=0)
train_network(source, digits.images, digits.labels, seed=0, epochs=2)
data = [digits.training(tuple(CLASSES))]

groups = netclone.channel_groups(source, digits.images[:2])
print(f"{len(groups)} groups of channels, {groups.prunable_parameters / groups.parameters:.0%} of the parameters.")
for item in groups.unprunable:
    print(f"  stays: {item}")

chosen = torch.isin(digits.test_labels, torch.tensor(CLASSES))
images = digits.test_images[chosen]
labels = torch.tensor([CLASSES.index(label) for label in digits.test_labels[chosen].tolist()])
full = netclone.cost(source, images[:1])


def accuracy(logits: torch.Tensor) -> float:
    """Share of right answers among the three classes."""
    return float((logits.argmax(1) == labels).float().mean())


print(f"The source on these classes: {accuracy(source(images)[:, CLASSES]):.1%}, {full.parameters:,} parameters.")
for method in ("magnitude", "local"):
    mask = netclone.localize(groups, data, classes=CLASSES, method=method, keep=0.4, budget="params", steps=60)
    for refit in (False, True):
        small = netclone.extract(groups, mask, classes=CLASSES, reconstruct=data if refit else None)
        cost = netclone.cost(small, images[:1])
        print(
            f"  {method:9} {'refitted' if refit else 'as it is':8}: {accuracy(small(images)):.1%}, "
            f"{cost.parameters:,} parameters, {cost.macs / full.macs:.0%} of the MACs, certificate "
            f"{small.certificate:.0e}"
        )
assert accuracy(small(images)) > 0.8
assert small.certificate < 1e-9  # masked and slim are the same function

# It is a model like any other, and a small safe file.
netclone.save(small, "three_digits.safetensors")
again = netclone.load("three_digits.safetensors")
assert torch.equal(again(images), small(images))
compiled = torch.export.export(small, (images,))
print(f"Saved, loaded, exported: {len(list(compiled.graph.nodes))} operators.")
