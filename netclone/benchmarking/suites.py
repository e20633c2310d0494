"""SUITES: the data, sources, targets, classes and numbers of steps that the benchmark uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.arguments import Method, words
from netclone.benchmarking.networks import LeNet, ResNet, Training, cropped
from netclone.demo import load_data, make_network, shifted
from netclone.errors import ArgumentError
from netclone.learning.neighbourhoods import Augment, mirrored

Options = dict[str, Any]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5)
"""The mean and the deviation that the suites zoo and vit normalise images with, as their source expects it."""
ZOO_SIZE = 128
"""The width of the images of the suites zoo and vit."""


@dataclass(frozen=True)
class Dataset:
    """Normalised images ``(N, C, H, W)`` and labels ``(N,)`` of both splits; ``columns``: the source's, by label."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    columns: tuple[int, ...]

    def on(self, device: torch.device) -> Dataset:
        """The same on a device."""
        train, test = (self.images, self.labels), (self.test_images, self.test_labels)
        images, labels, test_images, test_labels = (tensor.to(device) for tensor in (*train, *test))
        return Dataset(images, labels, test_images, test_labels, self.columns)


@dataclass(frozen=True)
class Network:
    """A network: built for a number of classes and a seed, and then trained, or loaded with given weights.

    With ``read`` it is what that gives for some rows of its classifier, and ``weights`` is only a name for it.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    training: Training | None = None
    weights: str | None = None
    read: Callable[[tuple[int, ...]], nn.Module] | None = None


@dataclass(frozen=True)
class Setting:
    """Classes that are cloned at once. Tables average over a ``group``; ``fractions`` are the sizes of clone sets.

    A size below 1 is a share of the training images of each class, and one from 1 on a number of images.
    ``steps`` is the number of steps of every tuning baseline, and ``search_steps`` that of the trials in its search
    (0: the same). ``keeps`` are the sizes of netclone's modules.
    """

    name: str
    group: str
    new: tuple[int, ...]
    fractions: tuple[float, ...]
    steps: int
    keeps: tuple[float, ...]
    search_steps: int = 0


@dataclass(frozen=True)
class Suite:
    """A benchmark: everything it depends on except the seed and the folder of data.

    ``rates`` are the learning rates to search, by baseline, and ``depths`` the freezing depths of methods that freeze.
    ``clone`` are options of :func:`netclone.clone` in every run, ``curve`` the further sizes, and ``ablations`` changes
    of single options. Studies (curve, localisation, ablations) run in the first setting and fraction, with
    ``study_seeds`` of the seeds. ``source_knows`` are the classes of a source that is trained here (None: all). Trained
    networks are kept under the name ``networks``, that of the suite if it is empty.
    """

    name: str
    about: str
    load: Callable[[Path], Dataset]
    source: Network
    target: Network
    old: tuple[int, ...]
    settings: tuple[Setting, ...]
    augment: Augment
    rates: dict[str, tuple[float, ...]]
    depths: tuple[int, ...]
    clone: Options
    curve: tuple[float, ...]
    localize: tuple[str, ...]
    ablations: tuple[tuple[str, Options], ...]
    positions: bool = True
    batch_size: int = 64
    localize_seeds: int = 3
    study_seeds: int = 1
    source_knows: tuple[int, ...] | None = None
    networks: str = ""


RATES: dict[str, tuple[float, ...]] = {
    "fine-tune": (3e-3, 1e-2, 3e-2),
    "LwF": (3e-3, 1e-2, 3e-2),
    "PCSD": (3e-3, 1e-2, 3e-2),
    "source as teacher": (3e-3, 1e-2, 3e-2),
    "UHC": (3e-3, 1e-2, 3e-2),
    "MeRLin": (3e-3, 1e-2, 3e-2),
    "DER": (3e-3, 1e-2, 3e-2),
    "LoRA": (3e-3, 1e-2, 3e-2),
    "kernel modulation": (3e-2, 1e-1, 3e-1),
    "residual patches": (3e-2, 1e-1, 3e-1),
    "parallel patches": (3e-2, 1e-1, 3e-1),
    "shallow prompts": (1e-2, 3e-2, 1e-1),
    "deep prompts": (1e-2, 3e-2, 1e-1),
    "class prompts": (1e-2, 3e-2, 1e-1),
}
METHODS = words(Method)
ABLATIONS: tuple[tuple[str, Options], ...] = (
    ("no distillation", {"distill_steps": 0}),
    ("plain copy: neither refitted nor distilled", {"reconstruct": False}),
    ("one epoch after the closed-form start", {"epochs": 1}),
    ("every position tried", {"search": "all"}),
    ("no sample of old classes", {"target_data": None}),
    ("without the target's stream", {"without": ("target_stream",)}),
    ("without calibration", {"without": ("calibration",)}),
    ("layer1, the adapter starting at random", {"at": "layer1", "without": ("adapter_start",)}),
)


def suite_named(name: str) -> Suite:
    """The suite of that name.

    Raises
    ------
    ArgumentError
        If there is no such suite.
    """
    if name not in SUITES:
        raise ArgumentError(f"suite: got {name!r}, expected one of {', '.join(SUITES)}")
    return SUITES[name]


def in_development(suite: Suite) -> Suite:
    """The suite with a tenth of the training images as its test split, for choosing constants."""

    def load(folder: Path) -> Dataset:
        dataset = suite.load(folder)
        held = torch.zeros(len(dataset.labels), dtype=torch.bool)
        for label in dataset.labels.unique():
            held[(dataset.labels == label).nonzero().flatten()[::10]] = True
        images, labels = dataset.images, dataset.labels
        return Dataset(images[~held], labels[~held], images[held], labels[held], dataset.columns)

    return replace(suite, about=f"{suite.about}; in development, on a tenth of the training images", load=load)


def needed(folder: Path, name: str) -> Path:
    """The path of a data file.

    Raises
    ------
    ArgumentError
        If it does not exist.
    """
    path = folder / name
    if not path.is_file():
        raise ArgumentError(f"data: no file {name} in '{folder}'; give the folder that holds it with --data")
    return path


def _digits(folder: Path) -> Dataset:
    """scikit-learn's digits, as the demo has them; no file is needed."""
    digits = load_data()
    return Dataset(digits.images, digits.labels, digits.test_images, digits.test_labels, tuple(range(10)))


def _fashion(folder: Path) -> Dataset:
    return _loaded(folder, "fashion_mnist.npz", "FashionMNIST", ((0.286,), (0.353,)))


def _mnist(folder: Path) -> Dataset:
    return _loaded(folder, "mnist.npz", "MNIST", ((0.1307,), (0.3081,)))


def _cifar100(folder: Path) -> Dataset:
    return _loaded(folder, "cifar100.npz", "CIFAR100", IMAGENET)


def _tiny_imagenet(folder: Path) -> Dataset:
    """Ten classes of Tiny-ImageNet as they are, 64 pixels wide; labels count from 0."""
    with np.load(needed(folder, "tiny_imagenet_10c_64.npz"), allow_pickle=False) as file:
        return _dataset(file, (HALVES, HALVES))


def _cifar10(folder: Path) -> Dataset:
    return _loaded(folder, "cifar10_jpeg_1000x500.npz", "CIFAR10", IMAGENET)


def _zoo(folder: Path) -> Dataset:
    """Ten classes of Tiny-ImageNet, enlarged from 64 to 128 pixels."""
    with np.load(needed(folder, "tiny_imagenet_10c_64.npz"), allow_pickle=False) as file:
        dataset = _dataset(file, (HALVES, HALVES))
        columns = tuple(int(index) for index in file["in1k_index"])
    sized = [
        F.interpolate(x, size=(ZOO_SIZE, ZOO_SIZE), mode="bicubic", align_corners=False) for x in _pictures(dataset)
    ]
    return Dataset(sized[0], dataset.labels, sized[1], dataset.test_labels, columns)


def _pictures(dataset: Dataset) -> tuple[Tensor, Tensor]:
    return dataset.images, dataset.test_images


def _loaded(folder: Path, name: str, other: str, scale: tuple[tuple[float, ...], tuple[float, ...]]) -> Dataset:
    """A dataset from its npz file, or, if that is missing, from torchvision, which may download it."""
    if (folder / name).is_file():
        with np.load(folder / name, allow_pickle=False) as file:
            return _dataset(file, scale)
    try:
        import torchvision

        kind = getattr(torchvision.datasets, other)
        splits = [kind(str(folder / "torchvision"), train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise ArgumentError(
            f"data: no file {name} in '{folder}', and torchvision cannot download {other} ({error}); give the folder "
            f"that holds the file with --data, or put torchvision's files of {other} into '{folder / 'torchvision'}'"
        ) from error
    arrays = {}
    for split, part in zip(("train", "test"), splits, strict=True):
        images = np.asarray(part.data)
        arrays[f"x_{split}"] = images[..., None] if images.ndim == 3 else images
        arrays[f"y_{split}"] = np.asarray(part.targets)
    return _dataset(arrays, scale)


def _dataset(arrays: Any, scale: tuple[tuple[float, ...], tuple[float, ...]]) -> Dataset:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in scale)
    images, test_images = (
        torch.from_numpy(np.asarray(arrays[f"x_{split}"])).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        for split in ("train", "test")
    )
    labels, test_labels = (torch.from_numpy(np.asarray(arrays[f"y_{split}"])).long() for split in ("train", "test"))
    return Dataset(
        images.contiguous(), labels, test_images.contiguous(), test_labels, tuple(range(int(labels.max()) + 1))
    )


def _resnet(channels: int, depth: int, widths: tuple[int, int, int], shortcut: str) -> Callable[[int, int], nn.Module]:
    def build(classes: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return ResNet(channels, classes, depth=depth, widths=widths, shortcut=shortcut)

    return build


def _timm(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def build(classes: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: nn.Module = timm.create_model(name, num_classes=classes, **options)
        return model

    return build


def _lenet(classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LeNet(1, classes)


def _tiny(classes: int, seed: int) -> nn.Module:
    return make_network("test_resnet", classes, seed)


_WHOLE = (16, 32, 64)
_LENET = Network("LeNet-5", _lenet, Training(epochs=4, lr=0.1))
_RESNET_20 = Network("ResNet-20", _resnet(3, 3, _WHOLE, "pad"), Training(epochs=15, lr=0.1, batch_size=64))
_TEST_RESNET = Network("timm test_resnet", _timm("test_resnet"), Training(epochs=20, lr=0.05, batch_size=32))
_GIVEN_RESNET_20 = Network(
    "ResNet-20", _resnet(3, 3, _WHOLE, "pad"), weights="cifar_resnet20.akamaster_c10_jpegft.safetensors"
)
_GIVEN_MOBILENET = Network(
    "timm mobilenetv2_100",
    _timm("mobilenetv2_100", pad_type="same"),
    weights="mobilenetv2_100.tf2ptq_in1k.safetensors",
)
_ADAM = Training(epochs=5, lr=4e-3, optimizer="adamw", batch_size=32, weight_decay=0.05, smoothing=0.1)
_ONE_CYCLE = Training(epochs=4, lr=0.2, channels_last=True)
_FIVE = (5, 6, 7, 8, 9)
_SEARCHED: Options = {"rates": RATES, "depths": (0, 2, 3, 4, 5)}
_COMPARED: Options = {**_SEARCHED, "curve": (), "localize": (), "ablations": (), "positions": False}
_STUDIED: Options = {
    **_SEARCHED,
    "clone": {},
    "curve": (0.75, 0.125),
    "localize": METHODS,
    "ablations": ABLATIONS,
}

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="digits",
            about="scikit-learn's handwritten digits, tiny networks, few steps: a check of the machinery, not a result",
            load=_digits,
            source=Network("ResNet-8, width 8", _resnet(1, 1, (8, 16, 32), "conv"), _ADAM),
            target=Network("timm test_resnet", _tiny, _ADAM),
            old=(0, 1, 2, 3, 4),
            settings=(
                Setting("M", "M", _FIVE, (0.2,), steps=16, keeps=(0.5, 0.25)),
                Setting("S 5", "S", (5,), (0.3,), steps=8, keeps=(0.5,)),
            ),
            augment=shifted,
            rates={name: rates[1:2] for name, rates in RATES.items()},
            depths=(0, 2),
            clone={"budget": "params", "distill_steps": 4, "epochs": 4, "batch_size": 32},
            curve=(0.75,),
            localize=("taylor",),
            ablations=ABLATIONS[:1],
            positions=False,
            batch_size=32,
            localize_seeds=1,
        ),
        Suite(
            name="fashion",
            about="Fashion-MNIST: the target, an 8-layer ResNet, knows classes 0-4; the source, the same, all ten",
            load=_fashion,
            source=Network("ResNet-8", _resnet(1, 1, _WHOLE, "conv"), _ONE_CYCLE),
            target=Network("ResNet-8", _resnet(1, 1, _WHOLE, "conv"), _ONE_CYCLE),
            old=(0, 1, 2, 3, 4),
            settings=(
                Setting("M", "M", _FIVE, (0.1, 0.3), steps=500, keeps=(0.5, 0.25), search_steps=200),
                *(Setting(f"S {c}", "S", (c,), (0.1,), steps=200, keeps=(0.5,), search_steps=120) for c in _FIVE),
            ),
            augment=mirrored,
            **_STUDIED,
        ),
        Suite(
            name="cifar10",
            about="CIFAR-10 saved as JPEG, 1,000 + 500 images a class (not to be compared with published figures): the "
            "target, a ResNet-20, knows classes 0-4; the source, a pretrained ResNet-20, all ten",
            load=_cifar10,
            source=_GIVEN_RESNET_20,
            target=_RESNET_20,
            old=(0, 1, 2, 3, 4),
            settings=(Setting("M", "M", _FIVE, (0.1, 0.3), steps=300, keeps=(0.5, 0.25), search_steps=100),),
            augment=cropped,
            **{**_COMPARED, "curve": (0.75, 0.125)},
            clone={},
        ),
        Suite(
            name="zoo",
            about="Ten classes of Tiny-ImageNet at 128 pixels: the target, timm's test_resnet trained on the "
            "first five; the source, an ImageNet MobileNetV2",
            load=_zoo,
            source=_GIVEN_MOBILENET,
            target=_TEST_RESNET,
            old=(0, 1, 2, 3, 4),
            settings=(Setting("M", "M", _FIVE, (0.1, 0.3), steps=300, keeps=(0.5,), search_steps=100),),
            augment=mirrored,
            **_COMPARED,
            clone={"batch_size": 32},
            batch_size=32,
        ),
        Suite(
            name="few",
            about="As cifar10, from one to thirty images of each class",
            load=_cifar10,
            source=_GIVEN_RESNET_20,
            target=_RESNET_20,
            old=(0, 1, 2, 3, 4),
            settings=(Setting("M", "M", _FIVE, (10, 1, 3, 5, 30), steps=100, keeps=(0.5,), search_steps=50),),
            augment=cropped,
            **_COMPARED,
            clone={},
            networks="cifar10",
        ),
        Suite(
            name="vit",
            about="Ten classes of Tiny-ImageNet at 128 pixels: the target, timm's test_vit trained on the first five; "
            "the source, an ImageNet MobileNetV2",
            load=_zoo,
            source=_GIVEN_MOBILENET,
            target=Network(
                "timm test_vit",
                _timm("test_vit", img_size=128),
                Training(epochs=20, lr=1e-3, optimizer="adamw", batch_size=32, weight_decay=0.05, smoothing=0.1),
            ),
            old=(0, 1, 2, 3, 4),
            settings=(Setting("M", "M", _FIVE, (0.1, 0.3), steps=300, keeps=(0.5,), search_steps=100),),
            augment=mirrored,
            **_COMPARED,
            clone={"batch_size": 32},
            batch_size=32,
        ),
        *(
            Suite(
                name=f"pnc-{name}",
                about=f"{words}: the target knows the first half of the classes, the source the second; one or all of "
                "these are cloned (the paper's protocol)",
                load=load,
                source=network,
                target=network,
                old=tuple(range(half)),
                settings=(
                    Setting("M", "M", tuple(range(half, 2 * half)), (0.1, 0.3), 300, (0.5,), search_steps=100),
                    Setting(f"S {half}", "S", (half,), (0.1, 0.3), 200, (0.5,), search_steps=100),
                ),
                augment=augment,
                **{**_COMPARED, "positions": True},
                clone={},
                source_knows=tuple(range(half, 2 * half)),
            )
            for name, words, load, network, half, augment in (
                ("fashion", "Fashion-MNIST, LeNet-5", _fashion, _LENET, 5, mirrored),
                ("mnist", "MNIST, LeNet-5", _mnist, _LENET, 5, shifted),
                ("cifar10", "CIFAR-10 saved as JPEG, ResNet-20", _cifar10, _RESNET_20, 5, cropped),
                ("cifar100", "CIFAR-100, ResNet-20", _cifar100, _RESNET_20, 50, cropped),
                ("tiny", "Ten classes of Tiny-ImageNet, timm's test_resnet", _tiny_imagenet, _TEST_RESNET, 5, mirrored),
            )
        ),
    )
}
"""All suites by name."""
