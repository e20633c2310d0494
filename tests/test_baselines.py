"""The baselines on tiny networks: what they return, leave alone, start from, and learn."""

import builtins
import math
import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

import netclone
from netclone.baselines import (
    ENSEMBLES,
    HEADS,
    TUNING,
    InapplicableError,
    Problem,
    Recipe,
    extended,
    heads,
    stages,
    train,
    tune,
    validated,
)
from netclone.baselines.ensembling import Ensemble
from netclone.baselines.frozen import chosen_strength
from netclone.baselines.modulating import Modulator
from netclone.baselines.patching import Patched, blocks
from netclone.errors import ArgumentError, DataError, FitError, OutputError
from netclone.learning import choosing
from netclone.learning.data import Samples, balance

PROMPTS = {name for name in TUNING if "prompts" in name}
BESIDE = {name: method for name, method in ENSEMBLES.items() if name != "ZipIt"}
METHODS = {**TUNING, **BESIDE, **{name: HEADS[name] for name in HEADS if "both" in name}}
OLD, NEW = 3, 2
SIZE = 32
QUICK = Recipe(lr=1e-3, steps=3, batch_size=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Networks this small gain nothing from a second thread, and lose much where it has to wait for a core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few projections, and few steps of the convex fits: what is tested here does not depend on where they end."""
    monkeypatch.setattr(heads, "WIDTH", 40)
    for module in (heads, choosing):
        monkeypatch.setattr(module, "STEPS", 3)


def network(name: str, classes: int) -> nn.Module:
    """A small network whose BatchNorm is not that of a fresh one."""
    model = timm.create_model(name, num_classes=classes, **({"img_size": SIZE} if "vit" in name else {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(
                module.weight, 0.5, 1.5
            )  # timm starts some at zero: what is before them then learns nothing
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def samples(count: int, seed: int, classes: int = OLD + NEW) -> Samples:
    """Images whose mean tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) / 2 + labels.view(-1, 1, 1, 1)
    return Samples(images, labels, "data")


def problem(target: str = "test_resnet", source: str = "test_efficientnet") -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Problem(
            network(target, OLD), network(source, 6), (5, 2), train=samples(20, 0), validation=samples(10, 1), keep=0.4
        )


def snapshot(model: nn.Module) -> list[object]:
    tensors = [(n, t.detach().numpy().tobytes(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()]
    modules = [(n, type(m), m.training, len(m._forward_hooks), len(m._modules)) for n, m in model.named_modules()]
    return [tensors, modules]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def same_values(a: nn.Module, b: nn.Module, prefix: str = "") -> bool:
    x, y = a.state_dict(), b.state_dict()
    names = [name for name in x if name.startswith(prefix)]
    assert names
    return all(torch.equal(x[name], y[name]) for name in names)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_returns_all_logits_and_touches_nothing(name: str) -> None:
    given = problem("test_vit" if name in PROMPTS else "test_resnet")
    given.target.train()
    stages(given.target)[1][1].eval()
    next(given.target.parameters()).requires_grad_(False)
    given.source.requires_grad_(False)
    stages(given.target)[0][1].register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(given.target), snapshot(given.source), torch.get_rng_state()
    result = METHODS[name](given, QUICK)
    assert (snapshot(given.target), snapshot(given.source)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(module.training for module in result.modules())
    out = logits(result, given.train.images)
    assert out.shape == (20, OLD + NEW)
    assert bool(torch.isfinite(out).all())
    torch.manual_seed(99)  # the caller's random state has no say
    assert same_values(result, METHODS[name](given, QUICK))
    if name in TUNING:
        assert not torch.equal(out, logits(METHODS[name](given, replace(QUICK, seed=1)), given.train.images))


@pytest.mark.parametrize("name", [*TUNING, *BESIDE, "SLDA, both features"])
def test_a_method_takes_a_vision_transformer(name: str) -> None:
    given = problem(target="test_vit", source="test_resnet")
    assert logits(METHODS[name](given, replace(QUICK, steps=1)), given.train.images).shape == (20, OLD + NEW)


@pytest.mark.parametrize("name", [name for name in TUNING if name not in PROMPTS])
@pytest.mark.parametrize("target", ["test_resnet", "test_efficientnet", "test_vit"])
def test_before_the_first_step_the_old_logits_are_the_targets(name: str, target: str) -> None:
    given = problem(target=target)
    expected = logits(given.target.eval(), given.train.images)
    out = logits(TUNING[name](given, replace(QUICK, steps=0)), given.train.images)
    torch.testing.assert_close(out[:, :OLD], expected)
    assert float(out[:, OLD:].abs().max()) < 0.1 * float(expected.abs().max())


def test_extending_keeps_the_rows_and_the_flags() -> None:
    target = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    target[2].requires_grad_(False)
    model = extended(target[:3], 2, old=3)
    assert torch.equal(model[2].weight[:3], target[2].weight)
    assert torch.equal(model[2].bias, torch.cat([target[2].bias, torch.zeros(2)]))
    assert 0 < float(model[2].weight[3:].detach().abs().max()) < 0.1
    assert not model[2].weight.requires_grad
    assert target[2].weight.shape == (3, 7)
    assert extended(target, 1, old=3)[3].weight.shape == (4, 3)  # the last with three outputs
    with pytest.raises(OutputError, match="no linear layer with 4 outputs"):
        extended(target, 1, old=4)
    with pytest.raises(OutputError, match="no linear layer to add"):
        extended(nn.Conv2d(1, 1, 1), 1)


def test_a_target_that_does_not_end_in_its_linear_layer_is_refused() -> None:
    given = problem()
    target = nn.Sequential(given.target, nn.Unflatten(1, (OLD, 1)), nn.AdaptiveAvgPool2d((OLD, 1)), nn.Flatten())
    with pytest.raises(OutputError, match="fails with 2 rows added to its last linear layer: unflatten"):
        TUNING["fine-tune"](replace(given, target=target), QUICK)
    cut = nn.Sequential(given.target, nn.Unflatten(1, (1, -1)), nn.AdaptiveAvgPool1d(OLD), nn.Flatten())
    with pytest.raises(OutputError, match="3 logits with 2 rows added to its last linear layer, expected 5"):
        TUNING["fine-tune"](replace(given, target=cut), QUICK)


def test_a_problem_out_of_range_is_refused() -> None:
    given = problem()
    with pytest.raises(ArgumentError, match="6 is out of range"):
        replace(given, classes=(5, 6))
    with pytest.raises(DataError, match="the extended model has classes 0 to 3"):
        replace(given, classes=(5,))
    with pytest.raises(ArgumentError, match="keep"):
        replace(given, keep=0.0)
    with pytest.raises(ArgumentError, match="batch_size is 1, expected 2"):
        Recipe(lr=1e-3, steps=1, batch_size=1)


@pytest.mark.parametrize("name", ["fine-tune", "LwF"])
def test_frozen_stages_are_the_targets(name: str) -> None:
    given = problem()
    names = [stage for stage, _ in stages(given.target)]
    for frozen in (0, 3, len(names) - 1):
        model = TUNING[name](given, replace(QUICK, frozen=frozen))
        for depth, stage in enumerate(names[:-1]):
            assert same_values(given.target, model, f"{stage}.") == (depth < frozen), (frozen, stage)
        assert not torch.equal(model.fc.weight[:OLD], given.target.fc.weight)
    with pytest.raises(ArgumentError, match=rf"expected 0 to {len(names) - 1}: .*layer1"):
        TUNING[name](given, replace(QUICK, frozen=len(names)))


def test_parameters_outside_the_stages_belong_to_the_first() -> None:
    given = problem(target="test_vit")
    for frozen in (0, 1):
        model = TUNING["fine-tune"](given, replace(QUICK, frozen=frozen))
        assert torch.equal(model.pos_embed, given.target.pos_embed) == bool(frozen)


def test_distillation_holds_the_old_logits() -> None:
    given = problem()
    expected = logits(given.target.eval(), given.train.images).softmax(1)
    recipe = Recipe(lr=3e-3, steps=16, batch_size=20)
    everything = replace(given, validation=given.train)
    distances = []
    for weight in (0.0, 30.0):
        model = TUNING["LwF"](everything, replace(recipe, distillation=weight))
        distances.append(float((logits(model, given.train.images)[:, :OLD].softmax(1) - expected).abs().mean()))
    assert distances[1] < distances[0] / 2
    plain = TUNING["fine-tune"](everything, recipe)
    assert same_values(plain, TUNING["LwF"](everything, replace(recipe, distillation=0.0)))


@pytest.mark.parametrize("name", ["LoRA", "kernel modulation"])
def test_merged_methods_give_a_plain_network_with_the_targets_statistics(name: str) -> None:
    given = problem()
    model = TUNING[name](given, replace(QUICK, lr=1e-2))
    assert [type(m) for m in model.modules()] == [type(m) for m in given.target.modules()]
    x, y = given.target.state_dict(), model.state_dict()
    assert x.keys() == y.keys()
    convolutions = {f"{n}.weight" for n, m in given.target.named_modules() if isinstance(m, nn.Conv2d)}
    for tensor in x.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(x[tensor], y[tensor]) == (tensor not in convolutions), tensor


def test_lora_updates_have_low_rank_and_leave_grouped_convolutions() -> None:
    given = problem(target="test_efficientnet")
    model = TUNING["LoRA"](given, replace(QUICK, lr=1e-2))
    changed = 0
    for name, module in given.target.named_modules():
        if isinstance(module, nn.Conv2d):
            update = (model.get_submodule(name).weight - module.weight).detach()
            assert (float(update.abs().max()) == 0) == (module.groups > 1), name
            if module.groups == 1:
                changed += 1
                sizes = torch.linalg.svdvals(update.flatten(1).double())
                assert not (sizes[8:] > 1e-5 * sizes[0]).any(), name
    assert changed


def test_lora_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return found(name, *rest)

    monkeypatch.delitem(sys.modules, "peft", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ArgumentError, match=r'pip install "netclone\[bench\]"'):
        TUNING["LoRA"](problem(), QUICK)


def test_a_modulator_scales_whole_kernels() -> None:
    weight = torch.randn(4, 3, 5, 5)
    modulator = Modulator(weight)
    assert torch.equal(modulator(weight), weight)
    with torch.no_grad():
        modulator.a[1], modulator.b[0, 2] = 1.0, 0.5
    expected = weight.clone()
    expected[1] *= 2
    expected[:, 2] *= 1.5
    torch.testing.assert_close(modulator(weight), expected)
    model = network("test_resnet", OLD)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    added = sum(p.numel() for layer in layers for p in Modulator(layer.weight.detach()).parameters())
    assert added < 0.03 * sum(p.numel() for p in model.parameters())


def test_patches_follow_the_blocks_and_the_trunk_is_the_targets() -> None:
    given = problem()
    model = TUNING["residual patches"](given, replace(QUICK, lr=1e-2))
    patched = {name: module for name, module in model.named_modules() if isinstance(module, Patched)}
    assert set(patched) == {f"layer{i}.0" for i in range(1, 5)} | ({"conv1", "bn1"} & set(patched))
    assert all(float(module.patch[2].weight.detach().abs().max()) > 0 for module in patched.values())
    trunk = {name.replace(".block.", "."): t for name, t in model.state_dict().items() if ".patch." not in name}
    for name, tensor in given.target.state_dict().items():
        assert torch.equal(trunk[name], tensor) or name.startswith("fc."), name
    added = sum(p.numel() for module in patched.values() for p in module.patch.parameters())
    assert added < 0.1 * sum(p.numel() for p in given.target.parameters())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert set(blocks(plain)) == {"0", "3"}


def test_ensembles_keep_the_targets_logits_bitwise() -> None:
    given = problem()
    old = logits(given.target.eval(), given.train.images)
    new = logits(given.source.eval(), given.train.images)[:, [5, 2]]
    for name, method in BESIDE.items():
        out = logits(method(given, QUICK), given.train.images)
        assert torch.equal(out[:, :OLD], old), name
        assert torch.equal(out[:, OLD:], new) == (name == "ensemble"), name


@pytest.mark.parametrize("of", ["target", "source", "both"])
def test_heads_keep_the_targets_logits_bitwise(of: str) -> None:
    given = problem()
    old = logits(given.target.eval(), given.train.images)
    model = HEADS[f"nearest mean, {of} features"](given, QUICK)
    assert torch.equal(logits(model, given.train.images)[:, :OLD], old)


def test_the_gated_ensemble_is_the_formula_of_a_clone() -> None:
    """logit of c: s_c - logsumexp(s of the rest) + logsumexp(z) - log(weight of a mistake on an old class).

    The rest are the classes, one for each old one, that the source takes the old samples for.
    """
    given = problem()
    both = torch.cat([given.train.images, given.validation.images])
    labels = torch.cat([given.train.labels, given.validation.labels])
    z, s = (logits(model.eval(), both) for model in (given.target, given.source))
    others = torch.tensor([0, 1, 3, 4])
    taken = others[s[:, others].argmax(1)]
    rest = sorted({int(taken[labels == c].mode().values) for c in range(OLD)})
    expected = s[:, [5, 2]] - s[:, rest].logsumexp(1, keepdim=True) + z.logsumexp(1, keepdim=True) - math.log(2.5)
    model = ENSEMBLES["gated ensemble"](given, QUICK)
    torch.testing.assert_close(logits(model, both)[:, OLD:], expected)
    assert model.left_out is None


def test_of_one_sample_a_class_nothing_is_left_out_to_fit_by() -> None:
    """It is for training and for validation: what was fitted to it would seem to be right on all samples."""
    given, one = problem(), samples(OLD + NEW, 0)
    given = replace(given, train=one, validation=replace(one, what="validation"))
    assert len(given.samples) == OLD + NEW
    fitted, started = (ENSEMBLES[name](given, QUICK) for name in ("fitted gated ensemble", "gated ensemble"))
    assert torch.equal(logits(fitted, one.images), logits(started, one.images))
    for name, method in HEADS.items():
        with pytest.raises(InapplicableError, match="left out: give two a class"):
            assert method(given, QUICK), name


def test_the_ridge_has_the_least_squared_error_on_the_last_fifth() -> None:
    generator = torch.Generator().manual_seed(0)
    lifted, labels = torch.randn(40, 30, generator=generator).double().relu(), torch.arange(40) % 2
    wanted, known, last = torch.eye(2).double()[labels], lifted[:32], lifted[32:]
    losses = {}
    for power in range(-8, 9):
        gram = known.T @ known + 10.0**power * torch.eye(30)
        losses[10.0**power] = float(
            (last @ torch.linalg.solve(gram, known.T @ wanted[:32]) - wanted[32:]).square().mean()
        )
    found = chosen_strength(heads.KINDS["RanPAC"], lifted, labels, 2, torch.arange(40) % 5, 8)
    assert found == min(losses, key=losses.__getitem__)
    assert 1e-8 < found < 1e8


class Bright(nn.Module):
    """Five features, each of which is one where the images are so bright."""

    def forward(self, x: Tensor) -> Tensor:
        return (-(x.mean((1, 2, 3))[:, None] - torch.arange(5)).square()).exp()


def test_a_source_class_that_no_old_sample_shows_takes_nothing_from_a_new_one() -> None:
    """The source's column 5 is a twin of the new class 4."""
    source, target = (nn.Sequential(Bright(), nn.Linear(5, count, bias=False)) for count in (6, OLD))
    with torch.no_grad():
        source[1].weight.copy_(20 * torch.eye(5)[[0, 1, 2, 3, 4, 4]])
        target[1].weight.copy_(20 * torch.eye(5)[:OLD])
    given = Problem(target, source, (3, 4), train=samples(40, 0), validation=samples(20, 1))
    model = ENSEMBLES["gated ensemble"](given, QUICK)
    assert validated(model, samples(40, 2), OLD)[0] == pytest.approx(1)
    assert len(model.classifier.source.weight) == 2 + OLD


def test_a_head_over_the_sources_features_learns_what_the_target_does_not_know() -> None:
    """Classes by the brightness of images: the source has a feature for each, and the target sees nothing."""

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, OLD)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x.mean((2, 3))[:, :1].repeat(1, 4).clamp(0, 1) * 0)
            return out

    source = nn.Sequential(Bright(), nn.Linear(5, 6))
    given = Problem(Blind(), source, (5, 2), train=samples(80, 0), validation=samples(20, 1))
    scores = {name: method(given, QUICK).left_out for name, method in HEADS.items()}
    for kind in heads.KINDS:
        assert scores[f"{kind}, source features"] >= 0.5 > scores[f"{kind}, target features"], kind


def test_a_network_without_features_to_read_is_refused() -> None:
    given = problem()
    source = nn.Sequential(given.source, nn.Softmax(1))
    with pytest.raises(OutputError, match="Sequential: no features to read"):
        ENSEMBLES["gated ensemble"](replace(given, source=source), QUICK)


def test_calibration_finds_the_scale_and_the_bias() -> None:
    """A source whose logits are right but shrunk and shifted, beside a target whose logits are right."""
    images = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    data = Samples(images, (3 * images).softmax(1).multinomial(1).flatten(), "data")
    target, source = nn.Linear(5, 3, bias=False), nn.Linear(5, 2)
    with torch.no_grad():
        target.weight.copy_(3 * torch.eye(5)[:3])
        source.weight.copy_(0.3 * torch.eye(5)[[4, 3]])
        source.bias.copy_(torch.tensor([9.0, 9.0]))
    given = Problem(target, source, (1, 0), train=data, validation=data)
    plain, fitted = (ENSEMBLES[name](given, QUICK) for name in ("ensemble", "calibrated ensemble"))
    assert isinstance(fitted, Ensemble)
    assert validated(fitted, data, 3) > validated(plain, data, 3)
    assert 5 < float(fitted.scale.mean()) < 15
    assert float((fitted.scale * 9 + fitted.bias).abs().max()) < 1.5
    held_out = replace(data, labels=logits(plain, images).argmax(1))  # where the plain one is right, it is taken
    kept = ENSEMBLES["calibrated ensemble"](replace(given, validation=held_out), QUICK)
    assert torch.equal(logits(kept, images), logits(plain, images))


def test_a_pruned_source_is_within_its_budget() -> None:
    given = problem()
    model = ENSEMBLES["pruned ensemble"](given, QUICK)
    whole = sum(p.numel() for p in given.source.parameters())
    assert 0.2 * whole < sum(p.numel() for p in model.new.parameters()) <= given.keep * whole


@pytest.mark.parametrize("name", [name for name in ENSEMBLES if name != "ZipIt"])
def test_a_source_of_the_new_classes_alone_may_stand_beside(name: str) -> None:
    """As in the paper's protocol: the labels of the clone set are not the source's."""
    given = replace(problem(), source=network("test_efficientnet", NEW), classes=tuple(range(NEW)))
    assert ENSEMBLES[name](given, QUICK)(given.validation.images).shape == (10, OLD + NEW)


def test_tuning_takes_the_best_and_keeps_failures_as_values() -> None:
    given = problem()
    recipes = [replace(QUICK, lr=1e-5), replace(QUICK, frozen=99), replace(QUICK, lr=1e18), Recipe(lr=3e-3, steps=30)]
    seen: list[tuple[int, int]] = []
    tuned = tune(TUNING["fine-tune"], given, recipes, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [trial.recipe for trial in tuned.trials] == recipes
    assert [trial.score is None for trial in tuned.trials] == [False, True, True, False]
    assert tuned.trials[1].reason.startswith("ArgumentError: recipe: frozen is 99")
    assert tuned.trials[2].reason.startswith("FitError: ")
    assert tuned.recipe == recipes[3]
    assert tuned.score == tuned.trials[3].score == validated(tuned.model, given.validation, OLD)[0]
    assert tuned.score > (tuned.trials[0].score or 0)
    assert tuned.seconds >= sum(trial.seconds for trial in tuned.trials) > 0
    with pytest.raises(FitError, match="no recipe works: lr 0.001: ArgumentError"):
        tune(TUNING["fine-tune"], given, recipes[1:2])
    with pytest.raises(ArgumentError, match="recipes: empty"):
        tune(TUNING["fine-tune"], given, [])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("fine-tune", "DER") else pytest.mark.long)
        for name in TUNING
        if name not in {"UHC", "PCSD", *PROMPTS}
    ],
)
def test_a_method_learns_an_easy_task(name: str) -> None:
    """Others are trained in ``test_opponents.py``: these networks have learned nothing that could be passed on."""
    given = replace(problem(), train=samples(60, 2), validation=samples(20, 3))
    model = TUNING[name](given, Recipe(lr=1e-2, steps=80, batch_size=20))
    test = samples(40, 4)
    scores = netclone.evaluate(model, [(test.images, test.labels)], old=range(OLD), new=range(OLD, OLD + NEW))
    assert scores.old is not None and scores.new is not None
    assert min(scores.old, scores.new) > 0.8, scores


def test_training_from_scratch_on_plain_labels_with_augmentation() -> None:
    data, generators = samples(60, 5, classes=3), []

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        generators.append(generator)
        return images + torch.randn(images.shape, generator=generator) / 10

    models = [network("test_resnet", 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps: list[tuple[int, int]] = []
    recipe = Recipe(lr=1e-2, steps=30, batch_size=20, weight_decay=1e-2)
    for model in models:
        assert train(model, data, recipe, augment=augment, progress=lambda *at: steps.append(at)) is None
    assert same_values(*models)
    assert steps == [(i % 30 + 1, 30) for i in range(60)]
    assert len(generators) == 60
    assert all(parameter.requires_grad for parameter in models[0].parameters())
    assert validated(models[0], samples(30, 6, classes=3))[0] > 0.9


def test_the_best_moment_stays() -> None:
    """Samples that teach the opposite of the validation split: the first look is the best."""
    images = torch.linspace(-1, 1, 40).view(-1, 1)
    right, wrong = (Samples(images, (sign * images[:, 0] > 0).long(), "data") for sign in (1, -1))
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    score = train(model, wrong, Recipe(lr=0.1, steps=80), validation=right)
    assert score == validated(model, right)[0] > 0.9
    train(model, wrong, Recipe(lr=0.1, steps=80))
    assert validated(model, right)[0] < 0.1


def test_old_samples_weigh_so_many_times_the_new_ones() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    assert balance(labels, 2).tolist() == pytest.approx([0.6] * 5 + [3.0])
    assert balance(labels, 2, 2.0).tolist() == pytest.approx([0.8] * 5 + [2.0])
    assert balance(labels, None).tolist() == balance(labels, 3).tolist() == balance(labels + 3, 3).tolist() == [1.0] * 6
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    score, loss = validated(model, Samples(torch.zeros(6, 1), labels, "data"), 2)
    assert score == pytest.approx((3 / 5 + 0) / 2)
    each = [math.log(2 + math.exp(5)) - value for value in (0.0, 5.0, 0.0)]
    assert -loss == pytest.approx(((2 * each[0] + 3 * each[1]) / 5 + each[2]) / 2)


def test_training_refuses_what_it_cannot_do() -> None:
    data = Samples(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), "data")
    with pytest.raises(FitError, match="the loss is nan at step 0"):
        train(nn.Linear(2, 2), replace(data, images=data.images * math.nan), QUICK)
    with pytest.raises(FitError, match="not finite after 1 steps"):
        train(nn.Linear(2, 2), data, Recipe(lr=math.inf, steps=1))
    with pytest.raises(FitError, match="validation loss is nan"):
        train(nn.Linear(2, 2), data, QUICK, validation=replace(data, images=data.images * math.nan))
    with pytest.raises(DataError, match="at least two"):
        train(nn.Linear(2, 2), Samples(data.images[:1], data.labels[:1], "data"), QUICK)
    with pytest.raises(DataError, match="labels run from 0 to 5"):
        train(nn.Linear(2, 2), replace(data, labels=5 * data.labels), QUICK)
    with pytest.raises(ArgumentError, match="nothing to train"):
        train(nn.Linear(2, 2).requires_grad_(False), data, QUICK)
