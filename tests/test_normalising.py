"""Channels that norms are over: masked ones are left out of the statistics, and slim is a plain, narrower norm."""

import pytest
import torch
from architectures import build, example, named, random_mask, relative_error, untouched
from torch import nn
from torch.nn import functional as F

from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract
from netclone.cloning.modules import load, save
from netclone.learning.localizing import localize

WITH_NORMS = (
    "convnext_atto",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilevit_xxs",
    "mixer_s16_224",
    "pit_ti_224",
)


class Residual(nn.Module):
    """A residual stream of ``width`` channels with a norm in the branch and one at the end."""

    def __init__(self, width=8, kind="layer"):
        super().__init__()
        norms = {
            "layer": lambda: nn.LayerNorm(width),
            "rms": lambda: nn.RMSNorm(width, eps=1e-6),
            "group": lambda: nn.GroupNorm(1, width),
        }
        self.stem, self.up, self.down = nn.Linear(5, width), nn.Linear(width, 6), nn.Linear(6, width)
        self.norm, self.last, self.head = norms[kind](), norms[kind](), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.last(x))


def network(kind, width=8, seed=0):
    torch.manual_seed(seed)
    net = Residual(width, kind).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.3, 0.7)
    return net


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEPT = [0, 2, 3, 6]


def masked(net):
    """A mask that keeps four channels of the residual stream."""
    groups = channel_groups(net, X, through_norms=True)
    return groups, ChannelMask.from_kept(groups, {"stem": [channel in KEPT for channel in range(8)]})


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_the_slim_network_is_the_narrower_one_as_written_by_hand(kind):
    net = network(kind)
    narrow = Residual(4, kind).double().eval()
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            whole = net.get_parameter(name)
            rows = KEPT if whole.shape[0] == 8 else slice(None)
            whole = whole[rows]
            parameter.copy_(whole[:, KEPT] if whole.dim() == 2 and whole.shape[1] == 8 else whole)
    with untouched(net):
        groups, mask = masked(net)
        module = extract(groups, mask)
    assert relative_error(module(X), narrow(X)) <= 1e-14
    assert relative_error(mask.apply(groups)(X), narrow(X)) <= 1e-14
    assert {n: tuple(p.shape) for n, p in module.body.named_parameters()} == {
        n: tuple(p.shape) for n, p in narrow.named_parameters()
    }
    assert relative_error(module(X), net(X)) > 1e-2  # another function than the full network, as any mask is


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_without_it_the_stream_stays_and_with_everything_kept_nothing_changes(kind):
    net = network(kind)
    assert [group.name for group in channel_groups(net, X).groups] == ["up"]
    groups = channel_groups(net, X, through_norms=True)
    assert {group.name: group.size for group in groups.groups} == {"stem": 8, "up": 6}
    everything = ChannelMask.from_kept(groups, {})
    assert torch.equal(everything.apply(groups)(X), net(X))
    assert torch.equal(extract(groups, everything)(X), net(X))


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_gates_of_zero_and_one_are_the_mask_and_gradients_are_those_of_differences(kind):
    groups, mask = masked(network(kind))
    run = Gated(groups)
    flags = gate_vector([torch.tensor(flags).double() for _, flags in mask.kept])
    assert relative_error(run(flags, X), mask.apply(groups)(X)) <= 1e-12
    gates = torch.full_like(flags, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(run(gates, X).square().sum(), gates)
    for unit in range(1, len(gates)):
        step = torch.zeros_like(gates).index_fill_(0, torch.tensor(unit), 1e-6)
        up, down = (run(gates.detach() + sign * step, X).square().sum() for sign in (1, -1))
        assert abs(float(gradient[unit] - (up - down) / 2e-6)) <= 1e-5 * max(1.0, abs(float(gradient[unit])))
    assert not any(parameter.grad is not None for parameter in groups.graph_module.parameters())


def test_a_norm_within_heads_leaves_the_heads_prunable():
    """Queries normalised over the dimensions of a head: what varies there is the head, not the channel."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.norm, self.out = nn.Linear(6, 12), nn.LayerNorm(4), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(self.norm(self.q(x).reshape(-1, 3, 4)).flatten(1))

    groups = channel_groups(Heads().double(), torch.randn(2, 6, dtype=torch.float64), through_norms=True)
    assert {group.name: group.size for group in groups.groups} == {"q": 3}


def test_a_norm_of_several_groups_keeps_them_whole():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    groups = channel_groups(net.double(), torch.randn(2, 3, 4, 4, dtype=torch.float64), through_norms=True)
    assert groups["0"].size == 4
    mask = ChannelMask.from_kept(groups, {"0": [True, False, True, False]})
    assert extract(groups, mask).certificate <= 1e-14


def test_channels_last_norms_and_maps():
    """A LayerNorm over the channels of a map, as ConvNeXt has it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 6, 3, padding=1, groups=6),
                nn.Linear(6, 2),
            )
            self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            x = self.stem(x)
            y = F.layer_norm(self.conv(x).permute(0, 2, 3, 1), (6,), self.weight, self.bias).permute(0, 3, 1, 2)
            return self.head((x + y).mean((2, 3)))

    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    groups = channel_groups(Block().double(), images, through_norms=True)
    assert [group.size for group in groups.groups] == [6]
    mask = random_mask(groups, 0.5)
    module = extract(groups, mask)
    fresh = torch.randn(3, 3, 7, 7, dtype=torch.float64)
    assert relative_error(module(fresh), mask.apply(groups)(fresh)) <= 1e-14
    assert module.body.get_parameter("weight").shape == (3,)


@pytest.mark.parametrize("name", named(*WITH_NORMS))
def test_architectures_with_norms_become_prunable_exactly(name):
    model, images = build(name), example(name)
    with untouched(model):
        groups = channel_groups(model, images, through_norms=True)
    before = channel_groups(groups.graph_module)
    assert groups.prunable_parameters > before.prunable_parameters
    assert groups.prunable_parameters > 0.85 * groups.parameters
    mask = random_mask(groups, 0.5)
    module = extract(groups, mask)
    fresh = example(name, count=3, seed=5)
    assert relative_error(module(fresh), mask.apply(groups)(fresh)) <= 1e-9


def test_such_a_mask_is_learned_archived_and_belongs_to_such_groups(tmp_path):
    net = network("layer").float()
    images, labels = torch.randn(48, 5), torch.arange(48) % 3
    groups = channel_groups(net, images[:2], through_norms=True)
    mask = localize(groups, [(images, labels)], classes=[0, 2], keep=0.5, steps=12)
    assert dict((name, kept) for name, kept, _ in mask.summary()) == {"stem": 4, "up": 3}
    module = extract(groups, mask, classes=[0, 2], reconstruct=[(images, labels)])
    save(module, tmp_path / "stream.safetensors")
    assert torch.equal(load(tmp_path / "stream.safetensors")(images), module(images))
    with pytest.raises(ValueError, match="made for another model"):
        extract(channel_groups(net, images[:2]), mask)
