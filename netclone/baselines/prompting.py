"""Visual prompts: tokens that are learned beside those of a frozen vision transformer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netclone.baselines.patching import StandIn, blocks
from netclone.baselines.problems import InapplicableError, Problem, Recipe, classifier
from netclone.baselines.training import seeded, train_on
from netclone.metrics.evaluating import predict


class Prompted(StandIn):
    """A transformer block that sees prompts ``(P, C)`` behind the first token, or hands on those of an earlier one.

    With ``inserts=False`` there are prompts among its tokens already, and with ``removes=False`` they stay there.
    """

    def __init__(self, block: nn.Module, prompts: Tensor, *, inserts: bool = True, removes: bool = True) -> None:
        super().__init__(block)
        self.prompts = nn.Parameter(prompts) if inserts else None
        self.count, self.removes = len(prompts), removes

    def forward(self, tokens: Tensor, *inputs: Any, **options: Any) -> Tensor:
        if self.prompts is not None:
            prompts = self.prompts.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
        out: Tensor = self.block(tokens, *inputs, **options)
        return torch.cat([out[:, :1], out[:, 1 + self.count :]], 1) if self.removes else out


class Similar(nn.Module):
    """Scores ``(N, classes)``: the weighted mean cosine between features ``(N, F)`` and each class's own tokens.

    The weights of a class's ``T`` tokens ``(classes, T, F)`` sum up to 1; a common scale is learned too.
    """

    def __init__(self, tokens: Tensor, scale: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.weights = nn.Parameter(tokens.new_zeros(tokens.shape[:2]))
        self.scale = nn.Parameter(tokens.new_tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        cosines = torch.einsum("nf,ctf->nct", F.normalize(features), F.normalize(self.tokens, dim=2))
        return self.scale * (cosines * self.weights.softmax(1)).sum(2)


def visual_prompts(problem: Problem, recipe: Recipe, *, depth: Literal["shallow", "deep"]) -> nn.Module:
    """The extended target with ``recipe.prompts`` learned tokens among its own, and a new classifier.

    Shallow: they are put in before the first block and run through all of them, ``[x_1, Z_1, E_1] = L_1([x_0, P,
    E_0])`` and ``[x_i, Z_i, E_i] = L_i([x_i-1, Z_i-1, E_i-1])``, for the class token ``x``, the patches' tokens ``E``
    and the block ``L_i``. Deep: every block has prompts of its own, whose outputs are left out, ``[x_i, _, E_i] =
    L_i([x_i-1, P_i-1, E_i-1])``. They start uniform, with the variance of the paper's code. Everything else is frozen.
    What reads the tokens behind the last block sees no prompts. The paper's class token is the only reader there. Old
    logits change.

    Raises
    ------
    FitError
        If training diverges.
    InapplicableError
        If the target is not made of blocks that mix any number of tokens, or, shallow, of one width.

    Reference: Jia et al., Visual Prompt Tuning (ECCV 2022, arXiv 2203.12119), section 3.2; the authors' code,
    github.com/KMnP/vpt, ``src/models/vit_prompt/vit.py``: ``incorporate_prompt``, ``forward_deep_prompt``.
    """
    model = problem.extended_target(recipe)
    last = classifier(model, problem.columns)[1]
    with seeded(recipe.seed, problem.train.images.device):
        prompts = _insert(model, problem.train.images[:1], recipe.prompts, depth)
    train_on(problem, model, recipe, [*prompts, *last.parameters()])
    return model


def class_prompts(problem: Problem, recipe: Recipe) -> nn.Module:
    """Deep prompts of which every class has its own, and scores by the similarity to tokens of each class.

    Every block sees ``recipe.prompts`` tokens for each of the ``K + n`` classes. The classifier is replaced by the
    weighted mean cosine between the features that it read and as many further tokens of each class, times a scale.
    These start as the classifier's rows, with noise.

    From the paper are the prompts that belong to classes, in all blocks, and the aggregation of similarities. It
    segments: its similarities are those of every pixel's embedding, and its network has windows and a decoder. Here
    there is one embedding per image. Old logits change, and are others from the start.

    Raises
    ------
    FitError
        If training diverges.
    InapplicableError
        If the target is not made of blocks that mix any number of tokens.

    Reference: Fischer, Bartler and Yang, Prompt Tuning for Parameter-efficient Medical Image Segmentation (arXiv
    2211.09233), the parts on prompt tokens and similarity aggregation.
    """
    model = problem.extended_target(recipe)
    path, last = classifier(model, problem.columns)
    with seeded(recipe.seed, problem.train.images.device):
        prompts = _insert(model, problem.train.images[:1], recipe.prompts * problem.columns, "deep")
        rows = last.weight.detach()[:, None].repeat(1, recipe.prompts, 1)
        rows = F.normalize(rows, dim=2)
        similar = Similar(rows + torch.randn_like(rows) / math.sqrt(rows.shape[2]) / 10, 10.0)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, similar)
    train_on(problem, model, recipe, [*prompts, *similar.parameters()])
    return model


def _insert(model: nn.Module, images: Tensor, count: int, depth: Literal["shallow", "deep"]) -> list[nn.Parameter]:
    """Put prompts into a transformer's blocks, and return them."""
    found = token_blocks(model, images)
    widths = {tokens.shape[2] for tokens in found.values()}
    if not found or (depth == "shallow" and len(widths) > 1):
        raise InapplicableError(
            f"visual prompts: {type(model).__name__} is not made of blocks that mix any number of tokens (N, T, C) of "
            "one width; they are for vision transformers"
        )
    patch = next((m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d)), 0)
    prompts = []
    for i, (path, tokens) in enumerate(found.items()):
        bound = math.sqrt(6 / (patch + tokens.shape[2]))
        fresh = tokens.new_empty(count, tokens.shape[2]).uniform_(-bound, bound)
        ends = {"inserts": i == 0, "removes": i == len(found) - 1} if depth == "shallow" else {}
        prompted = Prompted(model.get_submodule(path), fresh, **ends)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, prompted)
        if prompted.prompts is not None:
            prompts.append(prompted.prompts)
    return prompts


def token_blocks(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Paths of the blocks that mix tokens, any number of them, with the tokens ``(N, T, C)`` that each sees."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        given = inputs[0] if inputs else None
        if isinstance(given, Tensor) and given.dim() == 3 and isinstance(output, Tensor):
            seen[path] = given.detach()

    chosen = blocks(model)
    hooks = [block.register_forward_hook(partial(keep, path)) for path, block in chosen.items()]
    try:
        predict(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: tokens for path, tokens in seen.items() if _mixes(chosen[path], tokens)}


def _mixes(block: nn.Module, tokens: Tensor) -> bool:
    """Whether a block takes one token more, and the outputs of the others then change."""
    more = torch.cat([tokens, torch.randn_like(tokens[:, :1])], 1)
    with torch.no_grad():
        try:
            before, after = block(tokens), block(more)
        except Exception:  # a block may raise anything for another number of tokens
            return False
    if before.shape != tokens.shape or after.shape != more.shape:
        return False
    return not torch.allclose(before, after[:, : tokens.shape[1]])
