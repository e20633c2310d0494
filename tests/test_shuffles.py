"""Grouped convolutions behind channel shuffles, splits and sums: the same channels of every group are units.

The networks are small ones of these kinds, written by their papers' descriptions: ShuffleNet (arXiv 1707.01083),
MENet (1803.09127), ESPNetv2 (1811.11431), ResNeSt (2004.08955); each with widths that its groups do not divide evenly
where the papers have such.
"""

import pytest
import torch
from architectures import Net, random_mask, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.channels.budgeting import Allocation, Measure
from netclone.channels.certifying import TOLERANCE
from netclone.channels.grouping import channel_groups
from netclone.channels.labelling import Labelling
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract
from netclone.learning.localizing import localize

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def conv(before: int, after: int, size: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to its input, or joined with it where it strides."""

    def __init__(self, before: int, after: int, groups: int, stride: int, first: bool = False) -> None:
        super().__init__()
        middle = after // 4
        own = after - before if stride == 2 else after
        self.groups, self.stride = groups, stride
        self.reduce = conv(before, middle, groups=1 if first else groups)
        self.depthwise = conv(middle, middle, 3, stride, middle, act=False)
        self.expand = conv(middle, own, groups=groups, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(shuffled(self.reduce(x), self.groups)))
        return torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1).relu() if self.stride == 2 else (x + y).relu()


class ShuffleNet(nn.Module):
    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.stem = conv(3, 24, 3)
        self.first = nn.Sequential(ShuffleUnit(24, width, groups, 2, first=True), ShuffleUnit(width, width, groups, 1))
        self.second = nn.Sequential(
            ShuffleUnit(width, 2 * width, groups, 2), ShuffleUnit(2 * width, 2 * width, groups, 1)
        )
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class MergingUnit(ShuffleUnit):
    """A ShuffleNet unit with a narrow branch that sees all groups and gates what the wide one makes."""

    def __init__(self, before: int, after: int, groups: int, stride: int, first: bool = False) -> None:
        super().__init__(before, after, groups, stride, first)
        middle, narrow = after // 4, 12
        self.merge = conv(middle, narrow)
        self.evolve = nn.Sequential(conv(narrow, narrow, 3, stride), nn.Conv2d(narrow, middle, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = shuffled(self.reduce(x), self.groups)
        y = self.expand(self.depthwise(y) * self.evolve(self.merge(y)))
        return torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1).relu() if self.stride == 2 else (x + y).relu()


class MergingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12, 3)
        self.units = nn.Sequential(MergingUnit(12, 228, 3, 2, first=True), MergingUnit(228, 228, 3, 1))
        self.head = nn.Linear(228, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


class DilatedPyramid(nn.Module):
    """Grouped 1x1 to a quarter, depthwise convolutions of four dilations added up one after the other, grouped 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = width // 4
        self.project = conv(width, quarter, groups=4)
        self.branches = nn.ModuleList(
            nn.Conv2d(quarter, quarter, 3, padding=d, dilation=d, groups=quarter) for d in (1, 2, 3, 4)
        )
        self.norm = nn.BatchNorm2d(width)
        self.expand = conv(width, width, groups=4, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        found = [self.branches[0](y)]
        for branch in list(self.branches)[1:]:
            found.append(found[-1] + branch(y))
        return (x + self.expand(self.norm(torch.cat(found, 1)).relu())).relu()


class SplitAttention(nn.Module):
    """Two grouped halves, weighed per channel by a softmax over the halves, and added up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.split = conv(width, 2 * width, 3, groups=2)
        self.squeeze = conv(width, width // 2)
        self.weigh = nn.Conv2d(width // 2, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        halves = self.split(x).reshape(n, 2, c, h, w)
        weights = self.weigh(self.squeeze(halves.sum(1).mean((2, 3), keepdim=True)))
        weights = weights.view(n, 1, 2, c).transpose(1, 2).softmax(1).reshape(n, 2, c, 1, 1)
        return (halves * weights).sum(1)


def blocks(*middle: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(conv(3, width, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.reduce, self.inner, self.expand = conv(width, width // 2), inner, conv(width // 2, width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.expand(self.inner(self.reduce(x)))).relu()


# name: the network, and the share of its parameters that half the units leave at most
NETWORKS = {
    "shufflenet, 2 groups of odd width": (lambda: ShuffleNet(2, 200), 0.3),
    "shufflenet, 3 groups": (lambda: ShuffleNet(3, 240), 0.33),
    "shufflenet, 4 groups of odd width": (lambda: ShuffleNet(4, 272), 0.35),
    "shufflenet, 8 groups": (lambda: ShuffleNet(8, 384), 0.55),  # two of three units stay
    "menet": (MergingNet, 0.35),
    "espnetv2": (lambda: blocks(DilatedPyramid(32), DilatedPyramid(32), width=32), 0.45),  # depthwise, mostly
    "resnest": (lambda: blocks(Bottleneck(32, SplitAttention(16)), Bottleneck(32, SplitAttention(16)), width=32), 0.33),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name][0]().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_shuffles_are_prunable_and_slim_equals_masked(name):
    network = built(name)
    groups = channel_groups(network, IMAGES)
    assert groups.prunable_parameters / groups.parameters > 0.95
    for keep, seed in ((0.5, 0), (0.3, 1)):
        mask = random_mask(groups, keep, seed)
        module = extract(groups, mask, classes=[3, 1])
        assert module.certificate < TOLERANCE
        want = mask.apply(groups)(IMAGES)[:, [3, 1]]
        assert relative_error(module(IMAGES), want) < TOLERANCE
        assert relative_error(want, network(IMAGES)[:, [3, 1]]) > 1e-3
    half = extract(groups, localize(groups, method="magnitude", keep=0.5, budget="channels"))
    left = sum(p.numel() for p in half.parameters()) / groups.parameters
    assert left <= NETWORKS[name][1]


@pytest.mark.parametrize("name", ["shufflenet, 3 groups", "resnest"])
def test_sizes_known_in_closed_form_and_learned_masks_are_those_of_the_slim_network(name):
    groups = channel_groups(built(name).float(), IMAGES.float())
    allocation = Allocation(groups, Measure("params"))
    mask = random_mask(groups, 0.5)
    module = extract(groups, mask)
    assert allocation.size([kept for _, kept, _ in mask.summary()]) == sum(p.numel() for p in module.parameters())
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]
    learned = localize(groups, data, classes=[1, 2], keep=0.5, steps=2)
    assert extract(groups, learned, classes=[1, 2]).certificate < TOLERANCE


def test_two_groups_behind_a_shuffle_by_hand():
    """Channels (0 1 2 3 | 4 5 6 7) leave the shuffle as (0 4 1 5 | 2 6 3 7): of the second's places, 0 and 1 are one
    unit with 2 and 3 of the first, in steps: {0, 4, 2, 6} and {1, 5, 3, 7}."""

    def forward(net, x):
        return net.head(net.second(shuffled(net.first(net.stem(x)), 2)).mean((2, 3)))

    net = Net(
        forward,
        stem=nn.Conv2d(3, 8, 1),
        first=nn.Conv2d(8, 8, 1, groups=2),
        second=nn.Conv2d(8, 8, 1, groups=2),
        head=nn.Linear(8, 5),
    ).double()
    groups = channel_groups(net, IMAGES)
    assert {group.name: group.size for group in groups.groups} == {"stem": 4, "first": 2, "second": 4}
    assert set(groups["first"].members) == {
        ("first.weight", 0, 4),
        ("first.bias", 0, 4),
        ("second.weight", 1, 2),
    }
    mask = random_mask(groups, 0.5)
    module = extract(groups, mask)
    assert {name: tuple(t.shape[:2]) for name, t in module.body.named_parameters() if "weight" in name} == {
        "stem.weight": (4, 3),
        "first.weight": (4, 2),
        "second.weight": (4, 2),
        "head.weight": (5, 4),
    }
    assert relative_error(module(IMAGES), mask.apply(groups)(IMAGES)) < TOLERANCE


def test_columns_that_differ_from_group_to_group_are_sliced_in_each():
    """Two groups of three channels hold (0 0 1) and (1 2 2): unit 0 takes two of the first, unit 2 two of the second,
    so these go together, and unit 1 takes one of each."""

    def forward(net, x):
        a, b, c = net.stem(x).split(1, 1)
        return net.head(net.grouped(torch.cat([a, a, b, b * 2, c, c], 1)).mean((2, 3)))

    net = Net(forward, stem=nn.Conv2d(3, 3, 1), grouped=nn.Conv2d(6, 4, 1, groups=2), head=nn.Linear(4, 5)).double()
    groups = channel_groups(net, IMAGES)
    assert {
        (name, axis): count for g in groups.groups for name, axis, count in g.members if name == "grouped.weight"
    } == {("grouped.weight", 0): 2}
    labelling = Labelling(groups.graph_module, by_place=frozenset(["conv2d_1"]))
    units = labelling.labels.roots(labelling.slots["grouped.weight", 1]).tolist()
    assert units[0] == units[1] == units[4] == units[5] != units[2] == units[3] != 0


def test_groups_that_can_be_removed_whole_still_are():
    net = nn.Sequential(
        conv(3, 16), conv(16, 16, 3, groups=4), conv(16, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    groups = channel_groups(net, IMAGES.float())
    assert groups["0.0.weight"].size == 4


def test_a_refit_finds_for_each_group_what_the_removed_channels_gave():
    """Channels come in pairs of equals, so that the half that stays knows all that the other half did."""

    def forward(net, x):
        return net.head(net.second(shuffled(net.first(net.stem(x)), 2)).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Net(
        forward,
        stem=nn.Conv2d(3, 8, 1),
        first=nn.Conv2d(8, 8, 1, groups=2),
        second=nn.Conv2d(8, 8, 1, groups=2),
        head=nn.Linear(8, 5),
    ).double()
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias):
            tensor[1::2] = tensor[::2]
    groups = channel_groups(net, IMAGES)
    kept = {group.name: [True] * group.size for group in groups.groups} | {groups["first"].name: [True, False]}
    mask = ChannelMask.from_kept(groups, kept)
    images = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    data = [(images, torch.zeros(len(images)).long())]
    plain, refitted = (extract(groups, mask, reconstruct=given) for given in (None, data))
    want = net(images)
    assert relative_error(plain(images), want) > 0.05
    assert relative_error(refitted(images), want) < 0.005


def test_a_refit_of_a_network_with_shuffles_comes_closer_to_it():
    network = built("shufflenet, 3 groups")
    groups = channel_groups(network, IMAGES)
    mask = random_mask(groups, 0.6)
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    data = [(images, torch.zeros(len(images)).long())]
    plain, refitted = (extract(groups, mask, reconstruct=given)(images) for given in (None, data))
    want = network(images)
    assert (refitted - want).square().mean() < 0.3 * (plain - want).square().mean()
