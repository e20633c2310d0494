"""Neighbourhoods of samples: where a masked source is compared with the full one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

NOISE = 0.1  # of the standard deviation of the images drawn


def nearby(images: Tensor, count: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """``count`` points around random samples ``(N, ...)``: each mixed with another (mostly little) and perturbed.

    ``weights (N,)`` say how often each sample is drawn; None: all alike.

    Examples
    --------
    >>> nearby(torch.zeros(5, 3, 8, 8), 4, torch.Generator()).shape
    torch.Size([4, 3, 8, 8])

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.2: local surrogates around the clone set.
    """
    weights = torch.ones(len(images)) if weights is None else weights
    first, second = (drawn(weights, count, generator).to(images.device) for _ in range(2))
    mix = torch.rand(count, generator=generator).pow(3).view(-1, *[1] * (images.dim() - 1)).to(images)
    noise = torch.randn(count, *images.shape[1:], generator=generator).to(images)
    here = images[first]
    return here * (1 - mix / 2) + images[second] * mix / 2 + NOISE * here.std() * noise


def answered(
    draw: Callable[[int], Tensor], answer: Callable[[Tensor], Tensor], count: int, reuse: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, batches of ``count`` points and what a teacher answers there; the oldest make room for new ones.

    Each point stays for about ``reuse`` batches, which saves that share of the teacher's time.

    Parameters
    ----------
    draw
        Gives so many new points.
    answer
        The teacher.

    Examples
    --------
    >>> batches = answered(torch.ones, torch.neg, 4, reuse=2)
    >>> next(batches)[1], len(next(batches)[0])
    (tensor([-1., -1., -1., -1.]), 4)
    """
    points = draw(count)
    answers = answer(points)
    while True:
        yield points, answers
        fresh = draw(-(-count // reuse))
        points, answers = torch.cat([fresh, points])[:count], torch.cat([answer(fresh), answers])[:count]


def drawn(weights: Tensor, count: int, generator: torch.Generator, *, repeat: bool = True) -> Tensor:
    """Indices ``(count,)`` of samples drawn by their weights ``(N,)``; without repetition at most all of them.

    Examples
    --------
    >>> drawn(torch.tensor([0.0, 1.0, 1.0]), 5, torch.Generator(), repeat=False).sort().values
    tensor([1, 2])
    """
    count = count if repeat else min(count, int((weights > 0).sum()))
    if count == 0:
        return torch.empty(0, dtype=torch.long)
    return torch.multinomial(weights.cpu().float(), count, replacement=repeat, generator=generator)
