"""clone(source, target, data) -> CloneModule: localise, search the position, fit adapter and classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from netclone.adapting import Adapter, Branch, Cached, Classifier, fit, grid_of
from netclone.capturing import FACTS, capture, deterministic, fingerprint, in_place_again, tensor_at
from netclone.channels import ChannelGroups, channel_groups
from netclone.data import Batches, Samples, check_classes, check_keep, gather
from netclone.errors import ArgumentError, DataError, NetcloneError, PositionError, UncalibratedWarning
from netclone.extracting import extract_from, features_node
from netclone.localizing import localize
from netclone.masks import ChannelMask
from netclone.modules import Candidate, CloneModule
from netclone.placing import Place, candidates, features_at, matching, reason
from netclone.slimming import Resizer
from netclone.tracing import INPUT, classifier_input, logits_node, position, shape_of, trace

SEARCHES = ("early", "all")

Progress = Callable[[str, int, int], None]


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
    mask: ChannelMask | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    validation: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> CloneModule:
    """Clone classes of a source for a target: the whole of Partial Network Cloning in one call.

    Learns the mask, searches the target position from deep to shallow, and fits adapter and classifier there.
    Source and target are untouched; the result goes to :func:`netclone.inject` and :func:`netclone.save`.

    Parameters
    ----------
    source, target
        Modules or traced graphs.
    data
        The clone set: iterable of ``(images (N, C, H, W), labels (N,))``, labels in the source's label space.
        Samples of other classes are ignored.
    classes
        Source classes to clone; the new columns come in this order.
    target_data
        The same in the target's label space. If missing, nothing calibrates new logits against old ones: a threshold
        is set on the clone set alone, and an :class:`~netclone.errors.UncalibratedWarning` is given.
    keep, budget
        What to keep of the source at most, in (0, 1]: a share of its parameters (``"params"``), of its MACs
        (``"macs"``), or of the units in every channel group (``"channels"``).
    at
        Target position; ``"input"``: the whole slim source runs beside the target; ``"auto"``: search.
    source_at
        Where the source is cut; None: the cut point that matches the target position in size and depth.
    search
        ``"early"``: from the deepest position to the input, stopping when validation stops improving (the paper's
        rule); ``"all"``: every candidate position.
    method, mask
        How to localise (see :func:`netclone.localize`), or a mask made before.
    reconstruct
        Refit what reads removed channels by least squares on the clone set.
    epochs, batch_size, validation
        Length of the fit at each position, samples per step, share of the samples held out to choose by.
    progress
        Called with ``(what, done, total)``.

    Raises
    ------
    ArgumentError, DataError
        If an argument or the data are out of range.
    PositionError
        If no position works; the message lists the reason of each.

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

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3; DESIGN, "The paper in one page".
    """
    check_keep(keep)
    if search not in SEARCHES:
        raise ArgumentError(f"search: got {search!r}, expected one of {', '.join(map(repr, SEARCHES))}")
    if at == INPUT and source_at is not None:
        raise ArgumentError(f"source_at: got {source_at!r}, but at='{INPUT}' runs the whole source; leave it out")
    if not 0 < validation < 1:
        raise ArgumentError(f"validation: got {validation!r}, expected a share in (0, 1), such as 0.2")
    tell = progress or (lambda what, done, total: None)
    new = gather(data, "data")
    old = None if target_data is None else gather(target_data, "target_data")
    _check_same_images(new, old)
    if not old:
        warnings.warn(
            "clone: no target_data, so new-class logits are not calibrated against the target's classes; a threshold "
            "is set on the clone set alone. Pass some samples of the old classes as target_data.",
            UncalibratedWarning,
            stacklevel=2,
        )
    example = new.images[:2]
    with deterministic():
        torch.default_generator.manual_seed(seed)
        groups = channel_groups(source, example if len(example) == 2 else torch.cat([example] * 2))
        chosen = check_classes(classes, groups.outputs)
        if class_names and len(class_names) != len(chosen):
            raise ArgumentError(f"class_names: {len(class_names)} names for {len(chosen)} classes; give one per class")
        new.check_labels(groups.outputs, "source")
        new = new.of_classes(chosen)
        task = _Task.of(target, groups, new, old, chosen, validation, batch_size, epochs, seed, reconstruct)
        if mask is None:
            mask = localize(
                groups,
                [(part.images, part.labels) for part in task.clone_set] if method in ("local", "taylor") else None,
                classes=chosen,
                method=method,
                keep=keep,
                budget=budget,
                seed=seed,
                progress=lambda done, total: tell("localize", done, total),
            )
        return _search(task, mask, at, source_at, search == "all", tuple(class_names), tell)


@dataclass(frozen=True)
class _Task:
    """What every candidate position needs."""

    target: fx.GraphModule
    groups: ChannelGroups
    clone_set: tuple[Samples, ...]  # the training samples in the source's label space: new, and what it takes old for
    images: Tensor
    labels: Tensor  # columns of the grafted model
    train: Tensor  # indices into images
    validation: Tensor
    classes: tuple[int, ...]
    batch_size: int
    epochs: int
    seed: int
    reconstruct: bool

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
        seed: int,
        reconstruct: bool,
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
        rest = sorted(set(range(groups.outputs)) - set(classes))
        if old is not None and rest:
            images_of_rest = old.images[train[train < first_new]]
            with torch.no_grad():
                logits = torch.cat([groups.graph_module(part) for part in images_of_rest.split(batch_size)])
            likely = torch.tensor(rest, device=logits.device)[logits[:, rest].argmax(1)]
            clone_set += (Samples(images_of_rest, likely, "target_data"),)
        return cls(
            traced, groups, clone_set, images, labels, train, held_out, classes, batch_size, epochs, seed, reconstruct
        )


def _search(
    task: _Task,
    mask: ChannelMask,
    at: str,
    source_at: str | None,
    every: bool,
    class_names: tuple[str, ...],
    tell: Progress,
) -> CloneModule:
    """Fit candidates from deep to shallow; stop when validation no longer improves, or at the input; keep the best."""
    tried: list[Candidate] = []
    best: tuple[float, CloneModule] | None = None
    if at == "auto":
        todo = candidates(task.target) + ((_place(task.target, INPUT),) if source_at is None else ())
    else:
        todo = (_place(task.target, at),)
    sources = candidates(task.groups.graph_module, most=64)
    for number, place in enumerate(todo):
        tell(f"fit at {place.at}", 0, task.epochs)
        cut = source_at
        try:
            cut = None if place.at == INPUT else cut or matching(place, sources).at
            score, module = _fit_at(task, mask, place, cut, partial(tell, f"fit at {place.at}"))
        except NetcloneError as error:
            tried.append(Candidate(place.at, cut, None, reason(error)))
            if at != "auto":
                raise
            continue
        tried.append(Candidate(place.at, cut, score))
        tell("search", number + 1, len(todo))
        if best is None or score > best[0]:
            best = score, module
        elif not every:
            break
    if best is None:
        reasons = "; ".join(f"{c.at}: {c.reason}" for c in tried) or "the target has no position all its paths pass"
        raise PositionError(f"no target position works. {reasons}. Give at=... and source_at=...")
    tell("search", len(todo), len(todo))
    score, module = best
    return module.with_spec(class_names=class_names, scores=(("validation", score),), search=tuple(tried))


def _fit_at(
    task: _Task, mask: ChannelMask, place: Place, source_at: str | None, tell: Callable[[int, int], None]
) -> tuple[float, CloneModule]:
    recon = [(task.images[task.train], task.labels[task.train])] if task.reconstruct else None
    module = extract_from(task.groups, mask, source_at, task.classes, (), recon, features_only=True)
    head = features_node(task.groups.graph_module)
    last = classifier_input(task.target) or logits_node(task.target)
    logits = logits_node(task.target)
    seen = features_at(task.target, task.images, [place.node, last.name, logits.name], task.batch_size)
    cached = Cached(seen[place.node], seen[last.name], seen[logits.name], task.labels)
    train, held_out = cached[task.train], cached[task.validation]
    adapter = nn.Identity() if source_at is None else _solved_adapter(task, mask, place, source_at, module, train)
    features = _through(module.body, adapter, train.features, task.batch_size)
    classifier = Classifier(features.shape[1], train.target_features.shape[1], len(task.classes)).to(cached.logits)
    weight, bias = _source_rows(task, mask, head)
    classifier.start(features, train.target_features, weight, bias)
    branch = trained = Branch(adapter, module.body, classifier)
    if source_at is None:  # nothing before the classifier is trained: what it reads is computed once
        trained = Branch(adapter, nn.Identity(), classifier)
        train = replace(train, features=features)
        held_out = replace(held_out, features=_through(module.body, adapter, held_out.features, task.batch_size))
    generator = torch.Generator().manual_seed(task.seed)
    score = fit(
        trained,
        train,
        held_out,
        epochs=task.epochs,
        batch_size=task.batch_size,
        generator=generator,
        progress=tell,
    )
    body = capture(branch, cached.features[:2], cached.target_features[:2])
    body.meta[FACTS].pop("example")
    in_place_again(body)
    fitted = CloneModule(body, module.spec).with_spec(
        at=place.at,
        input_shape=place.shape,
        feature_node=last.name,
        feature_shape=tuple(cached.target_features.shape[1:]),
        target_input_shape=tuple(task.images.shape[1:]),
        target_fingerprint=fingerprint(task.target),
    )
    return score, fitted.eval()


def _solved_adapter(
    task: _Task, mask: ChannelMask, place: Place, source_at: str, module: CloneModule, train: Cached
) -> Adapter:
    """The adapter whose outputs are nearest to what the source has at its cut, in closed form."""
    node = position(task.groups.graph_module, source_at)
    wanted = features_at(task.groups.graph_module, task.images[task.train], [node.name], task.batch_size)[node.name]
    adapter = Adapter(grid_of(place.shape), grid_of(module.spec.input_shape)).to(train.logits)
    adapter.solve(train.features, _kept_channels(task.groups, mask, node, wanted))
    return adapter


def _through(body: nn.Module, adapter: nn.Module, features: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([body(adapter(part)) for part in features.split(batch_size)])


def _source_rows(task: _Task, mask: ChannelMask, head: fx.Node | None) -> tuple[Tensor | None, Tensor | None]:
    """The source's own classifier rows for the cloned classes, over the kept features."""
    if head is None:
        return None, None
    graph_module = task.groups.graph_module
    linear = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    weight = tensor_at(graph_module, str(linear.args[1].target)).detach()[list(task.classes)]
    resizer = Resizer(task.groups.labelling, mask.removed_units(task.groups))
    kept = resizer.kept_slices(str(linear.args[1].target), 1)
    weight = weight[:, kept.to(weight.device)] if len(kept) == weight.shape[1] else weight
    bias = None if len(linear.args) < 3 else tensor_at(graph_module, str(linear.args[2].target)).detach()
    return weight, None if bias is None else bias[list(task.classes)]


def _kept_channels(groups: ChannelGroups, mask: ChannelMask, node: fx.Node, features: Tensor) -> Tensor:
    resizer = Resizer(groups.labelling, mask.removed_units(groups))
    for axis in range(1, features.dim()):
        kept = resizer.kept_along(node, axis)
        features = features.index_select(axis, kept.nonzero().flatten().to(features.device))
    return features


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
    if old is not None and (old.images.shape[1:] != new.images.shape[1:] or old.images.dtype != new.images.dtype):
        raise DataError(
            f"target_data: images are {tuple(old.images.shape[1:])} {old.images.dtype}, those of data "
            f"{tuple(new.images.shape[1:])} {new.images.dtype}; give both in the target's input format"
        )
