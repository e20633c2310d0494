"""Operator graphs as plain data, and back: only what is on the allow-list, checked before anything runs."""

from __future__ import annotations

import keyword
import math
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.errors import ArchiveError
from netclone.exporting import lstm_by_shape
from netclone.oprules import OPERATORS, operator_name

MAX_ELEMENTS = 2**31
"""Most elements one tensor may have, stored or computed from a batch of two."""

_MAX_INTEGER = 2**63 - 1  # also how a slice says "to the end"
_MAX_ITEMS = 1024  # in one list of a node's arguments, and in one list of tensors an operator returns
_MAX_DEPTH = 8
_MAX_AXES = 64
_MAX_SECONDS = 30.0  # of a run on shapes; the largest networks take two
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_FIELDS = ("op", "name", "target", "args", "kwargs")
_MODULE_NAMES = frozenset(dir(nn.Module()))
_BODY_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

# Literals JSON has no word for are tagged, {tag: name}; these are the names there are.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_LITERALS: dict[str, dict[str, Any]] = {
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


def check_keys(value: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    """The value itself, a JSON object with exactly these keys."""
    if not isinstance(value, dict) or set(value) != set(keys):
        seen = sorted(value) if isinstance(value, dict) else value
        raise ArchiveError(f"{where} has to be an object with exactly the fields {list(keys)}, got {shown(seen)}")
    return value


def check_list(value: object, where: str) -> list[Any]:
    """The value itself, a JSON array."""
    if not isinstance(value, list):
        raise ArchiveError(f"{where} has to be a list, got {shown(value)}")
    return value


def check_shape(value: object, where: str) -> tuple[int, ...]:
    """The value as a shape of at most ``MAX_ELEMENTS`` elements."""
    sizes = tuple(check_list(value, where))
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


def float_to_data(value: float) -> Any:
    """A float as standard JSON can hold it: ``inf`` as ``{"float": "inf"}``."""
    return value if math.isfinite(value) else {"float": str(value)}


def float_from_data(value: object) -> float:
    """What :func:`float_to_data` wrote; a plain integer is taken as it is."""
    if isinstance(value, dict) and value.keys() == {"float"} and value["float"] in list(_NON_FINITE):
        return _NON_FINITE[value["float"]]
    if type(value) not in (int, float) or not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ArchiveError(f"expected a number, got {shown(value)}")
    return value  # type: ignore[return-value]


def graph_to_data(graph: fx.Graph) -> list[dict[str, Any]]:
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
    >>> _ = graph.output(graph.call_function(torch.ops.aten.fft_fft.default, (graph.call_function(torch.relu, (x,)),)))
    >>> [reason.partition(";")[0] for reason in unsavable(graph)]  # doctest: +NORMALIZE_WHITESPACE
    ["node 'relu': operator 'torch.relu' is not on the allow-list",
     "node 'fft_fft_default': operator 'aten.fft_fft.default' is not on the allow-list"]
    """
    reasons = []
    for node in graph.nodes:
        try:
            _node_to_data(node)
        except ArchiveError as error:
            reasons.append(str(error))
    return reasons


def _node_to_data(node: fx.Node) -> dict[str, Any]:
    where = f"node '{node.name}'"
    target = node.target
    if node.op == "call_function":
        target = operator_name(target)
        if OPERATORS.get(target) is not node.target:
            raise ArchiveError(
                f"{where}: operator {shown(target)} is not on the allow-list; express it in operators of "
                f"netclone.oprules.OPERATORS, or cut the source after it"
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


def _literal_to_data(value: object, where: str) -> Any:
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
            for key, value in check_keys(item["kwargs"], list(item["kwargs"]), where).items()
        }
        if op == "call_function":
            if not isinstance(target, str) or target not in OPERATORS:
                raise ArchiveError(f"{where}: operator {shown(target)} is not on the allow-list")
            target = OPERATORS[target]
        elif kwargs or len(args) != (op == "output") or not all(isinstance(value, fx.Node) for value in args):
            raise ArchiveError(f"{where}: a {shown(op)} takes {'one node' if op == 'output' else 'no arguments'}")
        elif op == "placeholder":
            _check_identifier(target, where)
        elif op == "get_attr":
            if target not in tensors:
                raise ArchiveError(f"{where}: there is no tensor {shown(target)}")
        elif op != "output" or target != "output" or index != len(nodes) - 1:
            raise ArchiveError(f"{where}: {shown(op)} is no kind of node an archive holds here")
        made[name] = graph.create_node(op, target, args, kwargs, name)
        if made[name].name != name or len(made) != index + 1:
            raise ArchiveError(f"{where}: the name is taken or reserved")
    if not nodes or nodes[-1]["op"] != "output":
        raise ArchiveError("graph: the last node has to be the output")
    graph.lint()
    return graph


def _literal_from_data(value: object, made: Mapping[str, fx.Node], where: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ArchiveError(f"{where}: arguments are nested more than {_MAX_DEPTH} levels deep")
    if type(value) is int and abs(value) > MAX_ELEMENTS and value != _MAX_INTEGER:
        raise ArchiveError(f"{where}: {shown(value)} in a shape or as a size is too large")
    if type(value) is float and not math.isfinite(value):
        raise ArchiveError(f"{where}: a number outside the range of a float")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        if len(value) > _MAX_ITEMS:
            raise ArchiveError(f"{where}: a list of {len(value)} arguments, the limit is {_MAX_ITEMS}")
        return [_literal_from_data(item, made, where, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        [(tag, content)] = value.items()
        if tag == "tuple" and isinstance(content, list):
            return tuple(_literal_from_data(content, made, where, depth))
        if tag == "node" and isinstance(content, str):
            if content not in made:
                raise ArchiveError(f"{where}: uses {shown(content)}, which is not defined before it")
            return made[content]
        if isinstance(content, str) and content in _LITERALS.get(tag, ()):
            return _LITERALS[tag][content]
    raise ArchiveError(f"{where}: {shown(value)} is no literal an archive holds")


def check_by_running(
    graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], output_shape: Sequence[int]
) -> None:
    """Run the graph on the meta device, where nothing is allocated, and require the output's shape.

    Raises
    ------
    ArchiveError
        If an operator refuses its arguments, a tensor on the way would be too large, or the output is another.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise ArchiveError(f"graph: {len(placeholders)} placeholders, the spec describes {len(inputs)} inputs")
    values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    pieces_left = 4 * len(graph.nodes) + 4 * _MAX_ITEMS
    deadline = time.monotonic() + _MAX_SECONDS
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for node in graph.nodes:
            if time.monotonic() > deadline:
                raise ArchiveError(f"node '{node.name}': checking the graph takes more than {_MAX_SECONDS:.0f} seconds")
            if node.op == "get_attr":
                values[node] = tensors[node.target]
            elif node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = dict(fx.map_arg(node.kwargs, values.__getitem__))
                values[node] = _call_on_meta(node, args, kwargs)
                if isinstance(values[node], (list, tuple)):
                    pieces_left -= len(values[node])
                if pieces_left < 0:
                    raise ArchiveError(f"node '{node.name}': the graph takes tensors into too many pieces")
            elif node.op == "output":
                result = values[node.args[0]]
                seen = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                if seen != tuple(output_shape):
                    raise ArchiveError(f"graph: the output is {seen}, the classes ask for {tuple(output_shape)}")


def _call_on_meta(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    where = f"node '{node.name}' ({operator_name(node.target)})"
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        names = [argument.name for argument in target._schema.arguments]
        if any(str(returned.type).startswith("List") for returned in target._schema.returns):
            _check_pieces(dict(zip(names, args, strict=False)) | kwargs, where)
        if "device" in names:  # left alone, a factory would allocate on the CPU
            index, meta = names.index("device"), torch.device("meta")
            args = tuple(meta if position == index else value for position, value in enumerate(args))
            kwargs = kwargs if index < len(args) else kwargs | {"device": meta}
    elif target is OPERATORS["operator.getitem"]:
        if not isinstance(args[0], (Tensor, list, tuple)):
            raise ArchiveError(f"{where}: cannot index {shown(args[0])}")
    elif kwargs or not all(isinstance(value, (Tensor, int, float)) for value in args):
        raise ArchiveError(f"{where}: takes numbers, got {shown(args)}")
    try:
        value = lstm_by_shape(*args, **kwargs) if target is torch.ops.aten.lstm.input else target(*args, **kwargs)
    except Exception as error:
        for sizes in (value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))):
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > MAX_ELEMENTS:
                raise ArchiveError(f"{where}: shape {shown(sizes)} is too large") from error
        raise ArchiveError(f"{where} does not accept its arguments: {shown(error)}") from error
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, Tensor) and (item.numel() > MAX_ELEMENTS or item.dim() > _MAX_AXES):
            raise ArchiveError(
                f"{where}: shape {shown(tuple(item.shape))} is too large, the limit is {MAX_ELEMENTS} elements"
            )
        if isinstance(item, int) and abs(item) > _MAX_INTEGER:
            raise ArchiveError(f"{where}: the size it computes is too large")
    return value


def _check_pieces(arguments: Mapping[str, Any], where: str) -> None:
    """Count the tensors an operator would return before it makes them."""
    tensor, dim = arguments.get("self"), arguments.get("dim", 0)
    if not isinstance(tensor, Tensor) or not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        return  # takes a list of tensors, of which there are few; or fails
    sections = next((value for name, value in arguments.items() if name not in ("self", "dim")), 1)
    if isinstance(sections, (list, tuple)):
        pieces = len(sections)
    elif "chunks" in arguments or "sections" in arguments:
        pieces = sections
    else:
        pieces = -(-tensor.shape[dim] // max(1, sections))
    if pieces > _MAX_ITEMS:
        raise ArchiveError(f"{where}: would take the tensor into {pieces} pieces, the limit is {_MAX_ITEMS}")
