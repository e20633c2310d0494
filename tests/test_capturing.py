"""The exact capture: one operator graph that computes what the model computes, under the model's own names."""

import operator

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
    relative_error,
    returned,
    untouched,
    value_at,
)
from torch import fx, nn
from torch.nn import functional as F

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import OutputError, TraceError
from netclone.graph.capturing import FACTS, capture, fingerprint, is_captured, set_tensor, tensor_at
from netclone.graph.tracing import same_bits, trace
from netclone.learning.localizing import localize


def vectors(count=2, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def linear(function, **parts):
    return Net(function, **({"stem": nn.Linear(6, 8), "head": nn.Linear(8, 4)} | parts))


def in_place(net, x):
    y = net.stem(x)
    z = y * 2
    y.add_(1).relu_()
    return net.head(y.mul_(3) + z)


def into_the_input(net, x):
    y = net.stem(x)
    x.mul_(2)
    return net.head(y) + net.head(net.stem(x))


def of_what_was_copied(net, x):
    y = net.stem(x)
    same = F.dropout(y.contiguous().to(y.dtype), 0.5, net.training)  # all of these give back the very tensor
    y.add_(1)
    return net.head(same)


def without_gradient(net, x):
    y = net.stem(x)
    with torch.no_grad():
        z = net.norm(y) + torch.arange(8.0)
        y.add_(1)
        with torch.enable_grad():
            z = z * 2
    return net.head(y + z)


def without_autocast(net, x):
    with torch.autocast("cpu", enabled=False):
        y = net.stem(x).float()
        with torch.no_grad():
            z = y * 2
    return net.head(y + z.to(y.dtype))


MODELS = {
    "plain": linear(lambda net, x: net.head(net.stem(x).relu())),
    "in-place": linear(in_place),
    "in-place on the input": linear(into_the_input),
    "in-place on an alias": linear(of_what_was_copied),
    "dropout": linear(
        lambda net, x: net.head(F.dropout(net.drop(net.stem(x)), 0.5, net.training)), drop=nn.Dropout(0.5)
    ),
    "norm": linear(lambda net, x: net.head(net.norm(net.stem(x))), norm=nn.BatchNorm1d(8)),
    "buffer": linear(lambda net, x: net.head(net.stem(x) + torch.arange(8.0))),
    "split": linear(lambda net, x: net.head(torch.cat(net.stem(x).split([3, 5], 1)[::-1], 1))),
    "batch size": linear(lambda net, x: net.head(net.stem(x).reshape(x.shape[0], 2, 4).flatten(1))),
    "weight norm": linear(
        lambda net, x: net.head(net.stem(x)), stem=nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    ),
    "without gradient": linear(without_gradient, norm=nn.BatchNorm1d(8)),
    "without autocast": linear(without_autocast),
    "unused layer": linear(lambda net, x: net.head(net.stem(x)), extra=nn.Linear(3, 3)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_the_model_computes_in_eval_mode_at_any_batch_size(name, training):
    model = MODELS[name].train(training)
    with untouched(model):
        graph_module = capture(model, vectors())
    model.eval()
    for count in (1, 2, 7):
        torch.testing.assert_close(graph_module(vectors(count)), model(vectors(count)), rtol=0, atol=1e-6)
    assert not graph_module.training


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_nfnet"])
def test_real_networks(name):
    model = timm.create_model(name, num_classes=4).double().eval()
    x = torch.randn(3, *model.default_cfg["input_size"], dtype=torch.float64)
    assert relative_error(capture(model, x)(x[:1]), model(x[:1])) <= 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_one_of_operators_and_tensors_only(name):
    graph_module = capture(MODELS[name], vectors())
    assert is_captured(graph_module)
    kinds = [node.op for node in graph_module.graph.nodes]
    assert set(kinds) <= {"placeholder", "get_attr", "call_function", "output"}
    assert kinds.count("placeholder") == 1
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            if isinstance(node.target, torch._ops.OpOverload):
                assert not node.target._schema.is_mutable
            else:
                assert node.target is operator.getitem


def test_tensors_keep_their_names_and_are_copies():
    model = MODELS["norm"]
    graph_module = capture(model, vectors())
    tensors = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
    theirs = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in theirs.values()}
    assert {name for name, _ in graph_module.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_tensors_that_are_not_used_are_not_kept():
    names = [name for name, _ in capture(MODELS["unused layer"], vectors()).named_parameters()]
    assert names == ["stem.weight", "stem.bias", "head.weight", "head.bias"]


def test_flags_are_kept():
    model = linear(lambda net, x: net.head(net.stem(x)))
    model.stem.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in capture(model, vectors()).named_parameters()}
    assert flags == {"stem.weight": False, "stem.bias": True, "head.weight": True, "head.bias": True}


def test_a_computed_weight_becomes_one_tensor():
    model = MODELS["weight norm"].eval()
    graph_module = capture(model, vectors())
    folded = [name for name, _ in graph_module.named_parameters() if name.endswith("_folded")]
    assert len(folded) == 1
    torch.testing.assert_close(tensor_at(graph_module, folded[0]), model.stem.weight)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("test_vit", {"patch_embed", "blocks.0", "blocks.0.attn", "blocks.3.mlp.fc1", "norm", "head"}),
        ("resnet18", {"conv1", "bn1", "act1", "layer1.0.bn2", "layer2.0.downsample", "layer4", "global_pool", "fc"}),
    ],
)
def test_positions_are_nodes_that_give_what_the_modules_give(name, some):
    """Also where the next operator then writes into that very tensor: a position is what its module returned."""
    model = timm.create_model(name, num_classes=4).eval()
    x = torch.randn(2, 3, 160, 160)
    graph_module = capture(model, x)
    positions = graph_module.meta[FACTS]["positions"]
    assert some <= positions.keys()
    values, seen = {}, {}

    class Watched(fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            values[n.name] = out.clone() if isinstance(out, torch.Tensor) else out
            return out

    Watched(graph_module).run(x)
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, path=path: seen.__setitem__(path, out.clone()))
    model(x)
    wrong = [path for path, at in positions.items() if not torch.allclose(values[at], seen[path], atol=1e-5)]
    assert wrong == []


def test_a_captured_graph_is_copied_when_captured_again():
    first = capture(MODELS["plain"], vectors())
    second = capture(first, vectors())
    assert second is not first
    assert second.code == first.code
    with torch.no_grad():
        second.get_parameter("stem.weight").zero_()
    assert first.get_parameter("stem.weight").abs().max() > 0


def test_a_symbolic_graph_keeps_module_paths_and_node_names():
    traced = trace(timm.create_model("test_resnet", num_classes=4).eval())
    node = traced.meta[FACTS]["positions"]["layer2"]
    captured = capture(traced, traced.meta[FACTS]["example"])
    positions = captured.meta[FACTS]["positions"]
    assert positions["layer2"] == positions[node]
    x = torch.randn(3, 3, 160, 160)
    torch.testing.assert_close(captured(x), traced(x))


@pytest.mark.parametrize("symbolic", [True, False])
def test_positions_that_are_overwritten_later_give_the_value_before(symbolic):
    """Also those of a symbolic graph, whose nodes have other names than its modules."""
    model, x = WritesLater().eval(), torch.randn(2, 3, 5, 5)
    graph_module = capture(trace(model, x) if symbolic else model, x)
    want = returned(model, x)
    assert want.keys() <= graph_module.meta[FACTS]["positions"].keys()
    assert [path for path in want if not same_bits(value_at(graph_module, path, x), want[path])] == []


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    model = Two().eval()
    graph_module = capture(model, vectors(), vectors(2, 3))
    torch.testing.assert_close(graph_module(vectors(5), vectors(5, 3)), model(vectors(5), vectors(5, 3)))


def test_one_tensor_as_two_inputs_is_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x, y):
            return self.a(x) - self.b(y)

    model, x, y = Two().eval(), vectors(), vectors() + 1
    torch.testing.assert_close(capture(model, x, x)(x, y), model(x, y))


@pytest.mark.parametrize("name", ["without gradient", "without autocast"])
def test_positions_inside_a_mode_give_what_the_modules_give(name):
    model, x = MODELS[name].eval(), vectors()
    graph_module, want = capture(model, x), returned(model, x)
    assert want.keys() == graph_module.meta[FACTS]["positions"].keys()
    assert [path for path in want if not same_bits(value_at(graph_module, path, x), want[path])] == []


def test_the_fingerprint_is_of_structure_not_of_values():
    def made(width=8, act=torch.relu):
        parts = {"stem": nn.Linear(6, width), "head": nn.Linear(width, 4)}
        return fingerprint(capture(Net(lambda net, x: net.head(act(net.stem(x))), **parts), vectors()))

    assert made() == made()
    assert len({made(), made(width=7), made(act=torch.sigmoid)}) == 3


def test_the_fingerprint_of_a_symbolic_graph_is_the_same_in_any_process():
    def made(width=8):
        def act(x):  # a new object at every call, as in a new process
            return x.relu()

        graph = fx.Graph()
        out = graph.call_module("stem", (graph.placeholder("x"),))
        graph.output(graph.call_function(act, (out,)))
        return fingerprint(fx.GraphModule({"stem": nn.Linear(6, width)}, graph))

    assert made() == made() != made(width=7)


def test_tensors_are_set_and_found_under_dotted_names():
    root = nn.Module()
    set_tensor(root, "a.b.weight", nn.Parameter(torch.ones(2)))
    set_tensor(root, "scale", torch.zeros(3))
    assert [name for name, _ in root.named_parameters()] == ["a.b.weight"]
    assert [name for name, _ in root.named_buffers()] == ["scale"]
    assert tensor_at(root, "a.b.weight").tolist() == [1, 1]
    assert tensor_at(root, "scale").shape == (3,)


# ---------------------------------------------------------------- models whose forward changes their state


@pytest.mark.parametrize("make", [Counting, CountingInto, Caching, CachingByKey, Once])
def test_a_model_whose_forward_changes_its_state_is_captured_as_it_is_and_not_changed(make):
    model = make().eval()
    with untouched(model):
        graph_module = capture(model, vectors())
    want = model(vectors())
    for _ in range(2):  # the graph has no state
        torch.testing.assert_close(graph_module(vectors()), want)


@pytest.mark.parametrize("make", [Caching, CachingByKey])
def test_what_a_model_keeps_at_its_first_call_follows_the_weights(make):
    model = make().eval()
    graph_module = capture(model, vectors())
    assert {name for name, _ in graph_module.named_parameters()} == {"stem.weight", "head.weight", "head.bias"}
    assert [name for name, _ in graph_module.named_buffers()] == []
    with torch.no_grad():
        for module in (model, graph_module):
            module.get_parameter("stem.weight").mul_(3)
    torch.testing.assert_close(graph_module(vectors()), model(vectors()))


def test_kept_attention_biases_follow_their_table():
    attention = timm.models.levit.Attention(6, 2, num_heads=2, resolution=(2, 2))
    nn.init.normal_(attention.attention_biases)
    model = linear(
        lambda net, x: net.head(net.attention(x.unsqueeze(1).expand(-1, 4, -1)).mean(1)), attention=attention
    )
    model.head = nn.Linear(6, 4)
    with untouched(model.eval()):
        graph_module = capture(model, vectors())
    assert "attention.attention_biases" in dict(graph_module.named_parameters())
    assert relative_error(graph_module(vectors()), model(vectors())) <= 1e-5


def test_a_position_that_only_the_export_sees_overwritten_is_found_on_a_fresh_copy():
    """The first run, on one example, does not tell all; the second export starts from the model as it was."""

    class ByBatch(Counting):
        def forward(self, x):
            self.calls += 1
            y = self.stem(x)
            if x.shape[0] != 1:
                y.add_(self.calls)
            else:
                y = y + self.calls
            return self.head(y)

    model = ByBatch().eval()
    graph_module = capture(model, vectors())
    torch.testing.assert_close(graph_module(vectors()), model(vectors()))
    assert value_at(graph_module, "stem", vectors()).equal(model.stem(vectors()))


def test_a_model_that_cannot_be_copied_is_refused():
    model = Caching().eval()
    model.stream = (number for number in range(3))  # what is under way cannot be copied
    with pytest.raises(TraceError, match=r"copy.deepcopy: TypeError: .* \(in Caching\).*take out"):
        capture(model, vectors())
    assert list(model.stream) == [0, 1, 2]


# ---------------------------------------------------------------- what is refused


def test_a_model_without_memory_is_captured_with_its_shapes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).to("meta")
    graph_module = capture(model, torch.zeros(2, 3, 2, 2, device="meta"))
    assert graph_module(torch.zeros(5, 3, 2, 2, device="meta")).shape == (5, 2)
    assert all(parameter.is_meta for parameter in graph_module.parameters())


def tied_parameters():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def tied_modules():
    shared = nn.Linear(6, 6)
    return nn.Sequential(shared, nn.ReLU(), shared)


def tied_views():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight.data = model[0].weight.data.T
    return model


@pytest.mark.parametrize(("make", "tensors"), [(tied_parameters, 3), (tied_modules, 2), (tied_views, 4)])
def test_tied_weights_are_sliced_as_one_tensor_and_views_of_one_memory_each_on_its_own(make, tensors):
    model = nn.Sequential(nn.Linear(6, 6), make(), nn.Linear(6, 3)).double()
    images = vectors().double()
    with untouched(model):
        groups = channel_groups(model, images)
        slim = extract(groups, localize(groups, method="magnitude", keep=0.5))
    captured = dict(groups.graph_module.named_parameters(remove_duplicate=False))
    assert len({tensor.untyped_storage().data_ptr() for tensor in captured.values()}) == len(captured) == tensors + 4
    assert slim.certificate < 1e-12
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in captured.values())
    assert torch.allclose(groups.graph_module(images), model(images), rtol=0, atol=1e-14)


def test_buffers_that_are_views_of_one_memory_become_tensors_of_their_own():
    model = linear(lambda net, x: net.head((net.stem(x) @ net.mix) @ net.back))
    model.register_buffer("mix", torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    model.register_buffer("back", model.mix.T)
    with untouched(model):
        graph_module = capture(model, vectors())
    mix, back = graph_module.get_buffer("mix"), graph_module.get_buffer("back")
    assert mix.untyped_storage().data_ptr() != back.untyped_storage().data_ptr()
    assert torch.equal(mix.T, back)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: (net.head(net.stem(x)), x),
        lambda net, x: {"scores": net.head(net.stem(x)), "features": x},
    ],
    ids=["tuple", "dict"],
)
@pytest.mark.parametrize("call", [channel_groups, lambda m, x: localize(m, method="random", example_inputs=x)])
def test_a_source_that_returns_several_tensors_without_a_choice_is_refused(function, call):
    model = linear(function)
    with (
        untouched(model),
        pytest.raises(OutputError, match="Net returns .* of 2: .* is the logits with output="),
    ):
        call(model, vectors())


def test_control_flow_that_depends_on_data_is_refused():
    model = linear(lambda net, x: net.head(net.stem(x)) if x.sum() > 0 else net.head(-net.stem(x)))
    with untouched(model), pytest.raises(TraceError, match=r"torch.export: .*\(in Net\)"):
        capture(model, vectors())


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.head(net.stem(x) + torch.rand_like(x[:, :1])),
        lambda net, x: net.head(net.stem(x) + torch.rand(8)),
        lambda net, x: net.head(F.dropout(net.stem(x), 0.5, True)),
    ],
    ids=["like", "constant", "dropout"],
)
def test_randomness_in_eval_mode_is_refused(function):
    model = linear(function).eval()
    with untouched(model), pytest.raises(TraceError, match="differs from the model by .*randomness in eval mode"):
        capture(model, vectors())


def under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.stem(x)
    return net.head(y.float())


def on_a_condition(net, x):
    return net.head(net.stem(torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))))


@pytest.mark.parametrize("function", [under_autocast, on_a_condition])
def test_a_part_that_runs_under_another_mode_or_condition_is_refused_by_node(function):
    model = linear(function).eval()
    with untouched(model), pytest.raises(TraceError, match=r"node '\w+' \(\w+\) of Net runs a part of the model"):
        capture(model, vectors())


def test_a_fixed_batch_size_is_refused():
    model = linear(lambda net, x: net.head(net.stem(x).reshape(2, 8)))
    with untouched(model), pytest.raises(TraceError, match=r"torch.export: .*\(in Net\)"):
        capture(model, vectors())


def through_a_view(net, x):
    y = net.stem(x)
    y.view(-1, 2, 4).relu_()
    return net.head(y)


def under_a_view(net, x):
    y = net.stem(x)
    view = y.view(-1, 2, 4)
    y.add_(1)
    return net.head(view.flatten(1))


@pytest.mark.parametrize("function", [through_a_view, under_a_view])
def test_changing_a_tensor_that_has_views_is_refused(function):
    model = linear(function)
    with untouched(model), pytest.raises(TraceError, match="writes into a part of a tensor.*without in-place"):
        capture(model, vectors())
