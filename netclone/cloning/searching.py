"""search(problem, slimmed, plan): fit the planned positions, and make a clone of the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from netclone.cloning.extracting import Slimmed, module_of
from netclone.cloning.modules import CloneModule
from netclone.cloning.placing import Place, features_at, reason
from netclone.cloning.planning import Planned, none_works
from netclone.cloning.problem import Problem
from netclone.errors import NetcloneError
from netclone.files.spec import Candidate
from netclone.graph.capturing import FACTS, capture, fingerprint
from netclone.graph.cutting import classifier_rows, features_node
from netclone.graph.functionalizing import in_place_again
from netclone.graph.numbers import numbers_digests
from netclone.graph.preparing import said_preparation
from netclone.graph.quickening import for_gradients
from netclone.graph.tracing import INPUT, logits_node, position
from netclone.learning.adapting import Adapter, Branch, Cached, Classifier, fit, frozen_linear, grid_of
from netclone.learning.choosing import Choice, by_kind, classified, fit_classifier
from netclone.learning.data import in_batches
from netclone.learning.joint import SMALL, JointBranch, JointClassifier, enough, fit_joint, scorer_size

BRIEF = 25  # steps, for each candidate position
AS_GOOD = 0.01
"""How far below the input a position inside the target may be as far as one can tell: see :func:`surely_as_good`."""


@dataclass
class _Fit:
    """A candidate position with its frozen features and the branch that is trained on them."""

    place: Place
    module: CloneModule
    branch: nn.Module  # what becomes the clone's graph
    trained: Branch  # the same adapter and classifier, and a body for gradients, or none if its outputs are known
    train: Cached
    held_out: Cached
    shows: Tensor  # the sample that each row of train, and then of held_out, shows
    second: tuple[fx.Node, Tensor]  # the target's node that the classifier reads, and its value for one image
    choice: Choice | None = None  # what of the classifier was fitted, where there was something to choose

    @property
    def closed(self) -> bool:
        """Whether the classifier alone is fitted: a convex problem, solved at once and not in epochs."""
        return isinstance(self.trained.adapter, nn.Identity)

    def right(self, problem: Problem) -> Tensor:
        """Whether each held-out sample is given its class ``(N,)``."""
        by = problem.batch_size, problem.workers
        return classified(self.trained, self.train, self.held_out, self.choice, *by)

    def run(self, problem: Problem, epochs: int, how: str = "") -> float:
        """Fit and return the validation score; a second call for an adapter goes on where the first ended."""
        loop, calibrate = problem.loop(f"fit at {self.place.at}{how}"), "calibration" not in problem.recipe.without
        if not self.closed or not epochs:
            return fit(self.trained, self.train, self.held_out, epochs=epochs, calibrate=calibrate, loop=loop)
        score, self.choice = fit_classifier(
            self.trained, self.train, self.held_out, self.shows, calibrate=calibrate, loop=loop
        )
        loop.tell(epochs, epochs)
        return score

    def resumed(self, problem: Problem, epochs: int) -> float:
        """As :meth:`run`; takes weights and score from an earlier process if it got that far."""
        if self.closed:
            return self.run(problem, epochs)
        name, parts = f"fit at {self.place.at}", nn.ModuleList([self.trained.adapter, self.trained.classifier])
        findings = problem.run.found
        found = findings.recall(name)
        if found is not None:
            parts.load_state_dict(found[0])
            return found[1]
        score = self.run(problem, epochs)
        findings.keep(name, parts.state_dict(), score)
        return score


def search(
    problem: Problem,
    slimmed: Slimmed,
    plan: Sequence[Planned],
) -> CloneModule:
    """Fit candidates briefly, deep to shallow, until validation stops improving, then the input; fit the best fully.

    A position inside the target is better than the input only if it is surely as good.
    """
    tried: list[Candidate] = []
    stopped = False
    best: tuple[float, _Fit] | None = None
    brief = sum(one.reason is None for one in plan) > 1 and problem.recipe.epochs > 1
    epochs, train = (1, problem.some(BRIEF * problem.batch_size)) if brief else (problem.recipe.epochs, problem.train)
    for number, one in enumerate(plan):
        place = one.place
        if one.reason is not None:
            tried.append(Candidate(place.at, one.cut, None, one.reason))
            continue
        if stopped and place.at != INPUT:
            continue
        problem.run.tell(f"fit at {place.at}", 0, epochs)
        try:
            candidate = _candidate(problem, slimmed, place, one.cut, train)
            score = candidate.resumed(problem, epochs)
        except NetcloneError as error:
            if len(plan) == 1:
                raise
            tried.append(Candidate(place.at, one.cut, None, reason(error)))
            continue
        tried.append(Candidate(place.at, one.cut, score))
        problem.run.tell("search", number + 1, len(plan))
        if place.at == INPUT and best is not None:
            inside = best[1].right(problem)
            better = not surely_as_good(inside, candidate.right(problem), candidate.held_out)
        else:
            better = best is None or score > best[0]
        if better:
            best = score, candidate
        else:
            stopped = problem.recipe.search != "all"
    if best is None:
        raise none_works(tried)
    problem.run.tell("search", len(plan), len(plan))
    score, chosen = best
    if brief:
        some = len(train) < len(problem.train)
        if some:
            chosen = _candidate(problem, slimmed, chosen.place, chosen.module.source_at, problem.train)
        if some or not chosen.closed:
            score = chosen.run(problem, problem.recipe.epochs, ", longer")
    kinds = by_kind(chosen.held_out, chosen.right(problem))
    scores = (("validation", score), *kinds, *(chosen.choice.told() if chosen.choice else ()))
    return _finished(problem, chosen).with_spec(scores=scores, search=tuple(tried))


def surely_as_good(right: Tensor, others: Tensor, held_out: Cached) -> bool:
    """Whether one score is no lower than another, nor more than ``AS_GOOD`` lower if it was lucky by a standard error.

    Both are balanced accuracies on the same samples. ``right (N,)`` and ``others (N,)`` say which get their class. One
    more of the old samples and one more of the new ones is taken to be classified otherwise: without, two samples would
    be as sure as two thousand.
    """
    gains = right.double() - others.double()
    is_old = held_out.labels < held_out.logits.shape[1]
    kinds = [gains[kind] for kind in (is_old, ~is_old) if bool(kind.any())]
    mean = sum(float(kind.mean()) for kind in kinds) / len(kinds)
    variance = sum((float(kind.square().sum()) + 1) / len(kind) ** 2 for kind in kinds) / len(kinds) ** 2
    return mean >= 0 and mean - math.sqrt(variance) >= -AS_GOOD


def _candidate(problem: Problem, slimmed: Slimmed, place: Place, source_at: str | None, samples: Tensor) -> _Fit:
    """A position with adapter and classifier at their closed-form start, ready to be fitted."""
    module = module_of(slimmed, source_at, features_only=True).with_spec(classes=problem.classes)
    module.body.requires_grad_(False)
    by = problem.batch_size, problem.workers

    def seen(index: Tensor) -> Cached:
        features = problem.images[index]
        if source_at is not None:
            features = features_at(problem.target, features, [place.node], problem.batch_size, problem.workers)[
                place.node
            ]
        return Cached(features.contiguous(), problem.logits[index], problem.labels[index])

    train, held_out = seen(samples), seen(problem.validation)
    adapter: Adapter | nn.Identity = nn.Identity()
    if source_at is not None:  # its outputs should match the slim source's features at the cut
        node = position(problem.groups.graph_module, source_at).name
        wanted = features_at(
            slimmed.graph_module, problem.images[samples], [node], problem.batch_size, problem.workers
        )[node]
        adapter = Adapter(grid_of(place.shape), grid_of(module.spec.input_shape)).to(train.logits)
        if "adapter_start" not in problem.recipe.without:
            adapter.solve(train.features, wanted)
    branch = nn.Sequential(adapter, module.body)
    features = in_batches(branch, train.features, *by)
    both = "target_stream" not in problem.recipe.without
    classifier = Classifier(features.shape[1], train.logits.shape[1], len(problem.classes), both).to(train.logits)
    rest = () if "calibration" in problem.recipe.without else problem.rest
    weight, bias = classifier_rows(slimmed.graph_module, problem.classes + rest) or (None, None)
    classifier.start(features, train.logits, weight, bias)
    whole = Branch(adapter, module.body, classifier)
    trained = Branch(adapter, for_gradients(module.body), classifier)
    if source_at is None:  # nothing before the classifier is trained, so its inputs are computed once
        trained = Branch(adapter, nn.Identity(), classifier)
        train = replace(train, features=features)
        held_out = replace(held_out, features=in_batches(branch, held_out.features, *by))
    shows = torch.cat([problem.shows[samples], problem.shows[problem.validation]])
    second = logits_node(problem.target), problem.logits[:1]
    made = _Fit(place, module, whole, trained, train, held_out, shows, second)
    return _jointly(problem, made, samples) or made


def _jointly(problem: Problem, made: _Fit, samples: Tensor) -> _Fit | None:
    """The candidate with a classifier of old and new classes, where the source knows the new ones alone.

    None: the source knows others, the classifier is not all that is fitted, it would be no small part of the source,
    there are too few samples, or the target's features are not known or do not give its logits by the last layer's
    weights alone.
    """
    features, rows = features_node(problem.target), classifier_rows(problem.target, range(problem.logits.shape[1]))
    labels = torch.cat([made.train.labels, made.held_out.labels])
    alone = problem.joint and not problem.rest and not {"calibration", "target_stream"} & set(problem.recipe.without)
    if not alone or not made.closed or features is None or rows is None:
        return None
    size = scorer_size(made.train.features.shape[1] + rows[0].shape[1], len(rows[0]) + len(problem.classes))
    if size > SMALL * problem.macs or not enough(labels, made.shows, problem.logits.shape[1]):
        return None
    read = [
        features_at(problem.target, problem.images[index], [features.name], problem.batch_size, problem.workers)
        for index in (samples, problem.validation)
    ]
    train, held_out = (
        replace(part, features=torch.cat([part.features, seen[features.name]], 1))
        for part, seen in zip((made.train, made.held_out), read, strict=True)
    )
    head, example = frozen_linear(*rows), read[0][features.name][:1]
    if not _gives(head, read[0][features.name], made.train.logits):
        return None
    new = len(problem.classes)
    joint = fit_joint(train, held_out, example.shape[1], made.shows, classes=new, seed=problem.seed)
    return replace(
        made,
        branch=JointBranch(made.module.body, JointClassifier(joint.scorer, head, joint.gate)),
        trained=joint.branch,
        train=joint.train,
        held_out=joint.held_out,
        second=(features, example),
    )


def _gives(head: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    """Whether a linear layer gives these logits; a hook, or a later write in place, changes what the target's gives."""
    off = (head(features) - logits).abs().max()
    return bool(off <= torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max())


def _finished(problem: Problem, chosen: _Fit) -> CloneModule:
    """The clone as one operator graph, with its spec."""
    place = problem.images[:1] if chosen.module.source_at is None else chosen.train.features[:1]
    node, second = chosen.second
    body = capture(chosen.branch, *(torch.cat([one, one]) for one in (place, second)))
    body.meta[FACTS].pop("example")
    in_place_again(body)
    fitted = CloneModule(body, chosen.module.spec).with_spec(
        at=chosen.place.at,
        input_shape=chosen.place.shape,
        feature_node=node.name,
        feature_shape=tuple(second.shape[1:]),
        target_input_shape=tuple(problem.images.shape[1:]),
        target_fingerprint=fingerprint(problem.target),
        target_digests=numbers_digests(problem.target),
        target_preparation=said_preparation(problem.target, tuple(problem.images.shape[1:])),
    )
    return fitted.eval()
