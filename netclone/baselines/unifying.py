"""unified(problem, recipe): target and source unified into one network, from images without labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netclone.baselines.distilling import TEMPERATURE, taught
from netclone.baselines.finetuning import finetuned
from netclone.baselines.problems import Problem, Recipe
from netclone.metrics.evaluating import predict


@dataclass(frozen=True)
class Teacher:
    """A classifier of some of the classes: ``columns (M,)`` of its logits, and what each of them covers.

    ``cover (classes, M)`` is true where a class of the unified network belongs to a column.
    """

    model: nn.Module
    columns: Tensor
    cover: Tensor

    def disagreement(self, images: Tensor, logits: Tensor) -> Tensor:
        """The mean cross entropy between this classifier and the unified logits, restricted to what it covers."""
        wanted = (taught(self.model, images)[:, self.columns] / TEMPERATURE).softmax(1)
        return -(wanted * restricted(logits / TEMPERATURE, self.cover)).sum(1).mean()


def unified(problem: Problem, recipe: Recipe) -> nn.Module:
    """The extended target, trained so that its probabilities among any network's classes are that network's.

    With ``p_i`` the probabilities of classifier ``i`` over its own classes ``L_i``, and ``q`` those of the unified
    network over all of them, the loss is the sum over the classifiers of the cross entropy between ``p_i`` and
    ``q(l) / sum_{k in L_i} q(k)``. The target's classes are the old ones. The source's are the new ones, and those that
    it takes the target's classes for: for each class that the target predicts, the one that the source predicts most
    often beside it. Without these, nothing would tell new classes from old ones.

    No label is used, except those of the validation samples, which choose the recipe and the moment. The paper's
    network starts at random and here as the extended target, and the paper first estimates soft labels from the
    classifiers, while here the network itself minimises the cross entropy. It also balances the classes, which needs
    many more images. The temperature of 2 is ours. Old logits change.

    Raises
    ------
    ArgumentError
        If ``recipe.frozen`` leaves no stage.
    FitError
        If training diverges.

    Reference: Vongkulbhisal et al., Unifying Heterogeneous Classifiers with Distillation (CVPR 2019, arXiv 1904.06062),
    the approach by cross entropy.
    """
    teachers = _teachers(problem)

    def objective(images: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([teacher.disagreement(images, logits) for teacher in teachers]).sum()

    return finetuned(problem, recipe, objective=objective)


def restricted(logits: Tensor, cover: Tensor) -> Tensor:
    """Log-probabilities ``(N, M)`` of logits ``(N, classes)`` among the classes of a ``cover (classes, M)``.

    Examples
    --------
    >>> logits = torch.tensor([[0.1, 0.3, 0.6]]).log()
    >>> cover = torch.tensor([[True, False], [False, True], [False, True]])
    >>> restricted(logits, cover).exp()
    tensor([[0.1000, 0.9000]])
    >>> restricted(logits, cover[:, 1:]).exp()
    tensor([[1.]])
    """
    covered = (logits[:, :, None] + cover.to(logits).log()).logsumexp(1)
    return covered - covered.logsumexp(1, keepdim=True)


def _teachers(problem: Problem) -> list[Teacher]:
    images = problem.train.images
    target, source = (copy.deepcopy(model).eval() for model in (problem.target, problem.source))
    same = counterparts(predict(target, images), predict(source, images), problem.classes)
    columns = [*problem.classes, *sorted(set(same.values()))]
    cover = torch.zeros(problem.columns, len(columns), dtype=torch.bool, device=images.device)
    for i in range(len(problem.classes)):
        cover[problem.old + i, i] = True
    for old, column in same.items():
        cover[old, columns.index(column)] = True
    own = torch.eye(problem.columns, problem.old, dtype=torch.bool, device=images.device)
    return [
        Teacher(target, torch.arange(problem.old, device=images.device), own),
        Teacher(source, torch.tensor(columns, device=images.device), cover),
    ]


def counterparts(target: Tensor, source: Tensor, classes: tuple[int, ...]) -> dict[int, int]:
    """The source's class that each of the target's is mostly taken for, from logits of the same images.

    Images that the source takes for one of ``classes`` do not count. A target class that is predicted for none of the
    others has no counterpart.

    Examples
    --------
    >>> counterparts(torch.eye(2)[[0, 0, 1, 1, 1]], torch.eye(4)[[3, 3, 0, 0, 2]], (2,))
    {0: 3, 1: 0}
    """
    mine, theirs = target.argmax(1), source.argmax(1)
    others = ~torch.isin(theirs, torch.tensor(classes, device=theirs.device))
    return {
        old: int(theirs[others & (mine == old)].mode().values)
        for old in range(target.shape[1])
        if bool((others & (mine == old)).any())
    }
