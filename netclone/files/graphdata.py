"""Operator graphs as plain data, and back: only what is on the allow-list, checked before anything runs."""

from __future__ import annotations

import keyword
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target

from netclone.errors import ArchiveError
from netclone.graph.dry_run import MAX_ELEMENTS
from netclone.graph.operators import operator_name
from netclone.graph.purity import find_operator
from netclone.graph.signatures import MAX_ITEMS

_MAX_INTEGER = 2**63 - 1  # also how a slice says "to the end"
_MAX_DEPTH = 8
_MAX_AXES = 64
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_FIELDS = ("op", "name", "target", "args", "kwargs")
_MODULE_NAMES = frozenset(dir(nn.Module()))
_BODY_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

# Literals JSON has no word for are tagged, {tag: name}; these are the names there are.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_Literal: TypeAlias = float | torch.dtype | torch.memory_format | torch.layout | torch.device
_LITERALS: dict[str, Mapping[str, _Literal]] = {
    "float": _NON_FINITE,
    "dtype": {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        )
    },
    "memory_format": {
        str(value).removeprefix("torch."): value
        for value in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
    },
    "layout": {"strided": torch.strided},
    "device": {"cpu": torch.device("cpu")},
}


def shown(value: object) -> str:
    """``repr(value)``, cut to what fits in a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_keys(value: object, keys: Sequence[str], where: str) -> dict[str, object]:
    """The value itself, a JSON object with exactly these keys."""
    if not isinstance(value, dict) or set(value) != set(keys):
        seen = sorted(value) if isinstance(value, dict) else value
        raise ArchiveError(f"{where} has to be an object with exactly the fields {list(keys)}, got {shown(seen)}")
    return value


def check_list(value: object, where: str) -> list[object]:
    """The value itself, a JSON array."""
    if not isinstance(value, list):
        raise ArchiveError(f"{where} has to be a list, got {shown(value)}")
    return value


def check_shape(value: object, where: str) -> tuple[int, ...]:
    """The value as a shape of at most ``MAX_ELEMENTS`` elements."""
    sizes = cast("tuple[int, ...]", tuple(check_list(value, where)))
    if len(sizes) > _MAX_AXES or not all(type(size) is int and size >= 0 for size in sizes):
        raise ArchiveError(f"{where} has to be a shape, at most {_MAX_AXES} sizes of 0 or more, got {shown(value)}")
    if any(size > MAX_ELEMENTS for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        raise ArchiveError(f"{where}: shape {shown(sizes)} is too large, the limit is {MAX_ELEMENTS} elements")
    return sizes


def check_tensor_name(name: str) -> str:
    """The name itself: dotted, each segment an identifier or digits, none of them an attribute of every module.

    Hyphens may be in an identifier, as in torchvision's RegNets: fx reads such an attribute by its name in quotes.
    """
    segments = name.split(".")
    for position, segment in enumerate(segments):
        if not (segment.isascii() and segment.isdigit()):
            _check_identifier(segment.replace("-", "_"), f"tensor name {shown(name)}")
        if segment in (_MODULE_NAMES if position else _BODY_NAMES):
            raise ArchiveError(
                f"tensor name {shown(name)}: '{segment}' is an attribute of every module; rename the tensor"
            )
    if len(segments) > 64:
        raise ArchiveError(f"tensor name {shown(name)} is nested more than 64 levels deep")
    return name


def _check_identifier(name: object, where: str) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or name == "self":
        raise ArchiveError(f"{where}: {shown(name)} is not an identifier")
    if name.startswith("__"):
        raise ArchiveError(f"{where}: {shown(name)} starts with a double underscore")
    return name


_LARGEST_FLOAT = sys.float_info.max


def float_to_data(value: float) -> object:
    """A float as standard JSON can hold it: ``inf`` as ``{"float": "inf"}``."""
    return value if math.isfinite(value) else {"float": str(value)}


def float_from_data(value: object) -> float:
    """What :func:`float_to_data` wrote; a plain integer is taken as it is."""
    if isinstance(value, dict) and value.keys() == {"float"} and value["float"] in list(_NON_FINITE):
        return _NON_FINITE[value["float"]]
    if type(value) not in (int, float) or not -_LARGEST_FLOAT <= (number := cast("float", value)) <= _LARGEST_FLOAT:
        raise ArchiveError(f"expected a number, got {shown(value)}")
    return number


def graph_to_data(graph: fx.Graph) -> list[dict[str, object]]:
    """The graph as a list of nodes, each an object of strings, numbers and lists.

    Raises
    ------
    ArchiveError
        If a node is of another kind than an archive holds, calls an operator that is not on the allow-list, or has
        an argument that cannot be written.
    """
    return [_node_to_data(node) for node in graph.nodes]


def unsavable(graph: fx.Graph) -> list[str]:
    """Why a clone of a captured graph could not be saved: one reason for each node at fault, none if it could.

    What :func:`netclone.save` says at the end, asked before anything is learned.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> y = graph.call_function(torch.relu, (x,))
    >>> _ = graph.output(graph.call_function(torch.ops.aten.bernoulli.default, (y,)))
    >>> [reason.partition(";")[0] for reason in unsavable(graph)]  # doctest: +NORMALIZE_WHITESPACE
    ["node 'relu': operator 'torch.relu' is not on the allow-list of pure operators",
     "node 'bernoulli_default': operator 'aten.bernoulli.default' is not on the allow-list of pure operators"]
    """
    reasons = []
    for node in graph.nodes:
        try:
            _node_to_data(node)
        except ArchiveError as error:
            reasons.append(str(error))
    return reasons


def _node_to_data(node: fx.Node) -> dict[str, object]:
    where = f"node '{node.name}'"
    target: object = node.target
    if node.op == "call_function":
        target = operator_name(target)
        if find_operator(target) is not node.target:
            raise ArchiveError(
                f"{where}: operator {shown(target)} is not on the allow-list of pure operators; express it in others, "
                "or cut the source after it"
            )
    elif node.op not in ("placeholder", "get_attr", "output"):
        raise ArchiveError(
            f"{where} is a {node.op}; an archive holds operator calls only: capture it with netclone.extract"
        )
    value = node.meta.get("val")
    if node.op == "get_attr" and isinstance(value, Tensor) and value.dtype not in _LITERALS["dtype"].values():
        raise ArchiveError(f"{where}: tensor '{target}' is of {value.dtype}, which an archive cannot hold")
    args = [_literal_to_data(value, where) for value in node.args]
    kwargs = {key: _literal_to_data(value, where) for key, value in node.kwargs.items()}
    return dict(zip(_FIELDS, (node.op, node.name, target, args, kwargs), strict=True))


def _literal_to_data(value: object, where: str) -> object:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return float_to_data(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_literal_to_data(item, where) for item in value]
    if type(value) is tuple:
        return {"tuple": [_literal_to_data(item, where) for item in value]}
    for tag, names in _LITERALS.items():
        for name, literal in names.items():
            if type(value) is type(literal) and value == literal:
                return {tag: name}
    advice = "; capture the source on the CPU" if isinstance(value, torch.device) else ""
    raise ArchiveError(f"{where}: argument {shown(value)} of type {type(value).__name__} cannot be archived{advice}")


def graph_from_data(data: object, tensors: Collection[str], max_nodes: int) -> fx.Graph:
    """The graph that :func:`graph_to_data` wrote, with the same node names.

    Raises
    ------
    ArchiveError
        If anything is not as :func:`graph_to_data` writes it: an operator outside the allow-list, a name that is no
        identifier, a tensor that is not among ``tensors``, a use before the definition.
    """
    nodes = check_list(data, "graph")
    if len(nodes) > max_nodes:
        raise ArchiveError(f"graph: {len(nodes)} nodes, a file of this size may have {max_nodes}")
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for index, item in enumerate(nodes):
        item = check_keys(item, _FIELDS, f"graph node {index}")
        op, target = item["op"], item["target"]
        name = _check_identifier(item["name"], f"graph node {index}")
        where = f"node '{name}'"
        args = tuple(_literal_from_data(value, made, where) for value in check_list(item["args"], where))
        kwargs = {
            _check_identifier(key, where): _literal_from_data(value, made, where)
            for key, value in check_keys(item["kwargs"], list(cast("dict[str, object]", item["kwargs"])), where).items()
        }
        if op == "call_function":
            called = find_operator(target)
            if called is None:
                raise ArchiveError(f"{where}: operator {shown(target)} is not on the allow-list")
            target = called
        elif kwargs or len(args) != (op == "output") or not all(isinstance(value, fx.Node) for value in args):
            raise ArchiveError(f"{where}: a {shown(op)} takes {'one node' if op == 'output' else 'no arguments'}")
        elif op == "placeholder":
            _check_identifier(target, where)
        elif op == "get_attr":
            if target not in tensors:
                raise ArchiveError(f"{where}: there is no tensor {shown(target)}")
        elif op != "output" or target != "output" or index != len(nodes) - 1:
            raise ArchiveError(f"{where}: {shown(op)} is no kind of node an archive holds here")
        made[name] = graph.create_node(op, cast("Target", target), args, kwargs, name)
        if made[name].name != name or len(made) != index + 1:
            raise ArchiveError(f"{where}: the name is taken or reserved")
    if not nodes or cast("dict[str, object]", nodes[-1])["op"] != "output":
        raise ArchiveError("graph: the last node has to be the output")
    graph.lint()
    return graph


def _literal_from_data(value: object, made: Mapping[str, fx.Node], where: str, depth: int = 0) -> Argument:
    if depth > _MAX_DEPTH:
        raise ArchiveError(f"{where}: arguments are nested more than {_MAX_DEPTH} levels deep")
    if type(value) is int and abs(value) > MAX_ELEMENTS and value != _MAX_INTEGER:
        raise ArchiveError(f"{where}: {shown(value)} in a shape or as a size is too large")
    if type(value) is float and not math.isfinite(value):
        raise ArchiveError(f"{where}: a number outside the range of a float")
    if value is None or type(value) in (bool, int, float, str):
        return cast("float | str | None", value)
    if isinstance(value, list):
        if len(value) > MAX_ITEMS:
            raise ArchiveError(f"{where}: a list of {len(value)} arguments, the limit is {MAX_ITEMS}")
        return [_literal_from_data(item, made, where, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        [(tag, content)] = value.items()
        if tag == "tuple" and isinstance(content, list):
            return tuple(cast("list[Argument]", _literal_from_data(content, made, where, depth)))
        if tag == "node" and isinstance(content, str):
            if content not in made:
                raise ArchiveError(f"{where}: uses {shown(content)}, which is not defined before it")
            return made[content]
        if isinstance(content, str) and content in _LITERALS.get(tag, ()):
            return _LITERALS[tag][content]
    raise ArchiveError(f"{where}: {shown(value)} is no literal an archive holds")
