"""describe(graph, ...): the attributes by which timm's networks describe themselves, copied to their graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _KEPT  # torch sets these again on its copies

from netclone.graph.configs import facts_of, options_of

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

NAMES = (
    *("num_classes", "in_chans", "num_features", "head_hidden_size", "feature_info", "pretrained_cfg", "default_cfg"),
    "_model_args",  # arguments of timm's constructor
)
"""The names of the attributes; a graph has those that its network has."""


def facts_about(network: object) -> Mapping[str, Any]:
    """What a network records of itself, by timm's names: its ``pretrained_cfg``, or what its transformers config says.

    Examples
    --------
    >>> import timm
    >>> facts_about(timm.create_model("test_resnet"))["input_size"]
    (3, 160, 160)
    """
    cfg = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if cfg is not None and not isinstance(cfg, Mapping):
        cfg = {name: value for name, value in vars(cfg).items() if value is not None}  # timm's dataclass
    return cfg or facts_of(getattr(network, "config", None))


def described(model: nn.Module) -> dict[str, object]:
    """A copy of a network's descriptive attributes, as plain data; for one of transformers, what its config says.

    Examples
    --------
    >>> import timm
    >>> described(timm.create_model("test_resnet", num_classes=4))["num_classes"]
    4
    """
    found = {name: getattr(model, name, None) for name in NAMES}
    config = getattr(model, "config", None)
    if not found["pretrained_cfg"] and (facts := facts_of(config)):
        found |= {"num_classes": facts["num_classes"], "pretrained_cfg": facts, "_model_args": options_of(config)}
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
    before = graph.meta.pop(_KEPT, {})
    for name in before.keys() - values.keys():
        graph.__dict__.pop(name, None)
    free = {name: value for name, value in values.items() if name in before or not hasattr(graph, name)}
    for name, value in free.items():
        setattr(graph, name, value)
    if free:
        graph.meta[_KEPT] = free


def widened(values: Mapping[str, object], own: int, added: Sequence[str | None]) -> dict[str, object]:
    """A network's descriptive attributes once clones have added their columns: more classes, with their names.

    Class names always match the columns: if one of them has no name, the result has none. Those of ImageNet, which timm
    knows by their number alone, are written out.

    Parameters
    ----------
    values
        The network's attributes; they are copied.
    own
        The number of its own columns.
    added
        The name of each further column, if it is known.

    Examples
    --------
    >>> cfg = {"num_classes": 1000, "label_names": ["crow", "gull"]}
    >>> widened({"num_classes": 2, "pretrained_cfg": cfg}, 2, ["heron"])
    {'num_classes': 3, 'pretrained_cfg': {'num_classes': 3, 'label_names': ['crow', 'gull', 'heron']}}
    """
    wide = copy.deepcopy(dict(values))
    wide["num_classes"] = own + len(added)
    configs = {id(cfg): cfg for cfg in (wide.get("pretrained_cfg"), wide.get("default_cfg")) if isinstance(cfg, dict)}
    for cfg in configs.values():  # timm's two configs are one object
        cfg["num_classes"] = wide["num_classes"]
        given = given_names(cfg, own)
        described = cfg.pop("label_descriptions", None)
        labels = given or column_names(values, own)
        cfg.pop("label_names", None)
        if len(labels) == own and None not in added:
            cfg["label_names"] = [*labels, *added]
            if given and isinstance(described, dict):  # timm wants one for every name
                cfg["label_descriptions"] = {str(name): str(name) for name in added} | described
    return wide


def column_names(values: Mapping[str, object], own: int) -> tuple[str, ...]:
    """One name for each of a network's ``own`` columns, from its descriptive attributes; empty if they are not known.

    Where a class has several names, as those of ImageNet have, it is the first.

    Examples
    --------
    >>> column_names({"pretrained_cfg": {"label_names": ["crow", "gull"]}}, 2)
    ('crow', 'gull')
    >>> column_names({"num_classes": 1000}, 1000)[1:3]
    ('goldfish', 'great white shark')
    """
    cfg = values.get("pretrained_cfg")
    if given := given_names(cfg if isinstance(cfg, Mapping) else {}, own):
        return given
    if values.get("num_classes") != own:
        return ()
    return _first_names(own) if _of_imagenet(SimpleNamespace(**values)) is not None else ()


@functools.cache
def _first_names(count: int) -> tuple[str, ...]:
    """The first name of each class of the ImageNet that has so many."""
    info = _of_imagenet({"num_classes": count})
    assert info is not None
    return tuple(info.index_to_description(column).partition(",")[0] for column in range(count))


def given_names(facts: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names in ``label_names``, a list or, as timm also has it, names by their column; empty if not all are there.

    Examples
    --------
    >>> given_names({"label_names": {"1": "gull", "0": "crow"}}, 2)
    ('crow', 'gull')
    """
    given = facts.get("label_names")
    if isinstance(given, Mapping):
        by_column = {str(column): name for column, name in given.items()}
        given = [by_column[str(column)] for column in range(count) if str(column) in by_column]
    return tuple(map(str, given)) if given and len(given) == count else ()


def _of_imagenet(network: object) -> ImageNetInfo | None:
    """What timm knows of the classes of a network that has as many as an ImageNet."""
    from timm.data import infer_imagenet_subset  # slow to import, and not needed to load a clone

    subset = infer_imagenet_subset(network)
    return None if subset is None else _imagenet(subset)


@functools.cache
def _imagenet(subset: str) -> ImageNetInfo:
    from timm.data import ImageNetInfo

    return ImageNetInfo(subset)


def labels_of(network: object) -> dict[str, int]:
    """A network's columns by class name, in normal form and every known spelling; empty if it has no names.

    Examples
    --------
    >>> import timm
    >>> network = timm.create_model("test_resnet", num_classes=2)
    >>> network.pretrained_cfg["label_names"] = ["Grey_Heron", "ibis"]
    >>> labels_of(network)
    {'grey heron': 0, 'ibis': 1}
    """
    found = columns_by_name(facts_about(network), getattr(network, "num_classes", None))
    return {name: columns[0] for name, columns in found.items() if len(columns) == 1}


def columns_by_name(facts: Mapping[str, Any], classes: int | None = None) -> dict[str, tuple[int, ...]]:
    """The columns of every class name in normal form, more than one where a name is not clear; empty without names.

    Parameters
    ----------
    facts
        What a network records, as :func:`facts_about` gives it.
    classes
        How many columns it has. None: as many as the facts say.

    Examples
    --------
    >>> found = columns_by_name({"num_classes": 1000})
    >>> found["tench"], found["crane"]
    ((0,), (134, 517))
    """
    classes = facts.get("num_classes") if classes is None else classes
    if classes is not None and (given := given_names(facts, classes)):
        return named_columns(given)
    info = _of_imagenet({"num_classes": classes})
    if info is None:
        return {}
    columns = range(info.num_classes())
    described = named_columns(info.index_to_description(column) for column in columns)
    return described | {info.index_to_label_name(column): (column,) for column in columns}


def named_columns(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Columns by name, of a list of names; of one with commas, such as ``"tench, Tinca tinca"``, also by its parts.

    Examples
    --------
    >>> named_columns(["tench, Tinca tinca", "Grey_Heron"])
    {'tench, tinca tinca': (0,), 'grey heron': (1,), 'tench': (0,), 'tinca tinca': (0,)}
    """
    whole: dict[str, tuple[int, ...]] = {}
    parts: dict[str, tuple[int, ...]] = {}
    for column, name in enumerate(names):
        whole[plain(name)] = (*whole.get(plain(name), ()), column)
        for part in dict.fromkeys(map(plain, name.split(","))):
            if part:
                parts[part] = (*parts.get(part, ()), column)
    return {name: whole.get(name, columns) for name, columns in (whole | parts).items()}


def plain(name: str) -> str:
    """A class name in normal form, for comparison: without case, hyphens and underscores."""
    return name.strip().replace("_", " ").replace("-", " ").lower()
