"""Neighbourhoods: what is drawn around samples, and how long a teacher's answers serve."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netclone.learning.neighbourhoods import Neighbourhoods, answered, drawn


def test_points_lie_around_the_samples_that_are_drawn() -> None:
    images = torch.stack([torch.zeros(1, 16, 16), torch.full((1, 16, 16), 100.0)])
    generator = torch.Generator().manual_seed(0)
    second = Neighbourhoods(images, torch.tensor([0.0, 1.0]))
    assert torch.equal(second.nearby(8, generator).round(), torch.full((8, 1, 16, 16), 100.0))
    mixed = Neighbourhoods(images, torch.ones(2)).nearby(64, generator).mean((1, 2, 3))
    assert bool((mixed > 1).any()) and bool((mixed < 99).any())  # of two samples, but mostly of the first
    nearest = torch.minimum(mixed, 100 - mixed)
    assert float(nearest.median()) < 10 and float(nearest.max()) <= 55


def test_views_take_the_place_of_samples() -> None:
    def brighter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return images + torch.rand(len(images), 1, 1, 1, generator=generator) + 1

    views, plain = (Neighbourhoods(torch.zeros(3, 1, 4, 4), torch.ones(3), augment) for augment in (brighter, None))
    for draw in (Neighbourhoods.samples, Neighbourhoods.nearby):
        seen = draw(views, 6, torch.Generator().manual_seed(0))
        assert float(seen.min()) > 0.8 and float(seen.max()) < 2.2  # from 1 to 2, and a tenth of their deviation
        assert len(seen.mean((1, 2, 3)).unique()) == 6
        assert torch.equal(seen, draw(views, 6, torch.Generator().manual_seed(0)))
        assert not draw(plain, 6, torch.Generator().manual_seed(0)).any()


def test_samples_are_drawn_by_their_weights() -> None:
    index = drawn(torch.tensor([1.0, 3.0]), 4000, torch.Generator().manual_seed(0))
    assert float((index == 1).float().mean()) == pytest.approx(0.75, abs=0.03)


@given(count=st.integers(1, 9), reuse=st.integers(1, 4), batches=st.integers(1, 6))
def test_each_point_is_answered_once_and_serves_a_few_batches(count: int, reuse: int, batches: int) -> None:
    """The teacher sees every point once; batches are full, and answers stay with their points."""
    made, asked = [], []

    def draw(number: int) -> torch.Tensor:
        start = sum(made)
        made.append(number)
        return torch.arange(start, start + number)

    def answer(points: torch.Tensor) -> torch.Tensor:
        asked.extend(points.tolist())
        return -points

    seen = list(islice(answered(draw, answer, count, reuse), batches))
    assert all(len(points) == count and torch.equal(answers, -points) for points, answers in seen)
    assert asked == list(range(sum(made)))
    assert made == [count] + [-(-count // reuse)] * (batches - 1)
    uses = torch.stack([points for points, _ in seen]).flatten().bincount()
    assert int(uses.max()) <= reuse
