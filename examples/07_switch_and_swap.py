"""07: a clone switched off and on, swapped, and given a bias, in one model that stays in use.

    python examples/07_switch_and_swap.py

What the model computes is always what inject and remove would give, to the bit.
"""

import torch

import netclone
from netclone.demo import load_data, make_network, train_network

digits = load_data()
old, every = digits.training(tuple(range(7))), digits.training(tuple(range(10)))
target = make_network("test_resnet", 7, seed=0)
train_network(target, *old, seed=0, epochs=2)
source = make_network("test_efficientnet", 10, seed=1)
train_network(source, *every, seed=0, epochs=3)


def clone(epochs: int) -> netclone.CloneModule:
    return netclone.clone(
        source,
        target,
        [every],
        classes=[7, 8, 9],
        target_data=[old],
        at="input",
        distill_steps=20,
        epochs=epochs,
    )


module, better = clone(epochs=0), clone(epochs=8)
grafted = netclone.inject(target, module, name="digits", columns="stable")
images = digits.test_images[:50]

with torch.no_grad():
    whole, own = grafted(images), target(images)
    with netclone.disabled(grafted, "digits"):
        off = grafted(images)
    assert torch.equal(off[:, :7], own) and bool((off[:, 7:] == -torch.inf).all())
    assert torch.equal(grafted(images), whole)
    print("Off, every image keeps the target's prediction; on again, every bit is back.")

    former = netclone.replace(grafted, "digits", better)
    assert torch.equal(grafted(images), netclone.inject(target, better)(images))
    netclone.replace(grafted, "digits", former)
    assert torch.equal(grafted(images), whole)
    netclone.replace(grafted, "digits", better)
    print("Swapped for a clone that was fitted longer, back, and swapped again.")

curve = netclone.trade_off(grafted, (digits.test_images, digits.test_labels))
for cost in (0.2, 1, 5):
    point = curve.cheapest(cost)
    print(f"An old image taken for new costs {cost}: bias {point.bias:+.1f}, old {point.old:.1%}, new {point.new:.1%}.")
netclone.replace(grafted, "digits", better.with_bias(curve.cheapest(5).bias))
scores = netclone.evaluate(grafted, [(digits.test_images, digits.test_labels)], reference=target)
assert scores.locality_closed == 0 and scores.old == curve.cheapest(5).old
