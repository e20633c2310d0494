"""Clones on and off, and swapped, in a model that is in use: what inject and remove give, to the bit."""

import copy
import io
import threading

import pytest
import timm
import torch
from grafts import Colours
from torch import fx, nn

import netclone
from netclone.cloning.injecting import inject, remove
from netclone.cloning.switching import disable, disabled, enable, replace
from netclone.errors import AdapterError, ArgumentError, CloneNameError, TargetError

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
COLUMNS = ["packed", "stable"]


def extracted(seed, classes=(4, 5), at="conv", names=()):
    torch.manual_seed(seed)
    source = Colours(6)
    mask = netclone.localize(source, method="magnitude", keep=1.0, example_inputs=IMAGES)
    return netclone.extract(source, mask, at, classes=classes, class_names=names, example_inputs=IMAGES)


def target():
    torch.manual_seed(0)
    made = Colours(4).eval()
    made.num_classes, made.pretrained_cfg = 4, {"num_classes": 4, "label_names": ["crow", "gull", "tern", "duck"]}
    return made


HERONS, GEESE = extracted(1, names=("heron", "ibis")), extracted(2, (3,), names=("goose",))


def two(columns="packed", herons=HERONS):
    grafted = inject(target(), herons, "conv", name="herons", columns=columns, example_inputs=IMAGES)
    return inject(grafted, GEESE, "conv", name="geese")


def run(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def facts(model):
    """What must not change: tensors and where they are, flags, modes, code and what the model says of itself."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors],
        [(name, id(part), part.training) for name, part in model.named_modules()],
        (model.code, model.columns, model.label_names, model.num_classes, model.pretrained_cfg),
    )


# Off


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", ["herons", "geese"])
def test_off_is_what_remove_gives_and_on_is_what_was(columns, name):
    grafted = two(columns)
    before, whole, removed = facts(grafted), run(grafted), run(remove(grafted, name))
    with disabled(grafted, name):
        inside = run(grafted)
        assert grafted.num_classes == 7  # the attribute is everyone's, and off is this thread's alone
    assert facts(grafted) == before and torch.equal(run(grafted), whole)
    disable(grafted, name)
    assert torch.equal(run(grafted), inside) and grafted.num_classes == inside.shape[1]
    enable(grafted, name)
    assert facts(grafted) == before and torch.equal(run(grafted), whole)
    if columns == "packed" or name == "herons":
        assert torch.equal(inside, removed)
    else:  # the last columns stay too, since their clone comes back
        assert torch.equal(inside[:, :6], removed) and torch.equal(inside[:, 6], torch.full((3,), -torch.inf))


def test_without_names_all_are_off_and_the_target_is_left():
    grafted = two()
    with disabled(grafted):
        assert torch.equal(run(grafted), run(target()))
    disable(grafted)
    assert torch.equal(run(grafted), run(target()))
    enable(grafted)
    assert run(grafted).shape == (3, 7)


def test_blocks_nest_and_end_with_errors():
    grafted = two()
    with disabled(grafted, "herons"):
        with pytest.raises(KeyError), disabled(grafted, "geese"):
            assert run(grafted).shape == (3, 4)
            raise KeyError
        assert run(grafted).shape == (3, 5)
        with disabled(grafted, "herons"):
            assert run(grafted).shape == (3, 5)
        assert run(grafted).shape == (3, 5)
    assert run(grafted).shape == (3, 7)


def test_a_block_does_not_switch_on_what_is_off_for_good():
    grafted = two()
    with disabled(grafted, "herons"):
        disable(grafted, "herons")
    assert run(grafted).shape == (3, 5)
    with disabled(grafted, "herons"):
        enable(grafted, "herons")
        assert run(grafted).shape == (3, 5) and grafted.num_classes == 7
    assert run(grafted).shape == (3, 7)


def test_other_threads_and_models_see_nothing_of_a_block_and_all_of_what_is_for_good():
    grafted, other, shapes = two(), two(), []

    def elsewhere():
        shapes.append(tuple(run(grafted).shape))

    def in_a_thread():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return shapes.pop()

    with disabled(grafted, "herons"):
        assert in_a_thread() == (3, 7) and run(other).shape == (3, 7)
        assert run(copy.deepcopy(grafted)).shape == (3, 5)  # such as evaluate makes on another device
        assert run(remove(grafted, "geese")).shape == (3, 6)  # a model of its own
    disable(grafted, "herons")
    assert in_a_thread() == (3, 5)


def test_off_for_good_goes_into_copies_and_through_inject_and_remove():
    grafted = two()
    disable(grafted, "herons")
    assert torch.equal(run(copy.deepcopy(grafted)), run(remove(grafted, "herons")))
    more = inject(grafted, extracted(3, (2,)), "conv", name="more")
    assert run(more).shape == (3, 6) and more.columns == {
        "herons": range(4, 4),
        "geese": range(4, 5),
        "more": range(5, 6),
    }
    fewer = remove(more, "geese")
    assert run(fewer).shape == (3, 5)
    enable(fewer)
    assert torch.equal(run(fewer), run(inject(remove(two(), "geese"), extracted(3, (2,)), "conv")))
    again = inject(target(), grafted.clones["herons"], "conv", example_inputs=IMAGES)
    assert run(again).shape == (3, 6)  # a clone that is taken from there is on


def test_what_is_told_follows():
    grafted = two()
    assert grafted.label_names == ("crow", "gull", "tern", "duck", "heron", "ibis", "goose")
    disable(grafted, "herons")
    assert (
        grafted.label_names == ("crow", "gull", "tern", "duck", "goose") == tuple(grafted.pretrained_cfg["label_names"])
    )
    assert grafted.columns == {"herons": range(4, 4), "geese": range(4, 5)} and list(grafted.clones) == [
        "herons",
        "geese",
    ]
    assert netclone.clones(grafted) == ("herons", "geese") == netclone.clones(torch.compile(grafted, backend="eager"))
    assert netclone.clones(nn.Linear(1, 1)) == ()


def test_modes_flags_and_gradients_are_those_of_a_grafted_model():
    grafted = two()
    grafted.train()
    with disabled(grafted, "herons"):
        out = grafted(IMAGES)
        grafted.eval()
    assert not grafted.herons.training and torch.equal(out, run(remove(grafted, "herons")))
    out.sum().backward()
    assert {name.partition(".")[0] for name, p in grafted.named_parameters() if p.grad is not None} == {"geese"}


@pytest.mark.parametrize("columns", COLUMNS)
def test_autocast_gives_the_dtype_that_it_gives_without_the_clone(columns):
    grafted = two(columns)
    removed = remove(grafted, "herons")
    with torch.autocast("cpu", torch.bfloat16), disabled(grafted, "herons"):
        got, want = run(grafted), run(removed)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_graphs_made_from_a_model_are_of_its_state():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    grafted = inject(plain, extracted(1, at=None), "input", name="herons", columns="stable")
    disable(grafted, "herons")
    want = run(grafted)
    assert torch.equal(want[:, :4], run(plain)) and want.shape == (3, 6)
    assert torch.equal(run(fx.symbolic_trace(grafted)), want)
    assert torch.equal(run(torch.export.export(grafted, (IMAGES,)).module()), want)
    file = io.BytesIO()
    torch.save(grafted, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False)), want)


def test_a_compiled_model_is_switched_and_compiles_once_for_each_state():
    torch.compiler.reset()
    grafted, graphs = two(), []

    def backend(graph_module, _inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(grafted, backend=backend, fullgraph=True)
    whole, removed = run(grafted), run(remove(grafted, "herons"))
    for _ in range(2):
        assert torch.equal(run(compiled), whole)
        with disabled(compiled, "herons"):
            assert torch.equal(run(compiled), removed)
        disable(compiled, "herons")
        assert torch.equal(run(compiled), removed)
        enable(compiled, "herons")
    assert len(graphs) == 3  # on; off here; off for all


# Columns that stay


def test_stable_columns_do_not_move():
    grafted = two("stable")
    whole, removed = run(grafted), remove(grafted, "herons")
    left = run(removed)
    assert removed.columns == {"geese": range(6, 7)} and removed.num_classes == 7
    assert torch.equal(left[:, :4], run(target())) and torch.equal(left[:, 6], whole[:, 6])
    assert bool((left[:, 4:6] == -torch.inf).all()) and removed.label_names[3:] == ("duck", None, None, "goose")
    more = inject(removed, HERONS, "conv", name="again")
    assert more.columns == {"geese": range(6, 7), "again": range(7, 9)}
    assert inject(more, extracted(3, (2,)), "conv", columns="packed").columns["geese"] == range(4, 5)
    plain = remove(removed)
    assert not netclone.clones(plain) and plain.code == netclone.trace(target(), IMAGES).code


def test_columns_become_stable_where_they_are():
    grafted = inject(two(), extracted(3, (2,)), "conv", name="more", columns="stable")
    assert grafted.columns == {"herons": range(4, 6), "geese": range(6, 7), "more": range(7, 8)}
    assert remove(grafted, "geese").columns["more"] == range(7, 8)
    with pytest.raises(ArgumentError, match="columns"):
        inject(target(), HERONS, "conv", columns="still", example_inputs=IMAGES)


@pytest.mark.parametrize("columns", COLUMNS)
def test_scores_of_columns_with_a_gap(columns):
    grafted = remove(two(columns), "herons")
    goose = grafted.columns["geese"].start
    scores = netclone.evaluate(grafted, [(IMAGES, torch.tensor([0, 1, goose]))])
    assert scores.samples == 3 and scores.new is not None
    whole = two(columns)
    assert netclone.evaluate(whole, [(IMAGES, torch.tensor([0, 4, 6]))]).samples == 3


def test_files_keep_columns_and_what_is_off(tmp_path):
    grafted, images = timm.create_model("test_resnet", num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    source = Colours(6)
    mask = netclone.localize(source, method="magnitude", example_inputs=images)
    for name, some in (("a", (1,)), ("b", (2, 3)), ("c", (4,))):
        module = netclone.extract(source, mask, classes=some, example_inputs=images)
        grafted = inject(grafted, module, "input", name=name, columns="stable", check=False)
    grafted = remove(grafted, "a")
    disable(grafted, "b")
    netclone.save_grafted(grafted, tmp_path / "grafted.safetensors")
    again = netclone.load_model(str(tmp_path / "grafted.safetensors"))
    assert again.columns == grafted.columns == {"b": range(4, 6), "c": range(6, 7)}
    assert torch.equal(run(again, images), run(grafted, images))
    enable(again, "b")
    enable(grafted, "b")
    assert torch.equal(run(again, images), run(grafted, images)) and run(again, images).isfinite().sum() == 2 * 6


# Swapped


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("seed, at, alike", [(5, "conv", True), (5, None, False)])
def test_a_swap_gives_what_inject_gives_in_that_place_and_back(columns, seed, at, alike):
    place = "conv" if at else "input"
    old, better = extracted(1, at=at, names=("heron", "ibis")), extracted(seed, at=at, names=("heron", "ibis"))
    if not alike:  # another graph that reads the same
        torch.manual_seed(seed)
        source = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
        mask = netclone.localize(source, method="magnitude", keep=1.0, example_inputs=IMAGES)
        better = netclone.extract(source, mask, classes=[0, 1], example_inputs=IMAGES)

    def grafted_with(module):
        made = inject(target(), module, place, name="herons", columns=columns, example_inputs=IMAGES)
        return inject(made, GEESE, "conv", name="geese")

    grafted = grafted_with(old)
    whole, own = run(grafted), {id(p) for name, p in grafted.named_parameters() if not name.startswith("herons")}
    former = replace(grafted, "herons", better)
    direct = grafted_with(better)
    assert torch.equal(run(grafted), run(direct)) and grafted.label_names == direct.label_names
    assert grafted.state_dict().keys() == direct.state_dict().keys() and grafted.code == direct.code
    assert {id(p) for name, p in grafted.named_parameters() if not name.startswith("herons")} == own
    assert torch.equal(run(remove(grafted, "herons")), run(remove(direct, "herons")))
    with torch.no_grad():
        next(better.parameters()).add_(1)  # the model has a copy
    assert torch.equal(run(grafted), run(direct))
    replace(grafted, "herons", former)
    assert torch.equal(run(grafted), whole)


def test_a_tensor_in_two_places_is_one_tensor_after_a_swap():
    old, better = extracted(1), extracted(5)
    (name, bias), *_ = ((name, bias) for name, bias in better.body.named_parameters() if name.endswith("bias"))
    old.body.register_parameter("again", nn.Parameter(bias.detach().clone()))
    better.body.register_parameter("again", bias)
    grafted = two(herons=old)
    replace(grafted, "herons", better)
    body = grafted.clones["herons"].body
    assert body.again is body.get_parameter(name) and body.again is not bias and torch.equal(body.again, bias)


def test_a_swapped_clone_has_the_mode_of_the_one_before_and_trains_by_itself():
    grafted, better = two().train(), extracted(5).eval()
    former = replace(grafted, "herons", better)
    assert all(part.training for clone in (former, grafted.clones["herons"]) for part in clone.modules())
    grafted(IMAGES).sum().backward()
    assert all(parameter.grad is None for parameter in [*better.parameters(), *former.parameters()])
    assert all(parameter.grad is not None for parameter in grafted.clones["herons"].parameters())
    assert not any(part.training for part in better.modules())


def test_a_clone_that_is_off_stays_off_when_it_is_replaced():
    grafted = two()
    disable(grafted, "herons")
    replace(grafted, "herons", extracted(5))
    assert run(grafted).shape == (3, 5)
    enable(grafted)
    with disabled(grafted, "herons"):
        replace(grafted, "herons", HERONS)
        assert run(grafted).shape == (3, 5)
    assert torch.equal(run(grafted), run(two()))


def test_a_compiled_model_goes_on_without_compiling_if_the_graphs_agree():
    torch.compiler.reset()
    grafted, graphs = two(), []

    def backend(graph_module, _inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(grafted, backend=backend, fullgraph=True)
    for module in (HERONS, extracted(5), HERONS, extracted(6)):
        replace(compiled, "herons", module)
        assert torch.equal(run(compiled), run(two(herons=module)))
    assert len(graphs) == 1
    other = extracted(5)
    other.body.requires_grad_(False)
    replace(compiled, "herons", other)
    assert torch.equal(run(compiled), run(two(herons=other)))


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_in_other_threads_see_the_old_clone_or_the_new_one(compiled):
    torch.compiler.reset()
    grafted, better = two(), extracted(5)
    model = torch.compile(grafted, backend="eager") if compiled else grafted
    one, other = run(model), run(two(herons=better))
    mixed, done = [], threading.Event()

    def ask():
        while not done.is_set():
            got = run(model)
            if not torch.equal(got, one) and not torch.equal(got, other):
                mixed.append(got)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        replace(grafted, "herons", (better, HERONS)[turn % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert not mixed and torch.equal(run(model), one)


# Refusals


def test_names_that_are_not_there_change_nothing():
    grafted = two()
    before = facts(grafted)
    for call in (disable, enable):
        with pytest.raises(CloneNameError, match="no clone 'heron' .*did you mean 'herons'"):
            call(grafted, "geese", "heron")
    with pytest.raises(CloneNameError), disabled(grafted, "heron"):
        pass
    with pytest.raises(CloneNameError):
        replace(grafted, "heron", HERONS)
    with pytest.raises(ArgumentError, match="holds no clones"):
        disable(target())
    with pytest.raises(ArgumentError, match="expected a CloneModule"):
        replace(grafted, "herons", target())
    assert facts(grafted) == before


def test_clones_that_do_not_fit_the_place():
    grafted = two()
    before, whole = facts(grafted), run(grafted)
    misfits = {
        "it has 1 classes, the clone 'herons' has 2": (ArgumentError, extracted(5, (4,))),
        "its classes are ibis, heron, the columns of 'herons' stand for heron, ibis": (
            ArgumentError,
            extracted(5, names=("ibis", "heron")),
        ),
        r"have shape \(N, 4, 6, 6\), the clone takes \(N, 3, 8, 8\)": (AdapterError, extracted(5, at=None)),
        "reads the target's nodes 'x', the clone 'herons' reads 'conv'": (
            AdapterError,
            extracted(5, at=None).with_spec(at="input"),
        ),
        "its tensors are torch.float64": (ArgumentError, extracted(5).double()),
        "fitted to another target: its weights were others": (
            TargetError,
            extracted(5).with_spec(target_digests=(("float32", "other"),)),
        ),
    }
    for message, (error, module) in misfits.items():
        with pytest.raises(error, match=message):
            replace(grafted, "herons", module)
    assert facts(grafted) == before and torch.equal(run(grafted), whole)
