"""refit(module, latents(module, target, data)) -> CloneModule: fit a clone's classifier again, without the pictures."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from netclone.arguments import check_choice, check_number
from netclone.cloning.grafted import GraftedModule, clones
from netclone.cloning.injecting import remove
from netclone.cloning.modules import CloneModule
from netclone.cloning.placing import features_at
from netclone.cloning.problem import split
from netclone.cloning.recipe import Recipe
from netclone.errors import ArgumentError, TargetError
from netclone.files.latent_sets import read_latents, write_latents
from netclone.files.spec import CloneSpec
from netclone.graph.capturing import drop_unused_tensors
from netclone.graph.class_names import ClassNames
from netclone.graph.describing import named_columns
from netclone.graph.numbers import dtype_name, numbers_digest
from netclone.graph.outputs import Output
from netclone.graph.quickening import for_gradients
from netclone.graph.tracing import INPUT, logits_node, node_named, position, shape_of, trace
from netclone.learning.adapting import Branch, Cached, Classifier, fit
from netclone.learning.choosing import Choice, by_kind, classified, fit_classifier
from netclone.learning.data import Batches, check_taken, gather, in_batches
from netclone.learning.joint import Scorer, enough, fit_joint
from netclone.learning.stepping import Loop
from netclone.runtime.digests import content_digest
from netclone.runtime.entering import entered

LatentDtype = Literal["bf16"]


@dataclass(frozen=True)
class Latents:
    """A clone set without its pictures: what a clone's adapter and classifier read of them.

    Parameters
    ----------
    spec
        The spec of the clone it was made for: classes, position, digests of the target, how images are prepared.
    body
        At the input a digest of the clone's body, which the features come from. Empty at any other position.
    features
        At a position inside the target, its features there, ``(N, *input_shape)``. At the input these would be the
        pictures themselves; so there they are the pooled features ``(N, F)`` that the body gives to its classifier.
    logits
        The target's logits ``(N, K)``.
    labels
        Columns of the grafted network ``(N,)``: the target's classes, then the cloned ones.
    target_features
        What the target's last layer reads ``(N, G)``, if the clone's classifier reads it, too.
    """

    spec: CloneSpec
    body: str
    features: Tensor
    logits: Tensor
    labels: Tensor
    target_features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Latents) -> Latents:
        """Both sets as one, made for the same clone.

        Raises
        ------
        ArgumentError
            If the other belongs to another clone, position or target.
        """
        _check_same(self.spec, self.body, other)
        mine, theirs = self.tensors, other.tensors
        return Latents(
            self.spec, self.body, **{name: torch.cat([mine[name], theirs[name].to(mine[name].dtype)]) for name in mine}
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is of each sample, by name."""
        found = {"features": self.features, "logits": self.logits, "labels": self.labels}
        return found if self.target_features is None else {**found, "target_features": self.target_features}

    def save(self, path: str | os.PathLike[str], dtype: LatentDtype | None = None) -> None:
        """Write the set to one ``.safetensors`` file, whole or not at all.

        Parameters
        ----------
        dtype
            ``"bf16"``: the features in half of float32's bytes, rounded. A refit then is no longer the same to the bit.

        Raises
        ------
        ArchiveError
            If the file cannot be written.
        """
        if dtype is not None:
            check_choice(dtype, LatentDtype, "dtype")
        rounded = () if dtype is None else ("features", "target_features")
        tensors = {name: part.to(torch.bfloat16) if name in rounded else part for name, part in self.tensors.items()}
        write_latents(self.spec, self.body, tensors, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Latents:
        """Read a set that :meth:`save` wrote; safe for files from strangers.

        Raises
        ------
        ArchiveError
            If the file is missing, damaged, or no latent clone set.
        """
        spec, body, tensors = read_latents(path)
        kept = {name: part if name == "labels" else part.to(tensors["logits"].dtype) for name, part in tensors.items()}
        return cls(spec, body, **kept)


@entered()
def latents(
    module: CloneModule,
    target: nn.Module,
    data: Batches,
    *,
    target_data: Batches | None = None,
    batch_size: int = 64,
    output: Output = None,
) -> Latents:
    """Run the target on a clone set, and keep what :func:`refit` needs of it instead of the pictures.

    Latents are not anonymous: pictures may be told from their features, in part. The deeper the position, the less.

    Parameters
    ----------
    module
        A clone that :func:`netclone.clone` fitted.
    target
        The network that it was fitted to. Clones in it are ignored.
    data, target_data
        As :func:`netclone.clone` takes them: samples of the cloned classes with the source's labels, and samples of the
        target's own classes.
    batch_size
        Images at a time.
    output
        Which part of what the target returns is its logits, as for :func:`netclone.trace`.

    Raises
    ------
    ArgumentError
        If the clone was only extracted.
    DataError
        If the data cannot be used.
    TargetError
        If the target has other weights than the one that the clone was fitted to.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> source = timm.create_model("test_efficientnet", num_classes=4)
    >>> target = timm.create_model("test_resnet", num_classes=2)
    >>> images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    >>> module = netclone.clone(source, target, [(images, labels)], classes=[2, 3], at="input", method="magnitude",
    ...                         target_data=[(images, labels % 2)], distill_steps=0)
    >>> kept = netclone.latents(module, target, [(images, labels)], target_data=[(images, labels % 2)])
    >>> len(kept), tuple(kept.logits.shape)
    (24, (24, 2))
    """
    check_number(batch_size, "batch_size", 1)
    trunk = _trunk(module)
    while isinstance(target, GraftedModule):
        target = remove(target, clones(target)[0])
    cloned = named_columns(module.class_names)
    names = {name: tuple(module.classes[column] for column in found) for name, found in cloned.items()}
    new = gather(data, "data", names=ClassNames(names, "clone")).of_classes(module.classes)
    check_taken(target, new.images[:2], "data", "target")
    traced = trace(target, torch.cat([new.images[:2]] * 2)[:2], output=output).eval()
    known = dict(module.spec.target_digests)
    if known and known.get(dtype_name(traced)) != numbers_digest(traced):
        raise TargetError("target: its weights are not those that the clone was fitted to; give that network")
    (old,) = shape_of(logits_node(traced)) or (0,)
    columns = {c: old + i for i, c in enumerate(module.classes)}
    images, labels = new.images, torch.tensor([columns[label] for label in new.labels.tolist()])
    if target_data is not None:
        own = gather(target_data, "target_data", names=ClassNames.of(target, "target"))
        own.check_labels(old, "target")
        images, labels = torch.cat([own.images, images]), torch.cat([own.labels.cpu(), labels])
    if module.at == INPUT:
        features = in_batches(trunk, images, batch_size)
    else:
        node = position(traced, str(module.at)).name
        features = features_at(traced, images, [node], batch_size)[node]
    logits = in_batches(traced, images, batch_size)
    made = Latents(module.spec, _body_digest(module, trunk), features.contiguous(), logits, labels.to(logits.device))
    if not _is_joint(module):
        return made
    node = node_named(traced, str(module.spec.feature_node)).name
    return replace(made, target_features=features_at(traced, images, [node], batch_size)[node].contiguous())


@entered()
def refit(
    module: CloneModule,
    latents: Latents,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    validation: float = 0.2,
    seed: int = 0,
) -> CloneModule:
    """Fit a clone's classifier again, and its adapter if it has one, on a latent clone set; without any picture.

    The classifier starts from its formula, an adapter from where it is. Then both are fitted as :func:`netclone.clone`
    fits them: at the input by cross-validation, elsewhere in epochs. Body and source rows stay, to the bit. Scores of
    old and new classes are fitted anew if there are five samples of each class.

    Parameters
    ----------
    module
        The clone; it is not changed.
    latents
        What :func:`netclone.latents` kept, with this clone or one that differs in its classifier and adapter alone.
    epochs, batch_size, validation, seed
        As for :func:`netclone.clone`.

    Raises
    ------
    ArgumentError
        If the latents belong to another clone, or an argument is out of range.
    FitError
        If the loss is not finite.

    Examples
    --------
    >>> import timm, torch, netclone
    >>> source, target = (timm.create_model("test_resnet", num_classes=count) for count in (4, 2))
    >>> data = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    >>> module = netclone.clone(source, target, [data], classes=[2, 3], target_data=[(data[0], data[1] % 2)],
    ...                         at="layer3", method="magnitude", distill_steps=0, epochs=1)
    >>> kept = netclone.latents(module, target, [data], target_data=[(data[0], data[1] % 2)])
    >>> netclone.refit(module, kept, epochs=1, seed=1).classes
    (2, 3)
    """
    Recipe(epochs=epochs, batch_size=batch_size, validation=validation)  # checks them
    check_number(seed, "seed", 0)
    trunk = _trunk(module)
    _check_same(module.spec, _body_digest(module, trunk), latents)
    torch.default_generator.manual_seed(seed)
    place = next(trunk.parameters()).device
    features = [part.to(place) for part in (latents.features, latents.target_features) if part is not None]
    side_by_side = features[0] if len(features) == 1 else torch.cat(features, 1)
    cached = Cached(side_by_side, latents.logits.to(place), latents.labels.to(place))
    parts = split(cached.labels, validation, torch.Generator().manual_seed(seed))
    train, held_out = (cached[rows] for rows in parts)
    shows = torch.cat(parts)  # the one sample of a class is in both
    closed = module.at == INPUT
    adapter: nn.Module = nn.Identity() if closed else for_gradients(trunk)
    seen = train.features if closed else in_batches(trunk, train.features, batch_size)
    found: dict[str, Tensor] = {}
    if _is_joint(module):
        branch, train, held_out, found = _scored_again(module, train, held_out, shows, seed)
    else:
        branch = Branch(adapter, nn.Identity(), _started(module, seen, train.logits))
    loop = Loop(batch_size=batch_size, generator=torch.Generator().manual_seed(seed))
    calibrate = "calibration" not in json.loads(dict(module.spec.recipe).get("without", "[]"))
    choice: Choice | None = None
    if closed and epochs:
        score, choice = fit_classifier(branch, train, held_out, shows, calibrate=calibrate, loop=loop)
    else:
        score = fit(branch, train, held_out, epochs=epochs, calibrate=calibrate, loop=loop)
    place_of = "classifier.gate" if _is_joint(module) else "classifier"
    found |= {f"{place_of}.{name}": tensor for name, tensor in branch.classifier.state_dict().items()}
    found |= {name: tensor for name, tensor in adapter.state_dict().items() if module.part_of(name) == "adapter"}
    made = copy.deepcopy(module.body)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if name in found:
                tensor.copy_(found[name])
    facts = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "validation": validation, "samples": len(cached)}
    recipe = *(item for item in module.spec.recipe if item[0] != "refit"), ("refit", json.dumps(facts))
    kinds = by_kind(held_out, classified(branch, train, held_out, choice, batch_size))
    scores = (("validation", score), *kinds, *(choice.told() if choice else ()))
    spec = replace(module.spec, recipe=recipe, scores=scores, stored=())
    return CloneModule(made, spec, copy.deepcopy(module.router)).eval()


def _trunk(module: CloneModule) -> fx.GraphModule:
    """A copy of a clone's graph up to the features that its classifier reads; only the adapter requires a gradient.

    Raises
    ------
    ArgumentError
        If the clone was only extracted.
    """
    spec = module.spec
    if spec.feature_shape is None:
        raise ArgumentError(
            "module: it was only extracted and has no classifier to fit; make a clone with netclone.clone"
        )
    trunk = copy.deepcopy(module.body)
    _, target_logits = (node for node in trunk.graph.nodes if node.op == "placeholder")
    late = {target_logits}
    for node in trunk.graph.nodes:
        of_classifier = node.op == "get_attr" and module.part_of(str(node.target)) == "classifier"
        if of_classifier or any(read in late for read in node.all_input_nodes):
            late.add(node)
    features = next(
        node
        for node in trunk.graph.nodes
        if node.op != "get_attr" and node not in late and any(user in late for user in node.users)
    )
    next(node for node in trunk.graph.nodes if node.op == "output").args = (features,)
    trunk.graph.eliminate_dead_code()
    trunk.graph.erase_node(target_logits)
    drop_unused_tensors(trunk)
    trunk.recompile()
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(module.part_of(name) == "adapter")
    return trunk.eval()


def _started(module: CloneModule, seen: Tensor, logits: Tensor) -> Classifier:
    """A clone's classifier as it was before any fit, standardised by these features and logits."""
    tensors = {name.partition(".")[2]: tensor.detach() for name, tensor in module.parts["classifier"].items()}
    both = tensors["mean"].numel() > seen.shape[1]
    made = Classifier(seen.shape[1], logits.shape[1], len(module.classes), both).to(tensors["mean"])
    made.start(seen, logits, tensors.get("source.weight"), tensors.get("source.bias"))
    return made


def _is_joint(module: CloneModule) -> bool:
    """Whether the classifier reads the target's features (see :mod:`netclone.learning.joint`)."""
    return any(name.startswith("classifier.scorer.") for name in module.parts["classifier"])


def _scored_again(
    module: CloneModule, train: Cached, held_out: Cached, shows: Tensor, seed: int
) -> tuple[Branch, Cached, Cached, dict[str, Tensor]]:
    """The gate of a joint classifier to fit, its samples, and the tensors of a scorer that is fitted to them.

    Of too few samples, or without old ones, the clone's own scorer stays.
    """
    assert module.spec.feature_shape is not None
    (width,) = module.spec.feature_shape
    tensors = {name.removeprefix("classifier."): tensor.detach() for name, tensor in module.parts["classifier"].items()}
    classes, old = len(module.classes), train.logits.shape[1]
    labels = torch.cat([train.labels, held_out.labels])
    if enough(labels, shows, old):
        joint = fit_joint(train, held_out, width, shows, classes=classes, seed=seed)
        found = {f"classifier.scorer.{name}": tensor for name, tensor in joint.scorer.state_dict().items()}
        return joint.branch, joint.train, joint.held_out, found
    scorer = Scorer(tensors["scorer.projections.weight"], tensors["scorer.rows.weight"])
    train, held_out = (replace(part, features=scorer(part.features)) for part in (train, held_out))
    gate = Classifier(classes + old, old, classes).to(train.logits)
    gate.start(train.features, train.logits, tensors["gate.source.weight"], None)
    return Branch(nn.Identity(), nn.Identity(), gate), train, held_out, {}


def _body_digest(module: CloneModule, trunk: fx.GraphModule) -> str:
    """A digest of the part of a clone that latents at the input have gone through."""
    return content_digest(trunk.code, trunk.state_dict()) if module.at == INPUT else ""


def _check_same(spec: CloneSpec, body: str, latents: Latents) -> None:
    """Raise unless latents were made for a clone of this spec and body."""
    for name in ("classes", "at", "feature_node", "feature_shape", "target_fingerprint", "target_digests"):
        here, there = getattr(spec, name), getattr(latents.spec, name)
        if here != there:
            raise ArgumentError(f"latents: made for a clone with {name} {there!r}, here {here!r}; make them again")
    if body != latents.body:
        raise ArgumentError("latents: made for a clone with another body, whose features differ; make them again")
