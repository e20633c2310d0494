"""finetune(problem, recipe): train the extended target on old and new samples, completely or from some depth on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from netclone.baselines.problems import Problem, Recipe, classifier
from netclone.baselines.training import Objective, train_on
from netclone.errors import ArgumentError


def finetune(problem: Problem, recipe: Recipe) -> nn.Module:
    """The extended target with all layers trained, except those of the first ``recipe.frozen`` stages.

    With all stages but the last frozen, this is a linear probe. On a problem that holds all of the data, it is joint
    training, the upper bound. Old logits change.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    FitError
        If training diverges.

    Examples
    --------
    >>> import timm, torch
    >>> from netclone.learning.data import Samples
    >>> target = timm.create_model("test_resnet", num_classes=3)
    >>> source = timm.create_model("test_resnet", num_classes=5)
    >>> samples = Samples(torch.randn(10, 3, 64, 64), torch.arange(10) % 5, "data")
    >>> problem = Problem(target, source, (3, 4), train=samples, validation=samples)
    >>> finetune(problem, Recipe(lr=1e-3, steps=1, frozen=2))(samples.images).shape
    torch.Size([10, 5])
    """
    return finetuned(problem, recipe)


def finetuned(
    problem: Problem,
    recipe: Recipe,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    objective: Objective | None = None,
) -> nn.Module:
    """As :func:`finetune`, with a further term ``loss(images, logits)``, or another objective (see :func:`train`)."""
    model = problem.extended_target(recipe)
    train_on(problem, model, recipe, unfrozen(problem, model, recipe), loss, objective)
    return model


def unfrozen(problem: Problem, model: nn.Module, recipe: Recipe) -> list[nn.Parameter]:
    """The parameters of an extended target that are trained: those of no frozen stage, and the classifier's.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    """
    parts = stages(model)
    if recipe.frozen >= len(parts):
        raise ArgumentError(
            f"recipe: frozen is {recipe.frozen}, expected 0 to {len(parts) - 1}: the stages are "
            f"{', '.join(name for name, _ in parts)}"
        )
    frozen = {id(parameter) for _, part in parts[: recipe.frozen] for parameter in part.parameters()}
    if recipe.frozen:
        frozen |= {id(parameter) for parameter in model.parameters(recurse=False)}
    frozen -= {id(parameter) for parameter in classifier(model, problem.columns)[1].parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in frozen]


def stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The top-level children with parameters, from the input on. Freezing depths are 0 to their number minus one.

    Parameters of the model itself (a class token) belong to the first.
    """
    return [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
