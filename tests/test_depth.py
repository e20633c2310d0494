"""Which residual blocks to do without: by their similarity, and by how well they can be recovered."""

import pytest
import torch
from architectures import Net, untouched
from torch import fx, nn

import netclone
from netclone.channels.blocks import Block
from netclone.channels.budgeting import Allocation, Measure
from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import ArgumentError
from netclone.learning.data import Samples
from netclone.learning.depth import recoverable, without_recoverable
from netclone.learning.localizing import localize
from netclone.runtime.sharing import ALONE

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


# ---------------------------------------------------------------- by what can be recovered


def streams(branch):
    """A stream of two channels and what a branch adds to it, as one block of a graph."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.add.Tensor, (graph.call_function(branch, (x,)), x))
    graph.output(next(reversed(graph.nodes)))
    nodes = [node.name for node in graph.nodes]
    return fx.GraphModule(nn.Module(), graph), Block(nodes[2], ("group",), nodes[1], nodes[0], 1)


@pytest.mark.parametrize(
    ("branch", "lost"),
    [
        (lambda x: 3 * x.flip(1) + 1, 0.0),  # linear in the stream
        (lambda x: x.square() - 5, 0.25),  # x and its square do not go together where x is -1, 0 or 1
    ],
)
def test_recoverable_is_what_a_matrix_can_predict(branch, lost):
    """In both channels x has a variance of 2/3, and its square one of 2/9: that is a quarter of the sum's."""
    values = torch.cartesian_prod(torch.tensor([-1.0, 0, 1]), torch.tensor([-1.0, 0, 1]))
    graph, block = streams(branch)
    found = recoverable(graph, [block], values[:, :, None, None].expand(9, 2, 3, 3))
    torch.testing.assert_close(found, torch.tensor([lost]).double(), atol=1e-3, rtol=0)


def test_blocks_that_do_nothing_are_left_out_where_a_budget_is_short(groups):
    samples = Samples(*DATA[0], "data")
    sizes = Allocation(groups, Measure("params"))
    scores = [torch.rand(group.size, generator=torch.Generator().manual_seed(0)) for group in groups.groups]
    best = without_recoverable(samples, sizes, lambda own: own.exact_flags(scores, 0.55), ALONE)
    assert best.without == {"wide.1", "wide.2"}
    flags = dict(zip([group.name for group in groups.groups], best.exact_flags(scores, 0.55), strict=True))
    assert not flags["wide.1"].any() and not flags["wide.2"].any() and flags["wide.3"].any()
    assert sizes.without == set()


def test_a_budget_of_time_may_cost_blocks(groups):
    mask = localize(groups, DATA, method="taylor", allocation="global", budget="latency", keep=0.7)
    assert extract(groups, mask).certificate < 1e-14
