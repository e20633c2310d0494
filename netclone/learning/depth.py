"""Which residual blocks to do without: those that are like an earlier one, or those that others can make up for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from netclone.channels.blocks import Block, flags_without, residual_blocks
from netclone.channels.budgeting import Allocation
from netclone.channels.grouping import ChannelGroups, columns_without
from netclone.channels.slimming import Resizer, slim
from netclone.errors import ArgumentError, MaskError
from netclone.learning.data import Samples, in_batches
from netclone.learning.reconstructing import RIDGE, reconstruct_slim
from netclone.learning.similarity import similarities
from netclone.runtime.sharing import ALONE, Workers

SAMPLES, BATCH = 512, 64  # that layers are compared on
TRIED = 256  # samples that a number of blocks is tried on: half to refit on, half to compare on
EQUATIONS = 50  # per unknown, in each batch, are enough
_log = logging.getLogger(__package__)


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
        images = _some(samples, SAMPLES).images
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


def recoverable(
    graph_module: fx.GraphModule, blocks: Sequence[Block], images: Tensor, workers: Workers = ALONE
) -> Tensor:
    """What least squares cannot make up for if a block goes, as a share of the variance of its output: ``(L,)``.

    The branch is predicted from the stream that it is added to, at every position, by a matrix and a constant: layers
    that read the sum could take over that much. Images are ``(N, ...)``.

    Reference: after PRACTISE (CVPR 2022), which ranks blocks by how well an adapter recovers them.
    """
    batches = images.split(BATCH)
    team = workers.team(len(batches))
    found = {block.at: _Equations(block) for block in blocks}
    for part in batches[team.own(len(batches))]:
        with torch.no_grad():
            _Added(graph_module, found).run(part)
    team.add([tensor for equations in found.values() for tensor in equations.sums])
    return torch.stack([found[block.at].residual() for block in blocks]).cpu()


class _Equations:
    """Sums of the products of a stream and a branch ``(P, a + b + 1)`` over positions."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.sums: list[Tensor] = []
        self.width = 0

    def add(self, branch: Tensor, stream: Tensor) -> None:
        """Add the positions of a batch; of many, every n-th."""
        shape = torch.broadcast_shapes(branch.shape, stream.shape)
        self.width = shape[self.block.axis]
        rows = [value.expand(shape).movedim(self.block.axis, -1).flatten(0, -2) for value in (stream, branch)]
        every = len(rows[0]) // (EQUATIONS * self.width) | 1  # odd, so that it does not walk down a column of a map
        some = [value[::every].double() for value in rows]
        both = torch.cat([*some, some[0].new_ones(len(some[0]), 1)], 1)
        gram = both.T @ both
        self.sums = [gram] if not self.sums else [self.sums[0] + gram]

    def residual(self) -> Tensor:
        gram, width = self.sums[0], self.width
        centred = gram - torch.outer(gram[:, -1], gram[-1]) / gram[-1, -1]
        stream, cross, branch = centred[:width, :width], centred[:width, width:-1], centred[width:-1, width:-1]
        ridge = RIDGE * stream.diagonal().mean().clamp_min(1e-12) * torch.eye(width).to(stream)
        lost = branch.trace() - (cross * torch.linalg.solve(stream + ridge, cross)).sum()
        whole = (stream + cross + cross.T + branch).trace()
        share: Tensor = lost.clamp_min(0) / whole.clamp_min(1e-30)
        return share


class _Added(fx.Interpreter):
    """Runs a graph, and takes note of what its blocks add up."""

    def __init__(self, module: fx.GraphModule, found: Mapping[str, _Equations]) -> None:
        super().__init__(module)
        self.found = found

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.found:
            equations = self.found[n.name]
            values = {used.name: self.env[used] for used in n.all_input_nodes}
            equations.add(values[equations.block.branch], values[equations.block.stream])
        out: object = super().run_node(n)
        return out


def without_recoverable(
    samples: Samples, sizes: Allocation, choose: Callable[[Allocation], list[Tensor]], workers: Workers
) -> Allocation:
    """A division of a budget in which so many blocks are gone as leave the slim network nearest to the full one.

    Blocks are ranked by :func:`recoverable`. None, a quarter, half and three quarters of them are tried: the other
    channels are chosen for the budget (``choose``), and the slim network is refitted on some samples. Its logits are
    compared with the full one's on others.
    """
    groups, full = sizes.groups, sizes.groups.graph_module
    blocks, some = residual_blocks(groups), _some(samples, TRIED)
    if len(blocks) < 2 or len(some) < 8:
        return sizes
    lost = recoverable(full, blocks, some.images, workers)
    ranked = [blocks[place] for place in torch.sort(lost, stable=True).indices.tolist()]
    half = len(some) // 2
    refitted, held = Samples(some.images[:half], some.labels[:half], some.what), some.images[half:]
    want = in_batches(full, held, BATCH, workers)
    tried: list[tuple[float, Allocation]] = []
    for count in sorted({round(len(blocks) * share) for share in (0, 0.25, 0.5, 0.75)}):
        other = sizes.doing_without(name for block in ranked[:count] for name in block.groups)
        try:
            removed = other.removed(choose(other))
        except (ArgumentError, MaskError):  # the rest of the budget cannot be reached, or is not enough for a network
            continue
        slimmed = slim(groups.labelling, removed)
        reconstruct_slim(full, slimmed, Resizer(groups.labelling, removed), refitted, None, workers=workers)
        columns = list(columns_without(groups, removed))
        error = float((in_batches(slimmed, held, BATCH, workers) - want[:, columns]).square().mean())
        _log.debug("without %d of %d residual blocks: squared error of the logits %.3g", count, len(blocks), error)
        tried.append((error, other))
    return min(tried, key=lambda one: one[0])[1] if tried else sizes


def _some(samples: Samples, count: int) -> Samples:
    """At most so many samples, drawn without regard to their order."""
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:count].to(samples.images.device)
    return Samples(samples.images[drawn], samples.labels[drawn], samples.what)
