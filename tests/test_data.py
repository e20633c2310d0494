"""Batches gathered once, and what is refused."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from netclone.data import Samples, check_classes, check_keep, gather
from netclone.errors import ArgumentError, DataError

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
        ([(IMAGES, LABELS), (NOT_FINITE, LABELS)], "shirts: batch 1 holds 2 values that are NaN or infinite"),
        ([(IMAGES, LABELS[:3])], r"shirts: batch 0 has images \(5, 3, 2, 2\) and labels \(3,\); expected"),
        ([(IMAGES, LABELS.reshape(5, 1))], r"labels \(5, 1\); expected \(N, ...\) and \(N,\)"),
        ([(IMAGES, LABELS.double())], "labels of batch 0 are torch.float64; expected integer class indices"),
        ([IMAGES], r"batch 0 is Tensor; expected a pair \(images, labels\)"),
        ((IMAGES, LABELS), "batch 0 is Tensor; expected a pair"),  # a batch instead of a list of batches
        ([(IMAGES, LABELS, LABELS)], "batch 0 is tuple; expected a pair"),
        ([(IMAGES.numpy(), LABELS)], "batch 0 is tuple; expected a pair"),
        ([(IMAGES, LABELS), (IMAGES[:, :1], LABELS)], r"shirts: batch 1 .*\(5, 1, 2, 2\)"),
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
        (["cat"], "classes: .*cat"),
        (3, "classes: .*3"),
    ],
)
def test_bad_classes_are_refused(classes, message):
    with pytest.raises(ArgumentError, match=message):
        check_classes(classes, 4)


@pytest.mark.parametrize("classes", [(3, 1), [3, 1], torch.tensor([3, 1]), range(3, 0, -2)])
def test_classes_keep_their_order(classes):
    assert check_classes(classes, 4) == (3, 1)


def test_no_classes_means_all():
    assert check_classes(None, 3) == (0, 1, 2)
