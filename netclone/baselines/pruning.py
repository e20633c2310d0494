"""Pruning a source for a sub-problem: by a mask or by Torch-Pruning; then fine-tuned, or distilled as a clone is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from netclone.arguments import Method
from netclone.baselines.problems import InapplicableError, Recipe
from netclone.baselines.subproblems import Part, SubProblem, Told
from netclone.baselines.training import train
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import refit, slim_down
from netclone.errors import ArgumentError, first_line
from netclone.graph.calls import arguments
from netclone.graph.counting import MacCounter
from netclone.graph.quickening import for_gradients
from netclone.learning.data import Samples
from netclone.learning.distilling import distill
from netclone.learning.localizing import FROM_SAMPLES, localize
from netclone.learning.neighbourhoods import Neighbourhoods
from netclone.learning.stepping import Loop

aten = torch.ops.aten

TRIES = 12  # halvings of the range of ratios that Torch-Pruning is given, to come near a number of MACs


def masked(problem: SubProblem, method: Method, keep: float, seed: int = 0) -> ChannelMask:
    """The mask of :func:`netclone.localize` for a share of the MACs, as :func:`netclone.clone` asks for it.

    Raises
    ------
    InapplicableError
        If the budget cannot be reached.
    """
    try:
        return localize(
            problem.groups,
            [(problem.shown.images, problem.shown.labels)] if method in FROM_SAMPLES else None,
            classes=problem.classes,
            method=method,
            keep=keep,
            budget="macs",
            allocation="global" if method == "taylor" else None,
            seed=seed,
            augment=problem.augment,
        )
    except ArgumentError as error:
        raise InapplicableError(str(error)) from error


def plain(problem: SubProblem, mask: ChannelMask) -> Part:
    """The slim network as it is, with the source's weights."""
    slimmed = slim_down(problem.groups, mask, problem.columns)
    return Part(slimmed.graph_module, Told(slimmed.columns, problem.classes))


def distilled(problem: SubProblem, mask: ChannelMask, recipe: Recipe) -> Part:
    """The slim network refitted by least squares, then distilled from the source without labels, as a clone's body is.

    ``recipe.lr`` plays no part: the learning rate of a clone is a constant.

    Reference: docs/adr/0005-distilled-refit.md.
    """
    slimmed = slim_down(problem.groups, mask, problem.columns)
    slimmed = refit(slimmed, Samples(problem.shown.images, problem.shown.labels, "data"), None)
    distill(
        slimmed.graph_module,
        problem.groups.graph_module,
        Neighbourhoods(problem.shown.images, problem.weights(problem.train.labels), problem.augment),
        problem.held_out.images,
        columns=slimmed.columns,
        steps=recipe.steps,
        loop=Loop(recipe.batch_size, torch.Generator().manual_seed(recipe.seed)),
    )
    return Part(slimmed.graph_module, Told(slimmed.columns, problem.classes))


def finetuned(problem: SubProblem, part: Part, recipe: Recipe) -> Part:
    """A copy trained on labels by cross entropy, as pruned networks usually are.

    The best of eight moments on validation is kept. BatchNorms take each batch's statistics in training.

    Raises
    ------
    FitError
        If training diverges.
    """
    made = copy.deepcopy(part)
    body = made.body
    if isinstance(body, fx.GraphModule):
        made.body = _ByBatch(body)
    train(
        made,
        problem.train,
        recipe,
        augment=problem.augment,
        validation=problem.validation,
        old=problem.old,
        parameters=[parameter for parameter in made.parameters() if parameter.is_floating_point()],
    )
    if isinstance(made.body, _ByBatch):
        body.load_state_dict(made.body.evaluated.state_dict())
        made.body = body
    return made


def torch_pruned(problem: SubProblem, keep: float) -> Part:
    """A copy of the source, pruned by Torch-Pruning to at most a share of its MACs, by the norms of groups, globally.

    The classifier keeps its outputs. The ratio is the least of those tried with which the MACs are within the budget.

    Raises
    ------
    InapplicableError
        If Torch-Pruning is not installed, or fails on this network, or does not come within the budget.

    Reference: Fang et al., DepGraph: Towards Any Structural Pruning (CVPR 2023).
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise InapplicableError("torch-pruning is not installed; pip install torch-pruning") from error
    image = problem.shown.images[:1]
    whole = macs(problem.source, image)

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(problem.source).eval()
        last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == problem.outputs]
        torch_pruning.pruner.MagnitudePruner(
            model,
            image,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=True,
            ignored_layers=last,
        ).step()
        return model

    found: nn.Module | None = None
    low, high = 0.0, 1.0
    for _ in range(TRIES):
        middle = (low + high) / 2
        try:
            model = pruned(middle)
            size = macs(model, image)
        except Exception as error:  # whatever another library raises
            raise InapplicableError(
                f"torch-pruning fails on this network ({type(error).__name__}: {first_line(error)})"
            ) from error
        if size <= keep * whole:
            found, high = model, middle
        else:
            low = middle
    if found is None:
        raise InapplicableError(f"torch-pruning does not leave {keep:.3g} of the MACs or less")
    return Part(found, Told(tuple(range(problem.outputs)), problem.classes))


def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates for one image ``(1, ...)``."""
    with MacCounter() as counter, torch.no_grad():
        model(image)
    return int(counter.macs)


class _ByBatch(nn.Module):
    """A slim graph whose BatchNorms take the statistics of each batch in train mode, and running ones in eval mode."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.evaluated = for_gradients(graph_module)
        self.trained = fx.GraphModule(self.evaluated, copy.deepcopy(self.evaluated.graph))  # the same tensors
        for node in self.trained.graph.nodes:
            if node.target is aten.batch_norm.default:
                given = list(arguments(node))
                given[5] = True
                node.args = tuple(given)
        self.trained.recompile()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = (self.trained if self.training else self.evaluated)(images)
        return logits
