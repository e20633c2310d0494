"""der(problem, recipe): a second network trained beside the frozen target, its channels masked, and then removed."""

from __future__ import annotations

import copy
import math
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netclone.baselines.problems import InapplicableError, Problem, Recipe, classifier
from netclone.baselines.training import seeded, train_on, weighted_cross_entropy
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask, across
from netclone.cloning.extracting import extract

STEEPEST = 10.0  # s_max, the factor of a mask's strengths at the end of training
START = 1.0  # strength of every unit before the first step
STRETCH = 10.0  # strengths are so many times their parameters: they learn that much faster than weights
AUXILIARY = 1.0  # weight of the auxiliary classifier's loss


class Masks(nn.Module):
    """A mask ``sigmoid(s e)`` with a strength ``e`` for every unit of a network's channel groups.

    ``s`` is ``steepness``. The gradient is that of ``sigmoid(e)``, so that it does not depend on ``s``. In eval mode
    masks are 0 or 1, and the strongest unit of each group stays.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        super().__init__()
        self.groups = [group for group in groups.groups if not group.dims]
        self.numbers = {unit: i + 1 for i, unit in enumerate(u for group in self.groups for u in group.units)}
        self.strengths = nn.Parameter(torch.full((len(self.numbers),), START / STRETCH))
        self.steepness = 1 / STEEPEST
        self.now = torch.ones(1 + len(self.numbers))
        """The masks of the present batch."""

    def forward(self) -> Tensor:
        """The masks ``(1 + units,)``; the first entry is 1, for channels that always stay."""
        strengths = STRETCH * self.strengths
        if self.training:
            passed = strengths.sigmoid()
            masks = (self.steepness * strengths).sigmoid().detach() + passed - passed.detach()
        else:
            masks = torch.cat(self.kept()).to(strengths) if self.groups else strengths.detach()
        return torch.cat([masks.new_ones(1), masks])

    def kept(self) -> list[Tensor]:
        """By group, whether each unit stays."""
        parts = self.strengths.detach().split([group.size for group in self.groups])
        return [(part > 0).index_fill_(0, part.argmax(), True) for part in parts]

    def numbered(self, groups: ChannelGroups, labels: Tensor) -> Tensor:
        """The two entries of the masks whose product masks each label, ``(2, labels)``."""
        known = groups.labelling.labels
        units = known.parts(known.roots(labels)).tolist()
        return torch.tensor([[self.numbers.get(unit, 0) for unit in part] for part in units])


class MaskedColumns(nn.Module):
    """A weight whose slices along an axis are masked, which masks the channels that they read."""

    index: Tensor

    def __init__(self, masks: Masks, index: Tensor, axis: int) -> None:
        super().__init__()
        self.masks, self.axis = masks, axis
        self.register_buffer("index", index)

    def forward(self, weight: Tensor) -> Tensor:
        masks = self.masks.now.to(weight)[self.index].prod(0)
        return weight * across(masks, weight, self.axis)


class Branch(nn.Module):
    """A copy of the target whose channels are masked, for ``main`` logits and those of an auxiliary classifier.

    Raises
    ------
    InapplicableError
        If some masked weight is not a parameter of the target's modules.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.main, new = copy.deepcopy(problem.target), problem.columns, len(problem.classes)
        self.model.requires_grad_(True)
        path, linear = classifier(self.model, problem.old)
        rows = nn.Linear(linear.in_features, self.main + new + 1).to(linear.weight)
        with torch.no_grad():
            rows.weight.mul_(0.01)
            rows.weight[: problem.old] = 0
            rows.bias.zero_()
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, rows) if path else setattr(self, "model", rows)
        self.images = problem.train.images[:2]
        groups = channel_groups(self.model, self.images)
        self.masks = Masks(groups).to(self.images.device)
        slots = groups.labelling.slots
        known = dict(self.model.named_parameters())
        self.axes: dict[str, list[tuple[int, Tensor]]] = {}
        for (tensor, axis), labels in slots.items():
            index = self.masks.numbered(groups, labels).to(self.images.device)
            reads = groups.labelling.roles[tensor, axis] == "in"
            if not bool((index > 0).any()):
                continue
            if reads and tensor not in known:
                raise InapplicableError(f"der: {tensor} of {type(problem.target).__name__} is no parameter to mask")
            if tensor in known:
                self.axes.setdefault(tensor, []).append((axis, index))
            if reads:
                module, _, leaf = tensor.rpartition(".")
                masked = MaskedColumns(self.masks, index, axis)
                parametrize.register_parametrization(self.model.get_submodule(module), leaf, masked)
        self.sizes = {name: tuple(known[name].shape) for name in self.axes}

    def forward(self, x: Tensor) -> Tensor:
        self.masks.now = self.masks()
        logits: Tensor = self.model(x)
        return logits

    def size(self) -> Tensor:
        """The share of the masked weights that is left."""
        masks, left, whole = self.masks.now, [], 0
        for name, axes in self.axes.items():
            shape = self.sizes[name]
            if len(shape) < 2:
                continue
            shares = [masks[index].prod(0).mean() for _, index in axes]
            left.append(math.prod(shape) * torch.stack(shares).prod())
            whole += math.prod(shape)
        return torch.stack(left).sum() / whole if left else masks.new_zeros(())

    def slim(self) -> nn.Module:
        """The branch without the masked channels and the auxiliary classifier; this one is used up by it."""
        flags = {group.name: kept.tolist() for group, kept in zip(self.masks.groups, self.masks.kept(), strict=True)}
        self.eval()
        self.masks.now = self.masks().detach()
        for module in list(self.model.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        groups = channel_groups(self.model, self.images)
        return extract(groups, ChannelMask.from_kept(groups, flags), classes=tuple(range(self.main)))


class Expanded(nn.Module):
    """Logits ``(N, K + n)`` of the target's features and of a branch's; in train mode the auxiliary ones follow."""

    def __init__(self, target: nn.Module, branch: nn.Module, columns: int) -> None:
        super().__init__()
        self.target, self.branch, self.columns = target, branch, columns

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.branch(x)
        logits: Tensor = self.target(x) + added[:, : self.columns]
        return torch.cat([logits, added[:, self.columns :]], 1) if self.training else logits


def der(problem: Problem, recipe: Recipe) -> nn.Module:
    """A classifier over the frozen target's features and those of a second network, learned from data alone.

    The second network is trained completely. An auxiliary classifier of its features alone tells the new classes from
    each other and from the old ones together. With masks ``m = sigmoid(s e)`` on channels and the steepness ``s``
    rising from ``1 / s_max`` to ``s_max``, the loss is

        L(classifier) + 1 * L(auxiliary) + sparsity * sum_l K_l |m_l-1| |m_l| / sum_l K_l c_l-1 c_l

    for layers ``l`` with kernels of ``K_l`` weights and ``c_l`` channels: the share of weights that the masks leave.
    At the end, channels whose strength is not positive are removed, and the auxiliary classifier too.

    Not as in the paper: the second network is a copy of the target, trained weights included, the most that a user can
    have without a source. A mask belongs to all channels that can only be removed together, so that they can be (the
    same throughout a chain of residual blocks), and acts where they are read. The steepness rises over the whole
    training instead of every epoch. There is no second stage that trains the classifier on balanced samples, since old
    and new ones are balanced here. Old logits change.

    Raises
    ------
    FitError
        If training diverges.
    InapplicableError
        If the target's channels cannot be masked through its parameters.

    Reference: Yan et al., DER: Dynamically Expandable Representation for Class Incremental Learning (CVPR 2021, arXiv
    2103.16788), section 3. The authors' code, github.com/Rhyssiyan/DER-ClassIL.pytorch, has the auxiliary classifier
    (``inclearn/convnet/network.py``), and is published without masks.
    """
    target = problem.extended_target(recipe)
    with seeded(recipe.seed, problem.train.images.device):
        branch = Branch(problem)
    model = Expanded(target, branch, problem.columns)
    last = classifier(target, problem.columns)[1]
    done = count(1)

    def objective(images: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        main, auxiliary = logits[:, : problem.columns], logits[:, problem.columns :]
        value = weighted_cross_entropy(main, labels, weights)
        value = value + AUXILIARY * weighted_cross_entropy(auxiliary, (labels - problem.old + 1).clamp_min(0), weights)
        value = value + recipe.sparsity * branch.size()
        branch.masks.steepness = steepness(next(done), recipe.steps)
        return value

    train_on(problem, model, recipe, [*branch.parameters(), *last.parameters()], objective=objective)
    return Expanded(target, branch.slim(), problem.columns).eval()


def steepness(done: int, steps: int) -> float:
    """The steepness of masks after so many steps: linear, from one over the steepest to the steepest.

    Examples
    --------
    >>> steepness(0, 11), steepness(10, 11)
    (0.1, 10.0)
    """
    return 1 / STEEPEST + (STEEPEST - 1 / STEEPEST) * min(1.0, done / max(1, steps - 1))
