"""clone(): the pipeline on small random networks; what it learns on real data is shown by test_demo."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import netclone
from netclone.channels import budgeting
from netclone.cloning import method, planning, recipe, searching
from netclone.cloning.placing import candidates
from netclone.graph.measuring import measure
from netclone.learning.adapting import OLD_WEIGHT, Cached
from netclone.learning.data import Samples
from netclone.runtime.resuming import Findings

clone = partial(netclone.clone, distill_steps=2)
SIZE = 64
PAIRS = {
    "CNN into CNN": ("test_efficientnet", "test_resnet", "layer2"),
    "ViT into CNN": ("test_vit", "test_resnet", "layer3"),
    "CNN into ViT": ("test_resnet", "test_vit", "blocks.2"),
}


def network(name: str, classes: int) -> nn.Module:
    size = {"img_size": SIZE} if "vit" in name else {}
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = timm.create_model(name, num_classes=classes, **size).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return model


def samples(classes: int, count: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Images whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels.view(-1, 1, 1, 1)
    return [(images[i : i + 10], labels[i : i + 10]) for i in range(0, count, 10)]


def snapshot(model: nn.Module) -> list[object]:
    tensors = [
        (name, tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    flags = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    return [tensors, flags]


def same(a: list[object], b: list[object]) -> bool:
    (tensors, flags), (others, other_flags) = a, b
    return flags == other_flags and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(tensors, others, strict=True)
    )


@pytest.mark.parametrize(
    "pair", [pytest.param(p, marks=() if p == "CNN into CNN" else pytest.mark.long) for p in PAIRS]
)
def test_a_clone_fits_injects_and_comes_out_again(pair: str) -> None:
    source_name, target_name, at = PAIRS[pair]
    source, target = network(source_name, 5), network(target_name, 3)
    before = snapshot(source), snapshot(target), torch.get_rng_state()
    module = clone(
        source,
        target,
        samples(5, 40),
        classes=[4, 1],
        class_names=["four", "one"],
        target_data=samples(3),
        at=at,
        method="magnitude",
        epochs=2,
    )
    assert torch.equal(before[2], torch.get_rng_state())
    assert module.classes == (4, 1) and module.class_names == ("four", "one") and module.at == at
    assert module.certificate <= 1e-9
    assert 0 <= module.scores["validation"] <= 1
    assert list(module.parts) == (["source", "classifier"] if at == "input" else ["adapter", "source", "classifier"])
    assert sum(map(len, module.parts.values())) == len(module.body.state_dict())
    grafted = netclone.inject(target, module, name="two")
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        out, own = grafted(images), target(images)
    assert out.shape == (3, 5)
    assert torch.equal(out[:, :3], own)
    restored = netclone.remove(grafted, "two")
    with torch.no_grad():
        assert torch.equal(restored(images), own)
    assert same(before[0], snapshot(source)) and same(before[1], snapshot(target))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_clone_bit_by_bit() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    made = []
    for disturb in (1, 2):
        torch.manual_seed(disturb)  # the caller's random state does not matter
        made.append(
            clone(
                source,
                target,
                samples(4),
                classes=[2, 3],
                target_data=samples(2),
                at="layer3",
                method="taylor",
                epochs=2,
                seed=7,
            )
        )
    first, second = (module.state_dict() for module in made)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert made[0].spec == made[1].spec


@pytest.mark.long
def test_learning_in_bfloat16_is_learning_and_leaves_float32() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    masks = [netclone.localize(source, samples(4), classes=[2, 3], steps=12, mixed_precision=m) for m in ("no", "bf16")]
    flags = [torch.tensor([flag for _, kept in mask.kept for flag in kept]) for mask in masks]
    assert (flags[0] == flags[1]).double().mean() > 0.9
    options = dict(classes=[2, 3], target_data=samples(2), at="layer3", method="taylor", epochs=2)
    exact, rough = (clone(source, target, samples(4), mixed_precision=m, **options) for m in ("no", "bf16"))  # type: ignore[arg-type]
    assert rough.certificate < 1e-9
    assert {tensor.dtype for tensor in rough.parameters()} == {torch.float32}
    pairs = list(zip(exact.state_dict().values(), rough.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert all(torch.isfinite(b).all() for _, b in pairs)


def test_the_search_goes_from_deep_to_shallow_and_keeps_what_it_saw() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    told: list[str] = []
    module = clone(
        source,
        target,
        samples(4),
        classes=[2, 3],
        target_data=samples(2),
        method="random",
        epochs=1,
        progress=lambda what, done, total: told.append(what),
    )
    tried = module.spec.search
    scored = [candidate for candidate in tried if candidate.score is not None]
    assert module.at == "input"  # so few samples do not say that another position is as good
    order = [place.at for place in candidates(netclone.trace(target))] + ["input"]
    assert [candidate.at for candidate in tried] == [*order[: len(tried) - 1], "input"]
    scores = [candidate.score or 0 for candidate in scored if candidate.at != "input"]
    rising = [later > max(scores[: i + 1]) for i, later in enumerate(scores[1:])]
    assert all(rising[:-1]) and (len(tried) == len(order) or not rising[-1])  # it stopped where it no longer rose
    assert {"search"} < set(told)


@pytest.mark.parametrize("as_good", [True, False])
def test_the_input_is_chosen_unless_another_position_is_surely_as_good(
    as_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "surely_as_good", lambda right, others, held_out: as_good)
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    options = dict(classes=[2], target_data=samples(2), method="random", epochs=1, distill_steps=0)
    module = clone(source, target, samples(4), **options)  # type: ignore[arg-type]
    assert (module.at != "input") == as_good


def test_at_the_input_the_whole_slim_source_runs_beside_the_target(tmp_path: Path) -> None:
    source, target = network("test_efficientnet", 5), network("test_resnet", 3)
    module = clone(
        source,
        target,
        samples(5),
        classes=[3, 4],
        target_data=samples(3),
        at="input",
        keep=0.4,
        budget="params",
        method="magnitude",
        epochs=2,
    )
    assert (module.at, module.source_at, module.spec.input_shape) == ("input", None, (3, SIZE, SIZE))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (module, source)]
    assert 0.3 < sizes[0] / sizes[1] <= 0.4  # the classifier is within the budget
    netclone.save(module, tmp_path / "input.safetensors")
    images = torch.randn(3, 3, SIZE, SIZE)
    grafted, loaded = (
        netclone.inject(target, one, name="two") for one in (module, netclone.load(tmp_path / "input.safetensors"))
    )
    with torch.no_grad():
        out, own = grafted(images), target(images)
        assert torch.equal(out[:, :3], own) and torch.equal(out, loaded(images))
        assert torch.equal(netclone.remove(grafted)(images), own)


@pytest.mark.long
def test_every_position_is_tried_if_asked() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    module = clone(
        source, target, samples(4), classes=[2], target_data=samples(2), search="all", method="random", epochs=1
    )
    tried = [candidate.at for candidate in module.spec.search]
    assert tried == [place.at for place in candidates(netclone.trace(target, torch.zeros(2, 3, SIZE, SIZE)))] + [
        "input"
    ]
    chosen = next(candidate.score or 0 for candidate in module.spec.search if candidate.at == module.at)
    assert dict(module.spec.scores)["validation"] >= chosen  # it is fitted on


def held_out(old: int, new: int) -> Cached:
    """So many samples of old and of new classes."""
    labels = (torch.arange(old + new) >= old).long()
    return Cached(torch.zeros(old + new, 1), torch.zeros(old + new, 1), labels)


@pytest.mark.parametrize(
    ("old", "new", "flipped", "wrong", "expected"),
    [
        pytest.param(5, 5, 0, 0, False, id="a tie of ten"),
        pytest.param(5, 5, -1, 0, False, id="one of ten better"),
        pytest.param(600, 120, 0, 0, True, id="a tie of many"),
        pytest.param(2000, 400, 2, -10, True, id="a tie of many that differ in some"),
        pytest.param(600, 120, -30, 0, True, id="better"),
        pytest.param(600, 120, 30, 0, False, id="worse"),
        pytest.param(4000, 4000, 8, 0, False, id="worse by little"),
        pytest.param(0, 500, 0, 0, True, id="no old samples"),
    ],
)
def test_a_position_is_as_good_as_the_input_if_enough_samples_say_so(
    old: int, new: int, flipped: int, wrong: int, expected: bool
) -> None:
    """``flipped`` (below zero: gained) new samples, and as many of ``wrong`` old ones, are classified otherwise."""
    others = torch.ones(old + new, dtype=torch.bool)
    right = others.clone()
    for count, end in ((flipped, old + new), (wrong, old)):
        part = slice(end - abs(count), end)
        right[part], others[part] = count <= 0, count >= 0
    assert searching.surely_as_good(right, others, held_out(old, new)) is expected


def test_what_positions_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    def counted(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    places = {
        method: ("localize", "slim_down", "distill"),
        planning: ("slim_down",),
        searching: ("features_at", "fit", "fit_classifier"),
    }
    for module, names in places.items():
        for name in names:
            counted(module, name)
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    found = clone(
        source, target, samples(4), classes=[2], target_data=samples(2), search="all", method="random", epochs=20
    )
    tried = found.spec.search
    inner = [candidate for candidate in tried if candidate.at != "input"]
    assert len(inner) >= 3 and all(candidate.score is not None for candidate in tried)
    assert counts == {
        "localize": 1,
        "slim_down": 2,  # all of the source first, to see that it can be certified
        "distill": 1,
        "features_at": 3 * len(inner),  # of the target there, to train and to validate; of the slim source at its cut
        "fit": len(inner) + (found.at != "input"),  # the best is fitted on
        "fit_classifier": 1,  # at the input, where there is no adapter: at once on all samples
    }


@pytest.mark.long
def test_a_position_found_with_few_samples_is_fitted_as_if_it_had_been_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "BRIEF", 1)
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    arguments = dict(classes=[2], target_data=samples(2), method="random", epochs=2, batch_size=8, distill_steps=0)
    found = clone(source, target, samples(4), **arguments)  # type: ignore[arg-type]
    named = clone(source, target, samples(4), at=found.at, source_at=found.source_at, **arguments)  # type: ignore[arg-type]
    for (name, tensor), (other, again) in zip(found.state_dict().items(), named.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, again)


def test_a_clone_is_made_again_from_what_it_says_of_itself() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    asked = {"keep": 0.4, "at": "layer3", "method": "taylor", "epochs": 2, "distill_steps": 3, "seed": 7}
    asked |= {"without": ["target_stream"], "batch_size": 9}
    module = clone(source, target, samples(4), classes=[2], target_data=samples(2), **asked)  # type: ignore[arg-type]
    said = {name: json.loads(value) for name, value in module.spec.recipe}
    assert said.pop("mask") == "learned"
    assert asked.items() <= said.items()
    again = clone(source, target, samples(4), classes=module.classes, target_data=samples(2), **said)
    assert again.spec == module.spec
    assert all(map(torch.equal, again.state_dict().values(), module.state_dict().values()))
    assert dict(module.spec.versions)["torch"] == version("torch")


def test_a_refit_takes_no_more_samples_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of old classes as of new ones."""
    monkeypatch.setattr(method, "REFIT", 12)
    seen: list[Samples] = []
    refit = method.refit

    def watched(slimmed: Any, samples: Samples, *rest: Any) -> Any:
        seen.append(samples)
        return refit(slimmed, samples, *rest)

    monkeypatch.setattr(method, "refit", watched)
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    clone(source, target, samples(4, 40), classes=[2], target_data=samples(2, 90), at="input", method="random")
    assert len(seen) == 1 and len(seen[0]) == 12
    assert 3 <= int((seen[0].labels >= 2).sum()) <= 9  # of 8 new samples and 72 old ones


@pytest.mark.long
def test_augmentation_gives_views_to_learn_from_in_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    lengths: list[tuple[int, int]] = []
    fit = searching.fit

    def counted(branch: nn.Module, train: Cached, held_out: Cached, **options: Any) -> float:
        lengths.append((options["epochs"] * len(train), len(held_out)))
        return fit(branch, train, held_out, **options)

    monkeypatch.setattr(searching, "fit", counted)
    arguments = dict(classes=[2, 3], target_data=samples(2), at="layer2", method="magnitude", epochs=6)

    def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
        return images.flip(3) if torch.rand(1, generator=generator) < 2 else images

    before = torch.get_rng_state()
    plain, first, second = (
        clone(source, target, samples(4, 40), augment=augment, **arguments)  # type: ignore[arg-type]
        for augment in (None, mirrored, mirrored)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert lengths[0] == lengths[1] == lengths[2]
    weights = [list(module.state_dict().values()) for module in (plain, first, second)]
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))


@pytest.mark.parametrize("views", [lambda images, generator: images[:, :1], lambda images, generator: None])
def test_an_augmentation_that_gives_no_views_is_refused(views: Callable[[Tensor, torch.Generator], Any]) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    message = r"augment: gave (images \(\d+, 1, 64, 64\)|a NoneType).* for images \(\d+, 3, 64, 64\).*; expected"
    with pytest.raises(netclone.ArgumentError, match=message):
        clone(source, target, samples(4), classes=[2], target_data=samples(2), method="random", augment=views)


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.long) for part in recipe.PARTS])
def test_parts_of_the_method_can_be_left_out(part: str) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    arguments = dict(classes=[2, 3], target_data=samples(2), at="layer2", method="magnitude", epochs=10)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    outputs = [
        netclone.inject(target, clone(source, target, samples(4), without=without, **arguments))(x)  # type: ignore[arg-type]
        for without in ((), (part,), (part,))
    ]
    assert torch.equal(outputs[0][:, :2], outputs[1][:, :2])
    assert not torch.allclose(outputs[0][:, 2:], outputs[1][:, 2:], atol=1e-3)
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.long
def test_clones_of_two_sources_share_a_target_made_for_it_or_one_after_the_other_and_leave_in_any_order() -> None:
    target, names = network("test_resnet", 2), ("first", "second")
    sources, places = (network("test_efficientnet", 4), network("test_vit", 4)), ("layer2", "input")
    arguments: dict[str, object] = {"classes": [2, 3], "target_data": samples(2), "method": "magnitude", "epochs": 1}
    made = [clone(source, target, samples(4), at=at, **arguments) for source, at in zip(sources, places, strict=True)]  # type: ignore[arg-type]
    after = clone(sources[1], netclone.inject(target, made[0]), samples(4), at=places[1], **arguments)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b) for a, b in zip(made[1].state_dict().values(), after.state_dict().values(), strict=True)
    )
    before, x = netclone.evaluate(target, samples(2)), samples(2)[0][0]
    outputs = {}
    for order in ((0, 1), (1, 0)):
        grafted: nn.Module = target
        for i in order:
            grafted = netclone.inject(grafted, made[i], name=names[i])
        outputs[order] = grafted(x)
        assert torch.equal(outputs[order][:, :2], target(x))
        for i in (0, 1):
            one = netclone.remove(grafted, names[i])
            assert netclone.clones(one) == (names[1 - i],)
            assert netclone.evaluate(netclone.remove(one, names[1 - i]), samples(2)) == before
    assert torch.equal(outputs[0, 1][:, 2:], outputs[1, 0][:, 2:].roll(2, 1))


@pytest.mark.parametrize("at", ["layer2", pytest.param("input", marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")  # it is weak, and says so
def test_very_few_samples_are_enough_to_make_a_clone(at: str, count: int) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    images, labels = torch.randn(count, 3, SIZE, SIZE), torch.full((count,), 2)
    module = clone(source, target, [(images, labels)], classes=[2], at=at, method="magnitude", epochs=1)
    assert netclone.inject(target, module)(images).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("epochs", -1), ("distill_steps", 1.5), ("round_to", 0), ("latency_batch", 0)],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    with pytest.raises(netclone.ArgumentError, match=f"{name}: got {value}, expected a whole number from [01] on"):
        netclone.clone(source, target, samples(4), classes=[2], **{name: value})  # type: ignore[arg-type]


def test_an_unknown_part_to_leave_out_is_refused() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    for without in (("adapter",), "calibration"):
        with pytest.raises(netclone.ArgumentError, match="without: got .*, expected some of 'adapter_start'"):
            clone(source, target, samples(4), classes=[2], without=without)


def test_a_plain_copy_is_neither_refitted_nor_distilled() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    groups = netclone.channel_groups(source, samples(4)[0][0][:2])
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    arguments = dict(classes=[2, 3], target_data=samples(2), at="input", mask=mask, epochs=1)
    plain, refitted = (clone(source, target, samples(4), reconstruct=r, **arguments) for r in (False, True))  # type: ignore[arg-type]
    stored = netclone.extract(groups, mask, classes=[2, 3], fold_batch_norm=True).state_dict()
    convolutions = [tensor for name, tensor in stored.items() if tensor.dim() == 4]

    def holds(module: netclone.CloneModule, tensor: Tensor) -> bool:
        return any(other.shape == tensor.shape and torch.equal(other, tensor) for other in module.state_dict().values())

    assert all(holds(plain, tensor) for tensor in convolutions)
    assert not all(holds(refitted, tensor) for tensor in convolutions)


def one_each(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images[:4], labels[:4]


def black(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where((labels == 3).view(-1, 1, 1, 1), 0.0, images), labels


def imbalanced(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    many, few = (labels == 2).nonzero().flatten().repeat(20), (labels == 3).nonzero().flatten()[:2]
    chosen = torch.cat([many, few])
    return images[chosen], labels[chosen]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(one_each, "a single sample"), (black, "class 3"), (imbalanced, "class 2")],
    ids=["one image per class", "black", "imbalance"],
)
def test_weak_data_are_warned_of_and_leave_finite_weights(
    spoil: Callable[..., tuple[Tensor, Tensor]], message: str
) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    images, labels = (torch.cat(parts) for parts in zip(*samples(4, 40), strict=True))
    with pytest.warns(netclone.WeakDataWarning, match=message):
        module = clone(
            source,
            target,
            [spoil(images, labels)],
            classes=[2, 3],
            target_data=samples(2),
            at="layer3",
            method="taylor",
            epochs=1,
        )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())


def test_a_budget_below_the_classifier_is_refused() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    with pytest.raises(netclone.ArgumentError, match=r"keep: 0.001 .* classifier of 2 new classes takes"):
        clone(source, target, samples(4), classes=[2, 3], target_data=samples(2), keep=0.001, budget="params")


def test_a_candidate_that_fails_is_a_value_with_a_reason() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    with pytest.raises(netclone.PositionError, match=r"no position 'blocks.9'.*did you mean"):
        clone(source, target, samples(4), classes=[2], target_data=samples(2), source_at="blocks.9", method="random")


def test_without_old_data_it_warns_and_the_odds_of_the_new_classes_are_the_sources() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    data = samples(4, 40)
    with pytest.warns(netclone.UncalibratedWarning, match="no target_data"):
        module = clone(source, target, data, classes=[2, 3], at="input", keep=1.0, budget="channels", method="random")
    grafted = netclone.inject(target, module)
    images = data[0][0]
    with torch.no_grad():
        known, shares = source(images).softmax(1), grafted(images).softmax(1)
    odds = known[:, 2:].sum(1) / known[:, :2].sum(1) / OLD_WEIGHT
    torch.testing.assert_close(shares[:, 2:].sum(1) / shares[:, :2].sum(1), odds, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_at_a_position_without_old_data_only_the_adapter_is_fitted() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    states = []
    for epochs in (0, 12):
        with pytest.warns(netclone.UncalibratedWarning, match="no target_data"):
            module = clone(source, target, samples(4, 80), classes=[2, 3], at="layer2", method="random", epochs=epochs)
        states.append(module.state_dict())
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved == {"body.adapter.map.weight", "body.adapter.map.bias"}


def test_a_learned_clone_beats_its_own_closed_form_start() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    arguments = dict(classes=[2, 3], target_data=samples(2, 60), at="layer1", method="magnitude")
    scores = [
        clone(source, target, samples(4, 80), epochs=epochs, **arguments).scores["validation"]  # type: ignore[arg-type]
        for epochs in (0, 12)
    ]
    assert scores[1] > max(scores[0], 0.6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": [2, 4]}, netclone.ArgumentError, "classes: 4 is out of range; the source has classes 0 to 3"),
        ({"classes": [2, 2]}, netclone.ArgumentError, "classes: 2 is given 2 times"),
        ({"classes": []}, netclone.ArgumentError, "classes: empty"),
        ({"keep": 0.0}, netclone.ArgumentError, r"keep: got 0.0, expected a share in \(0, 1\]"),
        ({"budget": "size"}, netclone.ArgumentError, "budget: got 'size', expected one of 'channels', 'params'"),
        (
            {"mixed_precision": "fp8"},
            netclone.ArgumentError,
            "mixed_precision: got 'fp8', expected one of 'no', 'bf16'",
        ),
        ({"search": "deep"}, netclone.ArgumentError, "search: got 'deep', expected one of 'early', 'all'"),
        ({"at": "input", "source_at": "blocks.1"}, netclone.ArgumentError, "source_at: got 'blocks.1'.*leave it out"),
        ({"validation": 1.0}, netclone.ArgumentError, "validation: got 1.0"),
        ({"class_names": ["a"]}, netclone.ArgumentError, "1 names for 2 classes"),
        ({"at": "layer9"}, netclone.PositionError, "no position 'layer9' in ResNet; did you mean"),
        ({"target_data": [(torch.zeros(2, 3, 64, 64), torch.tensor([0, 5]))]}, netclone.DataError, "classes 0 to 1"),
        ({"target_data": [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))]}, netclone.DataError, "images are"),
        ({"target_data": []}, netclone.DataError, "target_data: empty"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, object], error: type[Exception], message: str) -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    before = snapshot(target)
    arguments: dict[str, object] = {"classes": [2, 3], "target_data": samples(2), "method": "random", "epochs": 1}
    with pytest.raises(error, match=message):
        clone(source, target, samples(4), **{**arguments, **change})  # type: ignore[arg-type]
    assert same(before, snapshot(target))


def test_bad_data_are_refused_by_name() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    images, labels = samples(4)[0]
    spoiled = images.clone()
    spoiled[0, 0, 0, 0] = float("nan")
    cases = [
        ([], "data: empty"),
        ([(spoiled, labels)], "data: batch 0 holds 1 values that are NaN"),
        ([(images, labels + 9)], "the source has classes 0 to 3"),
        ([(images, labels * 0)], "data: no sample of class 2"),
        ([(images, labels.float())], "expected integer class indices"),
    ]
    for data, message in cases:
        with pytest.raises(netclone.DataError, match=message):
            clone(source, target, data, classes=[2, 3], target_data=samples(2), method="random", epochs=1)


def test_a_target_that_returns_no_logits_is_refused() -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.model(x), "other": self.model(x)}

    source, target = network("test_efficientnet", 4), Wrapped(network("test_resnet", 2))
    with pytest.raises(netclone.OutputError, match="say which one is the logits with output='one'"):
        clone(source, target, samples(4), classes=[2], target_data=samples(2), method="random", epochs=1)


def test_a_target_whose_logits_are_not_finite_is_refused_before_anything_is_learned() -> None:
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.fc.bias.fill_(float("inf"))
    told: list[str] = []
    given = {"classes": [2], "target_data": samples(2), "at": "layer2", "method": "random"}
    with pytest.raises(netclone.DataError, match="target_data: the target's logits are NaN or infinite on 24 of 24"):
        clone(source, broken, samples(4), progress=lambda what, *_: told.append(what), **given)  # type: ignore[arg-type]
    assert not told


def refusals() -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    """Options that are wrong whatever is learned, with the error they give and what it names."""
    return {
        "method": ({"method": "tayler"}, netclone.ArgumentError, "method"),
        "budget": ({"budget": "flops"}, netclone.ArgumentError, "budget"),
        "search": ({"search": "some"}, netclone.ArgumentError, "search"),
        "precision": ({"mixed_precision": ["bf16"]}, netclone.ArgumentError, "mixed_precision"),
        "seed": ({"seed": -1}, netclone.ArgumentError, "seed"),
        "position": ({"at": 3}, netclone.ArgumentError, "at"),
        "no position": ({"at": "layer99"}, netclone.PositionError, "layer99"),
        "no cut": ({"at": "layer2", "source_at": "nowhere"}, netclone.PositionError, "nowhere"),
        "no cut, searched": ({"source_at": "nowhere"}, netclone.PositionError, "nowhere"),
        "names": ({"class_names": ["one", "two"]}, netclone.ArgumentError, "class_names"),
        "keep": ({"keep": 1e-9}, netclone.ArgumentError, "keep"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_can_be_refused_is_refused_before_anything_is_learned(name: str, tmp_path: Path) -> None:
    """And before anything that an earlier run found is touched."""
    options, error, named = refusals()[name]
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    told: list[str] = []
    given = {"classes": [2], "target_data": samples(2), "epochs": 1, "distill_steps": 1, **options}
    findings = Findings(tmp_path / "x.part")
    with pytest.raises(error, match=named):
        clone(source, target, samples(4), progress=lambda what, *_: told.append(what), findings=findings, **given)  # type: ignore[arg-type]
    assert set(told) <= {"localize"} and told.count("localize") <= 1  # the stage may have been named, no step was made
    assert not list(tmp_path.iterdir())


def test_options_are_refused_before_the_data_are_read() -> None:
    def data() -> Iterator[object]:
        yield pytest.fail("read")

    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    for name in ("method", "budget", "search", "precision", "seed", "position"):
        options, error, named = refusals()[name]
        with pytest.raises(error, match=named):
            clone(source, target, data(), classes=[2], **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_clone_with_a_budget_of_time_has_no_batch_norm_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that counts MACs."""

    def of_nodes(graph: Any, images: Tensor) -> dict[str, float]:
        return {name: float(node.macs) for name, node in measure(graph, images).items()}

    def relative(model: Any, other: Any, images: Tensor) -> float:
        return netclone.cost(model, images, repeats=1).macs / netclone.cost(other, images, repeats=1).macs

    monkeypatch.setattr(budgeting, "seconds_of_nodes", of_nodes)
    monkeypatch.setattr(budgeting, "relative_time", relative)
    source, target = network("test_efficientnet", 4), network("test_resnet", 2)
    options: dict[str, Any] = {"at": "input", "method": "magnitude", "distill_steps": 2}
    module = clone(source, target, samples(4), classes=[2], target_data=samples(2), budget="latency", **options)
    assert not [node for node in module.body.graph.nodes if "batch_norm" in str(node.target)]
    assert all(kept % 8 == 0 for _, kept, size in module.spec.kept if size >= 16)  # as processors like it
    assert dict(module.spec.recipe)["budget"] == '"latency"' and module.certificate <= 1e-9
    netclone.save(module, tmp_path / "clone.safetensors")
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        grafted = netclone.inject(target, netclone.load(tmp_path / "clone.safetensors"))
        assert torch.equal(grafted(images)[:, :2], target(images))


@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")  # its source knows nothing
def test_a_clone_is_weighed_against_one_source_class_for_each_old_class() -> None:
    source, target = network("test_efficientnet", 9), network("test_resnet", 2)
    images, labels = (torch.cat(parts) for parts in zip(*samples(9), strict=True))
    old = images[labels < 4], labels[labels < 4] % 2
    module = clone(source, target, [(images, labels)], classes=[7, 8], target_data=[old], at="input", epochs=0)
    weight = next(tensor for name, tensor in module.state_dict().items() if name.endswith("classifier.source.weight"))
    assert len([7, 8]) < len(weight) <= len([7, 8]) + 2
