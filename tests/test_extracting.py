"""Slim equals masked: on small networks against models written by hand, at cuts, and for 23 architectures."""

import copy

import pytest
import timm
import torch
from architectures import (
    ARCHITECTURES,
    Net,
    build,
    example,
    lost_weights,
    named,
    random_mask,
    relative_error,
    untouched,
)
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from netclone.channels.certifying import TOLERANCE
from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.channels.slimming import Resizer
from netclone.cloning.extracting import extract, module_of, slim_down
from netclone.cloning.modules import CloneModule
from netclone.errors import ArgumentError, DataError, MaskError, OutputError, PositionError
from netclone.graph.capturing import tensor_at
from netclone.graph.tracing import position, trace
from netclone.learning.data import Samples
from netclone.learning.localizing import localize
from netclone.learning.reconstructing import reconstruct_slim

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def macs(module, *inputs):
    """Multiply-accumulates of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def stored(module):
    return {name.removeprefix("body."): tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def expected_shapes(groups, mask):
    """Shape of every tensor of the slim network: what it had, less the slices of the units that are not kept.

    Of the slices of a dimension of all heads, those of heads that go are gone already.
    """
    kept = {name: (stays, units) for name, stays, units in mask.summary()}
    heads = {(name, axis): kept[g.name] for g in groups.groups for name, axis, _ in g.members if not g.dims}
    tensors = {**dict(groups.graph_module.named_parameters()), **dict(groups.graph_module.named_buffers())}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for group in groups.groups:
        stays, units = kept[group.name]
        for name, axis, count in group.members:
            of_heads, all_heads = heads.get((name, axis), (1, 1)) if group.dims else (1, 1)
            shapes[name][axis] -= count * (units - stays) * of_heads // all_heads
    gone = mask.removed_units(groups)
    for name, labels in groups.labelling.constants.items():  # embeddings, layer scales, tokens
        units = groups.labelling.labels.roots(labels)
        for axis in range(units.dim()):
            line = units.movedim(axis, 0).reshape(units.shape[axis], -1)
            shapes[name][axis] = int((~torch.isin(line, gone).all(1)).sum())
    return {name: tuple(shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------- against models written by hand


class TwoConvolutions(nn.Module):
    def __init__(self, first=6, second=4, classes=5):
        super().__init__()
        self.first = nn.Conv2d(3, first, 3)
        self.norm = nn.BatchNorm2d(first)
        self.second = nn.Conv2d(first, second, 3, stride=2, bias=False)
        self.head = nn.Linear(second, classes)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self, hidden=7, classes=4):
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def two_convolutions():
    """A full network, a mask, and the slim network as one writes it by hand."""
    full = TwoConvolutions().double().eval()
    full.norm.running_mean.normal_()
    full.norm.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(full.norm.weight)
    nn.init.normal_(full.norm.bias)
    first, second = [0, 2, 3, 5], [1, 2]
    slim = TwoConvolutions(4, 2).double().eval()
    with torch.no_grad():
        slim.first.weight.copy_(full.first.weight[first])
        slim.first.bias.copy_(full.first.bias[first])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(slim.norm, name).copy_(getattr(full.norm, name)[first])
        slim.second.weight.copy_(full.second.weight[second][:, first])
        slim.head.weight.copy_(full.head.weight[:, second])
        slim.head.bias.copy_(full.head.bias)
    flags = {"first": [i in first for i in range(6)], "second": [i in second for i in range(4)]}
    return full, ChannelMask.from_kept(channel_groups(full, IMAGES), flags), slim


def test_two_convolutions_are_slimmed_as_by_hand():
    full, mask, by_hand = two_convolutions()
    with untouched(full):
        module = extract(full, mask, example_inputs=IMAGES)
    ours = dict(module.body.named_parameters()) | dict(module.body.named_buffers())
    theirs = {n: t for n, t in by_hand.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    x = torch.randn(5, 3, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(x), rtol=0, atol=1e-13)
    assert macs(module, x) == macs(by_hand, x) == 5 * (4 * 27 * 64 + 2 * 36 * 9 + 2 * 5)
    assert (
        sum(p.numel() for p in module.parameters())
        == sum(p.numel() for p in by_hand.parameters())
        < sum(p.numel() for p in full.parameters())
    )


def test_a_perceptron_is_slimmed_as_by_hand():
    full = Perceptron().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    groups = channel_groups(full, x)
    module = extract(
        full, ChannelMask.from_kept(groups, {"first": [True, False, True] + 4 * [False]}), example_inputs=x
    )
    by_hand = Perceptron(2).double()
    with torch.no_grad():
        by_hand.first.weight.copy_(full.first.weight[[0, 2]])
        by_hand.first.bias.copy_(full.first.bias[[0, 2]])
        by_hand.second.weight.copy_(full.second.weight[:, [0, 2]])
        by_hand.second.bias.copy_(full.second.bias)
    assert stored(module) == {name: tuple(tensor.shape) for name, tensor in by_hand.state_dict().items()}
    torch.testing.assert_close(module(x), by_hand(x), rtol=0, atol=1e-14)
    assert macs(module, x) == 3 * (6 * 2 + 2 * 4)


def test_what_a_module_says_of_itself():
    full, mask, _ = two_convolutions()
    module = extract(full, mask, at="norm", classes=[3, 0], class_names=["cat", "dog"], example_inputs=IMAGES)
    assert isinstance(module, CloneModule)
    assert (module.classes, module.class_names, module.source_at, module.at) == ((3, 0), ("cat", "dog"), "norm", None)
    assert module.spec.input_shape == (4, 6, 6)
    assert module.spec.kept == (("first", 4, 6), ("second", 2, 4))
    assert module.spec.source_fingerprint == mask.fingerprint
    assert 0 <= module.certificate <= TOLERANCE
    assert not module.training
    assert not any(child.training for child in module.modules())


def test_a_mask_that_keeps_everything_copies_the_source():
    full, _, _ = two_convolutions()
    module = extract(full, ChannelMask.from_kept(channel_groups(full, IMAGES), {}), example_inputs=IMAGES)
    assert torch.equal(module(IMAGES), full(IMAGES))
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in full.parameters()}


def test_flags_dtypes_and_modes():
    full, mask, _ = two_convolutions()
    full.first.weight.requires_grad_(False)
    module = extract(full.float().train(), mask, example_inputs=IMAGES.float())
    assert {name: p.requires_grad for name, p in module.body.named_parameters()} == {
        name: p.requires_grad for name, p in full.named_parameters()
    }
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.certificate <= TOLERANCE  # float64, whatever the source is in


def test_a_traced_source_gives_the_same_module():
    full, mask, by_hand = two_convolutions()
    traced = trace(full, IMAGES)
    with untouched(traced):
        module = extract(traced, localize(traced, method="random", keep=0.5))
    assert module.certificate <= TOLERANCE
    captured = channel_groups(full, IMAGES).graph_module
    with untouched(captured):
        module = extract(captured, mask, at="norm")
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(module(by_hand.norm(by_hand.first(x))), by_hand(x))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("classes", [[2], [4, 0], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], (1, 3, 2), range(1, 4)])
def test_classes_in_any_order_are_columns(classes):
    full, mask, _ = two_convolutions()
    module = extract(full, mask, classes=classes, example_inputs=IMAGES)
    want = mask.apply(full, IMAGES)(IMAGES)[:, list(classes)]
    torch.testing.assert_close(module(IMAGES), want, rtol=0, atol=1e-14)
    assert module.classes == tuple(classes)
    assert stored(module)["head.weight"] == (len(classes), 2)  # rows of the other classes are not stored
    assert stored(module)["head.bias"] == (len(classes),)


@pytest.mark.parametrize("classes", [[3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
def test_classes_of_outputs_that_are_not_rows_of_a_layer_are_columns(classes):
    """The softmax ties the logits to each other: all rows have to stay, and the columns are picked."""
    net = Net(lambda net, x: net.two(net.one(x).relu()).softmax(1), one=nn.Linear(6, 8), two=nn.Linear(8, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    mask = random_mask(channel_groups(net, x), 0.5)
    module = extract(net, mask, classes=classes, example_inputs=x)
    torch.testing.assert_close(module(x), mask.apply(net, x)(x)[:, classes], rtol=0, atol=1e-14)


@pytest.mark.parametrize("classes", [[5], [-1], [], [1, 1]])
def test_classes_out_of_range_repeated_or_empty_are_refused(classes):
    full, mask, _ = two_convolutions()
    with untouched(full), pytest.raises(ArgumentError, match="classes: "):
        extract(full, mask, classes=classes, example_inputs=IMAGES)


# ---------------------------------------------------------------- cuts

CUTS = {
    "test_resnet": ["conv1", "maxpool", "layer1", "layer2.0", "layer2", "layer4", "global_pool", None],
    "test_vit": ["patch_embed", "blocks.0", "blocks.2", "norm", "head_drop", None],
    "test_nfnet": ["stem", "stages.1", "stages.2.0", "final_conv", None],
    "resnet18": ["act1", "layer1.1", "layer3", None],
}


@pytest.fixture(scope="module", params=CUTS)
def masked(request):
    """A network, its groups, a mask of half the units, and the masked network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"img_size": 64} if "vit" in request.param else {}
        model = timm.create_model(request.param, num_classes=7, **options).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
    groups = channel_groups(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    mask = random_mask(groups, 0.5)
    return request.param, groups, mask, mask.apply(groups)


def features_at(graph_module, at, x):
    """What a position of a graph gives."""
    values = {}

    class Watched(fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watched(graph_module).run(x)
    return values[position(graph_module, at).name]


def test_cut_anywhere_the_module_continues_from_the_masked_features(masked):
    name, groups, mask, full = masked
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    want = full(x)
    resizer = Resizer(groups.labelling, mask.removed_units(groups))
    sizes = []
    for at in CUTS[name]:
        module = extract(groups, mask, at)
        features = x if at is None else features_at(full, at, x)
        for axis in range(1, features.dim() if at is not None else 0):
            kept = resizer.kept_along(position(groups.graph_module, at), axis)
            features = features.index_select(axis, kept.nonzero().flatten())
        assert features.shape[1:] == module.spec.input_shape
        before = features.clone()
        assert relative_error(module(features), want) <= 1e-12, at
        assert torch.equal(features, before)  # in-place operators do not reach what the module is given
        assert module.certificate <= TOLERANCE
        assert module.source_at == at
        sizes.append(len(list(module.body.graph.nodes)))
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)  # the deeper the cut, the less is left
    assert sizes[-1] == max(sizes)


def test_a_cut_stores_nothing_of_what_comes_before(masked):
    name, groups, mask, _ = masked
    at = CUTS[name][-2]
    module = extract(groups, mask, at, classes=[1, 2])
    first = next(iter(groups.graph_module.state_dict()))
    assert first not in stored(module)
    assert len(stored(module)) < len(groups.graph_module.state_dict()) / 2
    assert {n.op for n in module.body.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    assert sum(n.op == "placeholder" for n in module.body.graph.nodes) == 1


def test_folding_batch_norms_changes_no_output(masked):
    name, groups, mask, _ = masked
    for at in CUTS[name]:
        plain, folded = (extract(groups, mask, at, fold_batch_norm=fold) for fold in (False, True))
        x = torch.randn(3, *plain.spec.input_shape, dtype=torch.float64)
        assert relative_error(folded(x), plain(x)) <= 1e-12, at
        assert folded.spec == plain.spec
    whole = extract(groups, mask, fold_batch_norm=True)
    assert not [n for n in whole.body.graph.nodes if "batch_norm" in str(n.target)]
    assert macs(whole, torch.randn(1, 3, 64, 64).double()) == macs(
        extract(groups, mask), torch.randn(1, 3, 64, 64).double()
    )


def test_features_only_ends_before_the_classifier(masked):
    name, groups, mask, full = masked
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    module = module_of(slim_down(groups, mask, None), None, features_only=True)
    head = [n for n in groups.graph_module.state_dict() if n.endswith("weight")][-1]
    assert head not in stored(module)
    weight, bias = tensor_at(full, head), tensor_at(full, head.replace("weight", "bias"))
    kept = Resizer(groups.labelling, mask.removed_units(groups)).kept_slices(head, 1)
    assert relative_error(F.linear(module(x), weight[:, kept], bias), full(x)) <= 1e-12


INSIDE = {
    "test_resnet": ["layer2.0.conv1", "layer2.0.downsample"],
    "test_vit": ["blocks.1.attn", "blocks.1.mlp.fc1"],
    "test_nfnet": ["stages.1.0.conv1"],
    "resnet18": ["layer2.0.conv1", "layer3.1.bn2"],
}


def test_a_cut_inside_a_residual_block_is_refused_by_node(masked):
    name, groups, mask, _ = masked
    for at in INSIDE[name]:
        with untouched(groups.graph_module), pytest.raises(PositionError, match="also reads earlier features") as info:
            extract(groups, mask, at)
        through = str(info.value).split("through node '")[1].split("'")[0]
        assert through in {node.name for node in groups.graph_module.graph.nodes}
        assert "end of a block" in str(info.value)


def test_an_unknown_position_suggests_the_closest():
    full, mask, _ = two_convolutions()
    with untouched(full), pytest.raises(PositionError, match="no position 'secnd' in .*; did you mean .*'second'"):
        extract(full, mask, at="secnd", example_inputs=IMAGES)


def test_a_position_that_is_not_one_tensor_is_refused():
    net = Net(lambda net, x: net.head(net.stem(x).chunk(2, 1)[1]), stem=nn.Linear(6, 8), head=nn.Linear(4, 3))
    x = torch.randn(2, 6)
    mask = random_mask(channel_groups(net, x), 0.5)
    with untouched(net), pytest.raises(PositionError, match="position 'chunk'.*is not one tensor"):
        extract(net, mask, at="chunk", example_inputs=x)


def test_a_position_that_the_output_does_not_depend_on_is_refused():
    net = Net(lambda net, x: (net.other(x), net.head(net.stem(x)))[1], stem=nn.Linear(6, 8), head=nn.Linear(8, 3),
              other=nn.Linear(6, 2))  # fmt: skip
    x = torch.randn(2, 6)
    with pytest.raises(PositionError, match="'other'"):
        extract(net, random_mask(channel_groups(net, x), 0.5), at="other", example_inputs=x)


def test_a_mask_of_another_model_is_refused():
    _, mask, _ = two_convolutions()
    other = TwoConvolutions(8).double()
    with untouched(other), pytest.raises(MaskError, match=r"made for another model.*netclone\.localize"):
        extract(other, mask, example_inputs=IMAGES)


@pytest.mark.parametrize("wrap", [lambda y: (y, y), lambda y: {"one": y, "other": y}])
def test_a_source_that_does_not_return_logits_is_refused(wrap):
    full, mask, _ = two_convolutions()
    model = Net(lambda net, x: wrap(net.full(x)), full=full)
    with untouched(model), pytest.raises(OutputError, match="say which one is the logits"):
        extract(model, mask, example_inputs=IMAGES)


# ---------------------------------------------------------------- reconstruction


@pytest.fixture(scope="module")
def small():
    """A small residual network in float64 that depends on its input, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=6).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return channel_groups(model, images[:2]), images, torch.arange(24) % 6


@pytest.mark.parametrize("at", [None, "layer2"])
@pytest.mark.parametrize("keep", [0.75, 0.5])
def test_reconstruction_comes_closer_to_the_full_network_than_a_plain_copy(small, keep, at):
    groups, images, labels = small
    mask, full = random_mask(groups, keep), groups.graph_module
    with untouched(full):
        plain, refitted = (extract(full, mask, at, reconstruct=data) for data in (None, [(images, labels)]))
    unseen = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for x, share in ((images, 0.5), (unseen, 0.8)):
        features = x
        if at is not None:
            features = features_at(full, at, x)  # the full network's, of the channels that stay
            kept = Resizer(groups.labelling, mask.removed_units(groups)).kept_along(position(full, at), 1)
            features = features[:, kept]
        before, after = ((module(features) - full(x)).square().mean().sqrt() for module in (plain, refitted))
        assert after < share * before
    assert stored(refitted) == stored(plain)
    assert refitted.certificate == plain.certificate


def test_a_linear_network_is_refitted_to_the_least_squares_solution():
    net = Net(lambda net, x: net.second(net.first(x)), first=nn.Linear(6, 5), second=nn.Linear(5, 3)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    groups = channel_groups(net, x)
    mask = ChannelMask.from_kept(groups, {"first": [True, True, False, True, False]})
    module = extract(net, mask, reconstruct=[(x, torch.zeros(200, dtype=torch.long))], example_inputs=x)
    hidden = torch.cat([net.first(x)[:, [0, 1, 3]], torch.ones(200, 1)], 1).detach()
    best = hidden @ torch.linalg.lstsq(hidden, net(x).detach()).solution
    assert relative_error(module(x), best) < 1e-3  # up to the ridge


def test_reconstruction_with_every_channel_changes_nothing(small):
    groups, images, labels = small
    mask = ChannelMask.from_kept(groups, {})
    module = extract(groups, mask, reconstruct=[(images, labels)])
    assert torch.equal(module(images), groups.graph_module(images))


def test_reconstruction_is_deterministic_and_moves_nothing(small):
    groups, images, labels = small
    mask = random_mask(groups, 0.5)
    with untouched(groups.graph_module):
        first, second = (extract(groups, mask, reconstruct=[(images, labels)]) for _ in range(2))
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_features_that_do_not_fit_into_memory_give_the_same_weights(small):
    groups, images, labels = small
    many = Samples(images.repeat(6, 1, 1, 1), labels.repeat(6), "data")  # several batches
    mask = random_mask(groups, 0.5)
    made = []
    for in_memory in (2**30, 0, 10**6):
        slimmed = slim_down(groups, mask, None)
        new, refitted = Resizer(groups.labelling, slimmed.removed), copy.deepcopy(slimmed.graph_module)
        reconstruct_slim(groups.graph_module, refitted, new, many, None, in_memory)
        made.append(refitted.state_dict())
    for other in made[1:]:
        for name in made[0]:  # up to the order of sums, which follows the layout in memory
            torch.testing.assert_close(made[0][name], other[name], rtol=1e-9, atol=1e-12)
    assert not torch.equal(made[0]["layer1.0.conv2.weight"], slimmed.plain["layer1.0.conv2.weight"])


def test_large_maps_are_read_on_a_grid_that_covers_every_position():
    net = Net(lambda net, x: net.second(net.first(x)).mean((2, 3)), first=nn.Conv2d(2, 4, 1), second=nn.Conv2d(4, 3, 3))
    net = net.double()
    x = torch.randn(640, 2, 40, 40, dtype=torch.float64)
    groups = channel_groups(net, x[:2])
    mask = ChannelMask.from_kept(groups, {"first": [True, True, True, False]})  # two inputs: three channels say it all
    module = extract(groups, mask, reconstruct=[(x, torch.zeros(640, dtype=torch.long))])
    assert relative_error(module(x[:8]), net(x[:8]).detach()) < 1e-2


@pytest.mark.parametrize("kernel", [3, (1, 4)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch, of what it costs
def test_a_convolution_padded_to_the_same_size_is_refitted_as_one_padded_by_hand(kernel):
    weights = torch.randn(5, 6, *([kernel] * 2 if isinstance(kernel, int) else kernel)).double()
    sides = (1, 1, 1, 1) if kernel == 3 else (1, 2, 0, 0)
    ways = {
        "same": lambda net, x: net.second(net.first(x).relu()).mean((2, 3)),
        "by hand": lambda net, x: net.second(F.pad(net.first(x).relu(), sides)).mean((2, 3)),
    }
    x, made = torch.randn(40, 2, 7, 7).double(), []
    for way, forward in ways.items():
        torch.manual_seed(1)
        second = nn.Conv2d(6, 5, kernel, padding="same" if way == "same" else 0, dtype=torch.float64)
        net = Net(forward, first=nn.Conv2d(2, 6, 1, dtype=torch.float64), second=second)
        with torch.no_grad():
            second.weight.copy_(weights)
        groups = channel_groups(net, x[:2])
        mask = ChannelMask.from_kept(groups, {"first": [True, True, False, True, False, True]})
        made.append(extract(groups, mask, reconstruct=[(x, torch.zeros(40, dtype=torch.long))]).state_dict())
    assert made[0]["body.second.weight"].shape == (5, 4, *weights.shape[2:])
    assert relative_error(made[0]["body.second.weight"], weights[:, [0, 1, 3, 5]]) > 1e-3  # it was refitted
    for name in ("body.second.weight", "body.second.bias"):
        assert relative_error(made[0][name], made[1][name]) < 1e-9


def test_names_are_as_many_as_classes(small):
    groups, _, _ = small
    with pytest.raises(ArgumentError, match="class_names: 1 names for 2 classes"):
        extract(groups, random_mask(groups, 0.5), classes=[1, 3], class_names=["cat"])


def test_without_a_linear_classifier_there_is_nothing_to_end_before_and_classes_keep_their_order():
    net = Net(
        lambda net, x: net.head(net.stem(x).relu()).mean((2, 3)), stem=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 5, 1)
    )
    x = torch.randn(4, 3, 9, 9)
    groups = channel_groups(net, x)
    module = module_of(slim_down(groups, ChannelMask.from_kept(groups, {}), [4, 1]), None, features_only=True)
    torch.testing.assert_close(module(x), net(x)[:, [4, 1]])


def test_reconstruction_of_some_classes_keeps_their_order(small):
    groups, images, labels = small
    mask = random_mask(groups, 0.75)
    some, every = (extract(groups, mask, classes=classes, reconstruct=[(images, labels)]) for classes in ([4, 1], None))
    torch.testing.assert_close(some(images), every(images)[:, [4, 1]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "reconstruct: empty"),
        ([(torch.full((2, 3, 64, 64), torch.nan), torch.zeros(2, dtype=torch.long))], "reconstruct: batch 0 holds"),
        ([(torch.zeros(2, 1, 64, 64).double(), torch.zeros(2, dtype=torch.long))], "reconstruct: .*images"),
        ([(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))], "reconstruct: .*torch.float32"),
    ],
    ids=["empty", "NaN", "channels", "dtype"],
)
def test_bad_data_for_reconstruction_are_refused(small, data, message):
    groups = small[0]
    with untouched(groups.graph_module), pytest.raises(DataError, match=message):
        extract(groups, random_mask(groups, 0.5), reconstruct=data)


# ---------------------------------------------------------------- 23 architectures


@pytest.fixture(scope="module", params=named(*ARCHITECTURES))
def architecture(request):
    torch.set_num_threads(1)  # operators on images this small are done before a second thread has woken
    model = build(request.param)
    with untouched(model):
        groups = channel_groups(model, example(request.param))
    return request.param, model, groups


def test_units_of_an_architecture_are_those_known_by_hand(architecture):
    name, model, groups = architecture
    assert len(groups) > 0
    found = {
        parameter: groups[parameter].size
        for parameter in ARCHITECTURES[name].units
        if parameter_found(groups, parameter)
    }
    assert found == ARCHITECTURES[name].units
    assert groups.prunable_parameters / groups.parameters > 0.5


def parameter_found(groups, parameter):
    return any(name == parameter and axis == 0 for group in groups.groups for name, axis, _ in group.members)


def test_what_is_not_prunable_in_an_architecture_is_listed_with_reason_and_node(architecture):
    name, model, groups = architecture
    nodes = {node.name for node in groups.graph_module.graph.nodes} | set(groups.graph_module.state_dict())
    for item in groups.unprunable:
        assert item.size > 0
        assert item.reason
        assert item.node in nodes or (item.size == 1 and not item.node), str(item)
    assert [weight for weight in lost_weights(model, groups) if "mlp_tokens" not in weight] == []
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):  # its channels are one unit, and listed
        assert any(item.reason.endswith("so all of them stay together") for item in groups.unprunable)


def test_slim_equals_masked_for_an_architecture(architecture):
    torch.set_num_threads(1)
    name, model, groups = architecture
    x = example(name, count=3, seed=7)
    full = model(x).detach()
    assert relative_error(groups.graph_module(x), full) <= 1e-9
    assert float(full.std(0).max() / full.abs().max()) > 1e-3  # the network does depend on its input
    cost = macs(groups.graph_module, x[:1])
    for keep in (0.5, 0.25):
        for mask in (localize(groups, method="magnitude", keep=keep), random_mask(groups, keep)):
            masked = mask.apply(groups)(x)
            module = extract(groups, mask)
            assert relative_error(module(x), masked) <= 1e-9
            assert module.certificate <= TOLERANCE
            assert relative_error(masked, full) > 1e-4
            assert stored(module) == expected_shapes(groups, mask)
            assert sum(p.numel() for p in module.parameters()) < groups.parameters
            assert macs(module, x[:1]) < cost


def test_a_tensor_split_by_indices_or_sections_is_slimmed_in_its_parts() -> None:
    def forward(net, x):
        one, two = torch.tensor_split(net.stem(x), [3], 1)
        top, low = torch.tensor_split(net.one(one) + net.two(two), 2, dim=2)
        return net.head(top.mean((2, 3)) - low.mean((2, 3)))

    layers = dict(stem=nn.Conv2d(3, 8, 3), one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(5, 4, 1), head=nn.Linear(4, 3))
    net, x = Net(forward, **layers), torch.randn(2, 3, 9, 9)
    groups = channel_groups(net, x)
    assert sorted(group.size for group in groups.groups) == [3, 4, 5]
    module = extract(groups, localize(groups, method="magnitude", keep=0.5))
    assert module.certificate < 1e-12
    assert module.body.get_parameter("stem.weight").shape == (4, 3, 3, 3)  # 1 or 2 of 3, and 2 or 3 of 5


# ---------------------------------------------------------------- logits joined from heads


def joined(*sizes, join=lambda parts: torch.cat(parts, 1)):
    """A stem of six channels, and a head of so many classes each."""
    heads = nn.ModuleList(nn.Linear(6, size) for size in sizes)
    return Net(
        lambda net, x: join([head(net.stem(x).relu().mean((2, 3))) for head in net.heads]),
        stem=nn.Conv2d(3, 6, 3, padding=1),
        heads=heads,
    ).double()


def stacked(parts):
    return torch.stack(parts, 1).squeeze(2)


def scaled(parts):
    return torch.cat([torch.cat(parts[:2], 1), *parts[2:]], -1) * 2


@pytest.mark.parametrize(
    ("sizes", "classes"),
    [((1, 1, 1), [2]), ((1, 1, 1), [2, 0]), ((1, 4), [1, 2]), ((1, 4), [0]), ((3, 2, 1), [4, 0]), ((2, 3), [4, 3, 0])],
)
@pytest.mark.parametrize("join", [lambda parts: torch.cat(parts, 1), stacked, scaled])
def test_classes_of_several_heads_are_the_masked_network_columns(sizes, classes, join):
    if join is stacked and set(sizes) != {1}:
        sizes, classes = (1,) * 5, [4 - c for c in classes]
    groups = channel_groups(joined(*sizes, join=join), IMAGES)
    mask = random_mask(groups, 0.5)
    module = extract(groups, mask, classes=classes)
    assert relative_error(module(IMAGES), mask.apply(groups)(IMAGES)[:, classes]) < TOLERANCE
    assert module.certificate < TOLERANCE


def test_a_head_of_which_no_class_is_asked_is_not_stored():
    groups = channel_groups(joined(1, 4, 2), IMAGES)
    module = extract(groups, random_mask(groups, 0.5), classes=[3, 1])
    assert {name: shape[0] for name, shape in stored(module).items() if "heads" in name} == {
        "heads.1.weight": 2,
        "heads.1.bias": 2,
    }


@pytest.mark.parametrize("classes", [[5], [0], [6, 2]])
def test_a_refit_of_some_heads_comes_closer_to_the_full_network(classes):
    full = joined(1, 4, 2)
    groups = channel_groups(full, IMAGES)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    data = [(images, torch.zeros(len(images)).long())]
    mask = random_mask(groups, 0.5)
    want = full(images)[:, classes]
    plain, refitted = (extract(groups, mask, classes=classes, reconstruct=given)(images) for given in (None, data))
    assert (refitted - want).square().mean() < 0.5 * (plain - want).square().mean()


# ---------------------------------------------------------------- one weight, several readers


def there_and_back(net, x):
    return net.head(F.conv_transpose2d(net.body(net.stem(x)).relu(), net.body.weight, padding=1).mean((2, 3)))


def tied_matrices(net, x):
    x = net.stem(x).mean((2, 3))
    return net.head((net.linear(x).relu() @ net.linear.weight).relu())


def again_and_again(net, x):
    for _ in range(3):
        x = net.square(x if x.shape[1] == 6 else net.stem(x)).relu()
    return net.head(x.mean((2, 3)))


def dense_and_depthwise(net, x):
    own = F.conv2d(net.stem(x).relu(), net.single.weight, padding=1, groups=6)
    return net.head((own + net.single(x[:, :1])).mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "part", "units"),
    [
        (there_and_back, {"body": nn.Conv2d(6, 10, 3, padding=1)}, {"stem": 6, "body": 10}),
        (tied_matrices, {"linear": nn.Linear(6, 10)}, {"stem": 6, "linear": 10}),
        (again_and_again, {"square": nn.Conv2d(6, 6, 3, padding=1)}, {"stem": 6}),
        (dense_and_depthwise, {"single": nn.Conv2d(1, 6, 3, padding=1)}, {}),
    ],
)
def test_a_weight_that_several_nodes_read_is_sliced_right_or_its_channels_stay(function, part, units):
    net = Net(function, stem=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4), **part).double()
    groups = channel_groups(net, IMAGES)
    assert {group.name: group.size for group in groups.groups} == units
    for seed in range(3):
        mask = random_mask(groups, 0.5, seed)
        module = extract(groups, mask, classes=[3, 1])
        want = mask.apply(groups)(IMAGES)[:, [3, 1]]
        assert relative_error(module(IMAGES), want) < TOLERANCE
        assert not units or not torch.allclose(want, net(IMAGES)[:, [3, 1]])


def test_a_weight_used_in_ways_that_differ_is_listed_as_the_reason():
    net = Net(
        dense_and_depthwise,
        stem=nn.Conv2d(3, 6, 3, padding=1),
        head=nn.Linear(6, 4),
        single=nn.Conv2d(1, 6, 3, padding=1),
    )
    reasons = {item.name: item for item in channel_groups(net, IMAGES.float()).unprunable}
    assert reasons["stem.weight"].node == "single.weight"
    assert "used by several nodes in different ways" in reasons["stem.weight"].reason


def test_a_refit_leaves_a_weight_that_several_nodes_read_as_it_is():
    net = Net(
        again_and_again, stem=nn.Conv2d(3, 6, 3, padding=1), square=nn.Conv2d(6, 6, 3, padding=1), head=nn.Linear(6, 4)
    ).double()
    groups = channel_groups(net, IMAGES)
    mask = random_mask(groups, 0.5)
    plain, refitted = (
        extract(groups, mask, reconstruct=given) for given in (None, [(IMAGES, torch.zeros(len(IMAGES)).long())])
    )
    assert torch.equal(plain.body.square.weight, refitted.body.square.weight)
    assert not torch.equal(plain.body.head.weight, refitted.body.head.weight)
