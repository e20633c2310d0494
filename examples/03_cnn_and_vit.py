"""03: a convolutional network learns from a vision transformer, and the other way round.

    python examples/03_cnn_and_vit.py

The adapter turns feature maps (N, C, H, W) into tokens (N, T, C) or back; nobody has to say which is which.
"""

from typing import Any

import torch
from torch.nn import functional as F

import netclone
from netclone.demo import load_data

digits = load_data()
old, new = digits.training(tuple(range(7))), digits.training((7, 8, 9))
test = [(digits.test_images, digits.test_labels)]
EPOCHS = 6


def trained(name: str, classes: int, options: dict[str, Any]) -> torch.nn.Module:
    """One of timm's smallest networks, which knows the first digits."""
    network = netclone.load_model(f"timm/{name}", weights=None, in_chans=1, num_classes=classes, **options)
    images, labels = digits.training(tuple(range(classes)))
    steps = len(labels) // 32
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * steps)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels))[: 32 * steps].split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


torch.manual_seed(0)
networks: dict[str, dict[str, Any]] = {"test_resnet": {}, "test_vit": {"img_size": 32, "patch_size": 8}}
for source_name, target_name in (("test_vit", "test_resnet"), ("test_resnet", "test_vit")):
    source = trained(source_name, 10, networks[source_name])
    target = trained(target_name, 7, networks[target_name])

    # Inside both networks, so that an adapter is needed: "auto" would also try the input.
    at = "layer2" if target_name == "test_resnet" else "blocks.2"
    # Scores from gradients instead of a learned mask: seconds instead of a minute.
    module = netclone.clone(source, target, [new], classes=[7, 8, 9], target_data=[old], at=at, epochs=8)
    grafted = netclone.inject(target, module)
    scores = netclone.evaluate(grafted, test, reference=target)
    print(
        f"{source_name} -> {target_name} at '{at}', source cut behind '{module.source_at}', the adapter reads "
        f"{module.spec.input_shape}: old {scores.old:.1%}, new {scores.new:.1%}, all {scores.all:.1%}"
    )
    assert scores.locality_closed == 0  # over its own classes the target is what it was
    assert scores.all > 0.7
    with torch.no_grad():
        assert torch.equal(netclone.remove(grafted)(digits.test_images), target(digits.test_images))
