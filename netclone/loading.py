"""load_model(name, weights): one way to name a network everywhere, of timm, torchvision, the hub, or a file."""

from __future__ import annotations

import difflib
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import load_state_dict
from torch import Tensor, nn

from netclone.bundling import Bundle, is_bundle, read_bundle
from netclone.errors import LoadError, first_line

LIBRARIES = ("timm", "torchvision")
SOURCES = ("hf-hub", "local-dir")  # timm's own prefixes
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")
PRETRAINED = "pretrained"
"""The weights that the library itself supplies, which it may have to download."""


def load_model(name: str, weights: str | os.PathLike[str] | None = PRETRAINED, **options: Any) -> nn.Module:
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
        checkpoint: ``.safetensors``, or ``.pth`` and the like, read with ``weights_only=True``; it may come from
        timm's training script (averaged weights first). None: as the library initialises them.
    options
        What the constructor is told: ``num_classes=10``, ``in_chans=1``, ``img_size=64``. The number of classes of a
        checkpoint is found by itself.

    Raises
    ------
    LoadError
        If there is no such network, weights or file (the closest names are suggested), the file holds other tensors
        than the network has, more than tensors, or no architecture where it has to say one; or the network has no
        pretrained weights, or they could not be fetched.

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
    if library == "timm":
        return _finished(model, weights, options, _timm_builder(model))
    if library == "torchvision":
        return _finished(model, weights, options, _torchvision_builder(model))
    if name.partition(":")[0] in SOURCES:
        return _finished(name, weights, options, _create(name, name))
    path = Path(name)
    if path.suffix in CHECKPOINTS:
        return _of_checkpoint(path, weights, options)
    if path.is_dir():
        raise LoadError(f"name: '{name}' is a folder; a model that timm saved into it is 'local-dir:{name}'")
    known = f"; did you mean 'timm/{name}'?" if timm.is_model(name) else ""
    raise LoadError(
        f"name: '{name}' says no library{known or ': expected timm/..., torchvision/..., hf-hub:..., local-dir:... or'}"
        + ("" if known else f" a checkpoint ({', '.join(CHECKPOINTS)})")
    )


_PLAIN: list[Any] = [Namespace]  # what timm's training script keeps beside the tensors: its arguments, as data

Builder = Callable[..., nn.Module]
"""Called with ``weights`` (``"pretrained"``, a name, or None) and the options of the constructor."""


def _timm_builder(model: str) -> Builder:
    if not timm.is_model(model.partition(".")[0]):
        raise _unknown("timm", model, timm.list_models())
    return _create(model, f"timm/{model}")


def _create(model: str, shown: str) -> Builder:
    def build(weights: str | None, **options: Any) -> nn.Module:
        if weights not in (None, PRETRAINED):
            raise LoadError(f"weights: no file '{weights}' for {shown} ('pretrained' takes those of timm)")
        return timm.create_model(model, pretrained=weights is not None, **options)

    return build


def _torchvision_builder(model: str) -> Builder:
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
        return torchvision.models.get_model(model, weights="DEFAULT" if weights == PRETRAINED else weights, **options)

    return build


def _unknown(library: str, model: str, names: list[str]) -> LoadError:
    near = difflib.get_close_matches(model, names, n=3)
    listed = " or ".join(f"'{n}'" for n in near[-2:])
    hint = f"; did you mean {', '.join([f'{n!r}' for n in near[:-2]] + [listed])}?" if near else ""
    return LoadError(f"name: {library} has no model '{model}'{hint}")


def _finished(
    model: str, weights: str | os.PathLike[str] | None, options: Mapping[str, Any], build: Builder
) -> nn.Module:
    """The network, in eval mode; a checkpoint's number of classes is taken where none is asked for."""
    if weights is None or weights == PRETRAINED:
        return _built(model, build, weights, options).eval()
    path = Path(weights)
    if path.suffix not in CHECKPOINTS and not path.is_file():  # perhaps the name of one of several weights
        return _built(model, build, str(weights), options).eval()
    return _filled(model, _read(path), path, options, build)


def _filled(
    model: str, tensors: Mapping[str, Tensor], path: Path, options: Mapping[str, Any], build: Builder
) -> nn.Module:
    """The network with the tensors of a file, in eval mode."""
    network = _built(model, build, None, options)
    if "num_classes" not in options:
        count = _classes_of(tensors, network)
        if count is not None:
            network = _built(model, build, None, {**options, "num_classes": count})
    _fill(network, tensors, path, model)
    return network.eval()


def _built(model: str, build: Builder, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    try:
        return build(weights, **options)
    except LoadError:
        raise
    except Exception as error:  # constructors and downloads may raise anything
        what = "its weights could not be had" if weights else "it could not be built"
        hint = "; give a file with weights=..., or weights=None for random ones" if weights else ""
        raise LoadError(f"name: {model}: {what}: {type(error).__name__}: {first_line(error)}{hint}") from error


@contextmanager
def _tensors_alone(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read means that it holds something else than tensors."""
    if not path.is_file():
        raise LoadError(f"weights: there is no file '{path}'")
    try:
        yield
    except Exception as error:  # torch, safetensors and unpickling have errors of their own
        raise LoadError(
            f"weights: '{path}' is not a checkpoint of tensors alone: {type(error).__name__}: {first_line(error)} "
            "(files with code in them are refused; write the tensors with "
            "safetensors.torch.save_file(model.state_dict(), ...))"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; nothing in it is run."""
    with _tensors_alone(path):
        tensors = load_state_dict(str(path), weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise LoadError(f"weights: '{path}' holds no state_dict: expected names and tensors")
    return tensors


def _classes_of(tensors: Mapping[str, Tensor], network: nn.Module) -> int | None:
    """How many classes a checkpoint has, where that is all that sets it apart from the network; else None."""
    own = network.state_dict()
    if tensors.keys() != own.keys():
        return None
    others = {(tensors[n].shape, own[n].shape) for n in own if tensors[n].shape != own[n].shape}
    counts = {theirs[0] for theirs, ours in others if theirs[1:] == ours[1:] and len(theirs) > 0}
    return counts.pop() if len(counts) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in others) else None


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, model: str) -> None:
    own = network.state_dict()
    missing = [name for name in own if name not in tensors]
    more = [name for name in tensors if name not in own]
    for names, what in ((missing, "lacks"), (more, "has besides")):
        if names:
            raise LoadError(
                f"weights: '{path}' is not of {model}: it {what} {len(names)} of {len(own)} tensors, the first "
                f"'{names[0]}'; name the architecture (and its options) that it was trained with"
            )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise LoadError(
                f"weights: '{path}' is not of {model} as asked for: tensor '{name}' has shape "
                f"{tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}; see num_classes, in_chans, img_size"
            )
    network.load_state_dict(dict(tensors))


def _of_checkpoint(path: Path, weights: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> nn.Module:
    """The network of a file that says its architecture: a checkpoint of timm's training script."""
    if weights != PRETRAINED:
        raise LoadError(f"weights: '{path}' is a checkpoint itself, so weights={weights!r} has no meaning")
    if is_bundle(path):
        return grafted(read_bundle(path), path, **options)
    way = f"say of which network it is: load_model('timm/resnet18@{path}')"
    if path.suffix == ".safetensors" and path.is_file():
        raise LoadError(f"name: '{path}' holds tensors and no architecture; {way}")
    with _tensors_alone(path), torch.serialization.safe_globals(_PLAIN):
        content = torch.load(path, map_location="cpu", weights_only=True)
    architecture = content.get("arch") if isinstance(content, dict) else None
    if not isinstance(architecture, str):
        raise LoadError(f"name: '{path}' says no architecture ('arch'); {way}")
    return _finished(architecture, path, options, _timm_builder(architecture))


def grafted(bundle: Bundle, path: Path, **options: Any) -> nn.Module:
    """The network of a bundle; ``path`` names it in messages.

    Raises
    ------
    LoadError, ArchiveError
        If its tensors are not of its architecture; if a clone is damaged or does not fit.
    """

    def build(architecture: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        library, _, model = architecture.partition("/")
        builder = _timm_builder(model) if library == "timm" else _torchvision_builder(model)
        return _filled(model, tensors, path, options, builder)

    return bundle.network(build)


def load_target(name: str) -> nn.Module:
    """What :func:`load_model` gives, without its clones where the name is that of a grafted network's file.

    Raises
    ------
    LoadError, ArchiveError
        As :func:`load_model`.
    """
    if is_bundle(name):
        return grafted(replace(read_bundle(name), clones=()), Path(name))
    return load_model(name)


def architecture_of(name: str, network: nn.Module) -> str:
    """The name that builds a network of :func:`load_model` anew, whatever file or hub it came from.

    Raises
    ------
    LoadError
        If it does not say of which architecture it is.

    Examples
    --------
    >>> architecture_of("local-dir:birds", load_model("timm/test_resnet", weights=None))
    'timm/test_resnet'
    """
    if name.startswith("torchvision/"):
        return name.partition("@")[0]
    cfg = getattr(network, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    if not isinstance(architecture, str):
        raise LoadError(f"name: '{name}' gives a {type(network).__name__} that does not say its architecture")
    return f"timm/{architecture}"
