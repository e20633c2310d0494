"""Closed-form classifiers over features: what their papers say, on cases small enough to work out by hand."""

import math

import pytest
import torch
from torch import Tensor

from netclone.baselines import heads
from netclone.baselines.heads import KINDS, Projected, Rows, fecam, logistic, nearest_mean, ranpac, slda
from netclone.baselines.moments import Moments

FEATURES = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])
"""Means (2, 0) and (0, 3); about them the squares add up to 2 along the first axis and to 8 along the second."""


def near(found: Tensor, *expected: object) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))


def test_the_nearest_mean_has_the_highest_score() -> None:
    scores = nearest_mean(Moments.of(FEATURES, LABELS, 2), 0.0)(torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    near(scores - (1 + 1) / 2, [-(1 + 1) / 2, -(1 + 4) / 2])  # less |x|^2 / 2: half the squared distances


def test_discriminants_are_those_of_the_shrunk_common_covariance() -> None:
    """The covariance is diag(2, 8) / 4; half-way to the identity diag(3/4, 3/2), with precision diag(4/3, 2/3)."""
    linear = slda(Moments.of(FEATURES, LABELS, 2), 0.5)
    near(linear.weight, [4 / 3 * 2, 0.0], [0.0, 2 / 3 * 3])
    near(linear.bias, -(2 * 8 / 3) / 2, -(3 * 2) / 2)


def test_a_class_has_its_own_covariance_shrunk_and_made_a_correlation() -> None:
    """Of a class with covariance [[4, 2], [2, 1]] and strength 2: v1 = 2.5, v2 = 2, so [[9, 6], [6, 6]]."""
    features = torch.tensor([[4.0, 3.0], [2.0, 2.0], [0.0, 1.0]], dtype=torch.float64)  # along a line, about (2, 2)
    model = fecam(Moments.of(features, torch.zeros(3, dtype=torch.long), 1, by_class=True), 2.0)
    correlation = 6 / math.sqrt(9 * 6)
    expected = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64).inverse()
    torch.testing.assert_close(model.precisions[0], expected, rtol=1e-6, atol=1e-6)
    mean = torch.tensor([1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    away = torch.tensor([0.6, 0.8], dtype=torch.float64) - mean
    score = model(torch.tensor([[3.0, 4.0]], dtype=torch.float64))  # normalised (0.6, 0.8)
    near(score, [float(-away @ expected @ away / 2)])
    rooted = KINDS["FeCAM"].lift(features, torch.Generator())
    near(rooted(torch.tensor([[4.0, 9.0]])), [2.0, 3.0])
    assert torch.equal(KINDS["FeCAM"].lift(-features, torch.Generator())(features), features)


def test_the_ridge_of_one_hot_labels_on_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """h = (1, 0), (3, 0), (0, 1), (0, 5): G = diag(10, 26), C = ((4, 0), (0, 6)), ridge 2."""
    near(ranpac(Moments.of(FEATURES, LABELS, 2), 2.0).weight, [4 / 12, 0.0], [0.0, 6 / 28])
    monkeypatch.setattr(heads, "WIDTH", 3)
    lift = Projected(FEATURES, torch.Generator().manual_seed(0))
    drawn = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(lift(FEATURES), (FEATURES @ drawn).relu())


def test_a_class_is_taken_out_of_the_statistics_again() -> None:
    """As if it had never been there: subtracted from all, and added to the rest."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-4, 5, (30, 4), generator=generator).double()  # whole numbers: sums are exact
    labels = torch.arange(30) % 3
    kept = labels < 2
    for by_class in (False, True):
        whole, rest, gone = (
            Moments.of(features[rows], labels[rows], 3, by_class=by_class) for rows in (labels < 3, kept, ~kept)
        )
        for found, expected in ((whole - gone, rest), (rest + gone, whole)):
            assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(expected).values(), strict=True))
    alone = ranpac(Moments.of(features[kept], labels[kept], 2), 1.0)
    whole, gone = Moments.of(features, labels, 3), Moments.of(features[~kept], labels[~kept], 3)
    torch.testing.assert_close(ranpac(whole - gone, 1.0).weight[:2], alone.weight)


def test_logistic_regression_ends_where_its_gradient_is_zero() -> None:
    rows = Rows(FEATURES, LABELS, 2)
    linear = logistic(rows, 0.1)
    wrong = linear(rows.features).softmax(1) - torch.nn.functional.one_hot(LABELS, 2)
    torch.testing.assert_close(
        wrong.T @ FEATURES / 4 + 0.1 * linear.weight, torch.zeros(2, 2).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(wrong.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-5)
