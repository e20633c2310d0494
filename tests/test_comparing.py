"""Confusion, classes and changes of samples: against what was counted by hand."""

import math

import pytest
import torch

from netclone.metrics.comparing import Change, Confusion, OfClass, by_class, changes, confusion

LABELS = torch.tensor([0, 0, 1, 2, 2, 2, 3])
TAKEN = torch.tensor([0, 2, 1, 2, 2, 1, 3])


def test_confusion_counted_by_hand() -> None:
    found = confusion(LABELS, TAKEN, old=[0, 1], new=[2, 3], most=5)
    assert found == Confusion(
        columns=(0, 1, 2, 3),
        counts=((1, 0, 1, 0), (0, 1, 0, 0), (0, 1, 2, 0), (0, 0, 0, 1)),
        others=0,
    )


def test_confusion_of_the_most_confused_sums_over_the_others() -> None:
    """Class 2 has a part in two mistakes, the old classes in one each, of which 0 has more samples."""
    found = confusion(LABELS, TAKEN, old=[0, 1], new=[2, 3], most=1)
    assert found == Confusion(columns=(0, 2), counts=((1, 1, 0), (0, 2, 1), (0, 0, 2)), others=2)


def test_old_classes_may_lie_on_both_sides_of_the_new() -> None:
    found = confusion(LABELS, TAKEN, old=[0, 3], new=[1, 2], most=5)
    assert found.columns == (0, 3, 1, 2)
    assert found.counts == ((1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 2))


def test_classes_counted_by_hand() -> None:
    before = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    of_source = torch.tensor([True, False, False, True])
    assert by_class(LABELS, before, TAKEN, [2, 3], of_source) == (
        OfClass(0, False, 2, 1.0, 0.5, 1.0),
        OfClass(1, False, 1, 0.0, 1.0, 0.5),
        OfClass(2, True, 3, 0.0, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3)),
        OfClass(3, True, 1, 0.0, 1.0, 1.0, 1.0),
    )


def test_changes_counted_by_hand() -> None:
    """Probabilities 1/4 and 3/4 without the clone, whose column takes half of everything."""
    before = torch.tensor([[0.0, math.log(3)]] * 2)
    grafted = torch.tensor([[0.0, math.log(3), math.log(4)]] * 2)
    first, second = changes(torch.tensor([1, 2]), before, grafted, old=[0, 1])
    assert first == Change(0, 1, pytest.approx(0.75), pytest.approx(3 / 8), 1, 2)
    assert second == Change(1, 2, 0.0, pytest.approx(0.5), 1, 2)
    assert first.gain == pytest.approx(-3 / 8) and second.gain == pytest.approx(0.5)
