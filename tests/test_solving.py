"""The minimum of a convex loss, and where to look for it."""

import pytest
import torch
from torch.nn import functional as F

from netclone.learning import solving
from netclone.learning.solving import minimise, place_to_solve


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, labels = torch.randn(60, 4, generator=generator, dtype=torch.double), torch.arange(60) % 3
    weight, bias = (torch.zeros(*shape, dtype=torch.double, requires_grad=True) for shape in ((3, 4), (3,)))
    return [weight, bias], lambda: F.cross_entropy(rows @ weight.T + bias, labels) + 0.05 * weight.square().sum()


@pytest.mark.parametrize("history", [10, 100])
def test_at_the_minimum_the_gradient_is_gone(history):
    parts, loss = problem()
    start = loss().item()
    minimise(parts, loss, steps=100, history=history)
    gradients = torch.autograd.grad(loss(), parts)
    assert loss().item() < start
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


def test_it_ends_after_so_many_steps():
    parts, loss = problem()
    minimise(parts, loss, steps=2)
    assert max(float(gradient.abs().max()) for gradient in torch.autograd.grad(loss(), parts)) > 1e-4


def test_it_is_the_same_each_time():
    found = []
    for _ in range(2):
        parts, loss = problem()
        minimise(parts, loss, steps=20)
        found.append(parts)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_many_numbers_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(solving, "FEW", 6)
    assert place_to_solve(torch.empty(3, 2, device="meta")).type == "cpu"
    assert place_to_solve(torch.empty(7, 1, device="meta")).type == "meta"
