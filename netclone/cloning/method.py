"""clone(source, target, data) -> CloneModule: localise, refit, search the position, fit adapter and classifier."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import Unpack

import netclone
from netclone.arguments import Budget, check_number
from netclone.channels.budgeting import check_budget
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import Slimmed, refit, slim_down
from netclone.cloning.gating import gated
from netclone.cloning.grafted import GraftedModule, clones, names_in
from netclone.cloning.injecting import remove
from netclone.cloning.modules import CloneModule
from netclone.cloning.planning import check_source, planned
from netclone.cloning.problem import Problem, classifier_share
from netclone.cloning.recipe import Recipe, RecipeFields
from netclone.cloning.searching import search
from netclone.errors import ArgumentError, DataError, UncalibratedWarning
from netclone.graph.class_names import ClassNames, check_listed
from netclone.graph.cutting import features_node
from netclone.graph.outputs import Output
from netclone.graph.tracing import INPUT
from netclone.learning.data import (
    Batches,
    Classes,
    Samples,
    balance,
    check_agreement,
    check_classes,
    check_clone_set,
    check_keep,
    check_names,
    check_new,
    check_taken,
    gather,
    in_batches,
    names_for,
)
from netclone.learning.distilling import distill
from netclone.learning.localizing import FROM_SAMPLES, localize
from netclone.learning.neighbourhoods import Neighbourhoods
from netclone.runtime.context import Run, RunFields
from netclone.runtime.dependencies import code_digest
from netclone.runtime.devices import model_on
from netclone.runtime.entering import deterministic, entered
from netclone.runtime.sharing import digest

ALIGNED = 8
"""Channels that a processor takes at once: a width in between costs as much time as the next multiple."""
REFIT = 2048  # most samples of a refit: every position of a map is an equation, so more samples add little


class Options(RecipeFields, RunFields, total=False):
    """The fields of a :class:`Recipe` and of a :class:`Run`."""


@entered()
def clone(  # noqa: PLR0913 - public
    source: nn.Module,
    target: nn.Module,
    data: Batches,
    *,
    classes: Classes,
    class_names: str | Sequence[str] = (),
    source_names: Sequence[str] = (),
    target_names: Sequence[str] = (),
    target_data: Batches | None = None,
    keep: float = 0.5,
    budget: Budget = "macs",
    at: str = "auto",
    source_at: str | None = None,
    mask: ChannelMask | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    run: Run | None = None,
    output: Output = None,
    **options: Unpack[Options],
) -> CloneModule:
    """Clone classes of a source for a target: the whole of Partial Network Cloning in one call.

    Learns the mask, searches the target position from deep to shallow, and fits adapter and classifier there. A source
    that knows the cloned classes alone gets a classifier of old and new classes, over the features of both networks.
    Source and target are not changed. Pass the result to :func:`netclone.inject` or :func:`netclone.save`.

    Parameters
    ----------
    source, target
        Modules or traced graphs. Clones that the target already holds are ignored: each reads the target alone.
    data
        The clone set: images ``(N, C, H, W)`` and labels ``(N,)`` in the source's label space. A ``DataLoader`` or any
        other iterable of batches ``(images, labels)``, a ``Dataset`` or iterable of single samples, or one pair. A pair
        may be a dictionary with ``"pixel_values"`` (or ``"images"``, ``"image"``) and ``"labels"`` (or ``"label"``).
        Arrays may be numpy's. Labels may be one-hot, or names of the source's classes. It is read once and has to end.
        Samples of other classes are ignored.
    classes
        Source classes to clone, or one: columns of the source, or names (``["heron", "ibis"]``). The new columns come
        in this order.
    class_names
        Names of the new columns, stored with the module. Left out, classes that are given by name keep that name.
    source_names, target_names
        The names of all columns of source and target, for classes and labels that are given by name. They may be left
        out if a network records them (``label_names`` of timm, ``id2label`` of transformers), or has ImageNet's.
    target_data
        Samples of the target's own classes, in its label space. Without them, new logits are calibrated against old
        ones by the source's own odds of the new classes (or, if it knows no others, by a threshold on the clone set),
        and an :class:`~netclone.errors.UncalibratedWarning` is given.
    keep, budget
        How much of the source to keep at most, in (0, 1]: a share of its MACs (``"macs"``), of its parameters
        (``"params"``), of its time on this device for ``latency_batch`` images (``"latency"``), or of the units in
        every channel group (``"channels"``). BatchNorms of what is kept are folded into the convolutions before them.
    at
        Target position. ``"input"``: the whole slim source runs beside the target. ``"auto"``: search for the best.
    source_at
        Where to cut the source. None: the cut point that matches the target position in size and depth.
    mask
        A mask made by :func:`netclone.localize`. None: one is learned by the recipe's ``method``.
    seed
        Seed of everything random.
    recipe, run
        How the clone is made (a :class:`~netclone.Recipe`), and how the run is carried out (a :class:`~netclone.Run`).
    output
        Which part of what source and target return is their logits, as for :func:`netclone.trace`. Where they differ,
        trace one of them first: graphs are taken too.
    options
        Fields of either by name, which override ``recipe`` and ``run``: ``search``, ``method``, ``effort``,
        ``mask_steps``, ``distill_steps``, ``reconstruct``, ``epochs``, ``batch_size``, ``validation``, ``augment``,
        ``without``, ``mixed_precision``, ``round_to``, ``latency_batch``, ``gate``; ``device``, ``progress``,
        ``workers``, ``findings``.

    Raises
    ------
    ArgumentError, DataError
        If an argument is out of range, or the data cannot be used.
    PositionError
        If no position works; the message gives the reason for each.
    WorkerError
        If another worker is gone, or was given different data.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> source = timm.create_model("test_efficientnet", num_classes=4)
    >>> target = timm.create_model("test_resnet", num_classes=2)
    >>> images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    >>> old = [(images, labels % 2)]
    >>> module = netclone.clone(source, target, [(images, labels)], classes=[2, 3], target_data=old,
    ...                         at="layer3", method="magnitude", epochs=1, distill_steps=10)
    >>> module.at, module.classes
    ('layer3', (2, 3))

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.
    """
    recipe, run = check_options(
        keep=keep, budget=budget, at=at, source_at=source_at, seed=seed, recipe=recipe, run=run, **options
    )
    run = run.begun()
    source, target = model_on(source, run.place), model_on(target, run.place)
    if recipe.gate is not None and target_data is None:
        raise ArgumentError("gate: it is fitted on images of the old classes too: pass some as target_data")
    for what, listed in (("source_names", source_names), ("target_names", target_names)):
        check_listed(listed, len(listed), what)
    known = {
        "source": ClassNames.given(source_names, "source") if len(source_names) else ClassNames.of(source, "source"),
        "target": ClassNames.given(target_names, "target") if len(target_names) else names_in(target),
    }
    class_names, classes = names_for(classes, class_names), known["source"].resolved(classes)
    new, old = _gathered(source, target, (data, target_data), run, known)
    own_names = known["target"].columns
    while isinstance(target, GraftedModule):
        target = remove(target, clones(target)[0])
    with deterministic():
        torch.default_generator.manual_seed(seed)
        groups = channel_groups(source, torch.cat([new.images[:2]] * 2)[:2], output=output)
        chosen = check_classes(classes, groups.outputs)
        check_listed(source_names, groups.outputs, "source_names")
        check_names(class_names, chosen)
        check_new(class_names, own_names, "class_names")
        whole, new = new, _of_clone_set(new, groups, chosen, recipe, run)
        problem = Problem.of(target, groups, (new, old), chosen, recipe=recipe, run=run, seed=seed, output=output)
        if old is not None:
            check_agreement(problem.logits[: len(old)], old, sorted(set(old.labels.tolist())), "target")
        problem = replace(problem, joint=budget != "params")  # its classifier is no small part of a small source
        check_source(groups, chosen)
        plan = planned(problem, at, source_at)
        given = mask is not None
        if mask is not None:
            mask.removed_units(groups)  # refused here if it is another network's
        learned = mask is None and budget == "params" and keep < 1  # the whole source is one plus its classifier
        share = keep - classifier_share(problem, keep) if learned else keep
        if run.found.path is not None:
            run.found.open(_key(problem, [whole, old], keep, budget, at, source_at, mask))
        mask = _localised(problem, share, budget) if mask is None else mask
        slimmed = replace(_refitted(problem, mask), fold=True)
        problem = problem.with_views()
        module = search(problem, slimmed, plan).with_spec(class_names=tuple(class_names))
        if recipe.gate is not None:
            module = gated(problem, module, recipe.gate)
        run.workers.check_same(list(module.state_dict().values()), "clone")
        asked = {"keep": keep, "budget": budget, "at": at, "source_at": source_at, "seed": seed}
        made = {"mask": "given" if given else "learned", **asked, **recipe.facts()}
        return module.with_spec(
            recipe=tuple((name, json.dumps(value)) for name, value in made.items()),
            versions=(
                ("netclone", netclone.__version__),
                *((name, version(name)) for name in ("torch", "timm", "torchvision")),
            ),
        )


def check_options(
    *,
    keep: float = 0.5,
    budget: Budget = "macs",
    at: str = "auto",
    source_at: str | None = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    run: Run | None = None,
    **options: Unpack[Options],
) -> tuple[Recipe, Run]:
    """The recipe and the run of :func:`clone`; raises for what is wrong with any networks and data.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    TypeError
        If there is no option of that name.
    """
    made = {field.name for field in fields(Recipe)}, {field.name for field in fields(Run) if field.init}
    if unknown := [name for name in options if name not in made[0] | made[1]]:
        raise TypeError(f"clone() got an unexpected keyword argument {unknown[0]!r}")
    of_recipe, of_run = (
        cast("dict[str, Any]", {name: value for name, value in options.items() if name in names}) for names in made
    )
    check_keep(keep)
    check_budget(budget)
    for what, name in (("at", at), ("source_at", source_at or "")):
        if not isinstance(name, str):
            raise ArgumentError(f"{what}: got {name!r}, expected the name of a position, such as 'layer2'")
    if at == INPUT and source_at is not None:
        raise ArgumentError(f"source_at: got {source_at!r}, but at='{INPUT}' runs the whole source; leave it out")
    check_number(seed, "seed", 0)
    return replace(recipe or Recipe(), **of_recipe), replace(run or Run(), **of_run)


def _gathered(
    source: nn.Module,
    target: nn.Module,
    data: tuple[Batches, Batches | None],
    run: Run,
    names: Mapping[str, ClassNames],
) -> tuple[Samples, Samples | None]:
    """The samples of both sides, checked: on one device, the same for every worker, and fit for both networks."""
    new = gather(data[0], "data", run.place, names["source"])
    old = None if data[1] is None else gather(data[1], "target_data", run.place, names["target"])
    if old is not None and old.format != new.format:
        raise DataError(
            f"target_data: images are {old.format}, those of data {new.format}; give both in the target's input format"
        )
    for model, role in ((source, "source"), (target, "target")):
        if isinstance(model, nn.Module):
            check_taken(model, new.images[:2], "data", role)
    if not old:
        warnings.warn(
            "clone: no target_data, so new-class logits are calibrated by the source's own odds (or a threshold on the "
            "clone set), not against the target's classes. Pass some samples of the old classes as target_data.",
            UncalibratedWarning,
            stacklevel=4,
        )
    for samples in (new, old):
        if samples is not None:
            run.workers.check_same([samples.images, samples.labels], samples.what)
    return new, old


def _of_clone_set(
    samples: Samples, groups: ChannelGroups, classes: tuple[int, ...], recipe: Recipe, run: Run
) -> Samples:
    """The samples of the classes to clone, checked to be enough to learn from."""
    samples.check_labels(groups.outputs, "source")
    check_clone_set(samples, classes)
    new = samples.of_classes(classes)
    check_agreement(in_batches(groups.graph_module, new.images, recipe.batch_size, run.workers), new, classes)
    return new


def _localised(problem: Problem, keep: float, budget: Budget) -> ChannelMask:
    """The mask from the recipe's method, or from an earlier run that was stopped."""
    run, recipe, groups = problem.run, problem.recipe, problem.groups
    if (found := run.found.recall("mask")) is not None:
        return ChannelMask.from_kept(groups, {name: flags.tolist() for name, flags in found[0].items()})
    run.tell("localize", 0, 1)
    samples = [(part.images, part.labels) for part in problem.clone_set]
    mask = localize(
        groups,
        samples if recipe.method in FROM_SAMPLES else None,
        classes=problem.classes,
        method=recipe.method,
        keep=keep,
        budget=budget,
        round_to=recipe.round_to or (ALIGNED if budget in ("macs", "latency") else 1),
        latency_batch=recipe.latency_batch,
        seed=problem.seed,
        allocation="global" if recipe.method == "taylor" and budget != "channels" else None,
        steps=recipe.mask_steps,
        batch_size=(recipe.batch_size + 1) // 2,  # each step runs the masked and the full source
        augment=recipe.augment,
        mixed_precision=recipe.mixed_precision,
        progress=partial(run.tell, "localize"),
        workers=run.workers,
        unfinished=run.found.unfinished("mask"),
    )
    kept = {name: torch.tensor(flags) for name, flags in mask.kept}
    run.workers.check_same(list(kept.values()), "mask")
    run.found.keep("mask", kept)
    return mask


def _refitted(problem: Problem, mask: ChannelMask) -> Slimmed:
    """The slim source, refitted on the training samples; computed once for all positions."""
    run, recipe, full = problem.run, problem.recipe, problem.groups.graph_module
    whole = features_node(full) is not None  # without distillation the logits of other classes are never needed
    slimmed = slim_down(problem.groups, mask, None if whole else problem.classes)
    if not recipe.reconstruct:
        return slimmed
    if (found := run.found.recall("refit")) is not None:
        refitted = copy.deepcopy(slimmed.graph_module)
        refitted.load_state_dict(found[0])
        return replace(slimmed, graph_module=refitted)
    run.tell("refit", 0, 1)
    some = problem.some(REFIT)
    slimmed = refit(slimmed, Samples(problem.images[some], problem.labels[some], "data"), None, run.workers)
    run.tell("refit", 1, 1)
    weights = balance(problem.labels[problem.train], problem.logits.shape[1])
    everything = all(kept == units for _, kept, units in mask.summary())
    distill(
        slimmed.graph_module,
        full,
        Neighbourhoods(problem.images[problem.train], weights, recipe.augment),
        problem.images[problem.validation],
        columns=slimmed.columns,
        steps=0 if everything else recipe.steps,
        loop=replace(problem.loop("distil"), unfinished=run.found.unfinished("refit")),
    )
    run.found.keep("refit", slimmed.graph_module.state_dict())
    return slimmed


def _key(problem: Problem, data: Sequence[Samples | None], *asked: object) -> str:
    """A key of all that a run's result depends on: problem, recipe, and the code that computes it."""
    tensors = [tensor for part in data if part is not None for tensor in (part.images, part.labels)]
    for network in (problem.groups.graph_module, problem.target):
        tensors += network.state_dict().values()
    versions = netclone.__version__, code_digest(__name__), torch.__version__
    plain = [value.kept if isinstance(value, ChannelMask) else value for value in asked]
    facts = problem.groups.fingerprint, problem.classes, problem.recipe.facts(), problem.seed, plain
    place = problem.images.device.type
    return hashlib.sha256(repr((facts, place, digest(tensors), versions)).encode()).hexdigest()
