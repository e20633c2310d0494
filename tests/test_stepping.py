"""A step goes down the mean loss of its batch, in the precision that is asked for, or not at all."""

import math

import pytest
import torch

from netclone.errors import ArgumentError, FitError
from netclone.learning.stepping import precision_of, step


def descend(precision=None, rows=None):
    """One step of a small matrix; what the loss was computed in, and the matrix."""
    weight = torch.arange(12.0).view(4, 3).div(7).requires_grad_()
    seen = []

    def loss_of(rows):
        out = rows @ weight
        seen.append(out.dtype)
        return out.to(rows.dtype).square().mean()

    rows = torch.linspace(-1, 2, 20).view(5, 4) if rows is None else rows
    step(torch.optim.SGD([weight], lr=0.1), loss_of, [rows], "example", precision=precision)
    return seen[0], weight.detach()


def test_a_step_is_that_of_the_gradient():
    rows = torch.linspace(-1, 2, 20).view(5, 4)
    start = torch.arange(12.0).view(4, 3).div(7)
    gradient = 2 * rows.T @ (rows @ start) / 15
    dtype, weight = descend()
    assert dtype == torch.float32
    torch.testing.assert_close(weight, start - 0.1 * gradient)


def test_in_bfloat16_the_loss_is_computed_in_it_and_the_weights_keep_their_dtype():
    dtype, weight = descend(precision_of("bf16"))
    assert dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    _, exact = descend(precision_of("no"))
    assert 0 < float((weight - exact).abs().max()) < 0.02


def test_a_loss_that_is_not_finite_moves_nothing():
    rows = torch.full((5, 4), math.inf)
    with pytest.raises(FitError, match="example: the loss is (inf|nan); check the data's scale"):
        descend(rows=rows)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ArgumentError, match="mixed_precision: got 'fp8', expected one of 'no', 'bf16'"):
        precision_of("fp8")
