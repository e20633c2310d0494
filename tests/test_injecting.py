"""Grafting clones into targets and taking them out again: nothing of the target moves, nothing of the clone stays."""

import copy
import functools
import gc
import hashlib
import itertools
import keyword
import pickle
import re
import weakref

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from netclone.cloning.grafted import GraftedModule, clones, own_nodes, read_by
from netclone.cloning.injecting import inject, remove
from netclone.cloning.modules import CloneModule
from netclone.errors import AdapterError, ArgumentError, CloneNameError, OutputError, PositionError, SameNameWarning
from netclone.files.spec import CloneSpec
from netclone.graph.capturing import FACTS, capture
from netclone.graph.holding import hold
from netclone.graph.tracing import logits_node, shape_of, trace

IMAGES = (3, 64, 64)
PLACES = {  # by target: its stem, a middle position, and the last one before the classifier
    "test_resnet": ("maxpool", "layer2", "layer4"),
    "test_vit": ("norm_pre", "blocks.2", "norm"),
    "test_efficientnet": ("bn1", "blocks.2", "bn2"),
    "resnet18": ("conv1", "layer2.0", "layer4"),
}


class Probe(nn.Module):
    """Logits (N, K) that are linear in the mean of what is read, so that a test can compute them by hand."""

    def __init__(self, channels, classes, second=0):
        super().__init__()
        self.linear = nn.Linear(channels, classes)
        self.second = nn.Linear(second, classes) if second else None

    def forward(self, features, target_features=None):
        mean = features.mean((2, 3)) if features.dim() == 4 else features.mean(1) if features.dim() == 3 else features
        return self.linear(mean) if self.second is None else self.linear(mean) + self.second(target_features)


@functools.cache
def clone_for(shape, classes=(7, 8), second=(), seed=0, **facts):
    """A clone that reads features of a shape (and, with ``second``, the target's features of that shape)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = shape[0] if len(shape) == 3 else shape[-1]
        probe = Probe(channels, len(classes), *second)
        body = capture(probe, torch.randn(2, *shape), *([torch.randn(2, *second)] if second else []))
    spec = CloneSpec(tuple(classes), (), None, tuple(shape), 0.0, feature_shape=tuple(second) or None, **facts)
    return CloneModule(body, spec)


@functools.cache
def traced_target(name):
    """A traced target with statistics that are not the initial ones; tests must leave it as it is (most check)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        size = {"img_size": 64} if "vit" in name else {}
        model = timm.create_model(name, num_classes=4, **size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return trace(model.eval(), torch.randn(2, *IMAGES))


def shape_at(traced, at):
    name = traced.meta[FACTS]["positions"].get(at, at)
    return shape_of(next(node for node in traced.graph.nodes if node.name == name))


def probe_at(target, at, **options):
    return clone_for(shape_at(traced_target(target), at), **options)


class InPlace(nn.Module):
    """After ``bn``, an in-place ReLU writes into what ``bn`` returned; after ``pool`` into a view of it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.late = nn.LeakyReLU(0.5, inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        pooled = self.pool(self.drop(self.act(self.bn(self.conv(x)))) - 0.5)
        flat = pooled.flatten(1)
        self.late(flat)
        return self.fc(flat)


def digest(tensor):
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


def state(model):
    """All that two equal models have in common: tensors, flags, names, hooks, and of a graph its code and facts."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    facts = {
        "tensors": [(n, type(t).__name__, t.dtype, tuple(t.shape), digest(t), t.requires_grad) for n, t in tensors],
        "modules": [
            (n, m.training, type(m).__name__ if n else "", [list(getattr(m, hook).values()) for hook in hooks])
            for n, m in model.named_modules(remove_duplicate=False)
        ],
        "keys": list(model.state_dict()),
    }
    if isinstance(model, fx.GraphModule):
        facts["code"] = model.code
        facts["grafted"] = isinstance(model, GraftedModule)
        facts["nodes"] = [
            (n.op, n.name, str(n.target), str(n.args), str(n.kwargs), n.type, shape_of(n), sorted(n.meta))
            for n in model.graph.nodes
        ]
        facts["meta"] = {key: value for key, value in model.meta.items() if key != FACTS}
        facts["positions"] = {key: value for key, value in model.meta[FACTS].items() if key != "example"}
        facts["example"] = digest(model.meta[FACTS]["example"])
    return facts


def everything(model):
    """``state``, and that these are the same objects as before, that nobody wrote to; and the random state."""
    tensors = [*model.parameters(), *model.buffers()]
    same = [(id(t), t.data_ptr(), t._version, t.grad) for t in tensors] + [id(m) for m in model.modules()]
    return state(model), same, digest(torch.get_rng_state())


def branch_nodes(grafted):
    names = {node.name for node in remove_all(grafted).graph.nodes}
    return [node.name for node in grafted.graph.nodes if node.name not in names]


def copied_nodes(grafted):
    """Nodes of the branches that give memory of their own."""
    return [node.name for node in grafted.graph.nodes if node.target is hold and node.args[2:] == (True,)]


def remove_all(grafted):
    for name in clones(grafted):
        grafted = remove(grafted, name)
    return grafted


def run(model, images):
    with torch.no_grad():
        return model(images)


# What a grafted model computes


@pytest.mark.parametrize("target, at", [(target, at) for target, places in PLACES.items() for at in places])
def test_target_columns_keep_their_bits_and_removal_gives_the_target_back(target, at):
    traced, module = traced_target(target), probe_at(target, at)
    images = torch.randn(3, *IMAGES)
    before = everything(traced), everything(module)

    grafted = inject(traced, module, at, name="shirts")
    out = run(grafted, images)

    assert clones(grafted) == ("shirts",)
    assert out.shape == (3, 6)
    assert torch.equal(out[:, :4], run(traced, images))
    restored = remove(grafted, "shirts")
    assert type(restored).__mro__[1] is fx.GraphModule
    assert state(restored) == state(traced)
    assert torch.equal(run(restored, images), run(traced, images))
    assert (everything(traced), everything(module)) == before


def test_clone_columns_are_what_the_clone_computes_from_the_features():
    traced, module = traced_target("resnet18"), probe_at("resnet18", "layer2.0", classes=(3, 1, 2))
    images = torch.randn(3, *IMAGES)
    seen = []
    model = copy.deepcopy(traced)
    model.get_submodule("layer2.1.conv1").register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run(model, images)
    out = run(inject(traced, module, "layer2.0"), images)
    assert torch.equal(out[:, 4:], run(module, seen[0]))


def test_graph_gets_one_call_behind_the_tap_and_one_join_at_the_end():
    traced = traced_target("test_resnet")
    grafted = inject(traced, probe_at("test_resnet", "layer2"), "layer2", name="shirts")
    grafted = inject(grafted, probe_at("test_resnet", "layer2"), "layer2", name="bags")
    names = [node.name for node in grafted.graph.nodes]
    tap = names.index("layer2_0_act2")
    assert names[tap : tap + 5] == ["layer2_0_act2", "shirts_input", "shirts", "bags_input", "bags"]
    assert names[-4:] == ["fc", "fc_held", "join", "output"]
    assert "join(fc_held, [shirts, bags])" in grafted.code
    assert isinstance(grafted.get_submodule("shirts"), CloneModule)
    assert shape_of(logits_node(grafted)) == (8,)
    assert [node.name for node in own_nodes(grafted)] == [node.name for node in traced.graph.nodes]
    assert [node.name for node in read_by(grafted, "bags")] == ["layer2_0_act2"]


def test_plain_module_is_traced_and_left_alone():
    for target in (timm.create_model("test_resnet", num_classes=4), InPlace()):
        target.train()
        next(target.parameters()).requires_grad_(False)
        at = "layer2" if hasattr(target, "layer2") else "bn"
        example = torch.randn(2, *IMAGES)
        module = clone_for(shape_at(trace(target, example), at))
        images = torch.randn(2, *IMAGES)
        before = everything(target), everything(module)
        grafted = inject(target, module, at, example_inputs=example)
        out = run(grafted, images)
        restored = remove(grafted)
        assert (everything(target), everything(module)) == before
        assert state(restored) == state(trace(target, example))
        assert torch.equal(out[:, : restored(images).shape[1]], run(copy.deepcopy(target).eval(), images))


def test_example_comes_from_the_clone_and_then_from_the_model():
    at_64 = clone_for(shape_at(traced_target("test_resnet"), "layer2"), target_input_shape=IMAGES, at="layer2")
    model = timm.create_model("test_resnet", num_classes=4)
    assert inject(model, at_64).meta[FACTS]["example"].shape == (2, *IMAGES)
    at_own = clone_for(shape_at(trace(model), "layer2"), at="layer2")
    assert inject(model, at_own).meta[FACTS]["example"].shape == (2, 3, 160, 160)


def test_the_input_itself_can_be_tapped():
    traced, module = traced_target("test_resnet"), clone_for(IMAGES)
    images = torch.randn(3, *IMAGES)
    grafted = inject(traced, module, "x")
    assert torch.equal(run(grafted, images), torch.cat([run(traced, images), run(module, images)], 1))
    assert state(remove(grafted)) == state(traced)


def test_the_logits_can_be_tapped():
    traced, module = traced_target("test_resnet"), clone_for((4,))
    images = torch.randn(3, *IMAGES)
    logits = run(traced, images)
    grafted = inject(inject(traced, module, "fc"), module, "fc")
    assert torch.equal(run(grafted, images), torch.cat([logits, module(logits), module(logits)], 1))


def test_a_target_captured_by_export_takes_clones():
    model = InPlace().train()
    model.fc.weight.requires_grad_(False)
    captured = capture(model, torch.randn(2, *IMAGES))
    assert captured.meta[FACTS]["operators"]
    captured.train()
    module = clone_for(shape_at(captured, "bn"), second=(4,), feature_node="flatten")
    images = torch.randn(3, *IMAGES)
    grafted = inject(captured, module, "bn")
    assert branch_nodes(grafted) == ["clone_input", "clone_input_1", "clone", "linear_held", "join"]
    assert not any(part.training for path, part in grafted.named_modules() if not path.startswith("clone"))
    assert torch.equal(run(grafted, images)[:, :3], run(captured, images))
    assert shape_of(logits_node(grafted)) == (5,)
    assert state(remove(grafted)) == state(captured)
    exported = torch.export.export(grafted, (images,)).module()
    assert torch.equal(run(exported, images), run(grafted, images))


# In-place operations


def tapped_by_hand(model, images):
    """What bn and flatten return in InPlace, before and after they are written to."""
    with torch.no_grad():
        bn = model.bn(model.conv(images))
        pooled = model.pool(torch.relu(bn) - 0.5).flatten(1)
        return bn, pooled, torch.nn.functional.leaky_relu(pooled, 0.5)


def test_clone_reads_the_tap_before_it_is_written_to():
    traced = trace(InPlace(), torch.randn(2, *IMAGES)).eval()
    module = clone_for(shape_at(traced, "bn"))
    images = torch.randn(3, *IMAGES)
    bn, _, _ = tapped_by_hand(traced, images)
    grafted = inject(traced, module, "bn")
    assert branch_nodes(grafted) == ["clone_input", "clone", "fc_held", "join"]
    assert copied_nodes(grafted) == []
    assert torch.equal(run(grafted, images)[:, 3:], run(module, bn))


def test_tap_written_before_the_second_input_is_there_is_copied_first():
    model = trace(InPlace(), torch.randn(2, *IMAGES)).eval()
    images = torch.randn(3, *IMAGES)
    bn, pooled, _ = tapped_by_hand(model, images)
    module = clone_for(tuple(bn.shape[1:]), second=(4,), feature_node="flatten")
    before = state(model)
    grafted = inject(model, module, "bn", name="a")
    grafted = inject(grafted, module, "bn", name="b")
    assert branch_nodes(grafted) == ["a_input", "b_input", "a_input_1", "a", "b_input_1", "b", "fc_held", "join"]
    assert copied_nodes(grafted) == ["a_input", "b_input"]
    out = run(grafted, images)
    assert torch.equal(out[:, :3], run(model, images))
    assert torch.equal(out[:, 3:5], module(bn, pooled).detach())
    assert torch.equal(out[:, 5:], out[:, 3:5])
    assert branch_nodes(remove(grafted, "a")) == ["b_input", "b_input_1", "b", "fc_held", "join"]
    assert state(remove_all(grafted)) == before


def test_second_input_written_before_the_tap_is_there_is_copied_through_views():
    model = trace(InPlace(), torch.randn(2, *IMAGES)).eval()
    images = torch.randn(3, *IMAGES)
    _, pooled, _ = tapped_by_hand(model, images)
    module = clone_for((3,), second=(4,), feature_node="flatten")
    grafted = inject(model, module, "fc")
    assert copied_nodes(grafted) == ["clone_input_1"]
    assert torch.equal(run(grafted, images)[:, 3:], module(run(model, images), pooled).detach())
    reads_pool = clone_for((4, 1, 1), second=(3,), feature_node="fc")  # `late` writes into a view of what pool gave
    grafted = inject(model, reads_pool, "pool")
    assert copied_nodes(grafted) == ["clone_input"]
    assert torch.equal(run(grafted, images)[:, 3:], reads_pool(pooled[:, :, None, None], run(model, images)).detach())


def test_nothing_is_copied_where_nothing_writes():
    traced = traced_target("resnet18")  # its ReLUs work in place, on tensors of their own
    module = probe_at("resnet18", "layer2", second=(512,), feature_node="global_pool")
    grafted = inject(traced, module, "layer2")
    assert branch_nodes(grafted) == ["clone_input", "clone_input_1", "clone", "fc_held", "join"]
    assert copied_nodes(grafted) == []
    images = torch.randn(2, *IMAGES)
    assert torch.equal(run(grafted, images)[:, :4], run(traced, images))


# Flags: they stay as they were, and still the target never learns


def test_train_moves_clones_and_never_the_target():
    model = trace(InPlace(), torch.randn(2, *IMAGES)).train()
    images = torch.randn(4, *IMAGES)
    want = run(copy.deepcopy(model).eval(), images)
    grafted = inject(model, clone_for(shape_at(model, "bn")), "bn")
    for wrapped in (grafted, copy.deepcopy(grafted), nn.Sequential(grafted)):
        for mode in (True, False):
            assert wrapped.train(mode) is wrapped
            assert wrapped.training is mode
            assert all(part.training is mode for path, part in wrapped.named_modules() if "clone" in path)
            assert not any(
                part.training for part in wrapped.modules() if isinstance(part, (nn.BatchNorm2d, nn.Dropout))
            )
            wrapped(images).sum().backward()
            assert torch.equal(run(wrapped, images)[:, :3], want)
    assert model.training and model.bn.training and model.drop.training
    with pytest.raises(ValueError):
        grafted.train("yes")


def test_target_and_clone_keep_their_flags():
    traced = copy.deepcopy(traced_target("test_resnet"))
    for index, parameter in enumerate(traced.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    for index, part in enumerate(traced.modules()):
        part.training = index % 4 == 0
    module = copy.deepcopy(probe_at("test_resnet", "layer2"))
    module.get_parameter("body.linear.bias").requires_grad_(False)
    module.train()
    grafted = inject(traced, module, "layer2", name="a")
    grafted = inject(grafted, module, "layer2", name="b")
    trainable = {path for path, parameter in grafted.named_parameters() if parameter.requires_grad}
    own = {path for path, parameter in traced.named_parameters() if parameter.requires_grad}
    assert 0 < len(own) < len(list(traced.parameters()))
    assert trainable == own | {"a.body.linear.weight", "b.body.linear.weight"}
    assert {path.partition(".")[0] for path, part in grafted.named_modules() if part.training} == {"a", "b"}
    grafted.eval().train()
    for part in grafted.modules():
        part.training = True
    for parameter in grafted.parameters():
        parameter.requires_grad_(True)
    assert state(remove_all(copy.deepcopy(grafted))) == state(traced)


@pytest.mark.parametrize("images_ask", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shared", [False, True])
def test_only_the_clone_learns(optimizer, images_ask, shared):
    """With every parameter in the optimizer, decay of weights, and old logits in the loss."""
    traced = traced_target("test_resnet")
    grafted = inject(traced, probe_at("test_resnet", "layer2"), "layer2", share_parameters=shared).train()
    images = torch.randn(4, *IMAGES, requires_grad=images_ask)
    before = everything(traced)
    old, new = run(grafted, images).split([4, 2], 1)
    optimizer = optimizer(grafted.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        grafted(images).square().sum().backward()
        optimizer.step()
    assert all((parameter.grad is None) != name.startswith("clone.") for name, parameter in grafted.named_parameters())
    assert torch.equal(run(grafted, images)[:, :4], old)
    assert not torch.equal(run(grafted, images)[:, 4:], new)
    assert everything(traced) == before
    assert state(remove(grafted)) == state(traced)


class Saliency(nn.Module):
    """Smooth, so that second derivatives are not zero."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


def frozen(grafted):
    """What computes the same with the clone and the target in a row, the target frozen."""
    target, clone = remove(grafted).requires_grad_(False), grafted.clone

    def forward(x):
        maps = target.conv(x)
        return torch.cat([target.fc(torch.tanh(maps).mean((2, 3))), clone(maps)], 1)

    return forward


def saliency():
    images = torch.randn(2, 3, 8, 8)
    traced = trace(Saliency(), images)
    return inject(traced, clone_for(shape_at(traced, "conv")), "conv")


def test_gradients_of_the_images_are_those_through_a_frozen_target():
    grafted, want = saliency(), []
    for model in (grafted, frozen(grafted)):
        grafted.zero_grad()
        before = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        model(before.tanh()).square().sum().backward()  # the images themselves come from something that learns
        want.append((before.grad, grafted.clone.get_parameter("body.linear.weight").grad.clone()))
    for got, expected in zip(*want, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(p.grad is None for name, p in grafted.named_parameters() if not name.startswith("clone."))


def test_a_penalty_on_gradients_of_the_images_teaches_the_clone_alone():
    grafted, found = saliency(), []
    for model in (grafted, frozen(grafted)):
        grafted.zero_grad()
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), images, create_graph=True)
        (gradient.square().sum() + second.square().sum()).backward()
        found.append((images.grad, grafted.clone.get_parameter("body.linear.weight").grad.clone()))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(p.grad is None for name, p in grafted.named_parameters() if not name.startswith("clone."))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # jvp loads it
def test_functional_transforms_see_the_images_through_the_target():
    grafted = saliency()
    reference, images = frozen(grafted), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.func.jacrev(grafted)(images), torch.func.jacrev(reference)(images))
    tangents = [torch.func.jvp(model, (images,), (torch.ones_like(images),))[1] for model in (grafted, reference)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(torch.func.vmap(grafted)(images[:, None]), reference(images)[:, None])


def test_a_graph_traced_once_more_still_holds_the_target():
    grafted, images = saliency(), torch.randn(2, 3, 8, 8)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m, path):
            return isinstance(m, CloneModule) or super().is_leaf_module(m, path)

    again = fx.GraphModule(grafted, Leaves().trace(grafted))
    assert torch.equal(again(images), grafted(images))
    again(images).sum().backward()
    assert again.get_parameter("fc.weight").grad is None


# Several clones


def reading_both():
    """A clone that reads what maxpool gives in test_resnet, and what its classifier reads."""
    channels = shape_at(traced_target("test_resnet"), "global_pool")
    return probe_at("test_resnet", "maxpool", second=channels, feature_node="global_pool")


def three_modules():
    return {
        "a": (probe_at("test_resnet", "layer2"), "layer2"),
        "b": (probe_at("test_resnet", "layer4", classes=(1,)), "layer4"),
        "c": (reading_both(), "maxpool"),
    }


def injected(target, named):
    for name, (module, at) in named.items():
        target = inject(target, module, at, name=name)
    return target


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_every_removal_order_gives_what_never_had_the_clone(order):
    traced, named = traced_target("test_resnet"), three_modules()
    images = torch.randn(2, *IMAGES)
    grafted = injected(traced, named)
    for name in order:
        before = everything(grafted)
        smaller = remove(grafted, name)
        assert everything(grafted) == before
        del named[name]
        direct = injected(traced, named)
        assert state(smaller) == state(direct)
        assert torch.equal(run(smaller, images), run(direct, images))
        grafted = smaller
    assert state(grafted) == state(traced)


@functools.cache
def small_target():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return trace(InPlace(), torch.randn(2, *IMAGES))


NAMES = st.one_of(
    st.sampled_from(
        ["x", "clone", "clone_2", "clone_input", "join", "join_1", "cat", "len", "len_1", "torch", "add", "_", "é"]
    ),
    st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True),
).filter(lambda name: not keyword.iskeyword(name) and name != "self" and not hasattr(small_target(), name))
POOL = st.sampled_from([("bn", ()), ("bn", (4,)), ("fc", (4,)), ("pool", ()), ("x", ())])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.tuples(NAMES, POOL), st.integers(0, 3)), max_size=9))
def test_any_history_gives_the_state_of_direct_injection(history):
    target = current = small_target()
    present = {}
    for step in history:
        if isinstance(step, int):
            if step < len(present):
                name = list(present)[step]
                del present[name]
                current = remove(current, name)
        elif len(present) < 4 and step[0] not in present:
            name, (at, second) = step
            module = clone_for(shape_at(target, at), second=second, feature_node="flatten" if second else None)
            present[name] = module, at
            current = inject(current, module, at, name=name)
    assert state(current) == state(injected(target, present))
    images = torch.ones(2, *IMAGES)
    want = run(copy.deepcopy(target).eval(), images)
    assert torch.equal(run(copy.deepcopy(current).eval(), images)[:, :3], want)
    if present:
        assert clones(current) == tuple(present)
        assert state(remove_all(current)) == state(target)


def test_default_names_are_the_first_free_ones():
    traced, module = traced_target("test_resnet"), probe_at("test_resnet", "layer2")
    grafted = inject(inject(inject(traced, module, "layer2"), module, "layer2"), module, "layer2")
    assert clones(grafted) == ("clone", "clone_2", "clone_3")
    assert clones(inject(remove(grafted, "clone_2"), module, "layer2")) == ("clone", "clone_3", "clone_2")


# What else a grafted model must be able to do


def grafted_resnet():
    traced = traced_target("test_resnet")
    grafted = inject(traced, probe_at("test_resnet", "layer2"), "layer2", name="shirts")
    return traced, inject(grafted, reading_both(), "maxpool", name="bags")


def test_deepcopy_keeps_class_record_and_bits():
    traced, grafted = grafted_resnet()
    again = copy.deepcopy(copy.deepcopy(grafted))
    assert isinstance(again, GraftedModule)
    assert clones(again) == ("shirts", "bags")
    assert state(again) == state(grafted)
    assert state(remove_all(again)) == state(traced)


def test_a_graph_that_was_pickled_when_its_record_was_in_another_module_loads():
    _, grafted = grafted_resnet()
    data = pickle.dumps(grafted, protocol=2)  # that of torch.save; it holds names as text
    former = data
    for name in (b"Branch", b"Record"):
        now = b"cnetclone.cloning.grafted\n" + name + b"\n"
        assert now in data
        former = former.replace(now, b"cnetclone.cloning.injecting\n_" + name + b"\n")
    images = torch.randn(2, *IMAGES)
    assert torch.equal(pickle.loads(former)(images), grafted(images))


def test_state_dict_goes_into_another_grafted_model():
    _, grafted = grafted_resnet()
    other = copy.deepcopy(grafted)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.zero_()
    other.load_state_dict(grafted.state_dict())
    assert state(other) == state(grafted)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_change_of_dtype_stays_in_the_grafted_model(dtype, share):
    traced = traced_target("test_resnet")
    module = probe_at("test_resnet", "layer2")
    images = torch.randn(2, *IMAGES, dtype=dtype)
    before = everything(traced), everything(module)
    grafted = inject(traced, module, "layer2", share_parameters=share).to(dtype)
    assert torch.equal(run(grafted, images)[:, :4], run(copy.deepcopy(traced).to(dtype), images))
    assert state(remove(grafted)) == state(copy.deepcopy(traced).to(dtype))
    assert (everything(traced), everything(module)) == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    traced, grafted = grafted_resnet()
    images = torch.randn(2, *IMAGES)
    torch.compiler.reset()
    compiled = torch.compile(grafted, backend=backend, fullgraph=True)
    assert torch.equal(run(compiled, images), run(grafted, images))
    compiled.train()
    assert torch.equal(run(compiled, images)[:, :4], run(traced, images))
    torch.compiler.reset()


def test_exports():
    _, grafted = grafted_resnet()
    images = torch.randn(2, *IMAGES)
    exported = torch.export.export(grafted, (images,)).module()
    assert torch.equal(run(exported, images), run(grafted, images))


def test_shared_parameters_are_other_objects_on_the_same_memory():
    traced = traced_target("test_resnet")
    module = probe_at("test_resnet", "layer2")
    plain = timm.create_model("test_resnet", num_classes=4).train()
    images = torch.randn(2, *IMAGES)
    for target in (traced, plain, inject(traced, module, "layer2", name="first")):
        before = everything(target)
        grafted = inject(target, module, "layer2", share_parameters=True, example_inputs=images)
        mine = dict([*grafted.named_parameters(), *grafted.named_buffers()])
        for path, tensor in [*target.named_parameters(), *target.named_buffers()]:
            assert mine[path] is not tensor
            assert (mine[path].data_ptr() == tensor.data_ptr()) == (not path.startswith("first"))
        assert mine["clone.body.linear.weight"].data_ptr() != module.get_parameter("body.linear.weight").data_ptr()
        out = run(grafted, images)
        assert torch.equal(out[:, :4], run(copy.deepcopy(target).eval(), images)[:, :4])
        grafted.requires_grad_(True)
        restored = remove(grafted, "clone")
        assert restored.get_parameter("fc.weight").data_ptr() != mine["fc.weight"].data_ptr()
        grafted.to(torch.float64)
        grafted.get_parameter("fc.weight").data.zero_()
        assert everything(target) == before
        assert state(restored) == state(trace(target, images))


def test_removed_clone_is_freed_and_never_copied(monkeypatch):
    grafted = inject(traced_target("test_resnet"), probe_at("test_resnet", "layer2"), "layer2")
    clone = grafted.get_submodule("clone")
    gone = weakref.ref(clone), weakref.ref(clone.body), weakref.ref(clone.get_parameter("body.linear.weight"))
    del clone
    with monkeypatch.context() as patch:
        patch.setattr(CloneModule, "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
        restored = remove(grafted)
    assert all(ref() is not None for ref in gone)
    del grafted
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert not hasattr(restored, "clone")


def test_hooks_on_the_targets_modules_are_kept():
    traced = copy.deepcopy(traced_target("test_resnet"))
    traced.get_submodule("fc").register_forward_hook(lambda _m, _a, out: out * 2)
    images = torch.randn(2, *IMAGES)
    grafted = inject(traced, probe_at("test_resnet", "layer2"), "layer2")
    assert torch.equal(run(grafted, images)[:, :4], run(traced, images))
    assert state(remove(grafted)) == state(traced)


# Errors: typed, telling what was seen and the way out, and nothing half-done


def resnet_error(error, message, *args, target=None, module=None, **kwargs):
    target = traced_target("test_resnet") if target is None else target
    module = probe_at("test_resnet", "layer2") if module is None else module
    models = [model for model in (target, module) if isinstance(model, nn.Module)]
    before = [everything(model) for model in models]
    with pytest.raises(error, match=message) as caught:
        inject(target, module, *args, **kwargs)
    assert [everything(model) for model in models] == before
    return str(caught.value)


def test_unknown_or_impossible_position():
    resnet_error(PositionError, "no position 'layer9' in .*did you mean 'layer4'", "layer9")
    resnet_error(PositionError, "at: this clone was not fitted for a position.*module paths.*'conv1.0'")
    vit = traced_target("test_vit")
    resnet_error(PositionError, "is not one tensor: choose a node that uses it", "unbind", target=vit)
    grafted = inject(traced_target("test_resnet"), probe_at("test_resnet", "layer2"), "layer2", name="a")
    for at in ("a", "join"):
        resnet_error(PositionError, f"'{at}' belongs to a clone.*such as 'conv1.0'", at, target=grafted)


def test_shapes_that_do_not_fit():
    here, there = (str(shape_at(traced_target("test_resnet"), at))[1:-1] for at in ("layer2", "layer4"))
    message = resnet_error(AdapterError, "fit an adapter with", "layer4")
    assert f"(N, {there}), the clone takes (N, {here})" in message
    assert "netclone.clone(source, target, data, at='layer4')" in message
    channels = shape_at(traced_target("test_resnet"), "global_pool")
    for second, node, message in (
        ((5,), "global_pool", rf"node 'global_pool_flatten'.*\(N, {channels[0]}\).*second input takes \(N, 5\)"),
        (channels, "no_such_node", "second input.*is missing: no position 'no_such_node'"),
        (channels, None, r"feature_node is None.*with_spec\(feature_node"),
    ):
        module = probe_at("test_resnet", "layer2", second=second, feature_node=node)
        resnet_error(AdapterError, message, "layer2", module=module)


def test_names_that_cannot_be():
    grafted = inject(traced_target("test_resnet"), probe_at("test_resnet", "layer2"), "layer2", name="a")
    resnet_error(CloneNameError, "already holds a clone 'a'; 'a_2' is free", "layer2", name="a", target=grafted)
    for name in ("layer1", "forward", "training", "graph", "meta"):
        resnet_error(CloneNameError, f"already an attribute of the target; '{name}_2' is free", "layer2", name=name)
    for name, free in (("two words", "two_words"), ("2nd", "2nd"), ("", ""), ("class", "class"), ("ﬁ", ""), (3, "3")):
        message = rf"{re.escape(repr(name))} is not a Python identifier.*'clone_{free}' is free"
        resnet_error(CloneNameError, message, "layer2", name=name)
    resnet_error(CloneNameError, "'self' is not a Python identifier that can name", "layer2", name="self")


def test_modules_that_are_none_or_live_elsewhere():
    resnet_error(ArgumentError, "expected a CloneModule, got Linear; make one with", "layer2", module=nn.Linear(2, 2))
    double = copy.deepcopy(probe_at("test_resnet", "layer2")).double()
    message = resnet_error(
        ArgumentError, "torch.float64 on cpu, the target's are torch.float32", "layer2", module=double
    )
    assert "module.to('cpu', torch.float32)" in message
    meta = copy.deepcopy(probe_at("test_resnet", "layer2")).to("meta")
    with pytest.raises(ArgumentError, match=r"torch.float32 on meta.*on cpu: bring it there"):
        inject(traced_target("test_resnet"), meta, "layer2")


def test_targets_that_return_no_logits():
    class Two(InPlace):
        def forward(self, x):
            logits = super().forward(x)
            return {"a": logits, "b": logits + 1}

    class Map(InPlace):
        def forward(self, x):
            return self.conv(x)

    for kind in (Two, Map):
        target = kind()
        example = torch.randn(2, *IMAGES)
        before = everything(target)
        with pytest.raises(OutputError, match=r"returns (dict of 2|shape \(N, )"):
            inject(target, clone_for((4, 62, 62)), "conv", example_inputs=example)
        assert everything(target) == before


def test_removing_what_is_not_there():
    traced, grafted = grafted_resnet()
    before = everything(grafted)
    with pytest.raises(CloneNameError, match=r"no clone 'shirt'.*holds 'shirts', 'bags'; did you mean 'shirts'"):
        remove(grafted, "shirt")
    with pytest.raises(CloneNameError, match="the clones 'shirts', 'bags'; say which one"):
        remove(grafted)
    assert everything(grafted) == before
    for model in (traced, nn.Linear(2, 2), remove_all(grafted)):
        assert clones(model) == ()
        with pytest.raises(ArgumentError, match=r"holds no clones; pass the graph that netclone.inject"):
            remove(model)


def test_two_columns_of_one_class_name_are_told():
    shape = (8,)
    traced = trace(nn.Sequential(nn.Flatten(), nn.Linear(8, 8)), torch.randn(2, 8))
    first, second, other, numbers = (
        clone_for(shape, classes).with_spec(at="input", class_names=names)
        for classes, names in (
            ((1, 2), ("Grey Heron", "ibis")),
            ((3, 4), ("gull", "grey-heron")),
            ((5, 6), ("tern", "crow")),
            ((7, 8), ("7", "8")),
        )
    )
    grafted = inject(traced, first)  # warnings are errors
    with pytest.raises(ArgumentError, match="already has a column called 'grey-heron'; .*allow_same_names=True"):
        inject(grafted, second)
    with pytest.warns(SameNameWarning, match="already has a column called 'grey-heron'; two columns"):
        assert clones(inject(grafted, second, allow_same_names=True)) == ("clone", "clone_2")
    assert clones(inject(inject(inject(grafted, other), numbers), numbers)) == (
        "clone",
        "clone_2",
        "clone_3",
        "clone_4",
    )
    inject(remove(grafted), second)


def test_a_class_that_the_target_names_itself_is_told():
    target = timm.create_model("test_resnet", num_classes=2).eval()
    target.pretrained_cfg = {**target.pretrained_cfg, "label_names": ["heron", "gull"]}
    module = clone_for((3, 160, 160)).with_spec(at="input", class_names=("Heron", "ibis"))
    with pytest.raises(ArgumentError, match="'Heron'"):
        inject(target, module)


# What a grafted model says of its clones


def test_a_grafted_model_says_which_clones_and_columns_it_has():
    target, module = traced_target("test_resnet"), probe_at("test_resnet", "layer2")
    grafted = inject(inject(target, module, "layer2", name="first"), probe_at("test_resnet", "layer4"), "layer4")
    assert list(grafted.clones) == ["first", "clone"] == list(clones(grafted))
    assert grafted.clones["first"] is grafted.get_submodule("first")
    assert grafted.columns == {"first": range(4, 6), "clone": range(6, 8)}
    assert [node.name for node in grafted.own] == [node.name for node in target.graph.nodes]
    restored = remove(remove(grafted, "first"))
    assert not any(hasattr(restored, name) for name in ("clones", "columns", "own"))


def test_a_targets_own_module_of_such_a_name_is_found_under_it():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns, self.own = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            return self.own(self.columns(x).mean((2, 3)))

    target, images = Columns().eval(), torch.randn(2, 3, 8, 8)
    grafted = inject(target, clone_for((4, 8, 8)), "columns", example_inputs=images)
    assert isinstance(grafted.columns, nn.Conv2d) and isinstance(grafted.own, nn.Linear)
    assert torch.equal(run(grafted, images)[:, :3], run(target, images)) and list(grafted.clones) == ["clone"]


def test_a_clone_cannot_be_called_as_what_says_it():
    with pytest.raises(CloneNameError, match="'columns' is a property of grafted models"):
        inject(traced_target("test_resnet"), probe_at("test_resnet", "layer2"), "layer2", name="columns")
