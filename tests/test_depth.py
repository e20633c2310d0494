"""Which residual blocks to do without, by their similarity."""

import pytest
import torch
from architectures import Net, untouched
from torch import nn

import netclone
from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import ArgumentError
from netclone.learning.localizing import localize

LABELS = torch.arange(40) % 5
IMAGES = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES, LABELS)]


def network(weights=(1.0, 0.02, 0.02, 3.0)):
    """Four residual blocks that change the stream by so much."""

    def forward(net, x):
        x = net.stem(x)
        for wide, narrow in zip(net.wide, net.narrow, strict=True):
            x = x + narrow(wide(x).relu())
        return net.head(x.mean((2, 3)))

    torch.manual_seed(0)
    net = Net(
        forward,
        stem=nn.Conv2d(3, 4, 1),
        wide=nn.ModuleList(nn.Conv2d(4, 16, 3, padding=1) for _ in weights),
        narrow=nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in weights),
        head=nn.Linear(4, 5),
    )
    with torch.no_grad():
        for block, weight in zip(net.narrow, weights, strict=True):
            block.weight.mul_(weight)
            block.bias.mul_(weight)
    return net.eval()


def plain(classes):
    parts = {"stem": nn.Conv2d(3, 6, 3), "head": nn.Linear(6, classes)}
    return Net(lambda net, x: net.head(net.stem(x).relu().mean((2, 3))), **parts).eval()


@pytest.fixture(scope="module")
def groups():
    return channel_groups(network(), IMAGES[:2])


def without(groups, **options):
    mask = localize(groups, DATA, method="cka", **options)
    assert all(kept in (0, units) for _, kept, units in mask.summary())
    return [name for name, kept, _ in mask.summary() if not kept]


@pytest.mark.parametrize(("budget", "keep"), [("params", 0.6), ("macs", 0.6), ("channels", 0.6)])
def test_of_similar_blocks_the_first_stays(groups, budget, keep):
    with untouched(groups.graph_module):
        assert without(groups, budget=budget, keep=keep) == ["wide.1", "wide.2"]


def test_no_more_go_than_the_budget_asks_for(groups):
    assert len(without(groups, budget="params", keep=0.8)) == 1
    assert without(groups, budget="params", keep=1) == []


def test_less_time_is_left(groups):
    assert without(groups, budget="latency", keep=0.95)


def test_the_slim_network_is_certified_and_has_none_of_their_layers(groups):
    module = extract(groups, localize(groups, DATA, method="cka", budget="params", keep=0.6))
    assert module.certificate < 1e-14
    assert {name.split(".")[2] for name in module.state_dict() if "wide" in name} == {"0", "3"}


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("'cka', which removes whole residual blocks: without all but the first of 4, 0.27 is left", {"keep": 0.2}),
        ("method 'cka' learns from samples and got none", {"data": None}),
        ("compares blocks on at least 4 samples and got 3", {"data": [(IMAGES[:3], LABELS[:3])], "classes": [0]}),
        ("method 'cka' keeps or removes whole blocks", {"allocation": "global"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(groups, message, options):
    arguments = {"data": DATA, "budget": "params", **options}
    with pytest.raises(ArgumentError, match=message):
        localize(groups, method="cka", **arguments)


def test_a_network_without_blocks_is_refused():
    net = plain(5)
    with pytest.raises(ArgumentError, match="without all but the first of 0, 1 is left"):
        localize(net, DATA, method="cka")


def test_a_clone_without_some_blocks():
    target = Net(
        lambda net, x: net.head(net.stem(x).relu().mean((2, 3))), stem=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 3)
    )
    module = netclone.clone(
        network(),
        target,
        [(IMAGES[LABELS > 2], LABELS[LABELS > 2])],
        classes=[3, 4],
        target_data=[(IMAGES[:12], LABELS[:12] % 3)],
        at="input",
        method="cka",
        keep=0.6,
        distill_steps=3,
        epochs=1,
    )
    assert {name for name, kept, _ in module.spec.kept if not kept} == {"wide.1", "wide.2"}
    grafted = netclone.inject(target, module)
    assert grafted(IMAGES).shape == (40, 5)
    assert torch.equal(grafted(IMAGES)[:, :3], target(IMAGES))
