"""Neighbourhoods of samples: the points at which a masked source is compared with the full one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from netclone.errors import ArgumentError

NOISE = 0.1  # as a share of the standard deviation of the drawn images

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Gives another view of a batch of images ``(N, ...)``; all randomness comes from the generator (on the CPU)."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Samples ``(N, ...)`` and the points around them; ``weights (N,)`` say how often each sample is drawn.

    Examples
    --------
    >>> around = Neighbourhoods(torch.zeros(5, 3, 8, 8), torch.ones(5))
    >>> around.nearby(4, torch.Generator()).shape
    torch.Size([4, 3, 8, 8])

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.2: local surrogates around the clone set.
    """

    images: Tensor
    weights: Tensor
    augment: Augment | None = None

    def samples(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples ``(count, ...)``, augmented if there is an augmentation."""
        images = self.images[drawn(self.weights, count, generator).to(self.images.device)]
        return images if self.augment is None else viewed(self.augment, images, generator)

    def nearby(self, count: int, generator: torch.Generator) -> Tensor:
        """Points ``(count, ...)``, each a sample mixed with a little of another, as a rule, and perturbed."""
        here, other = self.samples(count, generator), self.samples(count, generator)
        mix = torch.rand(count, generator=generator).pow(3).view(-1, *[1] * (here.dim() - 1)).to(here)
        noise = torch.randn(here.shape, generator=generator).to(here)
        return here * (1 - mix / 2) + other * mix / 2 + NOISE * here.std() * noise


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)``, about half of them flipped horizontally."""
    turned = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(turned.to(images.device)[:, None, None, None], images.flip(3), images)


def viewed(augment: Augment, images: Tensor, generator: torch.Generator) -> Tensor:
    """Another view of a batch, checked to have the same shape, dtype and device.

    Raises
    ------
    ArgumentError
        If the augmentation gives anything else.

    Examples
    --------
    >>> viewed(lambda images, generator: images.flip(3), torch.eye(2).view(1, 1, 2, 2), torch.Generator())
    tensor([[[[0., 1.],
              [1., 0.]]]])
    """
    views = augment(images, generator)
    got, expected = _described(views), _described(images)
    if got != expected:
        raise ArgumentError(f"augment: gave {got} for {expected}; expected images of the same shape, dtype and device")
    return views


def answered(
    draw: Callable[[int], Tensor],
    answer: Callable[[Tensor], Tensor],
    count: int,
    reuse: int,
    last: tuple[Tensor, Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless series of batches: ``count`` points with a teacher's answers. New points replace the oldest ones.

    Each point stays for at most ``reuse`` batches, so the teacher computes only about one in ``reuse`` at a time.

    Parameters
    ----------
    draw
        Draws so many new points.
    answer
        The teacher: points to answers.
    last
        The last batch of an earlier run, to continue after. None: start anew.

    Examples
    --------
    >>> batches = answered(torch.ones, torch.neg, 4, reuse=2)
    >>> next(batches)[1], len(next(batches)[0])
    (tensor([-1., -1., -1., -1.]), 4)
    """
    if last is None:
        points = draw(count)
        answers = answer(points)
        yield points, answers
    else:
        points, answers = last
    while True:
        fresh = draw(-(-count // reuse))
        points, answers = torch.cat([fresh, points])[:count], torch.cat([answer(fresh), answers])[:count]
        yield points, answers


def drawn(weights: Tensor, count: int, generator: torch.Generator, *, repeat: bool = True) -> Tensor:
    """Indices ``(count,)`` of samples, drawn by their weights ``(N,)``; without repetition at most all of them.

    They are drawn on the CPU, so that every device draws the same, and are where the weights are.

    Examples
    --------
    >>> drawn(torch.tensor([0.0, 1.0, 1.0]), 5, torch.Generator(), repeat=False).sort().values
    tensor([1, 2])
    """
    count = count if repeat else min(count, int((weights > 0).sum()))
    if count == 0:
        return torch.empty(0, dtype=torch.long, device=weights.device)
    return torch.multinomial(weights.cpu().float(), count, replacement=repeat, generator=generator).to(weights.device)


def _described(images: object) -> str:
    if not isinstance(images, Tensor):
        return f"a {type(images).__name__}"
    return f"images {tuple(images.shape)} {images.dtype} on {images.device}"
