"""clone(source, target, data) -> CloneModule: localise, search the position, fit adapter and classifier."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, fx, nn

from netclone.channels.budgeting import check_budget
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import Slimmed, classifier_rows, cut, features_node, slim_down
from netclone.cloning.injecting import GraftedModule, clones, names_in, remove
from netclone.cloning.modules import CloneModule
from netclone.cloning.placing import Place, candidates, features_at, matching, passed_over, reason
from netclone.errors import ArchiveError, ArgumentError, DataError, NetcloneError, PositionError, UncalibratedWarning
from netclone.files.graphdata import unsavable
from netclone.files.spec import Candidate
from netclone.graph.capturing import FACTS, capture, deterministic, fingerprint
from netclone.graph.functionalizing import in_place_again
from netclone.graph.numbers import numbers_digests
from netclone.graph.preparing import said_preparation
from netclone.graph.tracing import INPUT, logits_node, position, shape_of, trace
from netclone.learning.adapting import Adapter, Branch, Cached, Classifier, fit, grid_of
from netclone.learning.data import (
    Batches,
    Samples,
    balance,
    check_agreement,
    check_classes,
    check_clone_set,
    check_keep,
    check_names,
    check_new,
    check_number,
    check_taken,
    gather,
    in_batches,
)
from netclone.learning.distilling import distill
from netclone.learning.localizing import check_method, localize
from netclone.learning.neighbourhoods import Augment, Neighbourhoods, drawn, viewed
from netclone.learning.stepping import precision_of
from netclone.runtime.dependencies import code_digest
from netclone.runtime.devices import device_named, model_on
from netclone.runtime.entering import entered
from netclone.runtime.identity import identity
from netclone.runtime.resuming import Findings
from netclone.runtime.sharing import ALONE, Workers, digest

SEARCHES = ("early", "all")
REFIT = 2048  # samples at most of a refit: more say little more, since every position of a map is an equation
VIEWS, MOST_VIEWS = 2, 2048  # of each training sample beside itself, where there is an augmentation; in all at most
PARTS = ("adapter_start", "target_stream", "calibration")
BRIEF = 25  # steps, for each candidate position
MOST_REST, REST_MASS = 64, 0.999  # source classes that a clone knows beside its own: at most, and their probability

Progress = Callable[[str, int, int], None]


@entered()
def clone(
    source: nn.Module,
    target: nn.Module,
    data: Batches,
    *,
    classes: Sequence[int],
    class_names: Sequence[str] = (),
    target_data: Batches | None = None,
    keep: float = 0.5,
    budget: str = "params",
    at: str = "auto",
    source_at: str | None = None,
    search: str = "early",
    method: str = "local",
    reconstruct: bool = True,
    distill_steps: int = 150,
    mask: ChannelMask | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    validation: float = 0.2,
    augment: Augment | None = None,
    without: Sequence[str] = (),
    mixed_precision: str = "no",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    workers: Workers = ALONE,
    findings: Findings | None = None,
) -> CloneModule:
    """Clone classes of a source for a target: the whole of Partial Network Cloning in one call.

    Learns the mask, searches the target position from deep to shallow, and fits adapter and classifier there.
    Source and target are untouched; the result goes to :func:`netclone.inject` and :func:`netclone.save`.

    Parameters
    ----------
    source, target
        Modules or traced graphs. Clones that the target holds already play no part: each reads the target alone.
    data
        The clone set: images ``(N, C, H, W)`` and labels ``(N,)`` in the source's label space, as batches
        ``(images, labels)`` from a ``DataLoader`` or any other iterable, as a ``Dataset`` of samples, as such samples
        one by one, or as one pair. A pair may be a dictionary with ``"pixel_values"`` (or ``"images"``, ``"image"``)
        and ``"labels"`` (or ``"label"``); arrays may be numpy's, labels one-hot. Read once, so it has to end. Samples
        of other classes are ignored.
    classes
        Source classes to clone; the new columns come in this order.
    target_data
        The same in the target's label space. If missing, new logits are calibrated against old ones by the source's own
        odds of the new classes (or, if it knows no others, by a threshold on the clone set), and an
        :class:`~netclone.errors.UncalibratedWarning` is given.
    keep, budget
        What to keep of the source at most, in (0, 1]: a share of its parameters (``"params"``), of its MACs
        (``"macs"``), or of the units in every channel group (``"channels"``).
    at
        Target position; ``"input"``: the whole slim source runs beside the target; ``"auto"``: search.
    source_at
        Where the source is cut; None: the cut point that matches the target position in size and depth.
    search
        ``"early"``: from the deepest position on, stopping when validation stops improving (the paper's rule), and then
        the input; ``"all"``: every candidate position.
    method, mask
        How to localise (see :func:`netclone.localize`), or a mask made before.
    reconstruct, distill_steps
        Refit what reads removed channels by least squares on the samples, and then all of the slim source by so many
        steps of distillation from the full one (0: none). False: the paper's plain copy, neither of them.
    epochs, batch_size, validation
        Length of the fit at the position chosen (25 steps at each candidate), samples per step, share of the samples
        held out to choose by.
    augment
        ``augment(images, generator)`` gives another view of a batch (mirrored, say), drawing from the generator, on
        the CPU, alone. Mask and distillation then see a new view each time, adapter and classifier a few of each
        sample.
    without
        What to leave out of the method, for ablations: ``"adapter_start"`` (the closed-form start of the adapter; it
        starts at random), ``"target_stream"`` (the target's logits among what the new classifier reads),
        ``"calibration"`` (new logits come from the clone alone, and are fitted among themselves).
    mixed_precision
        ``"bf16"``: mask, distillation and fit learn in bfloat16 where torch.autocast does so; the clone's tensors keep
        their dtype, and all that is checked or refitted in closed form is computed as without.
    device
        Where to learn: copies of the networks, and each batch, are moved there, and the clone is left there. None:
        where the networks are; the data have to be there too.
    progress
        Called with ``(what, done, total)``.
    workers
        The processes that share the work (see :func:`netclone.runtime.sharing.share`): each is given the same data,
        and gets the same result.
    findings
        Where to keep what is found on the way (mask, refitted source, each position tried), and to go on from.

    Raises
    ------
    ArgumentError, DataError
        If an argument or the data are out of range.
    PositionError
        If no position works; the message lists the reason of each.
    WorkerError
        If another worker is gone, or was given other data.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> source = timm.create_model("test_efficientnet", num_classes=4)
    >>> target = timm.create_model("test_resnet", num_classes=2)
    >>> images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    >>> old = [(images, labels % 2)]
    >>> module = netclone.clone(source, target, [(images, labels)], classes=[2, 3], target_data=old,
    ...                         at="layer3", method="magnitude", epochs=1)
    >>> module.at, module.classes
    ('layer3', (2, 3))

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.
    """
    check_options(
        keep=keep,
        budget=budget,
        at=at,
        source_at=source_at,
        search=search,
        method=method,
        distill_steps=distill_steps,
        epochs=epochs,
        batch_size=batch_size,
        validation=validation,
        without=without,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    precision = precision_of(mixed_precision)
    tell = progress or (lambda what, done, total: None)
    place = device_named(device)
    source, target = model_on(source, place), model_on(target, place)
    new = gather(data, "data", place)
    old = None if target_data is None else gather(target_data, "target_data", place)
    _check_same_images(new, old)
    for model, role in ((source, "source"), (target, "target")):
        if isinstance(model, nn.Module):
            check_taken(model, new.images[:2], "data", role)
    if not old:
        warnings.warn(
            "clone: no target_data, so new-class logits are calibrated by the source's own odds (or a threshold on the "
            "clone set), not against the target's classes. Pass some samples of the old classes as target_data.",
            UncalibratedWarning,
            stacklevel=2,
        )
    for samples in (new, old):
        if samples is not None:
            workers.check_same([samples.images, samples.labels], samples.what)
    own_names = names_in(target)
    while isinstance(target, GraftedModule):
        target = remove(target, clones(target)[0])
    example = new.images[:2]
    with deterministic():
        torch.default_generator.manual_seed(seed)
        groups = channel_groups(source, example if len(example) == 2 else torch.cat([example] * 2))
        chosen = check_classes(classes, groups.outputs)
        findings = Findings() if findings is None else findings
        check_names(class_names, chosen)
        check_new(class_names, own_names, "class_names")
        new.check_labels(groups.outputs, "source")
        check_clone_set(new, chosen)
        whole, new = new, new.of_classes(chosen)
        check_agreement(in_batches(groups.graph_module, new.images, batch_size, workers), new, chosen)
        left_out = frozenset(without)
        task = _Task.of(
            target, groups, new, old, chosen, validation, batch_size, epochs, left_out, seed, workers, precision
        )
        if old is not None:
            check_agreement(task.logits[: len(old)], old, sorted(set(old.labels.tolist())), "target")
        _check_source(groups, chosen)
        plan = _planned(task, at, source_at)
        share = keep
        if mask is not None:
            mask.removed_units(groups)  # refused here if it is another network's
        elif budget == "params":
            share -= _classifier_share(task, keep)
        if findings.path is not None:
            findings.open(
                _key(
                    [whole, old],
                    [groups.graph_module, target],
                    groups.fingerprint,
                    [chosen, keep, budget, at, source_at, search, method, reconstruct, distill_steps, epochs],
                    [
                        batch_size,
                        validation,
                        sorted(without),
                        seed,
                        identity(augment),
                        mixed_precision,
                        example.device.type,
                    ],
                    [] if mask is None else [mask.kept],
                )
            )
        if mask is None and (found := findings.recall("mask")) is not None:
            mask = ChannelMask.from_kept(groups, {name: flags.tolist() for name, flags in found[0].items()})
        elif mask is None:
            tell("localize", 0, 1)
            mask = localize(
                groups,
                [(part.images, part.labels) for part in task.clone_set] if method in ("local", "taylor") else None,
                classes=chosen,
                method=method,
                keep=share,
                budget=budget,
                seed=seed,
                batch_size=(batch_size + 1) // 2,  # each step runs the masked and the full source
                augment=augment,
                mixed_precision=mixed_precision,
                progress=lambda done, total: tell("localize", done, total),
                workers=workers,
                unfinished=findings.unfinished("mask"),
            )
            kept = {name: torch.tensor(flags) for name, flags in mask.kept}
            workers.check_same(list(kept.values()), "mask")
            findings.keep("mask", kept)
        slimmed = _slim(task, mask, reconstruct, distill_steps, augment, findings, tell)
        if augment is not None:
            task = task.with_views(augment)
        module = _search(task, slimmed, plan, search == "all", tuple(class_names), findings, tell)
        workers.check_same(list(module.state_dict().values()), "clone")
        return module


def check_options(
    *,
    keep: float = 0.5,
    budget: str = "params",
    at: str = "auto",
    source_at: str | None = None,
    search: str = "early",
    method: str = "local",
    distill_steps: int = 150,
    epochs: int = 20,
    batch_size: int = 64,
    validation: float = 0.2,
    without: Sequence[str] = (),
    mixed_precision: str = "no",
    seed: int = 0,
) -> None:
    """Refuse what :func:`clone` would refuse of its options whatever the networks and the data are.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    """
    check_keep(keep)
    check_budget(budget)
    check_method(method)
    if search not in SEARCHES:
        raise ArgumentError(f"search: got {search!r}, expected one of {', '.join(map(repr, SEARCHES))}")
    for what, name in (("at", at), ("source_at", source_at or "")):
        if not isinstance(name, str):
            raise ArgumentError(f"{what}: got {name!r}, expected the name of a position, such as 'layer2'")
    if at == INPUT and source_at is not None:
        raise ArgumentError(f"source_at: got {source_at!r}, but at='{INPUT}' runs the whole source; leave it out")
    unknown = [without] if isinstance(without, str) else [part for part in without if part not in PARTS]
    if unknown:
        raise ArgumentError(f"without: got {unknown}, expected some of {', '.join(map(repr, PARTS))}")
    check_number(epochs, "epochs", 0)
    check_number(batch_size, "batch_size", 1)
    check_number(distill_steps, "distill_steps", 0)
    check_number(seed, "seed", 0)
    precision_of(mixed_precision)
    if not isinstance(validation, (int, float)) or not 0 < validation < 1:
        raise ArgumentError(f"validation: got {validation!r}, expected a share in (0, 1), such as 0.2")


@dataclass(frozen=True)
class _Task:
    """What every candidate position needs, computed once."""

    target: fx.GraphModule
    groups: ChannelGroups
    clone_set: tuple[Samples, ...]  # the training samples in the source's label space: new, and what it takes old for
    images: Tensor
    labels: Tensor  # columns of the grafted model
    train: Tensor  # indices into images
    validation: Tensor
    classes: tuple[int, ...]
    rest: tuple[int, ...]  # the source's classes that the cloned ones are told from
    logits: Tensor  # the target's
    batch_size: int
    epochs: int
    without: frozenset[str]
    seed: int
    workers: Workers
    precision: torch.dtype | None

    @classmethod
    def of(
        cls,
        target: nn.Module,
        groups: ChannelGroups,
        new: Samples,
        old: Samples | None,
        classes: tuple[int, ...],
        validation: float,
        batch_size: int,
        epochs: int,
        without: frozenset[str],
        seed: int,
        workers: Workers,
        precision: torch.dtype | None,
    ) -> _Task:
        traced = trace(target, new.images[:2]).eval()
        width = (shape_of(logits_node(traced)) or (0,))[0]
        if old is not None:
            old.check_labels(width, "target")
        generator = torch.Generator().manual_seed(seed)
        columns = {c: width + i for i, c in enumerate(classes)}
        labels = torch.tensor([columns[int(label)] for label in new.labels], device=new.labels.device)
        images = new.images
        if old is not None:
            images, labels = torch.cat([old.images, images]), torch.cat([old.labels, labels])
        train, held_out = _split(labels, validation, generator)
        first_new = 0 if old is None else len(old)
        own = train[train >= first_new] - first_new
        clone_set: tuple[Samples, ...] = (Samples(new.images[own], new.labels[own], "data"),)
        others = sorted(set(range(groups.outputs)) - set(classes))
        rest: tuple[int, ...] = ()
        if others:
            around = clone_set[0].images if old is None else old.images[train[train < first_new]]
            logits = in_batches(groups.graph_module, around, batch_size, workers)[:, others]
            rest = tuple(others[i] for i in _most_likely(logits))
            if old is not None:
                likely = torch.tensor(others, device=logits.device)[logits.argmax(1)]
                clone_set += (Samples(around, likely, "target_data"),)
        return cls(
            target=traced,
            groups=groups,
            clone_set=clone_set,
            images=images,
            labels=labels,
            train=train,
            validation=held_out,
            classes=classes,
            rest=rest,
            logits=in_batches(traced, images, batch_size, workers),
            batch_size=batch_size,
            epochs=epochs,
            without=without,
            seed=seed,
            workers=workers,
            precision=precision,
        )

    def with_views(self, augment: Augment) -> _Task:
        """The same with augmented views of the training samples to fit on beside them, in as many steps."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(VIEWS)])[:MOST_VIEWS]
        seen = self.train[order.to(self.train.device)]
        views = viewed(augment, self.images[seen], generator)
        train = torch.cat([self.train, torch.arange(len(views), device=self.train.device) + len(self.images)])
        return replace(
            self,
            images=torch.cat([self.images, views]),
            labels=torch.cat([self.labels, self.labels[seen]]),
            logits=torch.cat([self.logits, in_batches(self.target, views, self.batch_size, self.workers)]),
            train=train,
            epochs=math.ceil(self.epochs * len(self.train) / len(train)),
        )

    def some(self, count: int) -> Tensor:
        """At most so many of the training samples, as many of old classes as of new ones; the same each time."""
        weights = balance(self.labels[self.train], self.logits.shape[1])
        chosen = drawn(weights, count, torch.Generator().manual_seed(self.seed), repeat=False)
        return self.train[chosen.sort().values.to(self.train.device)]


def _classifier_share(task: _Task, keep: float) -> float:
    """What the classifier takes of the source's parameters: over both streams, and the source's rows for the rest."""
    head = features_node(task.groups.graph_module)
    features = len(task.classes) if head is None else (shape_of(head) or (0,))[0]
    weights = len(task.classes) * (features + task.logits.shape[1] + 1) + 1 + len(task.rest) * (features + 1)
    share = weights / task.groups.parameters
    if share >= keep:
        raise ArgumentError(
            f"keep: {keep} of the source's parameters are fewer than the classifier of {len(task.classes)} new classes "
            f"takes, {share:.2g}; ask for more, or clone fewer classes at once"
        )
    return share


def _slim(
    task: _Task,
    mask: ChannelMask,
    refit: bool,
    distill_steps: int,
    augment: Augment | None,
    findings: Findings,
    tell: Progress,
) -> Slimmed:
    """The masked source, slim, refitted on the training samples: once, for every position."""
    whole = features_node(task.groups.graph_module) is not None  # else the logits of other classes are never needed
    slimmed = slim_down(task.groups, mask, None if whole else task.classes, refit)
    if not refit:
        return slimmed
    if (found := findings.recall("refit")) is not None:
        slimmed.graph_module.load_state_dict(found[0])
        return slimmed
    tell("refit", 0, 1)
    some = task.some(REFIT)
    slimmed.reconstruct(Samples(task.images[some], task.labels[some], "data"), None, task.workers)
    tell("refit", 1, 1)
    everything = all(kept == units for _, kept, units in mask.summary())
    distill(
        slimmed.graph_module,
        task.groups.graph_module,
        Neighbourhoods(task.images[task.train], balance(task.labels[task.train], task.logits.shape[1]), augment),
        task.images[task.validation],
        columns=slimmed.columns,
        steps=0 if everything else distill_steps,
        batch_size=task.batch_size,
        generator=torch.Generator().manual_seed(task.seed),
        progress=partial(tell, "distil"),
        workers=task.workers,
        precision=task.precision,
        unfinished=findings.unfinished("refit"),
    )
    findings.keep("refit", slimmed.graph_module.state_dict())
    return slimmed


@dataclass
class _Fit:
    """A candidate position with its frozen features and the branch that is trained on them."""

    place: Place
    module: CloneModule
    branch: Branch
    trained: Branch  # the same adapter and classifier, without what has been computed already
    train: Cached
    held_out: Cached

    def run(self, task: _Task, epochs: int, tell: Callable[[int, int], None]) -> float:
        """Train for some epochs and give the validation score; a second run goes on where the first ended."""
        return fit(
            self.trained,
            self.train,
            self.held_out,
            epochs=epochs,
            calibrate="calibration" not in task.without,
            batch_size=task.batch_size,
            generator=torch.Generator().manual_seed(task.seed),
            progress=tell,
            workers=task.workers,
            precision=task.precision,
        )

    def resumed(self, task: _Task, epochs: int, findings: Findings, tell: Callable[[int, int], None]) -> float:
        """As :meth:`run`, unless that was done in an earlier process, whose weights and score are taken then."""
        name, parts = f"fit at {self.place.at}", nn.ModuleList([self.trained.adapter, self.trained.classifier])
        found = findings.recall(name)
        if found is not None:
            parts.load_state_dict(found[0])
            return found[1]
        score = self.run(task, epochs, tell)
        findings.keep(name, parts.state_dict(), score)
        return score


@dataclass(frozen=True)
class _Planned:
    """A position to try, and where the source is cut for it (None: at its input); or why it cannot work."""

    place: Place
    cut: str | None
    reason: str | None = None


def _planned(task: _Task, at: str, source_at: str | None) -> tuple[_Planned, ...]:
    """The positions to try, in order; what cannot work is known before anything is learned.

    Raises
    ------
    PositionError, AdapterError, ArchiveError
        If the position asked for cannot work, or none can.
    """
    if source_at is not None:
        _check_cut(task.groups, source_at)
    source = task.groups.graph_module
    cuts = candidates(source, most=64), passed_over(source)
    if at != "auto":
        place = _place(task.target, at)
        return (_Planned(place, _cut_for(task, place, source_at, *cuts)),)
    found = [_Planned(place, None, why) for place, why in passed_over(task.target)]
    for place in candidates(task.target) + ((_place(task.target, INPUT),) if source_at is None else ()):
        try:
            found.append(_Planned(place, _cut_for(task, place, source_at, *cuts)))
        except NetcloneError as error:
            found.append(_Planned(place, source_at, reason(error)))
    if all(planned.reason for planned in found):
        raise _none_works([Candidate(p.place.at, p.cut, None, p.reason or "") for p in found])
    return tuple(found)


def _cut_for(
    task: _Task,
    place: Place,
    source_at: str | None,
    cuts: Sequence[Place],
    unfit: Sequence[tuple[Place, str]],
) -> str | None:
    """Where the source is cut for a target position, seen to work as far as shapes and operators tell."""
    if place.at == INPUT:
        _check_cut(task.groups, None)
        return None
    grid_of(place.shape)
    at = source_at or matching(place, cuts, unfit).at
    _check_cut(task.groups, at)
    return at


def _check_cut(groups: ChannelGroups, at: str | None) -> None:
    """Refuse a cut of the source behind which no module can be: its operators could not be saved, or go round it."""
    part = groups.graph_module
    if at is not None:
        node = position(part, at)
        grid_of(shape_of(node) or ())
        part = cut(part, node.name)
    if faults := unsavable(part.graph):
        raise ArchiveError(f"source: a clone cut at {at or INPUT!r} could not be saved: {'; '.join(faults)}")


def _check_source(groups: ChannelGroups, classes: tuple[int, ...]) -> None:
    """Refuse a source whose slim copy could never be held against it, by trying with all of it."""
    everything = ChannelMask.from_kept(groups, {group.name: [True] * group.size for group in groups.groups})
    slim_down(groups, everything, classes, refit=False).certify(None)


def _none_works(tried: Sequence[Candidate]) -> PositionError:
    reasons = "; ".join(f"{c.at}: {c.reason}" for c in tried) or "the target has no position all its paths pass"
    return PositionError(f"no target position works. {reasons}. Give at=... and source_at=...")


def _search(
    task: _Task,
    slimmed: Slimmed,
    plan: Sequence[_Planned],
    every: bool,
    class_names: tuple[str, ...],
    findings: Findings,
    tell: Progress,
) -> CloneModule:
    """Fit candidates briefly from deep to shallow until validation improves no more, then the input; the best fully."""
    tried: list[Candidate] = []
    stopped = False
    best: tuple[float, _Fit] | None = None
    brief = sum(planned.reason is None for planned in plan) > 1 and task.epochs > 1
    epochs, train = (1, task.some(BRIEF * task.batch_size)) if brief else (task.epochs, task.train)
    for number, planned in enumerate(plan):
        place = planned.place
        if planned.reason is not None:
            tried.append(Candidate(place.at, planned.cut, None, planned.reason))
            continue
        if stopped and place.at != INPUT:
            continue
        tell(f"fit at {place.at}", 0, epochs)
        try:
            candidate = _candidate(task, slimmed, place, planned.cut, train)
            score = candidate.resumed(task, epochs, findings, partial(tell, f"fit at {place.at}"))
        except NetcloneError as error:
            if len(plan) == 1:
                raise
            tried.append(Candidate(place.at, planned.cut, None, reason(error)))
            continue
        tried.append(Candidate(place.at, planned.cut, score))
        tell("search", number + 1, len(plan))
        if best is None or score > best[0]:
            best = score, candidate
        else:
            stopped = not every
    if best is None:
        raise _none_works(tried)
    tell("search", len(plan), len(plan))
    score, chosen = best
    if brief:
        if len(train) < len(task.train):
            chosen = _candidate(task, slimmed, chosen.place, chosen.module.source_at, task.train)
        score = chosen.run(task, task.epochs, partial(tell, f"fit at {chosen.place.at}, longer"))
    spec = {"class_names": class_names, "scores": (("validation", score),), "search": tuple(tried)}
    return _finished(task, chosen).with_spec(**spec)


def _candidate(task: _Task, slimmed: Slimmed, place: Place, source_at: str | None, samples: Tensor) -> _Fit:
    """A position with adapter and classifier at their closed-form start, to be fitted to some of the samples."""
    module = slimmed.module(source_at, features_only=True).with_spec(classes=task.classes)
    module.body.requires_grad_(False)

    def seen(index: Tensor) -> Cached:
        features = task.images[index]
        if source_at is not None:
            features = features_at(task.target, features, [place.node], task.batch_size, task.workers)[place.node]
        return Cached(features, task.logits[index], task.labels[index])

    train, held_out = seen(samples), seen(task.validation)
    adapter: Adapter | nn.Identity = nn.Identity()
    if source_at is not None:  # its outputs shall be what the slim source has at its cut
        node = position(task.groups.graph_module, source_at).name
        wanted = features_at(slimmed.graph_module, task.images[samples], [node], task.batch_size, task.workers)[node]
        adapter = Adapter(grid_of(place.shape), grid_of(module.spec.input_shape)).to(train.logits)
        if "adapter_start" not in task.without:
            adapter.solve(train.features, wanted)
    branch = nn.Sequential(adapter, module.body)
    features = in_batches(branch, train.features, task.batch_size, task.workers)
    both = "target_stream" not in task.without
    classifier = Classifier(features.shape[1], train.logits.shape[1], len(task.classes), both).to(train.logits)
    rest = () if "calibration" in task.without else task.rest
    weight, bias = classifier_rows(slimmed.graph_module, task.classes + rest) or (None, None)
    classifier.start(features, train.logits, weight, bias)
    whole = trained = Branch(adapter, module.body, classifier)
    if source_at is None:  # nothing before the classifier is trained: what it reads is computed once
        trained = Branch(adapter, nn.Identity(), classifier)
        train = replace(train, features=features)
        held_out = replace(held_out, features=in_batches(branch, held_out.features, task.batch_size, task.workers))
    return _Fit(place, module, whole, trained, train, held_out)


def _finished(task: _Task, chosen: _Fit) -> CloneModule:
    """The clone as one operator graph, with what is known about it."""
    place = task.images[:1] if chosen.module.source_at is None else chosen.train.features[:1]
    body = capture(chosen.branch, *(torch.cat([one, one]) for one in (place, task.logits[:1])))
    body.meta[FACTS].pop("example")
    in_place_again(body)
    fitted = CloneModule(body, chosen.module.spec).with_spec(
        at=chosen.place.at,
        input_shape=chosen.place.shape,
        feature_node=logits_node(task.target).name,
        feature_shape=tuple(task.logits.shape[1:]),
        target_input_shape=tuple(task.images.shape[1:]),
        target_fingerprint=fingerprint(task.target),
        target_digests=numbers_digests(task.target),
        target_preparation=said_preparation(task.target, tuple(task.images.shape[1:])),
    )
    return fitted.eval()


def _key(
    data: Sequence[Samples | None], networks: Sequence[nn.Module], structure: str, *arguments: Sequence[object]
) -> str:
    """What stands for all that a run's result depends on."""
    tensors = [tensor for part in data if part is not None for tensor in (part.images, part.labels)]
    tensors += [tensor for network in networks for tensor in network.state_dict().values()]
    versions = version("netclone"), code_digest(__name__), torch.__version__
    text = repr((structure, digest(tensors), arguments, versions))
    return hashlib.sha256(text.encode()).hexdigest()


def _most_likely(logits: Tensor) -> list[int]:
    """The columns that hold nearly all the probability over some samples, the likeliest first."""
    shares, order = logits.softmax(1).mean(0).sort(descending=True, stable=True)
    count = int((shares.cumsum(0) < REST_MASS).sum()) + 1
    return order[: min(count, MOST_REST)].tolist()


def _place(traced: fx.GraphModule, at: str) -> Place:
    node = position(traced, at)
    shape = shape_of(node)
    assert shape is not None
    order = [other.name for other in traced.graph.nodes]
    return Place(at, node.name, shape, order.index(node.name) / len(order))


def _split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices for training and validation, per class; a class of one sample is in both."""
    train, held_out = [], []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator).to(index.device)]
        count = min(max(1, round(share * len(index))), max(1, len(index) - 1))
        held_out.append(index[:count])
        train.append(index[count:] if len(index) > 1 else index)
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def _check_same_images(new: Samples, old: Samples | None) -> None:
    if old is not None and old.format != new.format:
        raise DataError(
            f"target_data: images are {old.format}, those of data {new.format}; give both in the target's input format"
        )
