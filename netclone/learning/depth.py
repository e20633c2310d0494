"""Which residual blocks to do without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from netclone.channels.blocks import flags_without, residual_blocks
from netclone.channels.grouping import ChannelGroups
from netclone.errors import ArgumentError
from netclone.learning.data import Samples
from netclone.learning.similarity import similarities
from netclone.runtime.sharing import Workers

SAMPLES, BATCH = 512, 64  # that layers are compared on


def without_similar(
    groups: ChannelGroups, samples: Samples, keep: float, share: Callable[[list[Tensor]], float], workers: Workers
) -> list[Tensor]:
    """Per group, False for the units of blocks that are too similar to an earlier one: MPruner's rule.

    The outputs of all residual blocks are compared by debiased linear CKA. Consecutive blocks of which each pair is
    more similar than a threshold form a cluster, which keeps its first block. The threshold is the highest with which
    the slim network has at most ``keep`` of the budget. ``share(flags)`` measures that.

    Raises
    ------
    ArgumentError
        If there is no such threshold, or there are fewer than four samples to compare on.

    Reference: MPruner (arXiv 2408.13482). The rule only, without its rounds of training in between.
    """
    everything = flags_without(groups, ())
    if keep == 1 or not groups.groups:
        return everything
    if len(samples) < 4:
        raise ArgumentError(f"data: method 'cka' compares blocks on at least 4 samples and got {len(samples)}")
    blocks = residual_blocks(groups)
    alike = torch.eye(len(blocks))
    if len(blocks) > 1:
        some = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        images = samples.images[some.to(samples.images.device)]
        alike = similarities(groups.graph_module, [block.at for block in blocks], images, BATCH, workers)
    thresholds = sorted({float(alike[i, j]) for j in range(len(blocks)) for i in range(j)}, reverse=True)
    chosen = list(dict.fromkeys(tuple(redundant(alike, threshold)) for threshold in thresholds))

    def flags(number: int) -> list[Tensor]:
        return flags_without(groups, (blocks[place] for place in chosen[number]))

    low, high = 0, len(chosen)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(flags(middle)) <= keep else (middle + 1, high)
    if low == len(chosen):
        least = share(flags(low - 1)) if chosen else 1.0
        raise ArgumentError(
            f"keep: {keep:.3g} cannot be reached by method 'cka', which removes whole residual blocks: without all but "
            f"the first of {len(blocks)}, {least:.2g} is left; keep at least that, or let a method remove channels"
        )
    return flags(low)


def redundant(alike: Tensor, threshold: float) -> list[int]:
    """The places of layers that are no cluster's first, given the similarity ``(L, L)`` of layers in order.

    Examples
    --------
    >>> import torch
    >>> alike = torch.tensor([[1.0, 0.9, 0.7, 0.1], [0.9, 1.0, 0.9, 0.2], [0.7, 0.9, 1.0, 0.3], [0.1, 0.2, 0.3, 1.0]])
    >>> redundant(alike, 0.8), redundant(alike, 0.6)
    ([1], [1, 2])
    """
    cluster, found = [0], list[int]()
    for place in range(1, len(alike)):
        if all(float(alike[place, member]) >= threshold for member in cluster):
            cluster.append(place)
            found.append(place)
        else:
            cluster = [place]
    return found
