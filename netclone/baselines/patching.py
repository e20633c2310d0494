"""residual_patches(problem, recipe): a small trainable block after, or beside, each block of the frozen target."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netclone.baselines.finetuning import stages
from netclone.baselines.problems import InapplicableError, Problem, Recipe, classifier
from netclone.baselines.training import seeded, train_on
from netclone.errors import ArgumentError
from netclone.metrics.evaluating import predict

NARROWING = 4  # width of a patch: a quarter of the channels


class StandIn(nn.Module):
    """A module in the place of a block, with all of the block's attributes, since the model may read some."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Patched(StandIn):
    """A block with a patch ``up(relu(down(y)))`` added to its output ``y``; ``up`` is initially zero.

    The patch is two 1x1 convolutions if ``y`` is ``(N, C, H, W)``, and two linear layers if it is ``(N, T, C)``. With
    ``parallel`` it reads the block's input instead, where that has the shape of the output.
    """

    def __init__(self, block: nn.Module, output: Tensor, *, parallel: bool = False) -> None:
        super().__init__(block)
        self.parallel = parallel
        channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
        layer: Any = partial(nn.Conv2d, kernel_size=1) if output.dim() == 4 else nn.Linear
        narrow = max(1, channels // NARROWING)
        self.patch = nn.Sequential(layer(channels, narrow), nn.ReLU(), layer(narrow, channels)).to(output)
        for parameter in self.patch[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        given = inputs[0] if self.parallel and inputs else None
        y: Tensor = self.block(*inputs, **options)
        patch: Tensor = self.patch(given if given is not None and given.shape == y.shape else y)
        return y + patch


def residual_patches(problem: Problem, recipe: Recipe, *, parallel: bool = False) -> nn.Module:
    """The extended target with a bottleneck patch at each block, and a new classifier; everything else is frozen.

    Blocks are the stages of the target or, if a stage is a plain sequence of blocks, these. A patch follows its block,
    or, ``parallel``, runs beside it where input and output of the block have one shape. Patches are a quarter as wide
    as what they read. Old logits change.

    The authors have a patch for every dilated convolution of a block, or for the second alone, and here it is one for
    the whole block. Their patch is grouped: the sum of 32 bottlenecks. All of these read the same, so they are together
    one bottleneck of 32 times the width, which is the patch here. Its activation is GELU there and ReLU here. Beside a
    convolution their patch adds what it reads once more. That changes the network before anything is trained, and is
    left out.

    Raises
    ------
    ArgumentError
        If no block of the target returns a feature map or tokens.
    InapplicableError
        If patches are to run in parallel, and no block returns the shape that it reads.
    FitError
        If training diverges.

    Reference: Yuan et al., Parameter-Efficient Transfer from Sequential Behaviors for User Modeling and Recommendation
    (PeterRec, SIGIR 2020, arXiv 2001.04253), section 3.4 (model patches, inserted serially or in parallel); the
    authors' code, github.com/fajieyuan/SIGIR2020_peterrec, ``ops.py``: ``get_mp``, ``peter_2mp_serial``,
    ``peter_2mp_parallel``, ``peter_mp_serial``.
    """
    model = problem.extended_target(recipe)
    last = classifier(model, problem.columns)[1]
    outputs, alike = _outputs(model, blocks(model), problem.train.images[:1])
    if not outputs:
        raise ArgumentError(f"residual_patches: no block of {type(model).__name__} returns (N, C, H, W) or (N, T, C)")
    if parallel and not alike:
        raise InapplicableError(
            f"parallel patches: no block of {type(model).__name__} returns the shape that it reads, as a block "
            "with a patch beside it has to"
        )
    patches = []
    with seeded(recipe.seed, problem.train.images.device):
        for path, output in outputs.items():
            parent, _, name = path.rpartition(".")
            patched = Patched(model.get_submodule(path), output, parallel=parallel)
            setattr(model.get_submodule(parent), name, patched)
            patches.append(patched.patch)
    train_on(problem, model, recipe, [*(p for patch in patches for p in patch.parameters()), *last.parameters()])
    return model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules that patches may follow; single layers only if the model consists of nothing else."""
    found = {path: block for name, stage in stages(model) for path, block in _blocks(name, stage).items()}
    return {path: block for path, block in found.items() if list(block.children())} or found


def _blocks(path: str, module: nn.Module) -> dict[str, nn.Module]:
    parts = stages(module)
    if not isinstance(module, nn.Sequential) or not any(list(part.children()) for _, part in parts):
        return {path: module}
    return {p: block for name, part in parts for p, block in _blocks(f"{path}.{name}", part).items()}


def _outputs(
    model: nn.Module, chosen: dict[str, nn.Module], images: Tensor
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Each module's output for some images, if it is a feature map or tokens, and those that read the same shape."""
    seen, alike = dict[str, Tensor](), set[str]()

    def keep(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            seen[path] = output
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape == output.shape:
                alike.add(path)

    hooks = [module.register_forward_hook(partial(keep, path)) for path, module in chosen.items()]
    try:
        predict(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.empty_like(output) for path, output in seen.items()}, frozenset(alike)
