"""describe(graph, ...): the attributes by which timm's networks describe themselves, copied to their graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _KEPT  # torch sets these again on its copies

NAMES = (
    *("num_classes", "in_chans", "num_features", "head_hidden_size", "feature_info", "pretrained_cfg", "default_cfg"),
    "_model_args",  # arguments of timm's constructor
)
"""The names of the attributes; a graph has those that its network has."""


def described(model: nn.Module) -> dict[str, object]:
    """A copy of a network's descriptive attributes, as plain data.

    Examples
    --------
    >>> import timm
    >>> described(timm.create_model("test_resnet", num_classes=4))["num_classes"]
    4
    """
    found = {name: getattr(model, name, None) for name in NAMES}
    return copy.deepcopy({name: value for name, value in found.items() if isinstance(value, (int, list, tuple, dict))})


def describe(graph: fx.GraphModule, values: Mapping[str, object]) -> None:
    """Set the descriptive attributes of a graph, and of its deep copies, to exactly these; modules keep their names.

    Examples
    --------
    >>> import copy
    >>> graph = fx.symbolic_trace(nn.Linear(2, 3))
    >>> describe(graph, {"num_classes": 3})
    >>> copy.deepcopy(graph).num_classes
    3
    """
    for name in graph.meta.pop(_KEPT, {}):
        graph.__dict__.pop(name, None)
    free = {name: value for name, value in values.items() if not hasattr(graph, name)}
    for name, value in free.items():
        setattr(graph, name, value)
    if free:
        graph.meta[_KEPT] = free


def widened(
    values: Mapping[str, object], own: int, classes: Mapping[str, tuple[int, tuple[str, ...]]]
) -> dict[str, object]:
    """A network's descriptive attributes once clones have added their columns: more classes, with their names.

    Class names always match the columns: if the network or a clone has none, the result has none.

    Parameters
    ----------
    values
        The network's attributes; they are copied.
    own
        The number of its own columns.
    classes
        For each clone, the number of columns that it adds, and the names of their classes, if it has any.

    Examples
    --------
    >>> cfg = {"num_classes": 1000, "label_names": ["crow", "gull"]}
    >>> widened({"num_classes": 2, "pretrained_cfg": cfg}, 2, {"herons": (1, ("heron",))})
    {'num_classes': 3, 'pretrained_cfg': {'num_classes': 3, 'label_names': ['crow', 'gull', 'heron']}}
    """
    wide = copy.deepcopy(dict(values))
    wide["num_classes"] = own + sum(count for count, _ in classes.values())
    configs = {id(cfg): cfg for cfg in (wide.get("pretrained_cfg"), wide.get("default_cfg")) if isinstance(cfg, dict)}
    for cfg in configs.values():  # timm's two configs are one object
        cfg["num_classes"] = wide["num_classes"]
        labels = cfg.pop("label_names", None)
        known = isinstance(labels, (list, tuple)) and len(labels) == own
        if known and all(len(names) == count for count, names in classes.values()):
            cfg["label_names"] = type(labels)([*labels, *(name for _, names in classes.values() for name in names)])
    return wide


def labels_of(network: nn.Module) -> dict[str, int]:
    """A network's columns by class name, in normal form and every known spelling; empty if it has no names.

    Examples
    --------
    >>> import timm
    >>> network = timm.create_model("test_resnet", num_classes=2)
    >>> network.pretrained_cfg["label_names"] = ["Grey_Heron", "ibis"]
    >>> labels_of(network)
    {'grey heron': 0, 'ibis': 1}
    """
    cfg = getattr(network, "pretrained_cfg", None) or {}
    given = cfg.get("label_names")
    if given and len(given) == getattr(network, "num_classes", None):
        return {plain(str(name)): column for column, name in enumerate(given)}
    from timm.data import ImageNetInfo, infer_imagenet_subset  # slow to import, and not needed to load a clone

    subset = infer_imagenet_subset(network)
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    found: dict[str, int] = {}
    for column in range(info.num_classes()):
        found[info.index_to_label_name(column)] = column
        for word in info.index_to_description(column).split(","):
            found.setdefault(plain(word), column)
    return found


def plain(name: str) -> str:
    """A class name in normal form, for comparison: without case, hyphens and underscores."""
    return name.strip().replace("_", " ").replace("-", " ").lower()
