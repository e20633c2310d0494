"""load_model(name, weights): one way to name a network everywhere: in timm, torchvision, the hub, or a file."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torchvision
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from netclone.cloning.grafted import Seat
from netclone.cloning.injecting import graft
from netclone.cloning.modules import CloneModule, from_bytes
from netclone.errors import ArchiveError, ArgumentError, LoadError, first_line
from netclone.files.bundling import Bundle, Packed, is_bundle, read_bundle
from netclone.files.options import LIBRARIES, checked_options
from netclone.graph.describing import facts_about
from netclone.graph.preparing import IMAGES, Preparation, preparation, prepared_as
from netclone.models import huggingface
from netclone.models.checkpoints import Checkpoint, fitted, read_checkpoint
from netclone.models.recipes import Recipe, recipe_of
from netclone.runtime.digests import content_digest
from netclone.runtime.entering import entered
from netclone.runtime.text import suggestion

SOURCES = ("hf-hub", "local-dir")  # timm's own prefixes
_MOST_BESIDE = 2**26  # numbers of a head for other classes than a file's, at most
_LEAST = 2**14  # numbers that any tensor counts for: making one takes time, however small it is
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
HISTORY = "netclone_history"
"""Where a grafted graph that was read from a file holds what the file tells of itself, in its ``meta``."""

PRETRAINED = "pretrained"
"""The weights that the library itself supplies, which it may have to download."""


Note = Callable[[str], None]
"""Called with one line for the user to read."""


def silent(line: str) -> None:
    """A :data:`Note` that says nothing."""


@dataclass(frozen=True)
class Opened:
    """A named network, and what builds it again: its architecture and its constructor's options.

    ``known`` is whether the preprocessing of its images is known: from the weights, a checkpoint, or the caller.
    """

    network: nn.Module
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    known: bool = True

    @property
    def assumption(self) -> str:
        """What is assumed about the preprocessing of its images, if nothing is known; else empty."""
        if self.known:
            return ""
        return (
            f"the preprocessing of its images is not recorded; assuming that of {self.architecture}: "
            f"{self.preparation} (change it with --img-size, --mean, --std, --interpolation and --crop-pct)"
        )

    @property
    def preparation(self) -> Preparation:
        """How its images are preprocessed."""
        return preparation(self.network)


@entered()
def load_model(
    name: str,
    weights: str | os.PathLike[str] | None = PRETRAINED,
    *,
    use_ema: bool | None = None,
    images: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a named network in eval mode, with pretrained weights, the weights of a file, or random ones.

    Parameters
    ----------
    name
        ``"timm/resnet18"`` (or with a tag, ``"timm/resnet18.a1_in1k"``), ``"torchvision/resnet50"``,
        ``"transformers/google/vit-base-patch16-224"`` (an image classifier, from transformers' cache, the hub, or a
        folder that ``save_pretrained`` wrote, ``"transformers/FOLDER"``), ``"hf-hub:timm/resnet18.a1_in1k"``,
        ``"local-dir:folder"`` (a ``config.json`` and weights, as timm's ``save_for_hf`` writes them).
        ``"timm/resnet18@birds.safetensors"`` is ``"timm/resnet18"`` with ``weights="birds.safetensors"``. A file alone,
        ``"model_best.pth.tar"``, works if it records its architecture, as those of timm's training script and of
        ``netclone inject`` do.
    weights
        ``"pretrained"``: the library's own; for torchvision also one of them by name (``"IMAGENET1K_V1"``). A
        checkpoint file: ``.safetensors``, or ``.pth`` and the like, read with ``weights_only=True``; the tensors may be
        nested and have a common prefix, as training scripts, Lightning, averaging and compiling leave them. None:
        random weights, as the library initialises them.
    use_ema
        Whether to take a checkpoint's averaged weights. None: if it has some.
    images
        The preprocessing of images, by timm's names (``{"input_size": (3, 96, 96), "mean": (0.5, 0.5, 0.5)}``), to
        override what the weights or a training script's checkpoint say. The network carries it in ``pretrained_cfg``,
        as timm's networks do.
    options
        Arguments of the constructor: ``num_classes=10``, ``in_chans=1``, ``img_size=64``. The number of classes is read
        off a checkpoint, and so are the other options that a training script records.

    Raises
    ------
    LoadError
        If there is no such network, weights or file (the closest names are suggested). If the file's tensors differ
        from the network's in name, shape or kind of number, it holds more than tensors, or it does not record the
        architecture that it has to. If the network has no pretrained weights, or they cannot be downloaded.
    ArgumentError
        If ``images`` has an unknown name or an invalid value.

    Examples
    --------
    >>> import netclone
    >>> netclone.load_model("timm/test_resnet", weights=None, num_classes=4).num_classes
    4
    >>> netclone.load_model("timm/vgg17", weights=None)
    Traceback (most recent call last):
        ...
    netclone.errors.LoadError: name: timm has no model 'vgg17'; did you mean 'vgg19', 'vgg16' or 'vgg13'?

    Reference: timm ``create_model``, torchvision ``get_model``.
    """
    return open_model(name, weights, use_ema=use_ema, images=images, **options).network


def open_model(
    name: str,
    weights: str | os.PathLike[str] | None = PRETRAINED,
    *,
    use_ema: bool | None = None,
    images: Mapping[str, Any] | None = None,
    **options: Any,
) -> Opened:
    """The network that :func:`load_model` returns, and what is known about it.

    Raises
    ------
    LoadError, ArgumentError
        As :func:`load_model`.
    """
    if not isinstance(name, str) or not name:
        raise LoadError(f"name: got {name!r}, expected text such as 'timm/resnet18' or 'torchvision/resnet50'")
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise LoadError(f"weights: got {type(weights).__name__}, expected 'pretrained', a file, or None")
    library, _, model = name.partition("/")
    if library in LIBRARIES and "@" in model:
        model, _, file = model.partition("@")
        if weights != PRETRAINED:
            raise LoadError(f"weights: '{name}' already names a checkpoint; leave out weights={weights!r}")
        weights = file
    asked = _Asked(options, checked_images(images or {}), use_ema)
    if library in LIBRARIES:
        return _finished(_plan(library, model), weights, asked)
    source, _, folder = name.partition(":")
    if source == "local-dir" and huggingface.is_of_transformers(folder):
        return _finished(_transformers_plan(folder), weights, asked)
    if source in SOURCES:
        return _finished(Plan("timm", name, _create(name, name)), weights, asked)
    path = Path(name)
    if path.suffix in CHECKPOINTS:
        return _of_checkpoint(path, weights, asked)
    if os.path.isdir(path):
        raise LoadError(
            f"name: '{name}' is a folder; for a model that timm or transformers saved there, write 'local-dir:{name}'"
        )
    known = f"; did you mean 'timm/{name}'?" if timm.is_model(name) else ""
    raise LoadError(
        f"name: '{name}' names no library{known or '; expected timm/..., torchvision/..., transformers/..., '}"
        + ("" if known else f"hf-hub:..., local-dir:... or a checkpoint file ({', '.join(CHECKPOINTS)})")
    )


Builder = Callable[..., nn.Module]
"""Called with ``weights`` (``"pretrained"``, a name, or None) and the options of the constructor."""


@dataclass(frozen=True)
class Plan:
    """How a library builds the networks of a name."""

    library: str
    model: str
    build: Builder


@dataclass(frozen=True)
class _Asked:
    """What the caller asks for: options of the constructor, preprocessing, which weights, and whether they keep their
    dtype."""

    options: Mapping[str, Any]
    images: Mapping[str, Any] = field(default_factory=dict)
    use_ema: bool | None = None
    as_stored: bool = False

    def after(self, recipe: Recipe, model: str) -> _Asked:
        """The same, added to what a checkpoint says."""
        same = recipe.architecture is not None and recipe.architecture.partition(".")[0] == model.partition(".")[0]
        options = {**recipe.options, **self.options} if same else self.options
        return replace(self, options=options, images={**recipe.images, **self.images})


def checked_images(images: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of images, by timm's names, as plain data.

    Raises
    ------
    ArgumentError
        If a name is unknown or a value is invalid.

    Examples
    --------
    >>> checked_images({"input_size": (3, 96, 96)})
    {'input_size': [3, 96, 96]}
    """
    made = {name: list(value) if isinstance(value, tuple) else value for name, value in images.items()}
    for name, value in made.items():
        if name not in IMAGES:
            raise ArgumentError(f"images: got {name!r}, expected some of {', '.join(IMAGES)}")
        if not IMAGES[name](value):
            raise ArgumentError(f"images: '{name}' has an invalid value, {str(value)[:80]!r}")
    return made


def _plan(library: str, model: str) -> Plan:
    """How a library builds the networks of a name."""
    plans = {"timm": _timm_plan, "torchvision": _torchvision_plan, "transformers": _transformers_plan}
    return plans[library](model)


def _transformers_plan(model: str) -> Plan:
    def build(weights: str | None, **options: Any) -> nn.Module:
        if weights not in (None, PRETRAINED):
            raise LoadError(
                f"weights: there is no file '{weights}' for transformers/{model}; weights='pretrained' takes its own"
            )
        return huggingface.build(model, weights, options)

    return Plan("transformers", model, build)


def _timm_plan(model: str) -> Plan:
    if not timm.is_model(model.partition(".")[0]):
        raise _unknown("timm", model, timm.list_models())
    return Plan("timm", model, _create(model, f"timm/{model}"))


def _create(model: str, shown: str) -> Builder:
    def build(weights: str | None, **options: Any) -> nn.Module:
        if weights not in (None, PRETRAINED):
            raise LoadError(f"weights: there is no file '{weights}' for {shown}; weights='pretrained' takes timm's own")
        return timm.create_model(model, pretrained=weights is not None, **options)

    return build


def _torchvision_plan(model: str) -> Plan:
    if model not in torchvision.models.list_models():
        raise _unknown("torchvision", model, torchvision.models.list_models())

    def build(weights: str | None, **options: Any) -> nn.Module:
        known = torchvision.models.get_model_weights(model)
        if weights not in (None, PRETRAINED, *known.__members__):
            raise LoadError(
                f"weights: there is no file '{weights}'; torchvision/{model} has {', '.join(known.__members__)}"
            )
        parameters = inspect.signature(torchvision.models.get_model_builder(model)).parameters
        if weights is None and "weights_backbone" in parameters:
            options.setdefault("weights_backbone", None)  # detection and segmentation download one by default
        chosen = "DEFAULT" if weights == PRETRAINED else weights
        network: nn.Module = torchvision.models.get_model(model, weights=chosen, **options)
        if chosen is not None:
            prepared_as(network, _preset(known[chosen].transforms()))
        return network

    return Plan("torchvision", model, build)


def _preset(transform: Any) -> dict[str, Any]:
    """What torchvision's preset of a classifier's weights does to images, by timm's names; empty for other presets."""
    if not {"crop_size", "resize_size", "mean", "std", "interpolation"} <= vars(transform).keys():
        return {}
    [crop], [resize] = transform.crop_size, transform.resize_size
    return {
        "input_size": [3, crop, crop],
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": crop / resize,
    }


def _unknown(library: str, model: str, names: list[str]) -> LoadError:
    return LoadError(f"name: {library} has no model '{model}'{suggestion(model, names)}")


def _finished(plan: Plan, weights: str | os.PathLike[str] | None, asked: _Asked) -> Opened:
    """The network, in eval mode; a checkpoint's number of classes is taken where none is asked for."""
    path = None if weights is None or weights == PRETRAINED else Path(weights)
    # what is no file is perhaps the name of one of several
    if path is not None and (path.suffix in CHECKPOINTS or os.path.isfile(path)):
        return _from_checkpoint(plan, read_checkpoint(path), asked)
    if asked.use_ema is not None:
        raise LoadError(f"use_ema: only a checkpoint can hold averaged weights, and {plan.model} was given none")
    given = None if weights is None else str(weights)
    network, options = _sized(plan, given, asked)
    return _opened(plan, network, options, known=plan.library != "transformers" or "mean" in facts_about(network))


def _from_checkpoint(plan: Plan, checkpoint: Checkpoint, asked: _Asked) -> Opened:
    recipe = _said(checkpoint)
    given = asked.after(recipe, plan.model)
    network, options = _sized(plan, None, given)
    own = network.state_dict()
    tensors = checkpoint.tensors_for(own, plan.model, asked.use_ema)
    if "num_classes" not in options and (count := _classes_of(tensors, own)) is not None:
        network, options = _sized(plan, None, replace(given, options={**given.options, "num_classes": count}))
    if asked.as_stored or recipe.library:
        _cast_like(network, tensors)
    network.load_state_dict(fitted(tensors, network.state_dict(), checkpoint.path, plan.model))
    known = recipe.says or {"input_size", "mean", "std"} <= asked.images.keys() or plan.model.startswith(SOURCES)
    return _opened(plan, network, options, known)


def _said(checkpoint: Checkpoint) -> Recipe:
    try:
        return recipe_of(checkpoint.content)
    except ArchiveError as error:
        raise LoadError(f"weights: '{checkpoint.path}': {error}") from error


def _cast_like(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network's floating tensors the dtypes of those of the same names."""
    for name, own in {**dict(network.named_parameters()), **dict(network.named_buffers())}.items():
        stored = tensors.get(name, own)
        if own.is_floating_point() and stored.is_floating_point():
            own.data = own.data.to(stored.dtype)


def _sized(plan: Plan, weights: str | None, asked: _Asked) -> tuple[nn.Module, dict[str, Any]]:
    """The network for images of the size asked for, which some constructors have to be told, and its options."""
    options = dict(asked.options)
    network = _built(plan, weights, options)
    about = getattr(network, "pretrained_cfg", None) or {}
    size = asked.images.get("input_size")
    if size and about.get("fixed_input_size") and "img_size" not in options and list(about["input_size"]) != size:
        options["img_size"] = tuple(size[1:])
        network = _built(plan, weights, options)
    prepared_as(network, told_size(network, options) | _of_channels(asked.images, getattr(network, "in_chans", None)))
    return network, options


def _of_channels(images: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """The preprocessing of images of so many channels (None: as many as it says); one mean stands for all channels."""
    made = dict(images)
    if channels is None:
        channels = next((len(made[name]) for name in ("mean", "std") if len(made.get(name, "")) > 1), 3)
        channels = made["input_size"][0] if "input_size" in made else channels
    if "input_size" in made:
        made["input_size"] = [channels, *made["input_size"][1:]]
    for name in ("mean", "std"):
        values = made.get(name, [])
        if len(values) not in (0, 1, channels):
            raise ArgumentError(f"images: {name} has {len(values)} values; expected 1, or {channels}, one per channel")
        made |= {name: values * channels} if len(values) == 1 else {}
    return made


def told_size(network: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The size of images that a constructor was given, as preprocessing; empty if it was not."""
    told = options.get("img_size")
    if told is None or not hasattr(network, "pretrained_cfg"):
        return {}
    sides = tuple(told) if isinstance(told, (tuple, list)) else (told, told)
    return {"input_size": [getattr(network, "in_chans", 3), *sides]}


def _opened(plan: Plan, network: nn.Module, options: Mapping[str, Any], known: bool) -> Opened:
    about = getattr(network, "pretrained_cfg", None) or {}
    model = plan.model if plan.library == "torchvision" else about.get("architecture", plan.model)
    made = getattr(network, "_model_args", options)  # timm's record, in which are those of a folder or the hub
    made = {name: value for name, value in made.items() if name != "num_classes"}
    return Opened(network.eval(), f"{plan.library}/{model}", made, known)


def _built(plan: Plan, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    try:
        return plan.build(weights, **options)
    except LoadError:
        raise
    except Exception as error:  # constructors and downloads may raise anything
        what = "its pretrained weights could not be loaded" if weights else "it could not be built"
        hint = "; pass a file as weights=..., or weights=None for random ones" if weights else ""
        raise LoadError(f"name: {plan.model}: {what}: {type(error).__name__}: {first_line(error)}{hint}") from error


def _classes_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint has, where that is all that sets it apart from the network; else None."""
    others = {(tensors[n].shape, own[n].shape) for n in own if n in tensors and tensors[n].shape != own[n].shape}
    counts = {theirs[0] for theirs, ours in others if theirs[1:] == ours[1:] and len(theirs) > 0}
    return counts.pop() if len(counts) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in others) else None


def _of_checkpoint(path: Path, weights: str | os.PathLike[str] | None, asked: _Asked) -> Opened:
    """The network of a file that records its architecture: a training script's checkpoint, or a grafted network."""
    if weights != PRETRAINED:
        raise LoadError(f"weights: '{path}' is a checkpoint already; leave out weights={weights!r}")
    if is_bundle(path):
        bundle = read_bundle(path)
        return grafted(replace(bundle, config={**bundle.config, **asked.images}), path, **asked.options)
    way = f"name it, as in 'timm/resnet18@{path}'"
    checkpoint = read_checkpoint(path)
    recipe = _said(checkpoint)
    architecture = recipe.architecture
    if architecture is None and path.suffix == ".safetensors":
        raise LoadError(f"name: '{path}' holds tensors but does not record their architecture; {way}")
    if architecture is None:
        raise LoadError(f"name: '{path}' does not record its architecture ('arch'); {way}")
    if recipe.library == "transformers":
        return _from_checkpoint(_transformers_plan(architecture), checkpoint, asked)
    of_timm = timm.is_model(architecture.partition(".")[0])
    if recipe.library == "torchvision" or (not of_timm and architecture in torchvision.models.list_models()):
        return _from_checkpoint(_torchvision_plan(architecture), checkpoint, asked)
    return _from_checkpoint(_timm_plan(architecture), checkpoint, asked)


def grafted(bundle: Bundle, path: Path, **options: Any) -> Opened:
    """The network of a bundle; ``path`` names it in messages.

    Raises
    ------
    LoadError, ArchiveError
        If its tensors are not of its architecture; if a clone is damaged or does not fit.
    """

    def build(architecture: str, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        library, _, model = architecture.partition("/")
        plan = _plan(library, model)
        plan = replace(plan, build=_bounded(plan.build, sum(tensor.numel() for tensor in tensors.values()), path))
        return _from_checkpoint(plan, Checkpoint(path, tensors), _Asked({**given, **options}, as_stored=True)).network

    network = build(bundle.architecture, checked_options(bundle.options), bundle.tensors).eval()
    prepared_as(network, bundle.config)
    for packed in bundle.clones:
        last = packed is bundle.clones[-1]  # all of them are compared with the target's own graph at once
        network = graft(
            network,
            clone_in(packed),
            packed.at,
            name=packed.name,
            seat=Seat("packed" if packed.first is None else "stable", packed.first, packed.off),
            check=last,
        )
    if isinstance(network, fx.GraphModule):
        network.meta[HISTORY] = bundle.history
    return Opened(network, bundle.architecture, bundle.options)


def clone_in(packed: Packed) -> CloneModule:
    """The clone that a bundle holds.

    Raises
    ------
    ArchiveError
        If it is none, or damaged.
    """
    return from_bytes(packed.archive, f"clone '{packed.name}'")


def _bounded(build: Builder, held: int, path: Path) -> Builder:
    """The same builder, which stops at a network far larger than the file.

    A file may come from anyone. The allowance covers a head for other classes than the file's, which is built first.
    """

    def bounded(weights: str | None, **options: Any) -> nn.Module:
        thread, left = threading.get_ident(), [2 * held + _MOST_BESIDE]

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if threading.get_ident() == thread and parameter is not None:
                left[0] -= parameter.numel() + _LEAST
                if left[0] < 0:
                    raise LoadError(f"weights: '{path}' asks for a network far larger than its {held} numbers")

        handle = register_module_parameter_registration_hook(count)
        try:
            return build(weights, **options)
        finally:
            handle.remove()

    return bounded


def open_target(name: str, *, use_ema: bool | None = None, images: Mapping[str, Any] | None = None) -> Opened:
    """As :func:`open_model`, but of a grafted network's file the target alone, without its clones.

    Raises
    ------
    LoadError, ArchiveError, ArgumentError
        As :func:`load_model`.
    """
    if not is_bundle(name):
        return open_model(name, use_ema=use_ema, images=images)
    bundle = read_bundle(name)
    config = {**bundle.config, **checked_images(images or {})}
    return grafted(replace(bundle, clones=(), config=config), Path(name))


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's tensors, with their names, shapes and dtypes, wherever they come from."""
    return content_digest("weights", network.state_dict())


def revision_of(name: str, network: nn.Module) -> str:
    """The commit of the hub that a network's weights were downloaded from, as the cache records it; else empty."""
    about = getattr(network, "pretrained_cfg", None) or {}
    repo = about.get("hf_hub_id") if name.startswith(("timm/", "hf-hub:")) and "@" not in name else None
    if not repo:
        return ""
    for file in filter(None, (about.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")):
        found = huggingface_hub.try_to_load_from_cache(str(repo), str(file))
        if isinstance(found, str):
            return Path(found).parent.name
    return ""
