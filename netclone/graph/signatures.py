"""bind(operator, args, kwargs): a call's arguments by name, checked to have the types that torch really expects.

Torch itself accepts an integer where it expects a dtype, a layout or a memory format, and may crash on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from netclone.errors import ArchiveError
from netclone.graph.purity import type_of

MAX_ITEMS = 1024
"""The most items in one list of arguments, and the most tensors that an operator may split one into."""

_MAX_SIZE = 2**31
_TO_THE_END = ("slice", "slice_copy", "slice_scatter")  # whose end may be the largest integer

# Strings that stand for a choice, by the argument's name; every string that operators take is listed here.
_WORDS: dict[str, frozenset[str]] = {
    "padding": frozenset({"valid", "same"}),
    "mode": frozenset({"constant", "reflect", "replicate", "circular"}),
    "pad_mode": frozenset({"constant", "reflect", "replicate"}),
    "rounding_mode": frozenset({"trunc", "floor"}),
    "approximate": frozenset({"none", "tanh"}),
    "reduce": frozenset({"sum", "prod", "mean", "amax", "amin", "add", "multiply"}),
    "indexing": frozenset({"ij", "xy"}),
    "norm": frozenset({"backward", "forward", "ortho"}),
    "side": frozenset({"left", "right"}),
    "interpolation": frozenset({"linear", "lower", "higher", "midpoint", "nearest"}),
}
# Integers that stand for a choice, by the argument's name, which torch does not check everywhere.
_CHOICES = {name: range(3) for name in ("normalization", "interpolation_mode", "padding_mode", "reduction")}
_EQUATION = re.compile(r"[A-Za-z,. ]{1,200}(->[A-Za-z. ]{0,60})?", re.ASCII)


def bind(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All arguments of an operator by name, in the schema's order, with defaults.

    Raises
    ------
    ArchiveError
        If an argument is missing, unknown, given twice, or not of the schema's type; ``where`` names the node.
    """
    schema = function._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    if len(args) > len(positional):
        raise ArchiveError(f"{where} does not accept its arguments: {len(args)} of at most {len(positional)}")
    given = dict(zip((argument.name for argument in positional), args, strict=False))
    known = {argument.name for argument in schema}
    for name in kwargs:
        if name not in known or name in given:
            words = "is given twice" if name in given else "is unknown"
            raise ArchiveError(f"{where} does not accept its arguments: '{name}' {words}")
    given |= kwargs
    bound = {}
    for argument in schema:
        if argument.name in given:
            value = given[argument.name]
            problem = _problem(function, argument, value)
            if problem:
                raise ArchiveError(f"{where} does not accept its arguments: '{argument.name}' {problem}")
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise ArchiveError(f"{where} does not accept its arguments: '{argument.name}' is missing")
        bound[argument.name] = value
    return bound


def _problem(function: Any, argument: Any, value: Any) -> str:
    """What is wrong with an argument's value; empty if the schema allows it."""
    kind, many, optional = type_of(argument)
    if value is None and optional:
        return ""
    expected = f"has to be {'a list of ' if many else ''}{kind}{' or None' if optional else ''}"
    if not many:
        return "" if _fits(function, argument.name, kind, value) else f"{expected}, got {_shown(value)}"
    if not isinstance(value, (list, tuple)):
        alone = argument.N is not None and _fits(function, argument.name, kind, value)
        return "" if alone else f"{expected}, got {_shown(value)}"
    if len(value) > MAX_ITEMS:
        return f"is a list of {len(value)}, the limit is {MAX_ITEMS}"
    if argument.N is not None and argument.N > 1 and len(value) not in (0, 1, argument.N):
        return f"has to be a list of {argument.N}, got {len(value)}"
    wrong = [item for item in value if not _fits(function, argument.name, kind, item)]
    return f"{expected}, got {_shown(wrong[0])} among them" if wrong else ""


def _fits(function: Any, name: str, kind: str, value: Any) -> bool:
    if kind == "Tensor" and type(value) in (int, float):  # torch raises by itself if it does not take it as a tensor
        return name != "self" or torch.Tag.pointwise in function.tags  # ``to.other`` takes some numbers, and not others
    if kind == "int" and type(value) is int and abs(value) > _MAX_SIZE:
        return value == 2**63 - 1 and function._schema.name.partition("::")[2] in _TO_THE_END
    if kind == "int" and name in _CHOICES:
        return type(value) is int and value in _CHOICES[name]
    if kind == "number" and name in ("self", "exponent"):  # for booleans, shapes and numbers give other dtypes
        return type(value) in (int, float)
    if kind == "str":
        return isinstance(value, str) and _is_word(name, value)
    return _KINDS[kind](value)


def _is_word(name: str, value: str) -> bool:
    if name == "equation":
        return bool(_EQUATION.fullmatch(value))
    return value in _WORDS.get(name, ())


_KINDS: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, Tensor),
    "Tensor?": lambda value: value is None or isinstance(value, Tensor),
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) in (int, float),
    "number": lambda value: type(value) in (int, float, bool),
    "ScalarType": lambda value: isinstance(value, torch.dtype),
    "Layout": lambda value: value is torch.strided,
    "Device": lambda value: isinstance(value, torch.device),
    "MemoryFormat": lambda value: isinstance(value, torch.memory_format),
    "Generator": lambda value: False,
}


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
