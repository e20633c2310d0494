"""Classifiers of transformers by name: a folder, a repository of the hub, or an architecture alone.

What a folder or a file says is data. A ``model_type`` is looked up in transformers' own registry of image classifiers,
code beside the weights is never run, and attention kernels are never fetched.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netclone.errors import LoadError, NetcloneWarning
from netclone.graph.configs import facts_of, options_of, own_fields
from netclone.graph.preparing import IMAGES

PROCESSOR = "preprocessor_config.json"
_OURS = {"num_classes": "num_labels", "img_size": "image_size", "in_chans": "num_channels"}  # timm's words for them
_ATTENTION = ("eager", "sdpa")  # those that are part of torch and transformers; others may be code from the hub
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers
_BY_SHORT_EDGE = ("ConvN", "MobileViT", "Bit", "CLIP", "Levit", "PoolFormer")  # whose size of one number is an edge
_LARGEST_CROPPED = 384  # from here on, ConvNeXt's processor squeezes images instead of cropping them


def is_of_transformers(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a config of transformers.

    Examples
    --------
    >>> is_of_transformers("nowhere")
    False
    """
    try:
        return "model_type" in json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def build(name: str, weights: str | None, options: Mapping[str, Any]) -> nn.Module:
    """A classifier of transformers, which records its preprocessing and its options as timm's networks do.

    Parameters
    ----------
    name
        A folder, a repository, or a ``model_type`` such as ``"vit"``.
    weights
        ``"pretrained"`` or None, for random ones.
    options
        Fields of the config, by its names or by timm's (``num_classes``, ``img_size``, ``in_chans``).

    Raises
    ------
    LoadError
        If transformers is not installed, the name is no image classifier, or weights are missing.
    """
    types = _registry()
    told = {_OURS.get(option, option): value for option, value in options.items()}
    where = os.path.expanduser(name)
    alone = name in types and not os.path.isdir(where)
    if alone:
        if weights is not None:
            raise LoadError(
                f"name: transformers/{name} is an architecture, and has no weights of its own; name a folder or a "
                "repository, such as transformers/google/vit-base-patch16-224"
            )
        config = _of_type(name, told)
    else:
        config = _config(where, told, types)
    from transformers import AutoModelForImageClassification  # slow to import

    with _quiet():
        if weights is None:
            network = AutoModelForImageClassification.from_config(config)
        else:
            network = _pretrained(where, config, "num_labels" in told)
    images = {} if alone else _processor(where)
    network.num_classes = len(config.id2label)
    network.pretrained_cfg = facts_of(config) | _preprocessing(images)
    network._model_args = options_of(config)
    return network.eval()  # type: ignore[no-any-return]


def _registry() -> Mapping[str, Any]:
    """transformers' table of image classifiers, by ``model_type``."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as names
    except ImportError as error:
        raise LoadError(
            "name: transformers/... needs the package transformers: pip install 'netclone[transformers]'"
        ) from error
    return {name: kind for name, kind in names.items() if name != "timm_wrapper"}


def _of_type(kind: str, told: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig  # slow to import

    known = {"num_labels", "architectures"} | {field.name for field in own_fields(type(AutoConfig.for_model(kind)))}
    if unknown := [option for option in told if option not in known]:
        raise LoadError(f"name: transformers/{kind} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return AutoConfig.for_model(kind, **told)


def _config(where: str, told: Mapping[str, Any], types: Mapping[str, Any]) -> Any:
    """The config of a folder or repository, once it is known to name an image classifier and no code."""
    from transformers import AutoConfig, PretrainedConfig  # slow to import

    raw, _ = PretrainedConfig.get_config_dict(where)
    kind = raw.get("model_type")
    if kind == "timm_wrapper" or (kind is None and "architecture" in raw):
        raise LoadError(f"name: '{where}' holds a network of timm; name it hf-hub:{where}, or local-dir:{where}")
    if kind not in types:
        raise LoadError(
            f"name: '{where}' holds a model of type {str(kind)[:80]!r}, and transformers has no image classifier of "
            "that type; code beside the weights is never run"
        )
    if "quantization_config" in raw:
        raise LoadError(f"name: '{where}' holds quantised weights, which have no gradient; name the original network")
    for field in ("attn_implementation", "_attn_implementation"):
        if raw.get(field) not in (None, *_ATTENTION):
            raise LoadError(f"name: '{where}': {field} is {str(raw[field])[:80]!r}; expected 'eager' or 'sdpa'")
    return AutoConfig.from_pretrained(where, trust_remote_code=False, **told)


def _pretrained(where: str, config: Any, fresh_head: bool) -> Any:
    """The network with its weights, all of them; with another number of classes asked for, the head is a new one."""
    from transformers import AutoModelForImageClassification  # slow to import

    network, found = AutoModelForImageClassification.from_pretrained(
        where,
        config=config,
        trust_remote_code=False,
        dtype=torch.float32,
        ignore_mismatched_sizes=fresh_head,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise LoadError(
            f"name: '{where}' has no weights for {len(missing)} tensors of {type(network).__name__}, such as "
            f"'{missing[0]}': it was perhaps saved without its classifier; name a classifier"
        )
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its table of missing weights, which is an error here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _processor(where: str) -> Mapping[str, Any]:
    """The image processor's config, as data; empty if there is none."""
    if os.path.isdir(where):
        path = Path(where, PROCESSOR)
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"name: '{path}' cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            raise LoadError(f"name: '{path}' holds no object with the preprocessing of images")
        return found
    from transformers.image_processing_utils import BaseImageProcessor  # slow to import

    try:
        listed, _ = BaseImageProcessor.get_image_processor_dict(where)
    except OSError:
        return {}
    return dict(listed)


def _preprocessing(said: Mapping[str, Any]) -> dict[str, Any]:
    """An image processor's preprocessing by timm's names, as far as it is valid; empty for no processor.

    Examples
    --------
    >>> found = _preprocessing({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True,
    ...                         "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3})
    >>> found["input_size"], found["crop_pct"], found["crop_mode"], found["interpolation"]
    ([3, 224, 224], 0.875, 'center', 'bicubic')
    """
    if not said:
        return {}
    kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    found: dict[str, Any] = {}
    try:
        found = _sizes(said, kind) | _values(said, kind)
        resample = said.get("resample", 2)
        found["interpolation"] = _RESAMPLING[resample] if type(resample) is int else None
        if said.get("do_flip_channel_order", kind.startswith("MobileViT")):
            found["channel_order"] = "bgr"
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        found = {"content": None}
    if invalid := [name for name, value in found.items() if name not in IMAGES or not IMAGES[name](value)]:
        warnings.warn(
            f"{PROCESSOR}: its {invalid[0]} is no valid preprocessing of one size, and is ignored; pass it with "
            "images={...} (--img-size, --mean, ...)",
            NetcloneWarning,
            stacklevel=2,
        )
    return {name: value for name, value in found.items() if name not in invalid}


def _sizes(said: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The size of images, what is cropped from them, and whether they are squeezed to fit."""
    size = said["size"]
    if type(size) is int:
        size = {"shortest_edge": size} if kind.startswith(_BY_SHORT_EDGE) else {"height": size, "width": size}
    edge = size.get("shortest_edge")
    resized = (edge, edge) if edge else (size["height"], size["width"])
    mode, crop = ("center" if edge else "squash"), resized
    if said.get("do_center_crop", False):
        crop = said["crop_size"]
        crop = (crop, crop) if type(crop) is int else (crop["height"], crop["width"])
        share = _share(crop[0], resized[0])
    elif edge and "crop_pct" in said and edge < _LARGEST_CROPPED:
        share = _share(edge, int(edge / said["crop_pct"]))
    else:
        share, mode = 1.0, "squash" if "crop_pct" in said else mode
    return {"input_size": [3, *crop], "crop_pct": share, "crop_mode": mode}


def _share(crop: int, resized: int) -> float:
    """The share of an edge that is cropped, such that timm resizes the edge to just so many pixels."""
    share = crop / resized
    while math.floor(crop / share) < resized:
        share = math.nextafter(share, 0)
    return share


def _values(said: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Mean and standard deviation of pixels in [0, 1]."""
    factor = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    factor = 1.0 if math.isclose(factor, 1.0) else factor
    mean, std = [0.0] * 3, [1.0] * 3
    if said.get("do_normalize", True) and not kind.startswith("MobileViT"):  # whose images stay in [0, 1]
        mean, std = list(said["image_mean"]), list(said["image_std"])
    return {"mean": [value / factor for value in mean], "std": [value / factor for value in std]}
