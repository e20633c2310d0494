"""learned_start(problem, recipe): the source beside the target, fitted from the mean of what earlier clones found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from netclone.baselines.frozen import rest, started, whole_source
from netclone.baselines.problems import InapplicableError, Problem, Recipe
from netclone.learning.adapting import Cached, Classifier
from netclone.learning.choosing import choose

MOST = 10
"""Earlier clones at most."""
KNOWN = 0.5
"""The share of an old class's samples that the source has to take for one class of its own, to know it."""


def learned_start(problem: Problem, recipe: Recipe) -> nn.Module:
    """The fitted gated ensemble, whose classifier starts at the mean of earlier clones instead of in closed form.

    An earlier clone is one of a single class that the source knows: one of the target's own classes, of which the
    target's logit is then hidden, or one of the new classes. Each is fitted as :func:`netclone.clone` fits a
    classifier, on the samples of this class and of the target's other ones. There are up to ten, drawn by the seed.
    They take no data beyond the problem's. Those with fewer samples than clone() fits to stay where clones start.

    A new class starts at the mean of all that is fitted of earlier clones (scale, bias, weights over standardised
    features and old logits), the clone of this class itself left out. From there it is fitted by the same
    cross-validation, whose prior, normal about the start, is a ridge towards that mean. Every sample has taken part in
    some earlier clone, so the accuracy on samples left out is a little too good.

    From the paper is that parameters for a new task come from those that were found for earlier ones. Its model is a
    diffusion transformer over parameters, of millions of checkpoints, prompted with the loss that is wanted. Here it is
    the mean, of a few, without a prompt. The adapter has no such start: its closed form is from images of all classes,
    so earlier ones could add nothing. Old logits stay the target's, to the bit.

    Raises
    ------
    InapplicableError
        If for some new class there is no other class for an earlier clone.
    OutputError
        If the source does not end in a linear layer.

    Reference: Peebles et al., Learning to Learn with Generative Models of Neural Network Checkpoints (G.pt, arXiv
    2209.12892).
    """

    def prepare(made: Classifier, seen: Cached, linear: nn.Linear) -> None:
        new = range(problem.old, problem.columns)
        taken = earlier_clones(made, seen, linear, problem.classes, recipe.seed)
        means = [mean_of_others(taken, column) for column in new]
        with torch.no_grad():
            scales, biases, weights = torch.stack(means).to(seen.logits).split([1, 1, made.linear.in_features], 1)
            made.scale.copy_(scales.mean())
            made.linear.bias.copy_(biases[:, 0])
            made.linear.weight.copy_(weights)

    return whole_source(problem, recipe, prepare)


def mean_of_others(found: Mapping[int, Tensor], column: int) -> Tensor:
    """The mean of what was found for other columns, over those that have a number; zero where none of them has.

    Raises
    ------
    InapplicableError
        If there is no other column.

    Examples
    --------
    >>> found = {0: torch.tensor([1.0, torch.nan]), 1: torch.tensor([3.0, 5.0]), 2: torch.tensor([9.0, 9.0])}
    >>> mean_of_others(found, 2)
    tensor([2., 5.])
    """
    others = [numbers for other, numbers in found.items() if other != column]
    if not others:
        raise InapplicableError("learned start: the source knows no class that an earlier clone could have been of")
    return torch.stack(others).nanmean(0).nan_to_num(0)


def earlier_clones(
    made: Classifier, seen: Cached, linear: nn.Linear, classes: tuple[int, ...], seed: int
) -> dict[int, Tensor]:
    """What is fitted of the clones of single classes, by their columns: scale, bias and weights ``(2 + F + K,)``.

    The weight of a logit that is hidden is not a number.

    Parameters
    ----------
    made
        A classifier for the new classes at its start, whose way to standardise all clones share.
    seen
        The source's features, the target's logits, and the labels of all samples.
    linear
        The source's last layer.
    classes
        The new classes, in the source.
    """
    old = seen.logits.shape[1]
    own = {**known(linear, seen, classes), **{old + i: name for i, name in enumerate(classes)}}
    generator = torch.Generator().manual_seed(seed)
    drawn = [list(own)[i] for i in torch.randperm(len(own), generator=generator).tolist()[:MOST]]
    found = {}
    for column in sorted(drawn):
        kept = [k for k in range(old) if k != column]
        alone = _without(seen, kept, column)
        others = rest(linear, alone, {*classes, own[column]})
        clone = started(alone, linear, [own[column]], others)
        if not kept or clone.gated != made.gated:
            continue
        place = _places(made, old, kept)
        clone.mean.copy_(made.mean[place])
        clone.std.copy_(made.std[place])
        choose(clone, alone, torch.arange(len(alone), device=alone.labels.device), generator)
        weights = torch.full_like(made.mean, torch.nan).index_copy(0, place, clone.linear.weight.detach()[0])
        found[column] = torch.cat([clone.scale.detach()[None], clone.linear.bias.detach(), weights])
    return found


def known(linear: nn.Linear, seen: Cached, left_out: Iterable[int]) -> dict[int, int]:
    """The source's class for each old class that it knows: most samples are taken for it, and of no other old class."""
    old = seen.logits.shape[1]
    out = torch.tensor(list(left_out), device=seen.logits.device)
    with torch.no_grad():
        taken = linear(seen.features).index_fill(1, out, -torch.inf).argmax(1)
    found = {}
    for column in seen.labels[seen.labels < old].unique().tolist():
        same = taken[seen.labels == column]
        name = int(same.mode().values)
        if name not in left_out and float((same == name).double().mean()) > KNOWN:
            found[column] = name
    names = list(found.values())
    return {column: name for column, name in found.items() if names.count(name) == 1}


def _without(seen: Cached, kept: list[int], column: int) -> Cached:
    """The samples of old classes and of one that plays new, as a target that knows only the former sees them."""
    names = torch.full((int(seen.labels.max()) + 1,), -1, device=seen.labels.device)
    names[[*kept, column]] = torch.arange(len(kept) + 1, device=names.device)
    labels = names[seen.labels]
    chosen = labels >= 0
    return Cached(seen.features[chosen], seen.logits[chosen][:, kept], labels[chosen])


def _places(made: Classifier, old: int, kept: list[int]) -> Tensor:
    """The positions among what a classifier reads of the features and of some old logits."""
    features = len(made.mean) - old
    return torch.tensor([*range(features), *(features + k for k in kept)], device=made.mean.device)
