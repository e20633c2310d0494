"""The networks that surgery is tested on, with weights on which no check is empty, and how results are compared.

Freshly built networks hide faults, so ``build`` randomises what starts as a constant, the same way at every call.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from netclone.channels.grouping import ChannelGroups
from netclone.channels.masks import ChannelMask
from netclone.cloning.placing import features_at
from netclone.graph.tracing import position
from netclone.zoo.building import randomised

CLASSES = 10
_STANDARD = frozenset(vars(nn.Module()))  # attributes of every module: parameters, hooks and the like


@dataclass(frozen=True)
class Architecture:
    """Name, what its constructor is told (smaller images, to save time), and its library.

    ``units`` gives, for some parameters, how many units the group that slices its rows has to have: what is known of
    the architecture by hand. ``long``: it is looked at in the long tier only.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    torchvision: bool = False
    long: bool = False

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return int(self.options.get("img_size", 64))


_ALL = (
    Architecture("resnet18", units={"layer1.0.conv1.weight": 64, "conv1.weight": 64, "layer4.0.conv1.weight": 512}),
    Architecture(
        "resnet50", long=True, units={"layer1.0.conv1.weight": 64, "layer1.0.conv2.weight": 64, "conv1.weight": 64}
    ),
    Architecture("mobilenetv2_100", long=True, units={"blocks.1.0.conv_pw.weight": 96}),
    Architecture("mobilenetv3_small_100", units={"blocks.1.0.conv_pw.weight": 72}),
    Architecture(
        "efficientnet_b0", long=True, units={"blocks.1.0.conv_pw.weight": 96, "blocks.1.0.se.conv_reduce.weight": 4}
    ),
    Architecture("regnetx_002", units={"s1.b1.conv2.conv.weight": 3}),  # groups of 8 channels, of 24
    Architecture("densenet121", long=True, units={"features.denseblock1.denselayer1.conv1.weight": 128}),
    Architecture("ghostnet_100", long=True),
    Architecture("res2net50_26w_4s", long=True),
    Architecture("dpn68", long=True),
    Architecture(
        "vgg11_bn", long=True, options={"mlp_ratio": 1 / 16}, units={"features.0.weight": 64}
    ),  # else 1 GB of weights
    Architecture("convnext_atto", units={"stages.0.blocks.0.mlp.fc1.weight": 160}),
    Architecture(
        "vit_tiny_patch16_224",
        options={"img_size": 64},
        units={"blocks.0.attn.qkv.weight": 3, "blocks.11.attn.qkv.weight": 3, "blocks.0.mlp.fc1.weight": 768},
    ),
    Architecture(
        "deit_tiny_distilled_patch16_224",
        long=True,
        options={"img_size": 64},
        units={"blocks.0.attn.qkv.weight": 3, "blocks.0.mlp.fc1.weight": 768},
    ),
    Architecture(
        "swin_tiny_patch4_window7_224",
        long=True,
        options={"img_size": 112},
        units={f"layers.{i}.blocks.0.attn.qkv.weight": 3 * 2**i for i in range(4)}
        | {f"layers.{i}.blocks.1.attn.qkv.weight": 3 * 2**i for i in range(4)}
        | {"layers.0.blocks.0.mlp.fc1.weight": 384},
    ),
    Architecture("mobilevit_xxs", long=True, units={"stages.2.1.transformer.0.attn.qkv.weight": 4}),
    Architecture(
        "mixer_s16_224", long=True, options={"img_size": 64}, units={"blocks.0.mlp_channels.fc1.weight": 2048}
    ),
    Architecture(
        "pit_ti_224",
        long=True,
        options={"img_size": 64},
        units={f"transformers.{stage}.blocks.0.attn.qkv.weight": 2 * 2**stage for stage in range(3)},
    ),
    Architecture(
        "xcit_nano_12_p8_224",
        long=True,
        units={"blocks.0.attn.qkv.weight": 4, "blocks.0.mlp.fc1.weight": 512}
        | {f"cls_attn_blocks.{i}.attn.{part}.weight": 4 for i in range(2) for part in "qkv"},
    ),
    Architecture("test_nfnet"),
    Architecture("shufflenet_v2_x0_5", torchvision=True),
    Architecture("squeezenet1_1", torchvision=True, units={"features.3.squeeze.weight": 16}),
    Architecture("googlenet", long=True, torchvision=True, options={"init_weights": False}),
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


def named(*names: str) -> list[Any]:
    """Architectures as parameters of tests, of which the larger ones are for the long tier."""
    return [pytest.param(name, marks=pytest.mark.long if ARCHITECTURES[name].long else ()) for name in names]


def build(name: str) -> nn.Module:
    """A network in float64 and eval mode, with the same random weights at every call."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture.torchvision:
            model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **architecture.options)
        else:
            model = timm.create_model(name, num_classes=CLASSES, **architecture.options)
        return randomised(model.double().eval(), example(name, count=4, seed=1))


def example(name: str, count: int = 2, seed: int = 0) -> Tensor:
    """A batch of images for an architecture, in float64."""
    size = ARCHITECTURES[name].size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A small network written as one function of (its modules, input), for what needs no class of its own."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def random_mask(groups: ChannelGroups, keep: float, seed: int = 0) -> ChannelMask:
    """A mask that keeps a share of every group, and at least one unit."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups.groups:
        chosen = set(torch.randperm(group.size, generator=generator)[: max(1, round(keep * group.size))].tolist())
        kept[group.name] = [unit in chosen for unit in range(group.size)]
    return ChannelMask.from_kept(groups, kept)


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; shapes must agree."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def lost_weights(model: nn.Module, groups: ChannelGroups) -> list[str]:
    """Weights with rows that are neither units of a group nor listed as not prunable.

    Rows of a linear layer that acts along another axis than the channels (token mixing) belong there. Those of a
    grouped convolution are not looked at: they follow its input.
    """
    labels = groups.labelling.labels
    free = labels.marked(torch.tensor([unit for group in groups.groups for unit in group.units], dtype=torch.long))
    prunable = {slot: int(free[labels.roots(own)].sum()) for slot, own in groups.labelling.slots.items()}
    stays = {item.name: item.size for item in groups.unprunable}
    used = dict(groups.graph_module.named_parameters())
    lost = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and getattr(module, "groups", 1) == 1:
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            name = next((n for n in (f"{path}.weight", f"{path}.weight_folded") if n in used), None)
            if name and prunable.get((name, axis), 0) + stays.get(name, 0) != used[name].shape[axis]:
                lost.append(name)
    return lost


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Check that a block leaves models and the random state as they were, whether it succeeds or raises."""
    before = [_everything(model) for model in models], torch.get_rng_state().tolist()
    try:
        yield
    finally:
        after = [_everything(model) for model in models], torch.get_rng_state().tolist()
        assert after == before


def _everything(model: nn.Module) -> dict[str, object]:
    """All that a call could change in a model: bits, versions, flags, gradients, modes, hooks, attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts: dict[str, object] = {
        name: (
            _digest(tensor),
            tensor.data_ptr(),
            tensor._version,
            tensor.requires_grad,
            tensor.grad is None,
        )
        for name, tensor in tensors.items()
    }
    for name, module in model.named_modules():
        hooks = [(key, list(value)) for key, value in vars(module).items() if key.endswith("hooks")]
        facts[f"module {name}"] = (type(module), module.training, hooks, sorted(vars(module)), module.extra_repr())
        facts[f"attributes {name}"] = {k: _plain(v) for k, v in vars(module).items() if k not in _STANDARD}
    if isinstance(model, fx.GraphModule):
        facts["code"], facts["meta"] = model.code, sorted(model.meta)
    return facts


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _plain(value: object) -> object:
    """What an attribute holds, as far as it can be compared: numbers, text, tensors, and containers of these."""
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value)


class WritesLater(nn.Module):
    """What almost every module returns, a later operator overwrites."""

    class Discards(nn.Module):
        """Works in place on what it returns, under the name from before."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.act(x)
            x.mul_(2)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.block = self.Discards()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stage(x))
        x.add_(1)
        x = self.block(x)
        x += 1
        x = self.pool(x)
        nn.functional.leaky_relu(x, 0.5, inplace=True)
        logits: Tensor = self.head(x)
        return logits


def returned(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every module of a copy of a model returns, at the time it does, by path."""
    model, seen = copy.deepcopy(model), {}
    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(lambda m, args, out, path=path: seen.__setitem__(path, out.clone()))
    with torch.no_grad():
        model(x.clone())
    return {path: out for path, out in seen.items() if isinstance(out, Tensor)}


def value_at(graph_module: fx.GraphModule, at: str, x: Tensor) -> Tensor:
    """What a position gives, before anything later works on it in place."""
    node = position(graph_module, at)
    with torch.no_grad():
        return features_at(graph_module, x.clone(), [node.name], len(x))[node.name]


class Counting(nn.Module):
    """Counts its calls, in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x):
        self.count.add_(1)
        self.calls += 1
        return self.head(self.stem(x).relu())


class CountingInto(Counting):
    """The count matters: this is the first call."""

    def forward(self, x):
        self.count.add_(1)
        return self.head(self.stem(x).relu()) * self.count


class Caching(Counting):
    """Computes a matrix at its first call and keeps it."""

    def __init__(self):
        super().__init__()
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.stem.weight * 2
        return self.head(x @ self.cache.T)


class CachingByKey(Caching):
    """As the attention of LeViT does."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        if "doubled" not in self.cache:
            self.cache["doubled"] = self.stem.weight * 2
        return self.head(x @ self.cache["doubled"].T)


class Once(Counting):
    """Is another function from its second call on."""

    def __init__(self):
        super().__init__()
        self.first = True

    def forward(self, x):
        x = self.stem(x + 1) if self.first else self.stem(x)
        self.first = False
        return self.head(x)
