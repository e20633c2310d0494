"""Batches gathered once, and what is refused."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from netclone.errors import ArgumentError, DataError, WeakDataWarning
from netclone.graph.class_names import ClassNames
from netclone.learning.data import (
    Samples,
    check_agreement,
    check_classes,
    check_clone_set,
    check_keep,
    check_names,
    check_new,
    gather,
)

IMAGES, LABELS = torch.arange(5 * 12.0).reshape(5, 3, 2, 2), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    "data",
    [
        [(IMAGES, LABELS)],
        [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])],
        [[IMAGES, LABELS]],
        [(IMAGES, LABELS.tolist())],
        ((IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(5)),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2),
    ],
    ids=["one batch", "two batches", "lists", "labels in a list", "generator", "loader"],
)
def test_batches_become_one(data):
    samples = gather(data)
    assert torch.equal(samples.images, IMAGES)
    assert torch.equal(samples.labels, LABELS)
    assert len(samples) == 5


def test_gathered_images_carry_no_gradient():
    assert not gather([(IMAGES.clone().requires_grad_(), LABELS)]).images.requires_grad


NOT_FINITE = IMAGES.clone()
NOT_FINITE[1, 0, 0, 0], NOT_FINITE[2, 0, 0, 0] = math.nan, math.inf


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "shirts: empty; expected at least one batch"),
        ([(IMAGES[:0], LABELS[:0])], "shirts: empty"),
        (
            [(IMAGES, LABELS), (NOT_FINITE, LABELS)],
            "shirts: batch 1 holds 2 values that are NaN or infinite",
        ),
        ([(IMAGES, LABELS[:3])], r"shirts: batch 0 has images \(5, 3, 2, 2\) and labels \(3,\); expected"),
        ([(IMAGES, LABELS.reshape(5, 1))], r"labels \(5, 1\); expected \(N, ...\) and \(N,\)"),
        ([(IMAGES, LABELS.double())], "labels of batch 0 are torch.float64; expected integer class indices"),
        ([IMAGES], r"batch 0 is Tensor; expected a pair \(images, labels\)"),
        ([(IMAGES, LABELS, LABELS)], "batch 0 is tuple of 3; expected a pair"),
        ([(IMAGES, LABELS), (IMAGES[:, :1], LABELS)], r"shirts: batch 1 .*\(1, 2, 2\) torch.float32 on cpu"),
        (
            [(IMAGES, LABELS), (IMAGES.double(), LABELS)],
            "batch 1 .* torch.float64 on cpu, batch 0 .* one size",
        ),
        ([(IMAGES, LABELS), (IMAGES.half(), LABELS)], "batch 1 .* torch.float16 on cpu, batch 0 .* on one device"),
        ([(IMAGES, ["cat"] * 5)], "labels of batch 0: 'cat' is a name, and the network records no class names"),
        (None, "shirts: got NoneType; expected an iterable of batches"),
    ],
)
def test_bad_batches_are_refused_by_number_with_what_was_seen(data, message):
    with pytest.raises(DataError, match=message):
        gather(data, "shirts")


def test_labels_outside_the_model_are_refused():
    samples = Samples(IMAGES, LABELS, "data")
    samples.check_labels(3, "source")
    with pytest.raises(DataError, match=r"data: labels run from 0 to 2, the source has classes 0 to 1; give labels in"):
        samples.check_labels(2, "source")
    with pytest.raises(DataError, match="labels run from -1 to 1"):
        Samples(IMAGES, LABELS - 1, "data").check_labels(3, "source")


def test_samples_of_some_classes():
    samples = Samples(IMAGES, LABELS, "data")
    chosen = samples.of_classes((1, 0))
    assert chosen.labels.tolist() == [0, 1, 1, 0]
    assert torch.equal(chosen.images, IMAGES[[0, 1, 3, 4]])
    with pytest.raises(DataError, match=r"data: no sample of class 3 \(classes asked for: \(3, 1\)\)"):
        samples.of_classes((3, 1))


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.01, 2, math.nan, math.inf, "half", None, True])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(ArgumentError, match=r"keep: got .*expected a share in \(0, 1\]"):
        check_keep(keep)


@pytest.mark.parametrize("keep", [1, 1.0, 0.5, 1e-9])
def test_a_share_in_its_range_is_taken(keep):
    check_keep(keep)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes: empty; name at least one class"),
        ([1, 4], "classes: 4 is out of range; the source has classes 0 to 3"),
        ([-1], "classes: -1 is out of range"),
        ([2, 1, 2], "classes: 2 is given 2 times; name each class once"),
        ([1.5], "classes: .*1.5"),
        (["cat"], "classes: 'cat' is a name, and the source records no class names; give columns"),
        (4, "classes: 4 is out of range"),
    ],
)
def test_bad_classes_are_refused(classes, message):
    with pytest.raises(ArgumentError, match=message):
        check_classes(classes, 4)


@pytest.mark.parametrize(
    "classes", [(3, 1), [3, 1], torch.tensor([3, 1]), range(3, 0, -2), ["ibis", 1], ["ibis", "Grey-Heron"]]
)
def test_classes_keep_their_order(classes):
    names = ClassNames.given(["crow", "grey heron", "gull", "ibis"], "source")
    assert check_classes(classes, 4, names) == (3, 1)


def test_no_classes_means_all():
    assert check_classes(None, 3) == (0, 1, 2)


def clone_set(counts, size=(3, 4, 4)):
    """Random images, so many of each class."""
    labels = torch.cat([torch.full((count,), c) for c, count in counts.items()])
    return Samples(torch.randn(len(labels), *size, generator=torch.Generator().manual_seed(1)), labels, "data")


def logits_for(predicted, width, sure=9.0):
    return sure * torch.nn.functional.one_hot(torch.as_tensor(predicted), width).float()


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 2, 2), (5,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("counts", [{2: 8, 5: 8}, {3: 8}, {0: 2, 1: 2}, {0: 8, 4: 792}, {c: 8 + c for c in range(9)}])
def test_ordinary_clone_sets_raise_no_alarm(counts, size):
    check_clone_set(clone_set(counts, size), tuple(counts))  # warnings are errors


def test_one_black_image_or_a_pair_of_equal_ones_among_others_raises_no_alarm():
    samples = clone_set({0: 8, 1: 8})
    samples.images[0] = 0
    samples.images[9] = samples.images[8]
    check_clone_set(samples, (0, 1))


def test_what_is_weak_in_other_classes_does_not_matter():
    check_clone_set(clone_set({0: 8, 1: 8, 2: 1}), (0, 1))
    with pytest.warns(WeakDataWarning, match="class 2"):
        check_clone_set(clone_set({0: 8, 1: 8, 2: 1}), (0, 1, 2))


def test_a_missing_class_is_refused():
    message = r"data: no sample of class 3 \(classes asked for: \(1, 3\)\); add some, or leave the class out"
    with pytest.raises(DataError, match=message):
        check_clone_set(clone_set({0: 8, 1: 8}), (1, 3))


def test_a_single_sample_of_a_class_is_told():
    with pytest.warns(WeakDataWarning, match="data: class 4 is one with a single sample, used for training and for"):
        check_clone_set(clone_set({3: 8, 4: 1}), (3, 4))
    with pytest.warns(WeakDataWarning, match="classes 3, 4 are ones with a single sample.*optimistic.*add samples"):
        check_clone_set(clone_set({3: 1, 4: 1}), (3, 4))


@pytest.mark.parametrize("spoil", ["black", "grey, each in another shade", "one and the same"])
def test_images_that_say_nothing_are_told(spoil):
    samples = clone_set({3: 8, 4: 8})
    images = samples.images[8:]
    images[:] = 0 if spoil == "black" else images[:, :1, :1, :1] if spoil.startswith("grey") else images[:1].clone()
    with pytest.warns(WeakDataWarning, match="data: class 4 is one whose images are all equal or blank"):
        check_clone_set(samples, (3, 4))


def test_a_single_black_image_is_told_for_both_reasons():
    samples = clone_set({3: 8, 4: 1})
    samples.images[8] = 0
    with pytest.warns(WeakDataWarning) as told:
        check_clone_set(samples, (3, 4))
    assert ["single sample" in str(told[0].message), "blank" in str(told[1].message), len(told)] == [True, True, 2]


def test_an_imbalance_of_a_hundred_to_one_is_told_with_both_counts():
    with pytest.warns(WeakDataWarning, match="data: 800 samples of class 4 and 8 of class 0; class 0 hardly counts"):
        check_clone_set(clone_set({0: 8, 4: 800, 7: 30}), (0, 4, 7))


def test_a_warning_names_the_line_that_called_the_caller_of_the_check():
    def clone():
        check_clone_set(clone_set({3: 8, 4: 1}), (3, 4))

    with pytest.warns(WeakDataWarning) as told:
        clone()
    assert told[0].filename == __file__
    assert told[0].lineno == clone.__code__.co_firstlineno + 4


LABELLED = clone_set({2: 8, 3: 8, 4: 8})


@pytest.mark.parametrize(
    "predicted",
    [
        LABELLED.labels,
        LABELLED.labels.where(torch.arange(24) % 2 == 0, 5),  # right on half of them
        LABELLED.labels.where(torch.arange(24) < 13, 2),
    ],
    ids=["always right", "half of them another class", "more than half right"],
)
def test_a_source_that_says_what_the_labels_say_raises_no_alarm(predicted):
    check_agreement(logits_for(predicted, 6), LABELLED, (2, 3, 4))


def test_a_source_that_is_right_among_the_cloned_classes_raises_no_alarm():
    """Of a thousand classes another one is often the first, though the decision among these is right."""
    logits = logits_for(LABELLED.labels, 1000, 20.0)
    logits[:, 999] = 21
    check_agreement(logits, LABELLED, (2, 3, 4))


def test_a_source_that_is_unsure_raises_no_alarm():
    check_agreement(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) / 10, LABELLED, (2, 3, 4))


def test_labels_in_another_order_are_told():
    message = (
        r"data: the source's own prediction agrees with the labels on 0% of 24 samples \(it takes class 2 mostly for "
        r"3; 3 mostly for 4; 4 mostly for 2\); the module learns what the source knows.*Give labels in the source's"
    )
    with pytest.warns(WeakDataWarning, match=message):
        check_agreement(logits_for((LABELLED.labels - 1) % 3 + 2, 6), LABELLED, (2, 3, 4))


def test_labels_without_any_order_are_told():
    mixed = LABELLED.labels[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert (mixed == LABELLED.labels).double().mean() < 0.5
    with pytest.warns(WeakDataWarning, match="source's own prediction agrees with the labels on 42% of 24 samples"):
        check_agreement(logits_for(mixed, 6), LABELLED, (2, 3, 4))


def test_with_one_class_the_prediction_over_all_of_the_source_counts():
    samples = clone_set({3: 8})
    check_agreement(logits_for([3] * 4 + [1] * 4, 6), samples, (3,))
    with pytest.warns(WeakDataWarning, match=r"on 38% of 8 samples \(it takes class 3 mostly for 1\)"):
        check_agreement(logits_for([3] * 3 + [1] * 5, 6), samples, (3,))


def test_a_source_that_returns_nan_is_refused():
    logits = logits_for(LABELLED.labels, 6)
    logits[:2, 0], logits[2, 3] = math.nan, math.inf
    with pytest.raises(DataError, match="data: the source's logits are NaN or infinite on 3 of 24 samples; nothing"):
        check_agreement(logits, LABELLED, (2, 3, 4))
    logits = logits_for(LABELLED.labels, 6)
    logits[:, 0] = -math.inf  # a class that is ruled out
    check_agreement(logits, LABELLED, (2, 3, 4))


def test_a_target_that_contradicts_its_labels_is_told():
    message = (
        "the target's own prediction agrees with the labels on 0%.*new logits are fitted against.*the target's order"
    )
    with pytest.warns(WeakDataWarning, match=message):
        check_agreement(logits_for((LABELLED.labels - 1) % 3 + 2, 6), LABELLED, (2, 3, 4), "target")
    check_agreement(logits_for(LABELLED.labels, 6), LABELLED, (2, 3, 4), "target")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tulip", "rose", "tulip"], "'tulip' is given 2 times; name each once"),
        (["tulip", "rose"], "2 names for 3 classes"),
        ("abc", "got 'abc'; expected a sequence of texts"),
        (["tulip", 5, "rose"], "expected a sequence of texts"),
    ],
)
def test_bad_names_of_classes_are_refused(names, message):
    with pytest.raises(ArgumentError, match=f"class_names: .*{message}"):
        check_names(names, (1, 2, 3))
    check_names(["tulip", "Tulip", "rose"], (1, 2, 3))
    check_names((), (1, 2, 3))


def test_classes_that_the_target_has_by_name_are_told():
    with pytest.warns(WeakDataWarning, match="class_names: the target already has 'Grey_Heron'; .*leave the class out"):
        check_new(["ibis", "Grey_Heron"], ["gull", "grey heron"], "class_names")
    check_new(["ibis", "7"], ["gull", "7"], "class_names")
