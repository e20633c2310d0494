"""build(name) -> Network: a network to check, its images, and random weights that make every check meaningful."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models

from netclone.errors import ArgumentError, LoadError
from netclone.models.loading import load_model
from netclone.zoo.naming import TRANSFORMERS, kind, known

CLASSES = 10
_LARGE = 384  # pixels; above, images are made smaller if the network takes any size


@dataclass(frozen=True)
class Network:
    """A network that takes images ``(N, *size)`` and returns one ``(N, columns)``, in eval mode."""

    name: str
    model: nn.Module
    size: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def on(self, device: str | torch.device) -> Network:
        """The same with its network moved to a device."""
        return replace(self, model=self.model.to(device))

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Noise as images, in the dtype and on the device of the network."""
        some = next(self.model.parameters())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.size, generator=generator, dtype=torch.float32).to(some.device, some.dtype)


class Averaged(nn.Module):
    """Columns from a network that is not a classifier: its maps ``(N, C, ...)``, averaged over positions, side by side.

    For a segmentation network that is its first map, the result. For a detector's backbone it is the whole pyramid, and
    for an encoder its tokens ``(N, T, C)``.
    """

    def __init__(self, network: nn.Module, first: bool) -> None:
        super().__init__()
        self.network = network
        self.first = first

    def forward(self, images: Tensor) -> Tensor:
        """Columns ``(N, sum of C)``."""
        maps = self.network(images)
        listed = list(maps.values()) if isinstance(maps, dict) else [maps]
        return torch.cat([one.flatten(2).mean(2) for one in (listed[:1] if self.first else listed)], 1)


class Logits(nn.Module):
    """The logits of a network of ``transformers``, which returns them among other things."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def build(name: str, device: str = "cpu", seed: int = 0) -> Network:
    """The named network with random weights, on the CPU or without values (``"meta"``), and its image size.

    Classifiers get ten classes. Images have the size that timm or torchvision states, or a smaller one if that is over
    384 pixels and the network takes any. Other networks are wrapped to return columns: segmentation networks, encoders
    without a head, and the backbones of detectors.

    Raises
    ------
    ArgumentError, LoadError
        If the library is unknown, or has no such network.

    Examples
    --------
    >>> build("timm/test_resnet").size
    (3, 160, 160)
    >>> build("torchvision/squeezenet1_1", device="meta").parameters
    727626
    """
    try:
        return _built(name, device, seed)
    except LoadError:
        if device == "cpu":
            raise
    network = _built(name, "cpu", seed)  # some constructors compute with tensors, which needs memory
    network.model.to(device)
    return network


def _built(name: str, device: str, seed: int) -> Network:
    library = name.partition("/")[0]
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of constructors do not matter for the check
        torch.manual_seed(seed)
        if library == "transformers":
            return Network(name, Logits(_of_transformers(name)).eval(), (3, 64, 64))
        if library == "torchvision":
            return _of_torchvision(name)
        if library == "timm":
            model = load_model(name, weights=None, num_classes=CLASSES)
            size = _affordable(cast("dict[str, Any]", model.pretrained_cfg))
            if model.num_classes == 0:  # an encoder, which has no head
                model = Averaged(model, first=True).eval()
            return Network(name, model, size)
    raise ArgumentError(f"name: no library '{library}' in the zoo; expected timm/, torchvision/ or transformers/")


def _affordable(preparation: Mapping[str, Any]) -> tuple[int, ...]:
    """The image size that timm states; if it is large and the network takes any, a small multiple of the least size."""
    channels, *sides = preparation["input_size"]
    if preparation.get("fixed_input_size") or max(sides) <= _LARGE:
        return (channels, *sides)
    least = preparation.get("min_input_size", (channels, 256, 256))[-1]
    return (channels, *2 * [least * -(-224 // least)])


def smallest(names: Sequence[str], progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
    """The smallest of the given networks in each family, by parameters; the first of equals.

    Every network is built on device meta, which takes minutes for all of timm.

    Examples
    --------
    >>> smallest(["timm/resnet18", "timm/resnet10t", "timm/vgg11"])
    ('timm/resnet10t', 'timm/vgg11')
    """
    best: dict[str, tuple[int, str]] = {}
    for done, name in enumerate(names, 1):
        size, family = build(name, "meta").parameters, known()[name]
        if family not in best or size < best[family][0]:
            best[family] = size, name
        if progress is not None:
            progress(done, len(names))
    return tuple(name for _, name in best.values())


def _of_torchvision(name: str) -> Network:
    what = kind(name)
    if what == "detection":
        detector: Any = load_model(name, weights=None)  # whose parts torchvision gives no types
        size = detector.transform.fixed_size or (128, 128)
        return Network(name, Averaged(detector.backbone, first=False).eval(), (3, *size))
    if what == "segmentation":
        network = load_model(name, weights=None, num_classes=CLASSES)
        return Network(name, Averaged(network, first=True).eval(), (3, 128, 128))
    model = name.partition("/")[2]
    options: dict[str, Any] = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    network = load_model(name, weights=None, num_classes=CLASSES, **options)
    weights = models.get_model_weights(model)["DEFAULT"]
    # a ViT is built for one size, perhaps not that of its best weights
    crop = getattr(network, "image_size", weights.transforms.keywords["crop_size"])
    size = (crop, crop) if isinstance(crop, int) else tuple(crop[-2:])
    if what == "video":  # networks that take clips of any size get small ones
        return Network(name, network, (3, 4, 32, 32) if weights.meta["min_size"] == (1, 1) else (3, 16, *size))
    return Network(name, network, (3, *size))


def _of_transformers(name: str) -> nn.Module:
    """A small classifier of Hugging Face, built from a config, without weights."""
    import transformers

    labels: dict[str, Any] = {"num_labels": CLASSES}
    side: dict[str, Any] = {"image_size": 64}
    tokens: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "patch_size": 16}
    depth: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4}
    makers: dict[str, Callable[[], nn.Module]] = {
        "convnext": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], **labels)
        ),
        "deit": lambda: transformers.DeiTForImageClassification(
            transformers.DeiTConfig(**side, **tokens, **depth, **labels)
        ),
        "resnet": lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], **labels)
        ),
        "swin": lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(
                **side, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4, **labels
            )
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**side, **tokens, **depth, **labels)
        ),
    }
    assert tuple(makers) == TRANSFORMERS
    model = name.partition("/")[2]
    if model not in makers:
        raise ArgumentError(f"name: no network 'transformers/{model}' in the zoo, which has {', '.join(TRANSFORMERS)}")
    return makers[model]()


def randomised(model: nn.Module, images: Tensor, seed: int = 1) -> nn.Module:
    """The same model with all constant initial values made random, in place.

    New networks hide faults: BatchNorm's statistics are 0 and 1, layer scales are tiny, heads and tokens are zero. Here
    the statistics become those of the images, so that the signal neither dies nor explodes, and are then shifted at
    random. Affine weights, biases, layer scales, gains, tokens and zero heads are drawn at random. All this is drawn on
    the CPU: every device gets the same.

    Examples
    --------
    >>> head = nn.Linear(4, 2)
    >>> _ = nn.init.zeros_(head.weight)
    >>> bool((randomised(head, torch.ones(3, 4)).weight == 0).any())
    False
    """
    generator = torch.Generator().manual_seed(seed)

    def blank(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1:  # gains, temperatures
                parameter.copy_(blank(parameter).uniform_(0.5, 1.5, generator=generator))
            elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                start = float(parameter.flatten()[0])
                mean = start if abs(start) >= 0.5 else 0.0
                parameter.copy_(blank(parameter).normal_(mean, 0.2, generator=generator))
            elif parameter.dim() > 1 and parameter.numel() and float(parameter.std()) < 1e-3:
                parameter.mul_(0.02 / float(parameter.std()))  # heads that start close to zero
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            if norm.running_mean is None or norm.running_var is None:
                continue
            noise = blank(norm.running_mean).normal_(generator=generator).to(norm.running_mean.device)
            factor = blank(norm.running_var).uniform_(0.5, 1.5, generator=generator)
            norm.running_mean += 0.3 * noise * norm.running_var.sqrt()
            norm.running_var *= factor.to(norm.running_var.device)
    return model
