"""Debiased linear CKA: how much alike layers see the same samples, whatever their widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from netclone.runtime.sharing import ALONE, Workers


def debiased_hsic(grams: Tensor) -> Tensor:
    """The unbiased estimate of HSIC between kernels ``(L, n, n)`` of the same n >= 4 samples: ``(L, L)``.

    Examples
    --------
    >>> one = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    >>> round(float(debiased_hsic((one @ one.T)[None])), 3)
    2.667

    Reference: Song et al., Feature Selection via Dependence Maximization (JMLR 2012), equation 4.
    """
    n = grams.shape[-1]
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(2)
    sums = rows.sum(1)
    traces = torch.einsum("aij,bij->ab", grams, grams)
    means = torch.outer(sums, sums) / ((n - 1) * (n - 2))
    return (traces + means - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def cka(hsic: Tensor) -> Tensor:
    """Linear CKA from HSIC ``(L, L)`` of linear kernels: at most about 1, and about 0 for layers that share nothing."""
    own = hsic.diagonal().clamp_min(0).sqrt()
    return hsic / torch.outer(own, own).clamp_min(torch.finfo(hsic.dtype).tiny)


def similarities(
    graph_module: fx.GraphModule, nodes: Sequence[str], images: Tensor, batch_size: int, workers: Workers = ALONE
) -> Tensor:
    """Debiased linear CKA between the values of some nodes for images ``(N, ...)``: ``(L, L)``, in float64.

    HSIC is estimated in every batch and averaged, which needs no bias correction since no estimate has a bias. Batches
    of less than four images are left out.

    Reference: Nguyen, Raghu, Kornblith, Do Wide and Deep Networks Learn the Same Things? (ICLR 2021), section 3.
    """
    batches = [part for part in images.split(batch_size) if len(part) > 3]
    team = workers.team(len(batches))
    total = torch.zeros(len(nodes), len(nodes), dtype=torch.float64, device=images.device)
    for part in batches[team.own(len(batches))]:
        seen = _Grams(graph_module, nodes)
        with torch.no_grad():
            seen.run(part)
        total += debiased_hsic(torch.stack([seen.grams[name] for name in nodes]))
    team.add([total])
    return cka(total)


class _Grams(fx.Interpreter):
    """Runs a graph, and keeps the linear kernel of the batch at some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Sequence[str]) -> None:
        super().__init__(module)
        self.nodes = frozenset(nodes)
        self.grams: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if n.name in self.nodes:
            assert isinstance(out, Tensor)
            features = out.flatten(1)
            features = features - features.mean(0)  # changes no estimate, only what is lost to rounding
            self.grams[n.name] = (features @ features.T).double()
        return out
