"""The readable capture: what it copies, names, and refuses."""

import copy
import logging
import traceback

import pytest
import timm
import torch
from architectures import (
    Caching,
    CachingByKey,
    Counting,
    CountingInto,
    Net,
    Once,
    WritesLater,
    returned,
    untouched,
    value_at,
)
from timm.layers import register_notrace_module
from torch import nn

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.cloning.injecting import inject
from netclone.errors import ArgumentError, NetcloneError, OutputError, PositionError, TraceError
from netclone.graph.capturing import FACTS, capture, is_captured
from netclone.graph.tracing import (
    example_input,
    logits_node,
    position,
    same_bits,
    shape_of,
    trace,
)
from netclone.learning.localizing import localize


def source(name="test_resnet", **options):
    return timm.create_model(name, num_classes=4, **options).eval()


def images(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


class BranchesOnShape(nn.Module):
    """Symbolic tracing cannot take it, torch.export can."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        if x.shape[2] > 2:
            x = x.mean((2, 3))
        return self.head(x)


class BranchesOnData(BranchesOnShape):
    """No capture can take it."""

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.head(x if x.sum() > 0 else -x)


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_graph_computes_what_the_model_computes_at_any_batch_size(name):
    model = source(name)
    with untouched(model):
        traced = trace(model)
    x = torch.randn(3, *model.default_cfg["input_size"])
    assert same_bits(traced.eval()(x), model(x))
    assert not is_captured(traced)


def test_the_input_size_stays_free():
    model = source()
    x = images(1, 96)
    assert same_bits(trace(model, images(2, 64))(x), model(x))


def test_the_graph_shares_nothing_with_the_model():
    model = source()
    traced = trace(model)
    assert not {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in traced.state_dict().values()
    }
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in traced.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_copied(training):
    model = source().train(training)
    model.layer2.eval()
    with untouched(model):
        traced = trace(model)
    assert traced.get_submodule("layer1.0.bn1").training == training
    assert not traced.get_submodule("layer2.0.bn1").training


def test_nodes_know_their_shapes_without_the_batch():
    traced = trace(source(), images())
    assert shape_of(position(traced, "conv1")) == (32, 32, 32)
    assert shape_of(position(traced, "fc")) == (4,)


def test_a_traced_graph_is_copied_when_traced_again():
    traced = trace(source())
    again = trace(traced)
    assert again is not traced
    assert again.code == traced.code
    assert again.meta[FACTS]["positions"] == traced.meta[FACTS]["positions"]


@pytest.mark.parametrize("make", [Counting, Caching, CachingByKey, Once])
def test_a_model_whose_forward_changes_its_state_is_traced_as_it_is_and_not_changed(make):
    model, x = make().eval(), torch.randn(2, 6)
    with untouched(model):
        traced = trace(model, x)
    assert not is_captured(traced)
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in traced.state_dict().items())
    with torch.no_grad():
        for module in (model, traced):
            module.get_parameter("head.weight").mul_(3)
        want = model(x)
        assert same_bits(traced(x), want)
        assert same_bits(traced(x), want)  # a graph has no state


def test_a_leaf_that_counts_starts_from_the_model_s_count():
    @register_notrace_module
    class Leaf(Counting):
        pass

    model, x = Net(lambda net, x: net.leaf(x), leaf=Leaf()).eval(), torch.randn(2, 6)
    model(x)
    with untouched(model):
        traced = trace(model, x)
    assert traced.get_buffer("leaf.count") == 1


def test_state_that_a_graph_cannot_follow_is_refused():
    model = CountingInto().eval()
    with untouched(model), pytest.raises(TraceError, match=r"state changed by forward\(\) does that"):
        trace(model, torch.zeros(2, 6))


def test_input_means_the_images_even_where_a_module_has_that_name():
    model = Net(lambda net, x: net.head(net.input(x)), input=nn.Linear(6, 5), head=nn.Linear(5, 4)).eval()
    traced = trace(model, torch.zeros(2, 6))
    assert position(traced, "input").op == "placeholder"


def test_an_example_is_not_changed_by_a_model_that_works_in_place_on_its_input():
    model = Net(lambda net, x: net.head(x.mul_(2)), head=nn.Linear(6, 4)).eval()
    x = torch.randn(2, 6)
    before = x.clone()
    traced = trace(model, x)
    assert torch.equal(x, before)
    assert torch.equal(traced.meta[FACTS]["example"], before)
    assert same_bits(traced(x.clone()), model(x.clone()))
    x.zero_()  # nor does the graph's example follow the caller's tensor
    assert torch.equal(traced.meta[FACTS]["example"], before)


def test_a_model_that_cannot_be_copied_is_refused():
    model = Caching().eval()
    model.stream = (number for number in range(3))  # not to be copied
    with untouched(model), pytest.raises(TraceError, match=r"copy.deepcopy: TypeError: .* \(in Caching\).*take out"):
        trace(model, torch.zeros(2, 6))


def test_export_is_the_second_try():
    model = BranchesOnShape().eval()
    with untouched(model):
        traced = trace(model, images())
    assert is_captured(traced)
    x = images(5)
    torch.testing.assert_close(traced(x), model(x))
    assert shape_of(position(traced, "stem")) == (4, 62, 62)


def test_control_flow_that_depends_on_data_is_refused_with_both_reasons():
    model = BranchesOnData().eval()
    with untouched(model), pytest.raises(TraceError) as info:
        trace(model, images())
    message = str(info.value)
    assert "neither capture takes BranchesOnData" in message
    assert "symbolic trace:" in message
    assert "torch.export:" in message
    assert "Move control flow" in message


def test_the_tracebacks_of_both_captures_are_kept():
    with pytest.raises(TraceError) as info:
        trace(BranchesOnData().eval(), images())
    assert isinstance(info.value.__cause__, TraceError)
    shown = "".join(traceback.format_exception(info.value))
    assert "symbolically traced variables cannot be used as inputs to control flow" in shown
    assert "torch/_export" in shown or "torch/export" in shown
    assert shown.count("in forward") >= 2  # the line of the model, as each of them met it


def test_a_log_says_which_capture_was_chosen(caplog):
    caplog.set_level(logging.DEBUG, "netclone")
    trace(source())
    trace(BranchesOnShape().eval(), images())
    said = [record.getMessage() for record in caplog.records if record.name == "netclone.graph"]
    assert [line.partition(";")[0].partition(" (")[0] for line in said] == [
        "ResNet: traced symbolically",
        "BranchesOnShape: no symbolic trace",
        "BranchesOnShape: recorded",
    ]
    assert "nodes" in said[0] and "positions" in said[0]
    assert "folded constants: " in said[2]


def test_a_hook_that_changes_the_output_is_refused():
    model = source()
    model.register_forward_hook(lambda module, args, out: out + 1)
    with untouched(model), pytest.raises(TraceError, match="does not compute what the model computes.*remove it"):
        trace(model)


def test_randomness_in_eval_mode_is_refused():
    model = Net(lambda net, x: net.head(x + torch.rand_like(x)), head=nn.Linear(6, 4)).eval()
    with untouched(model), pytest.raises(TraceError, match="does not compute what the model computes"):
        trace(model, torch.zeros(2, 6))


def test_a_model_in_two_dtypes_is_refused():
    model = source()
    model.fc.double()
    with untouched(model), pytest.raises(ArgumentError, match=r"'fc.weight' is torch.float64 on cpu, 'conv1"):
        trace(model)


# ---------------------------------------------------------------- examples


def test_one_image_is_doubled_and_many_are_cut_to_two():
    model = source()
    assert torch.equal(example_input(model, images(1)), images(1).expand(2, 3, 64, 64))
    assert torch.equal(example_input(model, (images(5),)), images(5)[:2])


def test_the_example_may_be_left_out_where_the_model_says_its_size():
    model = source().double()
    with untouched(model):
        example = example_input(model)
    assert example.shape == (2, *model.default_cfg["input_size"])
    assert example.dtype == torch.float64
    assert torch.equal(example, example_input(model))
    assert torch.equal(example_input(trace(model, images().double())), images().double())


@pytest.mark.parametrize("function", [trace, channel_groups])
def test_a_model_that_does_not_say_its_size_needs_an_example(function):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ArgumentError, match=r"example_inputs: Sequential does not record its input size"):
        function(model)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((images(), images()), "models of one input, got 2 inputs"),
        (images()[:0], r"expected a batch \(N, ...\), got shape \(0, 3, 64, 64\)"),
        (torch.zeros(3), r"expected a batch \(N, ...\), got shape \(3,\)"),
    ],
)
def test_a_bad_example_is_refused(example, message):
    with pytest.raises(ArgumentError, match=f"example_inputs: .*{message}"):
        trace(source(), example)


def test_an_example_that_the_model_does_not_take_is_refused():
    with pytest.raises(NetcloneError, match=r"(?s)expected.*channels"):
        trace(source(), images()[:, :1])


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_positions_give_what_the_modules_give(name):
    model, x = source(name), torch.randn(2, 3, 160, 160)
    seen = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, path=path: seen.__setitem__(path, out.clone()))
    traced = trace(source(name))
    traced.load_state_dict(model.state_dict())
    model(x)
    values = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name].clone() if isinstance(values[n.name], torch.Tensor) else values[n.name]

    Watched(traced).run(x)
    paths = [path for path, tensor in seen.items() if path and isinstance(tensor, torch.Tensor)]
    checked = [path for path in paths if path in traced.meta[FACTS]["positions"]]
    assert len(checked) > 10
    for path in checked:
        torch.testing.assert_close(values[position(traced, path).name], seen[path], msg=path)


def test_positions_that_are_overwritten_later_give_the_value_before():
    model, x = WritesLater().eval(), images()
    traced, want = trace(model, x), returned(model, x)
    assert want.keys() == traced.meta[FACTS]["positions"].keys()
    assert [path for path in want if not same_bits(value_at(traced, path, x), want[path])] == []


@pytest.mark.parametrize("at", ["stage.0", "stage.1", "stage", "drop", "block.conv", "block", "pool"])
def test_a_clone_reads_a_position_before_it_is_overwritten(at):
    """A network cloned whole into itself gives its own logits again, from either graph of either network."""
    model, x = WritesLater().eval(), images()
    traced, want = trace(model, x), model(x)
    mask = localize(traced, method="magnitude", keep=1.0)
    for source in (traced, model):
        module = extract(source, mask, at=at, example_inputs=x)
        for target in (traced, capture(model, x)):
            grafted = inject(target, module, at=at)(x)
            torch.testing.assert_close(grafted, torch.cat([want, want], 1))


def test_a_position_may_be_a_node_name():
    traced = trace(source())
    node = position(traced, "layer2")
    assert position(traced, node.name) is node


def test_an_unknown_position_suggests_the_closest():
    traced = trace(source())
    with pytest.raises(PositionError, match="no position 'layr2' in ResNet; did you mean 'layer2'"):
        position(traced, "layr2")
    with pytest.raises(PositionError, match="no position 'QQQQ' in ResNet; positions are module paths such as"):
        position(traced, "QQQQ")
    with pytest.raises(PositionError):
        position(traced, "output")


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


def test_a_module_that_returns_a_tuple_is_no_position():
    model = Net(lambda net, x: net.head(net.pair(x)[1]), pair=Pair(), head=nn.Linear(6, 4))
    with pytest.raises(PositionError, match=r"position 'pair' of Net returns tuple, not one tensor: choose a module"):
        position(trace(model, torch.zeros(2, 6)), "pair")


def test_a_node_that_holds_several_tensors_is_no_position():
    model = Net(lambda net, x: net.head(x.chunk(2, 1)[1]), head=nn.Linear(3, 4))
    traced = trace(model, torch.zeros(2, 6))
    with pytest.raises(PositionError, match=r"\(node 'chunk'\) of Net is not one tensor: choose a node .* 'getitem'"):
        position(traced, "chunk")


# ---------------------------------------------------------------- outputs


def test_the_logits_are_what_the_model_returns():
    traced = trace(source())
    assert logits_node(traced) is position(traced, "fc")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x: (net.head(x), x), r"returns tuple of 2: 0 \(2, 4\), 1 \(2, 6\); say which .* output=0"),
        (lambda net, x: {"a": net.head(x), "b": x}, r"returns dict of 2: 'a' \(2, 4\), 'b' .* output='a'"),
        (lambda net, x: {"logits": [net.head(x)]}, "returns dict; expected one tensor .* wrap the model"),
        (lambda net, x: net.head(x).unsqueeze(1), r"returns shape \(N, \(1, 4\)\); expected logits"),
    ],
    ids=["tuple", "dict", "nested", "rank"],
)
def test_outputs_that_are_not_logits_are_refused(function, message):
    with pytest.raises(OutputError, match=message):
        logits_node(trace(Net(function, head=nn.Linear(6, 4)), torch.zeros(2, 6)))


def test_same_bits_takes_nan_for_equal_and_nothing_else():
    a = torch.tensor([1.0, float("nan")])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([1.0, 2.0]))
    assert not same_bits(a, a.double())
    assert not same_bits(a, a[:1])


def test_a_buffer_that_forward_makes_anew_for_another_size_is_the_models_again():
    options = {"img_size": 32, "embed_dim": 12, "depth": 2, "local_up_to_layer": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("convit_tiny", **options).eval()  # keeps positions of patches in a leaf module
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    traced = trace(model, images)
    assert traced.get_buffer("blocks.0.attn.rel_indices").shape == (1, 1, 1, 3)
    with torch.no_grad():
        assert same_bits(traced(images), model(images))
        assert same_bits(traced(images), model(images))


def test_a_node_says_what_tensors_it_gives_and_a_size_says_nothing():
    class Sized(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return (first + second).reshape(x.shape[0], -1)

    traced = trace(Sized(), torch.randn(2, 4, 3))
    told = {node.name: node.meta.get("tensor_meta") for node in traced.graph.nodes}
    assert told["add"].shape == (2, 2, 3) and told["reshape"].shape == (2, 6)
    assert [part.shape for part in told["chunk"]] == [(2, 2, 3)] * 2
    sizes = [node for node in traced.graph.nodes if node.target is getattr or "getattr" in node.name]
    assert sizes and not any("tensor_meta" in node.meta for node in sizes)


class LooksForWeights(nn.Module):
    """What symbolic tracing takes one way and running the other: attention gives None for its weights."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=False)
        if weights is not None:
            out = out + weights.view(-1, 1, 1)
        return self.head(out.mean(1))


def test_a_trace_that_fails_on_the_way_prints_nothing(capfd):
    model, x = LooksForWeights().eval(), torch.randn(2, 5, 4)
    traced = trace(model, x)
    assert is_captured(traced)
    assert torch.allclose(traced(x), model(x), atol=1e-6)
    assert capfd.readouterr() == ("", "")
