"""ResNet, VGG and train_network(): the benchmark's own networks, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.learning.neighbourhoods import Augment, mirrored

SHORTCUTS = ("conv", "pad")


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut past both: a 1x1 convolution or (option A) zero channels."""

    def __init__(self, before: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.changes = stride != 1 or before != width
        self.missing = width - before
        if self.changes and shortcut == "conv":
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        else:
            self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.changes and not len(self.shortcut):
            half = self.missing // 2
            return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.missing - half)))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """The small ResNet for images of 28 or 32 pixels: a 3x3 stem, three stages of basic blocks, pooling, linear.

    With ``depth=3, widths=(16, 32, 64), shortcut="pad"`` it is ResNet-20 with the parameter names of
    akamaster/pytorch_resnet_cifar10.

    Examples
    --------
    >>> ResNet(1, 10, depth=1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    Reference: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        depth: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        befores = (widths[0], *widths[:2])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(Block(before if i == 0 else width, width, stride if i == 0 else 1, shortcut) for i in range(depth))
            )
            for before, width, stride in zip(befores, widths, (1, 2, 2), strict=True)
        )
        self.linear = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class VGG(nn.Module):
    """VGG16 for images of 32 pixels: 13 convolutions with BatchNorm, five poolings, and one linear layer.

    ``width`` is that of the first layer: 64 in the paper, whose three linear layers are one here, as is usual for small
    images.

    Examples
    --------
    >>> VGG(3, 10, width=8).eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    Reference: Simonyan and Zisserman, Very Deep Convolutional Networks (ICLR 2015), table 1, configuration D.
    """

    def __init__(self, channels: int, classes: int, *, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for times, repeats in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(repeats):
                layers += [
                    nn.Conv2d(channels, times * width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(times * width),
                    nn.ReLU(),
                ]
                channels = times * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).flatten(1))
        return logits


class LeNet(nn.Module):
    """LeNet-5 for images of 28 pixels, with ReLU and maximum pooling.

    Examples
    --------
    >>> LeNet(1, 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    Reference: LeCun et al., Gradient-based learning applied to document recognition (Proc. IEEE, 1998), section II.B.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv3(F.max_pool2d(F.relu(self.conv2(x)), 2)))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


@dataclass(frozen=True)
class Training:
    """How a source or target is trained: SGD with Nesterov momentum 0.9 or AdamW, one cycle of the learning rate.

    ``channels_last`` is faster on CPUs. Do not use it for narrow networks: with it, torch 2.15 aborted in the backward
    pass of a ResNet of widths 4, 8 and 16 on a CPU. That was not seen with 8 channels or more.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    batch_size: int = 128
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    channels_last: bool = False


def train_network(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    how: Training,
    seed: int,
    *,
    augment: Augment | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a network in place from labels and leave it in eval mode; the same seed gives the same network."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // how.batch_size
    total = how.epochs * steps
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    if how.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), how.lr, momentum=0.9, nesterov=True, weight_decay=how.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), how.lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=total, pct_start=0.25)
    model.train()
    for epoch in range(how.epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for step in range(steps):
            batch = order[step * how.batch_size : (step + 1) * how.batch_size]
            x = images[batch]
            if augment is not None:
                x = augment(x, generator)
            logits = model(x.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=how.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(epoch * steps + step + 1, total)
    model.to(memory_format=torch.contiguous_format)
    model.eval()


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)``, flipped at random and shifted by up to 4 pixels; new pixels repeat the edge.

    Examples
    --------
    >>> cropped(torch.ones(3, 1, 8, 8), torch.Generator().manual_seed(0)).unique()
    tensor([1.])
    """
    images = mirrored(images, generator)
    height, width = images.shape[2:]
    wide = F.pad(images, (4, 4, 4, 4), mode="replicate")
    moves = torch.randint(9, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(wide, moves, strict=True)])
