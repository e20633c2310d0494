"""01: a network gets three classes from another one, in five lines, and gives them back.

    python examples/01_five_lines.py

The target knows the handwritten digits 0 to 6 and is deployed: its weights must not change. The source knows all ten.
"""

import torch

import netclone
from netclone.demo import load_data, make_network, train_network

# Two networks of timm, trained here in seconds on scikit-learn's digits; yours would come from timm.create_model.
digits = load_data()
old, new = digits.training(tuple(range(7))), digits.training((7, 8, 9))
source, target = make_network("test_efficientnet", 10, seed=0), make_network("test_resnet", 7, seed=0)
train_network(source, digits.images, digits.labels, seed=0, epochs=2)
train_network(target, *old, seed=0, epochs=2)

# The five lines. `new` holds images of the cloned classes with the source's labels, `old` some of the target's own.
module = netclone.clone(source, target, [new], classes=[7, 8, 9], target_data=[old], distill_steps=40, epochs=8)
grafted = netclone.inject(target, module, name="digits")
netclone.save(module, "digits.safetensors")
again = netclone.inject(target, netclone.load("digits.safetensors"), name="digits")
restored = netclone.remove(grafted, "digits")

test = [(digits.test_images, digits.test_labels)]
scores = netclone.evaluate(grafted, test, reference=target)
print(f"The module is grafted at '{module.at}' and was cut behind '{module.source_at}' of the source.")
print(f"Grafted: {scores.old:.1%} of the old digits, {scores.new:.1%} of the new, {scores.all:.1%} of all ten.")
assert scores.all > 0.85

# What is promised is exact, not approximate.
with torch.no_grad():
    before, after = target(digits.test_images), grafted(digits.test_images)
    assert torch.equal(after[:, :7], before)  # old logits: bitwise the target's
    assert torch.equal(restored(digits.test_images), before)  # removed: as if nothing had been
    assert torch.equal(again(digits.test_images), after)  # from the file: the same network
assert all(torch.equal(restored.state_dict()[name], tensor) for name, tensor in target.state_dict().items())
print("Old logits are bitwise the target's, the file gives the same network, and removal leaves nothing behind.")
