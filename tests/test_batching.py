"""Where the first axis is not the batch: no clone is cut there, reads there, or has its logits there."""

import pytest
import timm
import torch
from architectures import Net, relative_error, untouched
from torch import nn
from torch.nn import functional as F

import netclone
from netclone.channels.certifying import TOLERANCE
from netclone.cloning.placing import candidates, passed_over
from netclone.errors import AdapterError, NetcloneError, OutputError, PositionError
from netclone.graph.capturing import capture

MAPS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def windows(net, x):
    """A stem, an attention within windows of 3x3 that are folded into the batch, and a classifier."""
    maps = net.stem(x)
    n, c, h, w = maps.shape
    folded = maps.view(n, c, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, c)
    mixed = net.mix(folded)
    maps = mixed.view(n, h // 3, w // 3, 3, 3, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    return net.head(net.last(maps).mean((2, 3)))


def recurrent(net, x):
    """Rows as steps of a sequence that comes before the batch."""
    steps = net.embed(x.permute(2, 0, 1, 3).flatten(2))
    return net.head(net.mix(steps).mean(0))


def frames(net, x):
    """Three frames of one channel folded into the batch, averaged at the end."""
    maps = net.stem(x.reshape(-1, 1, 12, 12))
    return net.head(maps.mean((2, 3))).view(x.shape[0], 3, -1).mean(1)


def network(function, classes=5):
    parts = {
        windows: {
            "stem": nn.Conv2d(3, 8, 3, padding=1),
            "mix": nn.Sequential(nn.Linear(8, 8), nn.GELU()),
            "last": nn.Conv2d(8, 8, 1),
            "head": nn.Linear(8, classes),
        },
        recurrent: {
            "embed": nn.Linear(36, 8),
            "mix": nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            "head": nn.Linear(8, classes),
        },
        frames: {"stem": nn.Conv2d(1, 8, 3), "head": nn.Linear(8, classes)},
    }[function]
    return Net(function, **parts).eval()


INNER = [(windows, "mix"), (windows, "mix.0"), (recurrent, "embed"), (recurrent, "mix"), (frames, "stem")]


def whole(source, at=None, example=MAPS):
    groups = netclone.channel_groups(source, example)
    return netclone.extract(groups, netclone.localize(groups, method="magnitude", keep=1.0), at=at)


@pytest.mark.parametrize(("function", "at"), INNER)
def test_a_position_behind_another_first_axis_is_refused_in_both_captures(function, at):
    model = network(function)
    for graph in (netclone.trace(model, MAPS), capture(model, MAPS)):
        with pytest.raises(PositionError, match=rf"position '{at}'.*first axis is not the batch: for one image"):
            netclone.position(graph, at)


@pytest.mark.parametrize(("function", "at"), [(windows, "mix"), (recurrent, "embed"), (frames, "stem")])
def test_extract_inject_and_clone_refuse_it_before_anything_is_learned(function, at):
    model, other = network(function), network(windows)
    shape = netclone.trace(model, MAPS)
    node = next(node for node in shape.graph.nodes if node.name == shape.meta["netclone"]["positions"][at])
    inner = tuple(node.meta["tensor_meta"].shape[1:])
    reader = whole(
        nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(inner).prod()), 2)), example=torch.zeros(2, *inner)
    )
    data = [(torch.randn(12, 3, 12, 12), torch.arange(12) % 5)]
    told = []
    options = {"classes": [1, 2], "target_data": data, "epochs": 1, "progress": lambda *step: told.append(step)}
    for refused in (
        lambda: whole(model, at),
        lambda: netclone.inject(model, reader, at=at, example_inputs=MAPS),
        lambda: netclone.clone(other, model, data, at=at, source_at="stem", **options),
        lambda: netclone.clone(model, other, data, at="stem", source_at=at, **options),
    ):
        with untouched(model), pytest.raises(PositionError, match="first axis is not the batch"):
            refused()
    assert not told


@pytest.mark.parametrize("function", [windows, recurrent, frames])
def test_the_search_passes_over_it_and_says_why(function):
    target = network(function)
    labels = torch.arange(20) % 5
    data = [(torch.randn(20, 3, 12, 12), labels)]
    module = netclone.clone(
        network(windows), target, data, classes=[1, 2], target_data=data, method="magnitude", epochs=1, distill_steps=0
    )
    refused = {candidate.at: candidate.reason for candidate in module.spec.search if candidate.score is None}
    assert {at for inner, at in INNER if inner is function and "." not in at} <= set(refused)
    assert all("first axis is not the batch" in why for why in refused.values())
    grafted = netclone.inject(target, module, example_inputs=MAPS)
    for count in (1, 2, 3):
        assert torch.equal(grafted(MAPS.repeat(2, 1, 1, 1)[:count])[:, :5], target(MAPS.repeat(2, 1, 1, 1)[:count]))


def test_positions_that_follow_the_batch_are_found_as_before():
    for name in ("test_vit", "test_resnet", "test_byobnet"):
        for graph in (
            netclone.trace(timm.create_model(name)),
            netclone.channel_groups(timm.create_model(name)).graph_module,
        ):
            assert candidates(graph)
            assert not passed_over(graph)


# ---------------------------------------------------------------- logits


def squeezed(net, x):
    return net.head(F.adaptive_avg_pool2d(net.stem(x).relu(), 1)).squeeze()


def squeezed_within(net, x):
    return net.line(F.adaptive_avg_pool2d(net.stem(x).relu(), 1).squeeze())


def squeezed_by_name(net, x):
    return net.head(F.adaptive_avg_pool2d(net.stem(x).relu(), 1)).squeeze(-1).squeeze(2).squeeze(0)


@pytest.mark.parametrize("function", [squeezed, squeezed_within, squeezed_by_name])
def test_a_source_that_squeezes_is_right_at_every_batch_size(function):
    net = Net(function, stem=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 5, 1), line=nn.Linear(8, 5)).double().eval()
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    groups = netclone.channel_groups(net, images)
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    module = netclone.extract(groups, mask, classes=[3, 0])
    for count in (1, 2, 3):
        part = images[:count]
        want = mask.apply(net, images)(part)
        assert want.shape == (count, 5)
        assert relative_error(module(part), want[:, [3, 0]]) < TOLERANCE
    assert torch.allclose(groups.graph_module(images), net(images))


@pytest.mark.parametrize("function", [squeezed, squeezed_by_name])
def test_a_target_whose_logits_lose_the_batch_of_one_image_is_refused_with_the_way_out(function):
    target = Net(function, stem=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 5, 1), line=nn.Linear(8, 5)).eval()
    reader = whole(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), example=MAPS)
    with untouched(target), pytest.raises(OutputError, match=r"for one image it has shape \(5,\).*\.flatten\(1\)"):
        netclone.inject(target, reader, at="input", example_inputs=MAPS)


def test_logits_of_frames_that_are_not_averaged_are_refused():
    def apart(net, x):
        return net.head(net.stem(x.reshape(-1, 1, 12, 12)).mean((2, 3)))

    net = Net(apart, stem=nn.Conv2d(1, 8, 3), head=nn.Linear(8, 5)).eval()
    with pytest.raises(OutputError, match="first axis is not the batch"):
        netclone.localize(net, method="magnitude", keep=0.5, example_inputs=MAPS)
    with pytest.raises(OutputError, match="first axis is not the batch"):
        netclone.inject(net, whole(nn.Sequential(nn.Flatten(), nn.Linear(432, 2))), at="input", example_inputs=MAPS)


# ---------------------------------------------------------------- features of other ranks


class Volumes(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3, 4)))


@pytest.mark.parametrize("positions", [{"at": "first"}, {"at": "second", "source_at": "first"}])
def test_volumes_are_said_not_to_be_adapted(positions):
    data = [(torch.randn(20, 1, 6, 6, 6), torch.arange(20) % 5)]
    with pytest.raises(NetcloneError, match="there is no adapter for volumes"):
        netclone.clone(
            Volumes(5), Volumes(5), data, classes=[1, 2], target_data=data, method="magnitude", epochs=1, **positions
        )


def test_a_source_of_volumes_alone_is_not_said_to_have_no_paths():
    maps, volumes = [(torch.randn(20, 1, 6, 6, 6), torch.arange(20) % 5)], Volumes(5)
    flat = nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(
        PositionError, match=r"'first' cannot be used: features of shape \(N, 4, 6, 6, 6\): there is no adapter"
    ):
        netclone.clone(volumes, flat, maps, classes=[1], target_data=maps, at="1", method="magnitude", epochs=1)


def test_volumes_are_cloned_at_the_input():
    data = [(torch.randn(20, 1, 6, 6, 6), torch.arange(20) % 5)]
    module = netclone.clone(
        Volumes(5), Volumes(5), data, classes=[1, 2], target_data=data, method="magnitude", epochs=1, distill_steps=1
    )
    assert module.at == "input"
    assert {c.at: c.score is None for c in module.spec.search} == {"second": True, "first": True, "input": False}


def test_other_ranks_are_said_not_to_be_adapted():
    with pytest.raises(AdapterError, match="there is no adapter for features of that rank"):
        netclone.learning.adapting.grid_of((2, 2, 2, 2, 2))
