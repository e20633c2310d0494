"""facts_of(config): what a network of transformers records in its config, by timm's names.

A config is recognised by what it has, so transformers itself is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def facts_of(config: object) -> dict[str, Any]:
    """Library, architecture, number of classes, their names if it has any, and the size of images if it is fixed.

    Empty if this is no config of transformers.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> facts_of(SimpleNamespace(model_type="vit", id2label={0: "heron", 1: "ibis"}, image_size=32))["label_names"]
    ['heron', 'ibis']
    >>> facts_of(None)
    {}
    """
    kind, names = getattr(config, "model_type", None), getattr(config, "id2label", None)
    if not isinstance(kind, str) or not isinstance(names, Mapping):
        return {}
    found: dict[str, Any] = {"library": "transformers", "architecture": kind, "num_classes": len(names)}
    listed = [names.get(column) for column in range(len(names))]
    if all(isinstance(name, str) for name in listed) and listed != [f"LABEL_{n}" for n in range(len(listed))]:
        found["label_names"] = listed
    side = getattr(config, "image_size", None)
    sides = list(side) if isinstance(side, (tuple, list)) else [side, side]
    if len(sides) == 2 and all(type(one) is int for one in sides):
        found["input_size"] = [getattr(config, "num_channels", 3), *sides]
    return found


def options_of(config: object) -> dict[str, Any]:
    """The fields of a config of transformers that differ from what its class has; what builds the network again.

    The number of classes and their names are left out.

    Examples
    --------
    >>> options_of(None)
    {}
    """
    if not facts_of(config) or not dataclasses.is_dataclass(config) or isinstance(config, type):
        return {}
    own = {field.name: field for field in own_fields(type(config))}
    made = {name: getattr(config, name) for name in own}
    made = {name: value for name, value in made.items() if value != own[name].default}
    heads = getattr(config, "architectures", None)
    return made | ({"architectures": list(heads)} if heads else {})


def own_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a config's class that describe the architecture: not those of all configs, nor private ones."""
    base = next(one for one in reversed(kind.__mro__) if dataclasses.is_dataclass(one))
    shared = {field.name for field in dataclasses.fields(base)}
    return [f for f in dataclasses.fields(kind) if f.name not in shared and not f.name.startswith("_")]
