"""02: a deployed classifier learns one class from another network, with real weights where you have them.

    python examples/02_imagenet.py --new photos/monarch --label 1021 --old photos/anything
    python examples/02_imagenet.py --source timm/mobilenetv2_100@insects.safetensors --target timm/resnet18 ...

``--new`` is a folder of images of the class, ``--label`` its index in the source, ``--old`` a folder of images of the
kind the target sees, unlabelled: the target says itself what they are. Networks are named as everywhere in netclone;
plain names take pretrained weights, which timm downloads. Without ``--new`` the same is done on handwritten digits.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import netclone
from netclone.demo import load_data, make_network, train_network

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", default="timm/mobilenetv2_100")
parser.add_argument("--target", default="timm/resnet18")
parser.add_argument("--new", type=Path)
parser.add_argument("--label", type=int, default=0)
parser.add_argument("--old", type=Path)
parser.add_argument("--size", type=int, help="side of the images; by default the target's own")
parser.add_argument("--out", type=Path, default=Path("one_class.safetensors"))
args = parser.parse_args()


class SeesAs(nn.Module):
    """A network that is given images normalised for another one: the difference is a scale and an offset."""

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, theirs: dict[str, Any], own: dict[str, Any]) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (theirs["mean"], theirs["std"], own["mean"], own["std"])
        )
        self.network = network
        self.register_buffer("scale", std / own_std)
        self.register_buffer("offset", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        logits: Tensor = self.network(images * self.scale + self.offset)
        return logits


def images_in(folder: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """All images of a folder, as the target wants them."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in files])


if args.new is not None:
    target, source = netclone.load_model(args.target), netclone.load_model(args.source)
    config, other = resolve_model_data_config(target), resolve_model_data_config(source)
    if args.size:
        config["input_size"] = (3, args.size, args.size)
    transform = create_transform(**config)
    if (config["mean"], config["std"]) != (other["mean"], other["std"]):
        source = SeesAs(source, config, other)
    new_images, label = images_in(args.new, transform), args.label
    old_images = None if args.old is None else images_in(args.old, transform)
else:
    print("No images given: a network that knows the digits 0 to 8 gets the 9 from one that knows all ten.")
    digits, label = load_data(), 9
    source, target = make_network("test_efficientnet", 10, seed=0), make_network("test_resnet", 9, seed=0)
    train_network(source, digits.images, digits.labels, seed=0, epochs=2)
    train_network(target, *digits.training(tuple(range(9))), seed=0, epochs=2)
    new_images, old_images = digits.training((9,))[0], digits.training(tuple(range(9)))[0][::3]

new = [(new_images, torch.full((len(new_images),), label))]
old = None
if old_images is not None:
    with torch.no_grad():
        old = [(old_images, torch.cat([target(part) for part in old_images.split(64)]).argmax(1))]

module = netclone.clone(source, target, new, classes=[label], target_data=old, distill_steps=40, epochs=8)
grafted = netclone.inject(target, module, name="new_class")
netclone.save(module, args.out)

with torch.no_grad():
    width = target(new_images[:1]).shape[1]
    hit = torch.cat([grafted(part).argmax(1) == width for part in new_images.split(64)]).float().mean()
print(f"'{args.out}': {args.out.stat().st_size / 1e6:.2f} MB, grafted at '{module.at}'.")
print(f"The new class is column {width}; {hit:.0%} of the images it was cloned from are recognised.")
if old is not None:
    kept = netclone.evaluate(grafted, old, reference=target)
    print(f"{kept.locality_open:.1%} of the old images are now taken for it; among old classes nothing changed:")
    print(f"  {kept.locality_closed:.0%} of the predictions over the old columns are different.")
    assert kept.locality_closed == 0
