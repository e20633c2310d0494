"""gated(problem, module, share) -> CloneModule: a clone with a router that spares it images of old classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from netclone.cloning.modules import CloneModule
from netclone.cloning.placing import features_at
from netclone.cloning.problem import Problem
from netclone.files.spec import Gate
from netclone.graph.tracing import logits_node, shape_of
from netclone.learning.routing import fit_router


def gated(problem: Problem, module: CloneModule, share: float) -> CloneModule:
    """The clone with a router, fitted on the clone set, that leaves out a share of the old classes' images.

    Raises
    ------
    DataError
        If there are too few samples.
    """
    reads = [before_logits(problem.target)]
    by = problem.batch_size, problem.workers
    rows = torch.cat([problem.train, problem.validation])
    seen = features_at(problem.target, problem.images[rows], [node.name for node in reads], *by)
    found = fit_router(
        list(seen.values()),
        problem.labels[rows],
        problem.shows[rows],
        old=problem.logits.shape[1],
        share=share,
        generator=torch.Generator().manual_seed(problem.seed),
    )
    shapes = tuple((node.name, shape_of(node) or ()) for node in reads)
    gate = Gate(shapes, found.skipped, found.missed)
    return CloneModule(module.body, replace(module.spec, gate=gate), found.router).eval()


def before_logits(target: fx.GraphModule) -> fx.Node:
    """The target's features ``(N, F)`` before its last layer, or its logits if it has none."""
    logits = logits_node(target)
    before = [node for node in logits.all_input_nodes if node.op != "get_attr" and len(shape_of(node) or ()) == 1]
    return before[0] if before else logits
