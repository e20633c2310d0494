"""Problem: what every candidate position of a clone needs, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn

from netclone.channels.grouping import ChannelGroups
from netclone.cloning.recipe import Recipe
from netclone.errors import ArgumentError
from netclone.graph.counting import MacCounter
from netclone.graph.cutting import features_node
from netclone.graph.outputs import Output
from netclone.graph.tracing import logits_node, shape_of, trace
from netclone.learning.data import Samples, balance, in_batches, mostly_taken_for
from netclone.learning.neighbourhoods import drawn, viewed
from netclone.learning.stepping import Loop
from netclone.runtime.context import Run
from netclone.runtime.sharing import Workers

VIEWS, MOST_VIEWS = 2, 2048  # augmented views of each training sample, and in all at most
MOST_REST, REST_MASS = 64, 0.999  # other source classes that a clone keeps: at most, and of what probability


@dataclass(frozen=True)
class Problem:
    """What every candidate position needs, computed once."""

    target: fx.GraphModule
    groups: ChannelGroups
    clone_set: tuple[Samples, ...]  # training samples with the source's labels; old ones as it sees them
    images: Tensor
    labels: Tensor  # columns of the grafted model
    shows: Tensor  # for each image the sample that it shows: itself, or the one it is a view of
    train: Tensor  # indices into images
    validation: Tensor
    classes: tuple[int, ...]
    rest: tuple[int, ...]  # the source's classes that the cloned ones have to be told apart from
    logits: Tensor  # the target's
    recipe: Recipe
    run: Run
    seed: int
    joint: bool = True  # whether a classifier may read the target's features too, for which it needs more parameters

    @classmethod
    def of(
        cls,
        target: nn.Module,
        groups: ChannelGroups,
        samples: tuple[Samples, Samples | None],
        classes: tuple[int, ...],
        *,
        recipe: Recipe,
        run: Run,
        seed: int,
        output: Output = None,
    ) -> Problem:
        """The problem for samples of the new classes and, if there are any, of the target's own."""
        new, old = samples
        traced = trace(target, new.images[:2], output=output).eval()
        width = (shape_of(logits_node(traced)) or (0,))[0]
        if old is not None:
            old.check_labels(width, "target")
        generator = torch.Generator().manual_seed(seed)
        columns = {c: width + i for i, c in enumerate(classes)}
        labels = torch.tensor([columns[int(label)] for label in new.labels], device=new.labels.device)
        images = new.images
        if old is not None:
            images, labels = torch.cat([old.images, images]), torch.cat([old.labels, labels])
        train, held_out = split(labels, recipe.validation, generator)
        first_new = 0 if old is None else len(old)
        own = train[train >= first_new] - first_new
        clone_set: tuple[Samples, ...] = (Samples(new.images[own], new.labels[own], "data"),)
        others = sorted(set(range(groups.outputs)) - set(classes))
        rest: tuple[int, ...] = ()
        if others:
            around = clone_set[0].images if old is None else old.images[train[train < first_new]]
            logits = in_batches(groups.graph_module, around, recipe.batch_size, run.workers)[:, others]
            if old is None:
                nearest = _most_likely(logits)
            else:
                nearest = mostly_taken_for(logits, old.labels[train[train < first_new]])
                likely = torch.tensor(others, device=logits.device)[logits.argmax(1)]
                clone_set += (Samples(around, likely, "target_data"),)
            rest = tuple(others[i] for i in nearest)
        return cls(
            target=traced,
            groups=groups,
            clone_set=clone_set,
            images=images,
            labels=labels,
            shows=torch.arange(len(images), device=images.device),
            train=train,
            validation=held_out,
            classes=classes,
            rest=rest,
            logits=in_batches(traced, images, recipe.batch_size, run.workers),
            recipe=recipe,
            run=run,
            seed=seed,
        )

    @cached_property
    def macs(self) -> int:
        """The source's multiply-accumulates for one image."""
        with torch.no_grad(), MacCounter() as counter:
            self.groups.graph_module(self.images[:1])
        return int(counter.macs)

    @property
    def workers(self) -> Workers:
        """The processes that share the work."""
        return self.run.workers

    @property
    def batch_size(self) -> int:
        """Samples in one step."""
        return self.recipe.batch_size

    def loop(self, what: str) -> Loop:
        """How a loop of steps is run, with a name for its progress."""
        return Loop(
            batch_size=self.recipe.batch_size,
            generator=torch.Generator().manual_seed(self.seed),
            workers=self.run.workers,
            precision=self.recipe.precision,
            progress=partial(self.run.tell, what),
        )

    def with_views(self) -> Problem:
        """The same problem with augmented views of the training samples added, fitted in as many steps."""
        augment = self.recipe.augment
        if augment is None:
            return self
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(VIEWS)])[:MOST_VIEWS]
        seen = self.train[order.to(self.train.device)]
        views = viewed(augment, self.images[seen], generator)
        train = torch.cat([self.train, torch.arange(len(views), device=self.train.device) + len(self.images)])
        return replace(
            self,
            images=torch.cat([self.images, views]),
            labels=torch.cat([self.labels, self.labels[seen]]),
            shows=torch.cat([self.shows, seen]),
            logits=torch.cat([self.logits, in_batches(self.target, views, self.batch_size, self.workers)]),
            train=train,
            recipe=replace(self.recipe, epochs=math.ceil(self.recipe.epochs * len(self.train) / len(train))),
        )

    def some(self, count: int) -> Tensor:
        """At most so many training samples, half old and half new; the same ones each time."""
        weights = balance(self.labels[self.train], self.logits.shape[1])
        chosen = drawn(weights, count, torch.Generator().manual_seed(self.seed), repeat=False)
        return self.train[chosen.sort().values.to(self.train.device)]


def classifier_share(problem: Problem, keep: float) -> float:
    """The share of the source's parameters that the classifier takes: both streams, and rows for other classes."""
    head = features_node(problem.groups.graph_module)
    features = len(problem.classes) if head is None else (shape_of(head) or (0,))[0]
    weights = len(problem.classes) * (features + problem.logits.shape[1] + 1) + 1 + len(problem.rest) * (features + 1)
    share = weights / problem.groups.parameters
    if share >= keep:
        raise ArgumentError(
            f"keep: {keep} of the source's parameters is less than the classifier of {len(problem.classes)} new "
            f"classes takes, {share:.2g}; keep more, or clone fewer classes at once"
        )
    return share


def _most_likely(logits: Tensor) -> list[int]:
    """The columns that hold nearly all of the probability over some samples, most likely first."""
    shares, order = logits.softmax(1).mean(0).sort(descending=True, stable=True)
    count = int((shares.cumsum(0) < REST_MASS).sum()) + 1
    return order[: min(count, MOST_REST)].tolist()


def split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices for training and validation, split per class; a class of one sample is in both."""
    train, held_out = [], []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator).to(index.device)]
        count = min(max(1, round(share * len(index))), max(1, len(index) - 1))
        held_out.append(index[:count])
        train.append(index[count:] if len(index) > 1 else index)
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values
