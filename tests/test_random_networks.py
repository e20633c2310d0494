"""Slim equals masked, in float64, for networks that are put together at random."""

import pytest
import torch
from architectures import lost_weights, relative_error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract

SIZE = 4
KINDS = (
    *("conv", "depthwise", "grouped", "batch norm", "layer norm", "group norm", "relu"),
    *("residual", "concatenation", "split", "gate", "pool", "attention", "perceptron"),
)
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7)), min_size=1, max_size=9)


def conv(before, after, size=3, **options):
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


class LayerNorm(nn.LayerNorm):
    """Over the channels of a map ``(N, C, H, W)``."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OnTokens(nn.Module):
    """A residual branch that reads the positions of a map as tokens, behind a layer norm."""

    def __init__(self, width, branch):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), branch

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.branch(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    """Self-attention of tokens ``(N, T, C)`` with any number of heads, three channels each."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 9 * heads), nn.Linear(3 * heads, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RandomNetwork(nn.Module):
    """A network put together from steps.

    Every step reads the last map, and some an earlier one, too: these skip or join. At the end the positions are
    averaged, or read by a class token.
    """

    def __init__(self, steps, class_token):
        super().__init__()
        self.steps = steps
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList()
        widths = [4]
        for kind, number in steps:
            width, other = widths[-1], widths[number % len(widths)]
            layer, after = self.made(kind, number, width, other)
            self.layers.append(layer)
            widths.append(after)
        self.token = nn.Parameter(torch.randn(1, 1, widths[-1])) if class_token else None
        self.reader = nn.Sequential(nn.LayerNorm(widths[-1]), Attention(widths[-1], 2)) if class_token else None
        self.head = nn.Linear(widths[-1], 5)

    @staticmethod
    def made(kind, number, width, other):
        """The layer of a step, and how many channels there are behind it."""
        wider, heads = 2 + number % 4 * 2, 1 + number % 3
        if kind == "conv":
            return conv(width, wider), wider
        if kind == "depthwise":
            return conv(width, width, groups=width), width
        if kind == "grouped":
            return conv(width, 2 * width, groups=2 - width % 2), 2 * width
        if kind == "batch norm":
            return nn.BatchNorm2d(width), width
        if kind == "layer norm":
            return LayerNorm(width), width
        if kind == "group norm":
            return nn.GroupNorm(2 - width % 2, width), width
        if kind == "residual":
            return conv(other, width, 1) if other != width else nn.Identity(), width
        if kind == "concatenation":
            return nn.Identity(), width + other
        if kind == "split":
            return nn.Identity(), width - width // 2
        if kind == "gate":
            return nn.Sequential(conv(width, 3, 1), nn.ReLU(), conv(3, width, 1), nn.Sigmoid()), width
        if kind == "attention":
            return OnTokens(width, Attention(width, heads)), width
        if kind == "perceptron":
            return OnTokens(width, nn.Sequential(nn.Linear(width, wider), nn.GELU(), nn.Linear(wider, width))), width
        return nn.Identity(), width

    def forward(self, x):
        maps = [self.stem(x)]
        for (kind, number), layer in zip(self.steps, self.layers, strict=True):
            y, other = maps[-1], maps[number % len(maps)]
            if kind == "relu":
                y = y.relu()
            elif kind == "residual":
                y = y + layer(other)
            elif kind == "concatenation":
                y = torch.cat([y, other], 1)
            elif kind == "split":
                y = y.split([y.shape[1] // 2, y.shape[1] - y.shape[1] // 2], 1)[1]
            elif kind == "gate":
                y = y * layer(y.mean((2, 3), keepdim=True))
            elif kind == "pool":
                y = F.avg_pool2d(y, 3, 1, 1)
            else:
                y = layer(y)
            maps.append(y)
        if self.reader is None:
            return self.head(maps[-1].mean((2, 3)))
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), maps[-1].flatten(2).transpose(1, 2)], 1)
        return self.head((tokens + self.reader(tokens))[:, 0])


def random_network(steps, class_token, seed):
    """The network with random weights and statistics: on ones and zeros no check would say anything."""
    torch.manual_seed(seed)
    joins = [i for i, (kind, _) in enumerate(steps) if kind in ("concatenation", "grouped")]
    net = RandomNetwork([step for i, step in enumerate(steps) if i not in joins[3:]], class_token)  # it stays narrow
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return net.double().eval()


def check_slim_equals_masked(steps, class_token, through_norms, seed, batch):
    net = random_network(steps, class_token, seed)
    groups = channel_groups(net, torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), through_norms=through_norms)
    kept = {g.name: (torch.rand(g.size) < 0.5).index_fill(0, torch.randint(g.size, (1,)), True) for g in groups.groups}
    mask = ChannelMask.from_kept(groups, kept)
    x = torch.randn(batch, 3, SIZE, SIZE, dtype=torch.float64)
    module = extract(groups, mask)
    assert relative_error(module(x), mask.apply(groups)(x)) <= 1e-12
    assert relative_error(groups.graph_module(x), net(x)) <= 1e-12
    removed = sum(units - kept for _, kept, units in mask.summary())
    assert (sum(p.numel() for p in module.parameters()) < groups.parameters) == (removed > 0)
    if not class_token:  # beside it, channels that are all one unit are taken for tokens, and what reads them is kept
        assert lost_weights(net, groups) == []


RANDOM = {
    "steps": STEPS,
    "class_token": st.booleans(),
    "through_norms": st.booleans(),
    "seed": st.integers(0, 1000),
    "batch": st.sampled_from([1, 3, 7]),
}


@settings(max_examples=8, deadline=None, derandomize=True)
@example([("grouped", 0), ("batch norm", 0), ("depthwise", 0), ("group norm", 0), ("residual", 0)], False, False, 1, 3)
@example([("conv", 3), ("attention", 1), ("perceptron", 2), ("concatenation", 1), ("layer norm", 0)], True, True, 2, 3)
@given(**RANDOM)
def test_slim_equals_masked_for_random_networks_masks_and_batch_sizes(steps, class_token, through_norms, seed, batch):
    check_slim_equals_masked(steps, class_token, through_norms, seed, batch)


@pytest.mark.fuzz
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(**RANDOM)
def test_slim_equals_masked_for_many_that_are_new_in_every_run(steps, class_token, through_norms, seed, batch):
    check_slim_equals_masked(steps, class_token, through_norms, seed, batch)
