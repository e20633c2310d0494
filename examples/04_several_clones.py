"""04: several clones in one network, from different sources, removed in any order.

    python examples/04_several_clones.py

A clone reads the target and never another clone, so what is left does not depend on what was there before.
"""

from itertools import permutations

import torch

import netclone
from netclone.demo import load_data, make_network, train_network

digits = load_data()
old = digits.training(tuple(range(7)))
target = make_network("test_resnet", 7, seed=0)
train_network(target, *old, seed=0, epochs=2)

# Two specialists: each learned the old digits and one that the target does not know (labels are a network's own).
grafted, columns = target, {}
for digit, architecture in ((7, "test_efficientnet"), (8, "test_resnet")):
    source = make_network(architecture, 8, seed=digit)
    images, labels = digits.training((*range(7), digit))
    labels = labels.where(labels != digit, torch.tensor(7))
    train_network(source, images, labels, seed=0, epochs=2)
    clone_set = [(images[labels == 7], labels[labels == 7])]
    module = netclone.clone(source, target, clone_set, classes=[7], target_data=[old], distill_steps=30, epochs=8)
    grafted = netclone.inject(grafted, module, name=f"digit_{digit}")
    columns[f"digit_{digit}"] = module

assert isinstance(grafted, torch.fx.GraphModule)
print("Clones:", ", ".join(netclone.clones(grafted)))
chosen = digits.test_labels < 9
images, labels = digits.test_images[chosen], digits.test_labels[chosen]
scores = netclone.evaluate(grafted, [(images, labels)], reference=target)
print(f"Old {scores.old:.1%}, new {scores.new:.1%}, all {scores.all:.1%} of the digits 0 to 8.")
print("(Neither clone was told of the other's class: see the limits in README.)")
assert (scores.old or 0) > 0.9 and (scores.new or 0) > 0.6

with torch.no_grad():
    before = target(images)
    for order in permutations(netclone.clones(grafted)):
        left = grafted
        for name in order:
            left = netclone.remove(left, name)
        assert torch.equal(left(images), before)
        assert left.state_dict().keys() == target.state_dict().keys()

    # One removed, the other is what it would be alone.
    alone = netclone.inject(target, columns["digit_8"], name="digit_8")
    assert torch.equal(netclone.remove(grafted, "digit_7")(images), alone(images))
print("Removed in either order, the target is back to the bit; one removed, the other is as if it had come alone.")
