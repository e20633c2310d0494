"""Neighbourhoods of samples: where a masked source is compared with the full one."""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 0.1  # of the standard deviation of the images drawn


def nearby(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` points around random samples ``(N, ...)``: each mixed with another (mostly little) and perturbed.

    Examples
    --------
    >>> nearby(torch.zeros(5, 3, 8, 8), 4, torch.Generator()).shape
    torch.Size([4, 3, 8, 8])

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.2: local surrogates around the clone set.
    """
    first, second = (torch.randint(len(images), (count,), generator=generator).to(images.device) for _ in range(2))
    mix = torch.rand(count, generator=generator).pow(3).view(-1, *[1] * (images.dim() - 1)).to(images)
    noise = torch.randn(count, *images.shape[1:], generator=generator).to(images)
    here = images[first]
    return here * (1 - mix / 2) + images[second] * mix / 2 + NOISE * here.std() * noise
