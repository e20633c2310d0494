"""A classifier of old and new classes over the features of both networks, for a source that knows new classes alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netclone
from netclone.learning import choosing
from netclone.learning.adapting import Cached
from netclone.learning.joint import FOLDS, enough, fit_joint

OLD, NEW, SIZE = 3, 2, 32
joint = partial(fit_joint, classes=NEW, seed=0)


class Network(nn.Module):
    def __init__(self, classes: int, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage(self.stem(x)).mean((2, 3)))
        return out


class Scaled(nn.Module):
    """Ends in no linear layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x) * 2
        return out


class WrittenInto(Network):
    """Changes its logits where its last layer put them."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage(self.stem(x)).mean((2, 3)))
        out.mul_(2)
        return out


class Twice(Network):
    """The name of the node that its last layer reads is that of a module, which gives another node."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.first, self.fc = nn.Linear(24, classes), nn.Linear(classes, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.fc(self.first(self.stage(self.stem(x)).mean((2, 3)))))
        return out


def network(classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(classes)
        return Network(classes).eval()


def images(labels: Tensor) -> Tensor:
    """Noise of which the mean colour tells the class."""
    noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(len(labels)))
    colours = torch.randn(OLD + NEW, 3, generator=torch.Generator().manual_seed(7))
    return noise + colours[labels][:, :, None, None]


LABELS = torch.arange(100) % (OLD + NEW)
IMAGES, IS_NEW = images(LABELS), LABELS >= OLD
DATA = IMAGES[IS_NEW], LABELS[IS_NEW] - OLD
TARGET_DATA = IMAGES[~IS_NEW], LABELS[~IS_NEW]


def cloned(source: nn.Module, target: nn.Module, **options: Any) -> netclone.CloneModule:
    given = {"classes": [1, 0], "target_data": [TARGET_DATA], "method": "magnitude", "distill_steps": 0, "at": "input"}
    return netclone.clone(source, target, [DATA], **{**given, **options})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "STEPS", 10)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    return network(OLD)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return network(NEW)


@pytest.fixture(scope="module")
def module(source: nn.Module, target: nn.Module) -> netclone.CloneModule:
    return cloned(source, target)


def crossed(count: int = 400) -> Cached:
    """A feature of each network: the class is new where their signs differ, which neither tells."""
    features = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.where(features.prod(1) < 0, OLD + (features[:, 0] > 0).long(), torch.zeros(count).long())
    return Cached(features, torch.zeros(count, OLD), labels)


def test_what_neither_network_tells_alone_both_tell_together() -> None:
    samples, shows = crossed(), torch.arange(400)
    found = joint(samples[:300], samples[300:], 1, shows)
    scores = torch.cat([found.train.features, found.held_out.features])
    right = scores.argmax(1) == (samples.labels - OLD) % (OLD + NEW)
    assert right.double().mean() > 0.9
    shuffled = Cached(samples.features[:, :1].repeat(1, 2), samples.logits, samples.labels)
    alone = joint(shuffled[:300], shuffled[300:], 1, shows).train.features.argmax(1)
    assert (alone == (samples.labels[:300] - OLD) % (OLD + NEW)).double().mean() < 0.8


def test_scores_of_a_sample_are_by_what_did_not_see_it() -> None:
    """With labels that are chance, scores on samples that were seen would be better than chance."""
    samples = crossed(60)
    chance = torch.randint(OLD + NEW, (60,), generator=torch.Generator().manual_seed(3))
    found = joint(
        Cached(torch.randn(50, 300), samples.logits[:50], chance[:50]), samples_of(chance[50:]), 100, torch.arange(60)
    )
    wanted = (chance[:50] - OLD) % (OLD + NEW)
    assert (found.train.features.argmax(1) == wanted).double().mean() < 0.45


def samples_of(labels: Tensor) -> Cached:
    return Cached(torch.randn(len(labels), 300), torch.zeros(len(labels), OLD), labels)


def test_views_of_a_sample_are_left_out_together() -> None:
    """Each sample is there twice: if one were scored by a fit that saw the other, chance labels would be learned."""
    torch.manual_seed(0)
    labels = torch.randint(OLD + NEW, (60,))
    once = samples_of(labels)
    shows = torch.cat([torch.arange(50), torch.arange(50), torch.arange(50, 60)])
    found = joint(
        once[:50].__class__(*(torch.cat([part] * 2) for part in vars(once[:50]).values())), once[50:], 100, shows
    )
    wanted = (labels[:50] - OLD) % (OLD + NEW)
    assert (found.train.features[:50].argmax(1) == wanted).double().mean() < 0.45


def test_every_class_counts_the_same() -> None:
    """A rare class beside a frequent one with the same features around it is not drowned."""
    torch.manual_seed(0)
    labels = torch.cat([torch.zeros(380), torch.full((20,), OLD)]).long()[torch.randperm(400)]
    features = torch.randn(400, 2) + (labels == OLD)[:, None]
    found = joint(
        *(Cached(features, torch.zeros(400, OLD), labels)[part] for part in (slice(300), slice(300, 400))),
        1,
        torch.arange(400),
    )
    scores = torch.cat([found.train.features, found.held_out.features])
    called_new = scores[:, 0] > scores[:, NEW]
    assert called_new[labels == OLD].double().mean() > 0.6


@pytest.mark.parametrize(
    ("counts", "is_enough"),
    [((FOLDS, FOLDS), True), ((FOLDS - 1, FOLDS), False), ((FOLDS, FOLDS - 1), False), ((0, FOLDS), False)],
)
def test_every_class_needs_a_sample_for_each_fold(counts: tuple[int, int], is_enough: bool) -> None:
    labels = torch.cat([torch.zeros(counts[0]), torch.full((counts[1],), OLD)]).long()
    assert enough(labels, torch.arange(len(labels)), OLD) == is_enough
    assert not enough(labels, torch.arange(len(labels)) // 2, OLD)  # two views of each sample


def test_it_reads_what_the_last_layer_of_the_target_reads(module: netclone.CloneModule, target: nn.Module) -> None:
    grafted = netclone.inject(target, module, name="new")
    with torch.no_grad():
        features = target.stage(target.stem(IMAGES)).mean((2, 3))  # type: ignore[operator]
        assert module.spec.feature_shape == tuple(features.shape[1:])
        out = grafted(IMAGES)
        assert torch.equal(out[:, :OLD], target(IMAGES))
        torch.testing.assert_close(out[:, OLD:], module(IMAGES, features))
        head = nn.Linear(features.shape[1], OLD)
        head.load_state_dict({n: module.state_dict()[f"body.classifier.head.{n}"] for n in ("weight", "bias")})
        assert torch.equal(head(features), target(IMAGES))
    before, after = target.state_dict(), netclone.remove(grafted).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_it_knows_new_classes_from_old_ones(module: netclone.CloneModule, target: nn.Module) -> None:
    labels = torch.arange(200) % (OLD + NEW)
    with torch.no_grad():
        out = netclone.inject(target, module)(images(labels))
    new = labels >= OLD
    called_new = out.argmax(1) >= OLD
    assert (called_new == new).double().mean() > 0.8  # the target is random, so old classes are only told from new ones
    named = torch.tensor([1, 0])[labels[new] - OLD]
    assert (out[new][:, OLD:].argmax(1) == named).double().mean() > 0.8


def test_a_file_gives_the_same_clone(module: netclone.CloneModule, target: nn.Module, tmp_path: Path) -> None:
    netclone.save(module, tmp_path / "clone.safetensors")
    read = netclone.load(tmp_path / "clone.safetensors")
    with torch.no_grad():
        first, second = (netclone.inject(target, one)(IMAGES) for one in (module, read))
    assert torch.equal(first, second)
    same = cloned(network(NEW), target)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"target_data": None},
        {"budget": "params"},
        {"without": ("calibration",)},
        {"without": ("target_stream",)},
        {"target_data": [(IMAGES[:3], LABELS[:3])]},
    ],
    ids=[
        "no old samples",
        "a budget of parameters",
        "no calibration",
        "nothing of the target",
        "one sample of each old class",
    ],
)
def test_otherwise_it_reads_the_targets_logits(source: nn.Module, target: nn.Module, change: dict[str, Any]) -> None:
    assert cloned(source, target, **change).spec.feature_shape == (OLD,)


@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")
def test_so_it_does_of_a_small_source_one_that_knows_others_or_a_target_without_a_last_layer(
    source: nn.Module, target: nn.Module
) -> None:
    assert cloned(Network(NEW, width=4), target).spec.feature_shape == (OLD,)  # of few MACs beside such a classifier
    assert cloned(network(NEW + 1), target).spec.feature_shape == (OLD,)
    assert cloned(source, Scaled(target)).spec.feature_shape == (OLD,)


def hooked(classes: int) -> nn.Module:
    made = Network(classes)
    made.fc.register_forward_hook(lambda layer, given, out: out * 3 + 1)
    return made


def called_otherwise(classes: int) -> nn.Module:
    made = Network(classes)
    made.fc.register_forward_pre_hook(lambda layer, given: (2 * given[0] + 1,))
    return made


@pytest.mark.parametrize("made", [hooked, called_otherwise, WrittenInto])
def test_so_it_does_where_logits_are_not_those_of_the_last_layers_weights(source: nn.Module, made: Any) -> None:
    assert cloned(source, made(OLD).eval()).spec.feature_shape == (OLD,)


@pytest.mark.parametrize("change", [{}, {"without": ("calibration",)}], ids=["both networks", "logits"])
def test_a_node_with_the_name_of_a_module_is_read_all_the_same(
    source: nn.Module, change: dict[str, Any], tmp_path: Path
) -> None:
    target = Twice(OLD).eval()
    module = cloned(source, target, gate=0.5, **change)
    assert module.spec.feature_node == ("fc_1" if change else "fc")
    assert module.spec.gate is not None and [node for node, _ in module.spec.gate.reads] == ["fc"]
    netclone.save(module, tmp_path / "module.safetensors")
    with torch.no_grad():
        first = target.fc(target.first(target.stage(target.stem(IMAGES)).mean((2, 3))))
        expected = module(IMAGES, target(IMAGES) if change else first, first)
        assert not torch.equal(expected, module(IMAGES, target(IMAGES), target(IMAGES)))
        for one in (module, netclone.load(tmp_path / "module.safetensors")):
            torch.testing.assert_close(netclone.inject(target, one)(IMAGES)[:, OLD:], expected)
    if not change:
        kept = netclone.latents(module, target, [DATA])
        assert kept.target_features is not None
        torch.testing.assert_close(kept.target_features, first[IS_NEW])


def test_latents_of_the_other_kind_are_refused(source: nn.Module) -> None:
    """Of a target with as many features as classes, both kinds of clones have a second input of one shape."""
    target = nn.Sequential(Network(OLD), nn.ReLU(), nn.Linear(OLD, OLD)).eval()
    one, other = cloned(source, target), cloned(source, target, budget="params")
    assert one.spec.feature_shape == other.spec.feature_shape and one.spec.feature_node != other.spec.feature_node
    first, second = (netclone.latents(module, target, [DATA], target_data=[TARGET_DATA]) for module in (one, other))
    for module, kept in ((one, second), (other, first)):
        with pytest.raises(netclone.ArgumentError, match="feature_node"):
            netclone.refit(module, kept)
    with pytest.raises(netclone.ArgumentError, match="feature_node"):
        first + second


def test_where_there_is_no_target_it_says_what_it_reads(module: netclone.CloneModule) -> None:
    with pytest.raises(netclone.AdapterError, match=f"reads '{module.spec.feature_node}' of it"):
        netclone.compose([module])


@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")
def test_it_is_fitted_again_without_the_pictures(
    module: netclone.CloneModule, target: nn.Module, tmp_path: Path
) -> None:
    kept = netclone.latents(module, target, [DATA], target_data=[TARGET_DATA])
    assert kept.logits.shape[1] == OLD
    kept.save(tmp_path / "kept.safetensors")
    again = netclone.refit(module, netclone.Latents.load(tmp_path / "kept.safetensors"))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    few = netclone.latents(module, target, [(DATA[0][:4], DATA[1][:4])], target_data=[(IMAGES[:3], LABELS[:3])])
    less = netclone.refit(module, few)
    for name, tensor in module.state_dict().items():
        if "scorer" in name:
            assert torch.equal(less.state_dict()[name], tensor)


def test_it_is_gated_and_quantised_as_any(source: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    module = cloned(source, target, gate=0.3)
    netclone.save(module, tmp_path / "small.safetensors", dtype="int8")
    with torch.no_grad():
        out = netclone.inject(target, netclone.load(tmp_path / "small.safetensors"))(IMAGES)
    assert torch.equal(out[:, :OLD], target(IMAGES)) and bool(F.softmax(out, 1).isfinite().all())
