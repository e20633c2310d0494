"""Old logits are the target's bits however a network is called, and where they are not, the mode and node are told."""

import copy
import dataclasses
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import SwinTransformer

import netclone
from netclone.cloning.verifying import compare
from netclone.errors import ArgumentError, BitsError, OutputError
from netclone.graph.modes import COVERING, DTYPES, EVERY, GRADIENTS, QUICK, SPREAD, Mode
from netclone.zoo.building import randomised
from netclone.zoo.checking import probe

SIDE = 32
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
MODES = tuple(Mode(gradients, batch, dtype) for dtype in DTYPES[:2] for gradients in GRADIENTS for batch in (1, 3))


class Tokens(nn.Module):
    """An encoder of torch's own layers, with its fast path, over patches."""

    def __init__(self, norm_first):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


class Biased(nn.Module):
    """Attention with a parameter as its mask, and a parameter that multiplies maps from the left."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2, 2)
        self.bias = nn.Parameter(torch.randn(1, 1, 256, 256))
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = self.patches(x).flatten(2).mT.unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)
        return self.head((self.mix @ y.mT.contiguous()).mean(2))


TARGETS = {
    "encoder": lambda: Tokens(norm_first=False),
    "encoder, norm first": lambda: Tokens(norm_first=True),
    "biased attention": Biased,
    "torchvision ViT": lambda: VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=5),
    "torchvision Swin": lambda: SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], num_classes=5),
    "CoAtNet": lambda: timm.create_model(
        "coatnet_nano_rw_224", num_classes=5, img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1)
    ),
    "MaxViT": lambda: timm.create_model(
        "maxvit_nano_rw_256", num_classes=5, img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1)
    ),
    "BEiT": lambda: timm.create_model(
        "beit_base_patch16_224", num_classes=5, img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "ResNet": lambda: timm.create_model("test_resnet", num_classes=5),
}


def target_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target = TARGETS[name]().eval()
        return randomised(target, pixels_of(name))


def pixels_of(name):
    return PIXELS.repeat(1, 1, 2, 2) if name in ("CoAtNet", "MaxViT") else PIXELS


def grafted_on(target, pixels, at="input", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", netclone.LostInTrainingWarning)  # Swin's stochastic depth is a function
        traced = netclone.trace(target, pixels)
        shape = tuple(netclone.position(traced, at).meta["tensor_meta"].shape[1:])
        return netclone.inject(target, probe(shape), at=at, example_inputs=pixels, **options)


@pytest.mark.parametrize("name", TARGETS)
def test_old_logits_are_the_targets_bits_in_every_way_of_calling(name):
    target, pixels = target_of(name), pixels_of(name)
    found = compare(grafted_on(target, pixels), target, pixels, MODES)
    assert found.passed
    assert found.equal == tuple(sorted(MODES, key=lambda m: (str(m.dtype), list(GRADIENTS).index(m.gradients))))


@pytest.mark.parametrize("name", ["encoder", "biased attention"])
def test_frozen_parameters_would_give_other_bits(name):
    """What the flags are kept for: if torch chose the same kernels for both, the test above would show nothing."""
    target, pixels = target_of(name), pixels_of(name)
    frozen = grafted_on(target, pixels).requires_grad_(False)
    found = compare(frozen, target, pixels, MODES)
    assert not found.passed
    assert found.different[0].node
    assert "old logits differ by up to" in found.different[0].seen


def test_the_whole_check_of_a_small_target_passes_and_changes_nothing():
    target = target_of("biased attention")
    grafted = grafted_on(target, PIXELS)
    before = [copy.deepcopy(model.state_dict()) for model in (target, grafted)], torch.get_rng_state()
    threads = torch.get_num_threads()
    found = netclone.verify(grafted.train(), target.train(), PIXELS)
    assert found.passed
    assert set(found.equal) == set(COVERING)
    assert (target.training, grafted.training, torch.get_num_threads()) == (True, True, threads)
    for model, state in zip((target, grafted), before[0], strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("traced", [False, True])
def test_the_first_node_that_differs_is_named(traced):
    target = target_of("ResNet")
    grafted = grafted_on(target, PIXELS, at="layer1")
    with torch.no_grad():
        grafted.get_parameter("layer3.0.conv1.weight").mul_(1.5)
    reference = netclone.trace(target, PIXELS) if traced else target
    found = compare(grafted, reference, PIXELS, QUICK)
    assert [difference.mode for difference in found.different] == list(QUICK)
    assert {difference.node for difference in found.different} == {"layer3_0_conv1"}
    assert not found.passed and not found.equal


def test_a_restored_target_is_verified_too():
    target = target_of("encoder")
    assert compare(netclone.remove(grafted_on(target, PIXELS)), target, PIXELS, QUICK).passed


class Moody(nn.Module):
    """Its forward looks at something that a graph cannot see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return self.fc(y * 2 if torch.is_inference_mode_enabled() else y)


def test_inject_refuses_a_target_whose_mode_is_not_in_the_graph():
    target = Moody().eval()
    with pytest.raises(BitsError, match=r"\(inference_mode, batch of 1\): node 'fc' is the first.*differ.*check=False"):
        grafted_on(target, PIXELS)
    grafted = grafted_on(target, PIXELS, check=False)
    assert torch.equal(grafted(PIXELS)[:, :5], target(PIXELS))


def test_a_dtype_that_the_target_does_not_take_is_told_and_is_no_difference():
    class Single(Moody):
        def forward(self, x):
            if x.dtype == torch.float16:
                raise RuntimeError("no halves here")
            return self.fc(self.conv(x).mean((2, 3)))

    target = Single().eval()
    modes = [Mode("plain", 1, torch.float16), Mode("plain", 1)]
    found = compare(target, target, PIXELS, modes)
    assert found.passed and found.equal == (modes[1],)
    assert found.unsupported == ((modes[0], "RuntimeError: no halves here"),)


def test_a_grafted_network_that_fails_where_the_target_does_not_is_a_difference():
    class Fails(Moody):
        def forward(self, x):
            raise RuntimeError("not today")

    (difference,) = compare(Fails().eval(), Moody().eval(), PIXELS, QUICK[:1]).different
    assert (difference.node, difference.seen) == ("", "RuntimeError: not today")
    (difference,) = compare(nn.Sequential(Moody(), nn.Linear(5, 4)), Moody().eval(), PIXELS, QUICK[:1]).different
    assert difference.seen == "the grafted network returns (1, 4), the target (1, 5)"


def test_what_cannot_be_verified_is_refused():
    target = target_of("encoder")
    for images, seen in ((torch.zeros(0, 3, 8, 8), r"shape \(0, 3, 8, 8\)"), ([1], "list")):
        with pytest.raises(ArgumentError, match=f"images: expected a batch .* got {seen}"):
            netclone.verify(target, target, images)
    with pytest.raises(ArgumentError, match=r"images: the target fails on them \(plain, batch of 1.*RuntimeError"):
        netclone.verify(target, target, torch.zeros(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match="holds no values"):
        netclone.verify(target, copy.deepcopy(target).to("meta"), PIXELS)
    with pytest.raises(OutputError, match="target: Conv2d returns Tensor; expected one tensor"):
        netclone.verify(target, nn.Conv2d(3, 4, 3), PIXELS)


def test_the_modes_are_those_of_deployment():
    """Each value of each with every kind of gradients; every combination in the thorough set."""
    facts = {field.name for field in dataclasses.fields(Mode)} - {"gradients"}
    values = {name: {getattr(mode, name) for mode in EVERY} for name in facts}
    assert values == {
        "batch": set(range(1, 10)),
        "dtype": set(DTYPES),
        "channels_last": {False, True},
        "threads": {1, 2},
    }
    assert len(set(EVERY)) == len(EVERY) == 3 * 9 * 3 * 2 * 2
    assert set(SPREAD) < set(EVERY) and set(COVERING) < set(EVERY)
    assert {name: {getattr(mode, name) for mode in SPREAD} for name in facts} == values
    for name in facts:
        for gradients in GRADIENTS:
            assert {getattr(mode, name) for mode in COVERING if mode.gradients == gradients} == values[name]


def test_a_network_with_weights_of_five_axes_is_verified_in_channels_last_too():
    """nn.Module.to(memory_format=...) fails at the first of them."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.volume = nn.Parameter(torch.randn(1, 1, 4, 1, 1))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head((self.conv(x)[:, None] * self.volume)[:, 0].mean((2, 3)))

    target, pixels = Patches().eval(), torch.randn(2, 3, 8, 8)
    assert netclone.verify(grafted_on(target, pixels), target, pixels).passed
