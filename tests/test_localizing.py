"""Which channels carry the cloned classes: every method, the budget, and that learning learns."""

import copy
import math

import pytest
import timm
import torch
from architectures import Net, random_mask, relative_error, untouched
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from netclone.arguments import Method, words
from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask, silence
from netclone.errors import ArgumentError, DataError, FitError, NetcloneError
from netclone.graph.tracing import trace
from netclone.learning.localizing import localize

KNOWN = 1200  # digits used for training and localising; the rest measure


def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def forward(net, x):
    x = F.max_pool2d(net.first(x).relu(), 2)
    return net.head(F.max_pool2d(net.third(net.second(x).relu()).relu(), 2).flatten(1))


@pytest.fixture(scope="module")
def source():
    """A network trained on handwritten digits for a few seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(
            forward,
            first=nn.Conv2d(1, 16, 3, padding=1),
            second=nn.Conv2d(16, 32, 3, padding=1),
            third=nn.Conv2d(32, 32, 3, padding=1),
            head=nn.Linear(128, 10),
        )
        images, labels = digits()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(150):
            chosen = torch.randint(KNOWN, (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        optimizer.zero_grad()
        return net.eval()


@pytest.fixture(scope="module")
def groups(source):
    return channel_groups(source, digits()[0][:2])


def clone_set(classes, count=100):
    images, labels = (t[:KNOWN] for t in digits())
    chosen = torch.isin(labels, torch.tensor(classes))
    return [(images[chosen][:count], labels[chosen][:count])]


def disagreement(source, masked, classes):
    """How the two disagree on unseen digits of some classes, over the logits of these: share of answers, and KL."""
    images, labels = (t[KNOWN:] for t in digits())
    images = images[torch.isin(labels, torch.tensor(classes))]
    with torch.no_grad():
        want, got = (net(images)[:, list(classes)] for net in (source, masked))
    answers = (want.argmax(1) != got.argmax(1)).double().mean()
    divergence = F.kl_div(got.log_softmax(1), want.log_softmax(1), log_target=True, reduction="batchmean")
    return float(answers), float(divergence)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("classes", [(0, 3, 8), pytest.param((5, 7), marks=pytest.mark.long)])
def test_a_learned_mask_agrees_with_the_source_better_than_its_start_and_than_chance(source, groups, classes):
    def measured(method, seed):
        mask = localize(groups, clone_set(classes), classes=classes, method=method, seed=seed)
        return disagreement(source, mask.apply(groups), classes)

    learned, chance = ([measured(method, seed) for seed in range(3)] for method in ("local", "random"))
    start = measured("taylor", 0)
    for (_, after), (_, random) in zip(learned, chance, strict=True):
        assert after < random
    assert sum(divergence for _, divergence in learned) / 3 < start[1]
    assert sum(divergence for _, divergence in learned) < 0.6 * sum(divergence for _, divergence in chance)
    assert sum(answers for answers, _ in learned) / 3 < 0.05


def test_a_learned_mask_is_of_its_classes(source, groups):
    """The channels learned for some classes carry these better than those learned for others do."""
    ours, theirs = (0, 3, 8), (1, 4, 9)
    masks = [
        localize(groups, clone_set(classes), classes=classes, keep=0.3).apply(groups) for classes in (ours, theirs)
    ]
    assert disagreement(source, masks[0], ours)[1] < disagreement(source, masks[1], ours)[1]
    assert disagreement(source, masks[1], theirs)[1] < disagreement(source, masks[0], theirs)[1]


def test_magnitude_keeps_the_channels_with_large_weights():
    net = Net(lambda net, x: net.head(net.stem(x).relu()), stem=nn.Linear(6, 4), head=nn.Linear(4, 3))
    with torch.no_grad():
        net.stem.weight.copy_(torch.tensor([0.1, 2.0, 0.5, 3.0]).unsqueeze(1) * torch.ones(6))
    mask = localize(net, method="magnitude", keep=0.5, example_inputs=torch.zeros(2, 6))
    assert mask.kept == (("stem", (False, True, False, True)),)


def test_taylor_keeps_the_channels_on_which_the_loss_depends():
    net = Net(lambda net, x: net.head(net.stem(x).relu()), stem=nn.Linear(6, 4), head=nn.Linear(4, 3))
    with torch.no_grad():
        net.stem.weight.fill_(0.1)
        net.head.weight[:, [0, 2]] = 0
    data = [(torch.rand(20, 6) + 0.5, torch.arange(20) % 3)]
    assert localize(net, data, method="taylor", keep=0.5).kept == (("stem", (False, True, False, True)),)


# ---------------------------------------------------------------- the same for every method


CHANNELS = [method for method in words(Method) if method != "cka"]  # which needs residual blocks


@pytest.mark.parametrize("method", CHANNELS)
def test_the_same_seed_gives_the_same_mask_and_moves_nothing(source, method):
    options = {"classes": (5, 7), "method": method, "steps": 12, "seed": 3}
    with untouched(source):
        first = localize(source, clone_set((5, 7)), **options)
    torch.rand(100)
    assert localize(source, clone_set((5, 7)), **options) == first


@pytest.mark.parametrize("method", ["local", "random"])
def test_another_seed_gives_another_mask(groups, method):
    masks = {
        localize(groups, clone_set((5, 7)), classes=(5, 7), method=method, steps=60, seed=seed) for seed in range(3)
    }
    assert len(masks) == 3


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.9, 1, 1.0])
@pytest.mark.parametrize("method", CHANNELS)
def test_every_group_keeps_its_share(groups, method, keep):
    mask = localize(groups, clone_set((5, 7)), classes=(5, 7), method=method, steps=5, keep=keep)
    assert mask.summary() == tuple((g.name, max(1, round(keep * g.size)), g.size) for g in groups.groups)


def test_progress_is_told_step_by_step(groups):
    seen = []
    localize(groups, clone_set((5, 7)), steps=4, classes=(5, 7), progress=lambda *at: seen.append(at))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_methods_without_data(method):
    model = timm.create_model("test_vit", num_classes=4)
    with untouched(model):
        mask = localize(model, method=method, keep=0.5)
    kept = {name: kept for name, kept, _ in mask.summary() if "qkv" in name}
    of_each = {"": 1, ".dims": 16, ".dims#2": 16}  # of two heads, and of 32 dimensions of queries and of values
    assert kept == {f"blocks.{i}.attn.qkv{part}": n for part, n in of_each.items() for i in range(len(model.blocks))}
    assert localize(trace(model), method=method, keep=0.5).summary() == mask.summary()


def test_no_classes_means_all_and_a_generator_is_enough(groups):
    images, labels = digits()
    data = ((images[i : i + 50], labels[i : i + 50]) for i in range(0, 200, 50))
    whole = localize(groups, data, method="taylor")
    assert whole == localize(groups, [(images[:200], labels[:200])], classes=range(10), method="taylor")


def test_the_order_of_classes_does_not_matter(groups):
    masks = [localize(groups, clone_set((5, 7)), classes=c, method="taylor") for c in ((5, 7), (7, 5))]
    assert masks[0] == masks[1]


def test_a_network_with_nothing_to_prune_gives_an_empty_mask():
    net = nn.Sequential(nn.Linear(6, 3))
    data = [(torch.randn(6, 6), torch.arange(6) % 3)]
    for method in words(Method):
        mask = localize(net, data, method=method, steps=2)
        assert mask.kept == ()
        assert torch.equal(mask.apply(net, data[0][0])(data[0][0]), net(data[0][0]))


# ---------------------------------------------------------------- gates


def vector(groups, value):
    return gate_vector([torch.full((g.size,), value, dtype=torch.float64) for g in groups.groups])


@pytest.fixture(scope="module")
def exact(source):
    """The groups of the same network in float64, and images."""
    images = digits()[0][:20].double()
    return channel_groups(copy.deepcopy(source).double(), images), images


def test_open_gates_are_the_full_network(exact):
    groups, images = exact
    assert relative_error(Gated(groups)(vector(groups, 1.0), images), groups.graph_module(images)) <= 1e-12


def test_closed_gates_are_the_silenced_network(exact):
    groups, images = exact
    units = torch.tensor([unit for group in groups.groups for unit in group.units])
    silent = silence(trace(groups.graph_module), groups.labelling, units.sort().values)
    got = Gated(groups)(vector(groups, 0.0), images)
    assert relative_error(got, silent(images)) <= 1e-12
    assert relative_error(got, groups.graph_module(images)) > 1e-2


def test_gates_of_zeros_and_ones_are_the_mask(exact):
    groups, images = exact
    mask = random_mask(groups, 0.5)
    gates = gate_vector([torch.tensor(flags).double() for _, flags in mask.kept])
    masked = mask.apply(groups)
    assert relative_error(Gated(groups)(gates, images), masked(images)) <= 1e-12


def test_gates_have_the_gradients_of_finite_differences(exact):
    groups, images = exact
    open_gates = vector(groups, 1.0).requires_grad_()
    with untouched(groups.graph_module):
        (gradient,) = torch.autograd.grad(Gated(groups)(open_gates, images).square().sum(), open_gates)
    for index in (1, 17, 40, len(open_gates) - 1):
        step = torch.zeros_like(open_gates).index_fill(0, torch.tensor([index]), 1e-6)
        with torch.no_grad():
            up, down = (Gated(groups)(open_gates + s, images).square().sum() for s in (step, -step))
        assert float(gradient[index]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- what is refused

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.tensor([5, 7, 5, 7])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ArgumentError, "method: got 'best', expected one of 'local', 'taylor', 'magnitude'", {"method": "best"}),
        (ArgumentError, r"keep: got 0, expected a share in \(0, 1\]", {"keep": 0}),
        (ArgumentError, "keep: got 1.5", {"keep": 1.5}),
        (ArgumentError, "keep: got nan", {"keep": math.nan}),
        (ArgumentError, "classes: 10 is out of range; the source has classes 0 to 9", {"classes": [5, 10]}),
        (ArgumentError, "classes: 5 is given 2 times", {"classes": [5, 7, 5]}),
        (ArgumentError, "classes: empty", {"classes": []}),
        (DataError, "data: empty", {"data": []}),
        (DataError, "data: batch 0 holds 256 values that are NaN", {"data": [(IMAGES * math.nan, LABELS)]}),
        (DataError, "data: labels run from 5 to 12", {"data": [(IMAGES, LABELS + 5 * (LABELS == 7))]}),
        (DataError, "data: no sample of class 3", {"classes": [5, 3]}),
        (DataError, "data: .*images", {"data": [(IMAGES.expand(4, 3, 8, 8), LABELS)]}),
        (DataError, "data: .*images", {"data": [(IMAGES.double(), LABELS)]}),
        (ArgumentError, "data: method 'local' learns from samples and got none.*method='magnitude'", {"data": None}),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_and_nothing_moves(groups, error, message, options):
    arguments = {"data": [(IMAGES, LABELS)], "classes": [5, 7], "steps": 2, "example_inputs": IMAGES, **options}
    with untouched(groups.graph_module), pytest.raises(error, match=message):
        localize(groups, **arguments)


@pytest.mark.parametrize("method", words(Method))
def test_classes_and_labels_are_checked_by_every_method(groups, method):
    with pytest.raises(ArgumentError, match="classes: 10 is out of range"):
        localize(groups, [(IMAGES, LABELS)], classes=[10], method=method)
    with pytest.raises(DataError, match="data: empty"):
        localize(groups, [], classes=[5], method=method)


def test_images_that_the_source_does_not_take_are_refused(source):
    with untouched(source), pytest.raises(NetcloneError, match="(?s)expected.*channel"):
        localize(source, [(IMAGES.expand(4, 3, 8, 8), LABELS)], classes=[5, 7])


@pytest.mark.parametrize("method", ["local", "taylor"])
def test_groups_that_are_given_are_not_touched(groups, method):
    with untouched(groups.graph_module):
        localize(groups, clone_set((5, 7), 20), classes=[5, 7], method=method, steps=2)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", 2.5), ("steps", -1)])
def test_numbers_out_of_range_are_refused(groups, name, value):
    with pytest.raises(ArgumentError, match=f"{name}: got {value}, expected a whole number from [01] on"):
        localize(groups, clone_set((5, 7), 4), classes=[5, 7], **{name: value})


def test_learning_that_diverges_says_so(groups):
    with untouched(groups.graph_module), pytest.raises(FitError, match="localize, step 0: the loss is .*; check the"):
        localize(groups, [(IMAGES + 1e38, LABELS)], classes=[5, 7])


def test_the_mask_is_a_mask_of_the_source(groups):
    assert isinstance(localize(groups, method="random"), ChannelMask)
    localize(groups, method="random").validate(groups)


@pytest.mark.parametrize("method", ["local", "taylor"])
def test_the_whole_source_is_kept_without_learning(groups: ChannelGroups, method: Method) -> None:
    told: list[tuple[int, int]] = []
    mask = localize(groups, [digits()], method=method, keep=1, progress=lambda *step: told.append(step))
    assert mask.share == 1 and not told
