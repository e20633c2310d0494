"""Scores and costs against what was counted by hand, and over grafting and removal."""

import functools
import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import netclone
from netclone.errors import ArchiveError
from netclone.metrics.evaluating import _correlation


class Table(nn.Module):
    """Returns fixed logits: image i holds its own row number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


IMAGES = torch.arange(6.0).reshape(6, 1, 1, 1)
LOGITS = torch.tensor(
    [
        [9.0, 1, 0, 0],  # old 0, right
        [1.0, 2, 5, 0],  # old 1, taken by new column 2; right among old
        [9.0, 1, 0, 0],  # old 1, wrong
        [0.0, 0, 9, 0],  # new 2, right
        [9.0, 0, 1, 0],  # new 2, wrong
        [0.0, 0, 0, 9],  # new 3, right
    ]
)
LABELS = torch.tensor([0, 1, 1, 2, 2, 3])


def test_scores_are_those_counted_by_hand() -> None:
    scores = netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], batch_size=4)
    assert scores.old == pytest.approx(1 / 3)
    assert scores.new == pytest.approx(2 / 3)
    assert scores.all == pytest.approx(3 / 6)
    assert scores.locality_open == pytest.approx(1 / 3)
    assert scores.locality_closed is None
    assert scores.samples == 6


def test_closed_locality_compares_with_the_reference_among_old_classes() -> None:
    before = Table(LOGITS[:, :2])
    after = Table(LOGITS)
    scores = netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=before)
    assert scores.locality_closed == 0.0
    moved = LOGITS[:, :2].clone()
    moved[0] = torch.tensor([0.0, 1.0])
    scores = netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=Table(moved))
    assert scores.locality_closed == pytest.approx(1 / 3)
    known = netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=moved)
    assert known == scores  # its logits do as well
    with pytest.raises(netclone.OutputError, match=r"reference: logits of shape \(5, 2\) for 6 images"):
        netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=moved[:5])


def test_a_reference_of_fewer_columns_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(netclone.ArgumentError, match="reference: 2 columns, but old classes up to 3; give the target"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], reference=Table(LOGITS[:, :2]))
    with pytest.raises(netclone.ArgumentError, match="batch_size: got 0, expected a whole number from 1 on"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], batch_size=0)


def test_a_class_without_a_column_counts_as_wrong() -> None:
    scores = netclone.evaluate(Table(LOGITS[:, :2]), [(IMAGES, LABELS)], old=[0, 1], new=[2, 3])
    assert scores.new == 0.0


def test_modes_and_random_state_are_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    netclone.evaluate(model, [(IMAGES, LABELS % 2)])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_stray_labels_and_overlap_are_refused() -> None:
    with pytest.raises(netclone.DataError, match="label 3 is neither old"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[2])
    with pytest.raises(netclone.ArgumentError, match=r"share the labels \[1\]"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[1, 2, 3])


def test_a_model_without_logits_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(netclone.OutputError, match="Two returns tuple"):
        netclone.evaluate(Two(), [(IMAGES, LABELS)])


def test_cost_counts_parameters_and_macs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5))
    cost = netclone.cost(model, torch.zeros(1, 3, 8, 8), repeats=2)
    assert cost.parameters == 3 * 8 * 9 + 8 * 36 * 5 + 5
    assert cost.macs == 3 * 8 * 9 * 36 + 8 * 36 * 5
    assert cost.latency_ms > 0


def test_cost_leaves_a_model_in_training_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    netclone.cost(model, torch.randn(1, 3, 3, 3), repeats=2)  # one value per channel: fails in training mode
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_calibration_error_is_that_counted_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.91, 0.09], [0.6, 0.4], [0.3, 0.7]])
    labels = torch.tensor([0, 1, 0, 1])
    scores = netclone.evaluate(Table(probabilities.log()), [(IMAGES[:4], labels)])
    # of two at 0.9 and 0.91 one is right: in one bin, their gap is |1 - 1.81|; then one at 0.6 and one at 0.7
    assert scores.calibration_error == pytest.approx((0.81 + 0.4 + 0.3) / 4, abs=1e-6)


def test_calibration_error_of_the_sure_and_right_is_0_and_of_the_sure_and_wrong_1() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    sure = 1000 * nn.functional.one_hot(labels, 4).float()
    assert netclone.evaluate(Table(sure), [(IMAGES, labels)]).calibration_error == 0.0
    assert netclone.evaluate(Table(sure), [(IMAGES, (labels + 1) % 4)]).calibration_error == 1.0


def test_calibration_error_of_nan_is_nan() -> None:
    assert math.isnan(netclone.evaluate(Table(LOGITS * math.nan), [(IMAGES, LABELS)]).calibration_error)


def test_the_calibrated_have_a_small_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    images = torch.arange(20000.0).reshape(-1, 1, 1, 1)
    assert netclone.evaluate(Table(logits), [(images, labels)]).calibration_error < 0.02
    assert netclone.evaluate(Table(4 * logits), [(images, labels)]).calibration_error > 0.2


PICTURES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
CLASSES = torch.arange(40) % 5  # columns of a target of three classes with a clone of two


@functools.cache
def network(classes: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(16, classes)).eval()


@functools.cache
def extracted(classes: tuple[int, ...], keep: float = 1.0) -> netclone.CloneModule:
    """A clone out of ``network(6)``, at the input."""
    groups = netclone.channel_groups(network(6), PICTURES[:2])
    mask = netclone.localize(groups, method="magnitude", keep=keep)
    return netclone.extract(groups, mask, classes=classes)


def graft(*modules: netclone.CloneModule) -> fx.GraphModule:
    """Clones on a target of three classes: columns 3, 4, ... are theirs."""
    grafted = netclone.trace(network(3, seed=1), PICTURES[:2])
    for number, module in enumerate(modules):
        grafted = netclone.inject(grafted, module, at="input", name=f"clone{number}")
    return grafted


def test_after_removal_the_figures_are_exactly_the_old_ones() -> None:
    target = network(3, seed=1)
    old, both = [(PICTURES, CLASSES % 3)], [(PICTURES, CLASSES)]
    arguments = dict(old=[0, 1, 2], new=[3, 4], reference=target, source=network(6))
    before = netclone.evaluate(target, old), netclone.evaluate(target, both, **arguments)  # type: ignore[arg-type]
    grafted = graft(extracted((4, 1)), extracted((2,), 0.5), extracted((0, 5, 3), 0.25))
    assert netclone.evaluate(grafted, old) != before[0]
    for name in ("clone1", "clone0", "clone2"):
        grafted = netclone.remove(grafted, name)
    after = netclone.evaluate(grafted, old), netclone.evaluate(grafted, both, **arguments)  # type: ignore[arg-type]
    assert after == before  # every field, to the bit


def test_a_clone_of_all_channels_is_like_its_source_and_a_small_one_less_so() -> None:
    data = [(PICTURES, CLASSES)]
    whole, half = (
        netclone.evaluate(graft(extracted((4, 1), keep)), data, source=network(6), batch_size=16) for keep in (1.0, 0.3)
    )
    assert whole.similarity == pytest.approx(1, abs=1e-6)
    assert half.similarity is not None and half.similarity < 0.98
    wrong = netclone.evaluate(graft(extracted((4, 1))), data, source=network(6, seed=3)).similarity
    assert wrong is not None and wrong < 0.9
    assert netclone.evaluate(graft(extracted((4, 1))), data) == replace(whole, similarity=None, new_source=None)


def test_similarity_is_counted_on_the_samples_of_the_clone() -> None:
    grafted = graft(extracted((4, 1), 0.3))
    scores = netclone.evaluate(grafted, [(PICTURES, CLASSES)], source=network(6))
    assert netclone.evaluate(grafted, [(PICTURES[CLASSES > 2], CLASSES[CLASSES > 2])], source=network(6)) != scores
    with torch.no_grad():
        made, wanted = grafted(PICTURES[CLASSES > 2])[:, 3:], network(6)(PICTURES[CLASSES > 2])[:, [4, 1]]
    both = torch.stack([(part - part.mean(0)).flatten() for part in (made, wanted)])
    assert scores.similarity == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-5)


def test_of_a_single_class_there_is_a_similarity_too() -> None:
    data = [(PICTURES, CLASSES % 4)]
    assert netclone.evaluate(graft(extracted((5,))), data, source=network(6)).similarity == pytest.approx(1, abs=1e-6)


def test_of_several_clones_the_one_to_compare_is_named() -> None:
    grafted = graft(extracted((4,)), extracted((1, 5)))
    data = [(PICTURES, CLASSES)]
    columns = [(PICTURES, CLASSES.clamp(max=4) + (CLASSES == 4))]  # labels 0 to 3 and 5
    for name in ("clone0", "clone1"):
        for some in (data, columns):
            scores = netclone.evaluate(grafted, some, source=network(6), name=name)
            assert scores.similarity == pytest.approx(1, abs=1e-6)
    with pytest.raises(netclone.CloneNameError, match="name: the graph holds the clones 'clone0', 'clone1'; say which"):
        netclone.evaluate(grafted, data, source=network(6))
    with pytest.raises(netclone.CloneNameError, match="name: no clone 'clone9' in the graph, which holds 'clone0', "):
        netclone.evaluate(grafted, data, source=network(6), name="clone9")
    assert netclone.evaluate(grafted, data).similarity is None


def test_there_is_no_similarity_without_a_clone_or_its_samples() -> None:
    data = [(PICTURES, CLASSES)]
    assert netclone.evaluate(network(5), data, source=network(6)).similarity is None
    old = [(PICTURES, CLASSES % 3)]
    assert netclone.evaluate(graft(extracted((4, 1))), old, source=network(6)).similarity is None


def test_a_source_without_the_cloned_classes_is_refused() -> None:
    message = (
        r"source: Sequential has classes 0 to 3, clone 'clone0' was cloned from classes \(4, 1\); give the network"
    )
    with pytest.raises(netclone.ArgumentError, match=message):
        netclone.evaluate(graft(extracted((4, 1))), [(PICTURES, CLASSES)], source=network(4))


def test_correlation_ignores_scale_and_offset_and_knows_the_sign() -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert _correlation(logits, 3 * logits + torch.tensor([5.0, -2, 0])) == pytest.approx(1)
    assert _correlation(logits, -logits) == pytest.approx(-1)
    assert _correlation(logits, torch.full((20, 3), 0.1)) is None
    assert _correlation(logits[:1], logits[:1]) is None


def test_cost_counts_the_bytes_of_the_archive_of_a_clone_alone(tmp_path: Path) -> None:
    module = extracted((4, 1))
    netclone.save(module, tmp_path / "clone.safetensors")
    cost = netclone.cost(module, torch.zeros(1, *module.spec.input_shape), repeats=1)
    assert cost.archive_bytes == (tmp_path / "clone.safetensors").stat().st_size > 4 * cost.parameters
    assert netclone.cost(nn.Linear(4, 2), torch.zeros(1, 4), repeats=1).archive_bytes is None


def test_a_clone_that_cannot_be_saved_has_a_cost() -> None:
    """Its images attend to each other: what that takes grows with the square of the batch."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            out: Tensor = self.fc((flat @ flat.T).softmax(1) @ flat)
            return out

    groups = netclone.channel_groups(Mixing(), torch.zeros(2, 3, 2, 2))
    module = netclone.extract(groups, netclone.localize(groups, method="magnitude", keep=1.0))
    with pytest.raises(ArchiveError, match="do not grow with the batch"):
        netclone.save(module, "never.safetensors")
    cost = netclone.cost(module, torch.zeros(2, 3, 2, 2), repeats=1)
    assert cost.archive_bytes is None and cost.macs > 0


def test_the_cost_of_a_model_that_hands_a_part_of_a_parameter_to_a_module() -> None:
    """Torch's counter asks for the gradient of such an argument, which it has none of: CaiT's class token."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.add, self.head = nn.Parameter(torch.randn(1, 4)), Add(), nn.Linear(4, 2)
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(self.add(x, self.token.expand(len(x), -1)))

    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    model = Token()
    with untouched(model):
        assert netclone.cost(model, torch.zeros(3, 4), repeats=1).macs == 3 * 8


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 10), max_size=6), batch_size=st.integers(1, 12))
def test_how_data_are_cut_into_batches_does_not_matter(cuts: list[int], batch_size: int) -> None:
    grafted = graft(extracted((0, 2)))
    images = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 5
    bounds = [0, *sorted(cuts), 10]
    batches = [(images[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
    options = {"reference": netclone.remove(grafted), "source": network(4), "batch_size": batch_size}
    whole = netclone.evaluate(grafted, [(images, labels)], **options)
    assert netclone.evaluate(grafted, batches, **options) == whole


def test_no_more_data_are_held_than_are_looked_at() -> None:
    held: list[weakref.ref] = []
    most = 0

    def batches():
        nonlocal most
        for number in range(12):
            array = np.full((4, 1, 1, 1), number % 6, np.float32)  # lives as long as the memory of its tensor
            held.append(weakref.ref(array))
            yield torch.from_numpy(array), torch.tensor([0, 1, 2, 3])
            del array
            most = max(most, sum(ref() is not None for ref in held))

    scores = netclone.evaluate(Table(LOGITS), batches(), batch_size=8)
    assert scores.samples == 48
    assert most <= 3
