"""load_model(name, weights): one way to name a network everywhere, of timm, torchvision, the hub, or a file."""

from __future__ import annotations

import difflib
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from netclone.cloning.injecting import graft
from netclone.cloning.modules import CloneModule, from_bytes
from netclone.errors import ArchiveError, ArgumentError, LoadError, first_line
from netclone.files.bundling import Bundle, Packed, is_bundle, read_bundle
from netclone.files.options import checked_options
from netclone.graph.preparing import IMAGES, Preparation, preparation, prepared_as
from netclone.models.checkpoints import Checkpoint, fitted, read_checkpoint
from netclone.models.recipes import Recipe, recipe_of
from netclone.runtime.entering import entered

LIBRARIES = ("timm", "torchvision")
SOURCES = ("hf-hub", "local-dir")  # timm's own prefixes
_MOST_BESIDE = 2**26  # numbers of a head for other classes than a file's, at most
_LEAST = 2**14  # numbers that any tensor counts for: making one takes time, however small it is
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
PRETRAINED = "pretrained"
"""The weights that the library itself supplies, which it may have to download."""


Note = Callable[[str], None]
"""Called with a line for a person."""


def silent(line: str) -> None:
    """The :data:`Note` that goes nowhere."""


@dataclass(frozen=True)
class Opened:
    """A network of a name, and what builds it anew: its architecture's name and its constructor's options.

    ``known`` is whether it is known how its images are prepared, by the weights, a checkpoint, or who asked for it.
    """

    network: nn.Module
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    known: bool = True

    @property
    def assumption(self) -> str:
        """A line that says how its images are prepared, where nothing is known; else empty."""
        if self.known:
            return ""
        return (
            f"nothing says how its images were prepared; assumed is what {self.architecture} says: {self.preparation} "
            "(--img-size, --mean, --std, --interpolation and --crop-pct say otherwise)"
        )

    @property
    def preparation(self) -> Preparation:
        """How its images are prepared."""
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
    """Build the network of a name, in eval mode, with the library's pretrained weights, those of a file, or none.

    Parameters
    ----------
    name
        ``"timm/resnet18"`` (or with a tag, ``"timm/resnet18.a1_in1k"``), ``"torchvision/resnet50"``,
        ``"hf-hub:timm/resnet18.a1_in1k"``, ``"local-dir:folder"`` (a ``config.json`` and weights, as timm's
        ``save_for_hf`` writes them), or with weights of its own, ``"timm/resnet18@birds.safetensors"``: the same as
        ``weights="birds.safetensors"``. A file alone, ``"model_best.pth.tar"``, if it says its architecture, as
        those of timm's training script and of ``netclone inject`` do.
    weights
        ``"pretrained"``, the library's own; for torchvision also the name of one of several (``"IMAGENET1K_V1"``). A
        checkpoint: ``.safetensors``, or ``.pth`` and the like, read with ``weights_only=True``. The tensors may be in
        mappings and behind a common prefix, as training scripts, Lightning, averaging and compiling put them. None: as
        the library initialises them.
    use_ema
        Whether to take a checkpoint's averaged weights; None: where it has some.
    images
        How images are prepared, by timm's names (``{"input_size": (3, 96, 96), "mean": (0.5, 0.5, 0.5)}``), where that
        is not what the weights say, or a checkpoint of timm's or torchvision's training script. The network says it,
        as timm's do, in ``pretrained_cfg``.
    options
        What the constructor is told: ``num_classes=10``, ``in_chans=1``, ``img_size=64``. The number of classes of a
        checkpoint is found by itself; of a training script's, its other options too.

    Raises
    ------
    LoadError
        If there is no such network, weights or file (the closest names are suggested), the file holds other tensors
        than the network has (in name, shape, or kind of number), more than tensors, or no architecture where it has to
        say one; or the network has no pretrained weights, or they could not be fetched.
    ArgumentError
        If ``images`` is not how images can be prepared.

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
    """What :func:`load_model` gives, and what is known about it.

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
            raise LoadError(f"weights: '{name}' names a checkpoint of its own, so weights={weights!r} has no meaning")
        weights = file
    asked = _Asked(options, checked_images(images or {}), use_ema)
    if library == "timm":
        return _finished(_timm_plan(model), weights, asked)
    if library == "torchvision":
        return _finished(_torchvision_plan(model), weights, asked)
    if name.partition(":")[0] in SOURCES:
        return _finished(Plan("timm", name, _create(name, name)), weights, asked)
    path = Path(name)
    if path.suffix in CHECKPOINTS:
        return _of_checkpoint(path, weights, asked)
    if os.path.isdir(path):
        raise LoadError(f"name: '{name}' is a folder; a model that timm saved into it is 'local-dir:{name}'")
    known = f"; did you mean 'timm/{name}'?" if timm.is_model(name) else ""
    raise LoadError(
        f"name: '{name}' says no library{known or ': expected timm/..., torchvision/..., hf-hub:..., local-dir:... or'}"
        + ("" if known else f" a checkpoint ({', '.join(CHECKPOINTS)})")
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
    """What the caller says of the network: options of the constructor, how images are prepared, which weights, and
    whether these keep their dtype."""

    options: Mapping[str, Any]
    images: Mapping[str, Any] = field(default_factory=dict)
    use_ema: bool | None = None
    as_stored: bool = False

    def after(self, recipe: Recipe, model: str) -> _Asked:
        """The same on top of what a checkpoint says."""
        same = recipe.architecture is not None and recipe.architecture.partition(".")[0] == model.partition(".")[0]
        options = {**recipe.options, **self.options} if same else self.options
        return replace(self, options=options, images={**recipe.images, **self.images})


def checked_images(images: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, by timm's names, as data.

    Raises
    ------
    ArgumentError
        If a name or value is none.

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
            raise ArgumentError(f"images: {name} is {str(value)[:80]!r}, which says nothing of how images are prepared")
    return made


def _timm_plan(model: str) -> Plan:
    if not timm.is_model(model.partition(".")[0]):
        raise _unknown("timm", model, timm.list_models())
    return Plan("timm", model, _create(model, f"timm/{model}"))


def _create(model: str, shown: str) -> Builder:
    def build(weights: str | None, **options: Any) -> nn.Module:
        if weights not in (None, PRETRAINED):
            raise LoadError(f"weights: no file '{weights}' for {shown} ('pretrained' takes those of timm)")
        return timm.create_model(model, pretrained=weights is not None, **options)

    return build


def _torchvision_plan(model: str) -> Plan:
    if model not in torchvision.models.list_models():
        raise _unknown("torchvision", model, torchvision.models.list_models())

    def build(weights: str | None, **options: Any) -> nn.Module:
        known = torchvision.models.get_model_weights(model)
        if weights not in (None, PRETRAINED, *known.__members__):
            raise LoadError(
                f"weights: no file '{weights}', and torchvision/{model} has the weights {', '.join(known.__members__)}"
            )
        parameters = inspect.signature(torchvision.models.get_model_builder(model)).parameters
        if weights is None and "weights_backbone" in parameters:
            options.setdefault("weights_backbone", None)  # detection and segmentation download one by default
        chosen = "DEFAULT" if weights == PRETRAINED else weights
        network = torchvision.models.get_model(model, weights=chosen, **options)
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
    near = difflib.get_close_matches(model, names, n=3)
    listed = " or ".join(f"'{n}'" for n in near[-2:])
    hint = f"; did you mean {', '.join([f'{n!r}' for n in near[:-2]] + [listed])}?" if near else ""
    return LoadError(f"name: {library} has no model '{model}'{hint}")


def _finished(plan: Plan, weights: str | os.PathLike[str] | None, asked: _Asked) -> Opened:
    """The network, in eval mode; a checkpoint's number of classes is taken where none is asked for."""
    path = None if weights is None or weights == PRETRAINED else Path(weights)
    # what is no file is perhaps the name of one of several
    if path is not None and (path.suffix in CHECKPOINTS or os.path.isfile(path)):
        return _from_checkpoint(plan, read_checkpoint(path), asked)
    if asked.use_ema is not None:
        raise LoadError(f"use_ema: {plan.model} is given no checkpoint, which alone may hold averaged weights")
    given = None if weights is None else str(weights)
    network, options = _sized(plan, given, asked)
    return _opened(plan, network, options, known=True)


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
    """How images of so many channels are prepared (None: as many as are said): one mean stands for all of them."""
    made = dict(images)
    if channels is None:
        channels = next((len(made[name]) for name in ("mean", "std") if len(made.get(name, "")) > 1), 3)
        channels = made["input_size"][0] if "input_size" in made else channels
    if "input_size" in made:
        made["input_size"] = [channels, *made["input_size"][1:]]
    for name in ("mean", "std"):
        values = made.get(name, [])
        if len(values) not in (0, 1, channels):
            raise ArgumentError(
                f"images: {name} has {len(values)} values, expected one, or {channels} for the channels"
            )
        made |= {name: values * channels} if len(values) == 1 else {}
    return made


def told_size(network: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The size of images that a constructor was told."""
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
        what = "its weights could not be had" if weights else "it could not be built"
        hint = "; give a file with weights=..., or weights=None for random ones" if weights else ""
        raise LoadError(f"name: {plan.model}: {what}: {type(error).__name__}: {first_line(error)}{hint}") from error


def _classes_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint has, where that is all that sets it apart from the network; else None."""
    others = {(tensors[n].shape, own[n].shape) for n in own if n in tensors and tensors[n].shape != own[n].shape}
    counts = {theirs[0] for theirs, ours in others if theirs[1:] == ours[1:] and len(theirs) > 0}
    return counts.pop() if len(counts) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in others) else None


def _of_checkpoint(path: Path, weights: str | os.PathLike[str] | None, asked: _Asked) -> Opened:
    """The network of a file that says its architecture: a checkpoint of a training script, or a bundle."""
    if weights != PRETRAINED:
        raise LoadError(f"weights: '{path}' is a checkpoint itself, so weights={weights!r} has no meaning")
    if is_bundle(path):
        bundle = read_bundle(path)
        return grafted(replace(bundle, config={**bundle.config, **asked.images}), path, **asked.options)
    way = f"say of which network it is: load_model('timm/resnet18@{path}')"
    checkpoint = read_checkpoint(path)
    recipe = _said(checkpoint)
    architecture = recipe.architecture
    if architecture is None and path.suffix == ".safetensors":
        raise LoadError(f"name: '{path}' holds tensors and no architecture; {way}")
    if architecture is None:
        raise LoadError(f"name: '{path}' says no architecture ('arch'); {way}")
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
        plan = _timm_plan(model) if library == "timm" else _torchvision_plan(model)
        plan = replace(plan, build=_bounded(plan.build, sum(tensor.numel() for tensor in tensors.values()), path))
        return _from_checkpoint(plan, Checkpoint(path, tensors), _Asked({**given, **options}, as_stored=True)).network

    network = build(bundle.architecture, checked_options(bundle.options), bundle.tensors).eval()
    prepared_as(network, bundle.config)
    for packed in bundle.clones:
        last = packed is bundle.clones[-1]  # all of them are compared with the target's own graph at once
        network = graft(network, clone_in(packed), packed.at, name=packed.name, check=last)
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
    """The same, but a network of far more numbers than a file holds is not built to its end.

    What the file says of it may come from anyone. A head of other classes than the file's is built first.
    """

    def bounded(weights: str | None, **options: Any) -> nn.Module:
        thread, left = threading.get_ident(), [2 * held + _MOST_BESIDE]

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if threading.get_ident() == thread and parameter is not None:
                left[0] -= parameter.numel() + _LEAST
                if left[0] < 0:
                    raise LoadError(f"weights: '{path}' says a network of far more numbers than the {held} it holds")

        handle = register_module_parameter_registration_hook(count)
        try:
            return build(weights, **options)
        finally:
            handle.remove()

    return bounded


def open_target(name: str, *, use_ema: bool | None = None, images: Mapping[str, Any] | None = None) -> Opened:
    """What :func:`open_model` gives, without its clones where the name is that of a grafted network's file.

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
