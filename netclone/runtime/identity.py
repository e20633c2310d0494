"""identity(value): a digest that is equal in another process if, and only if, the value computes the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
import uuid
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netclone.runtime.sharing import digest

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_DEEPEST = 32  # levels of nesting beyond which a value counts as different from any other


def identity(value: object) -> str:
    """SHA-256, as hexadecimal digits, of all that a function, an object or plain data computes with.

    A function is described by its code, defaults and closure, a ``functools.partial`` by its parts, an object by its
    class and attributes, a tensor by its bits. A value that cannot be described for certain, such as an open file, is
    different from everything, even from itself in another call.

    Examples
    --------
    >>> import functools
    >>> scaled = lambda x, by: x * by
    >>> identity(functools.partial(scaled, by=2)) == identity(functools.partial(scaled, by=2))
    True
    >>> identity(functools.partial(scaled, by=2)) == identity(functools.partial(scaled, by=3))
    False
    """
    return hashlib.sha256(repr(_described(value, ())).encode()).hexdigest()


def _described(value: Any, above: tuple[int, ...]) -> Any:
    """Nested tuples of plain values that describe a value; ``above`` holds the ids of the values that contain it."""
    if id(value) in above:
        return "around", above.index(id(value))
    if len(above) > _DEEPEST:
        return _unlike_any_other()
    inner = functools.partial(_described, above=(*above, id(value)))
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    if (numbers := _numbers(value)) is not None:
        return numbers
    if isinstance(value, nn.Module):
        return _named(type(value)), repr(value), inner(dict(value.state_dict())), inner(_source(type(value)))
    if isinstance(value, functools.partial):
        return "partial", inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, types.MethodType):
        return "method", inner(value.__func__), inner(value.__self__)
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    if isinstance(value, types.CodeType):
        return _code(value, inner)
    if isinstance(value, (types.BuiltinFunctionType, type, types.ModuleType)):
        return _named(value), inner(_source(value)) if isinstance(value, type) else ""
    if isinstance(value, Mapping):
        return "mapping", tuple((inner(key), inner(item)) for key, item in value.items())
    if isinstance(value, Sequence):
        return type(value).__name__, tuple(inner(item) for item in value)
    if isinstance(value, Set):
        return type(value).__name__, tuple(sorted(repr(inner(item)) for item in value))
    attributes = getattr(value, "__dict__", None)
    if attributes is None or (source := _source(type(value))) is None:
        return _unlike_any_other()
    return _named(type(value)), inner(source), inner(dict(attributes))


def _numbers(value: Any) -> tuple[Any, ...] | None:
    """A description of a tensor or array; None for any other value."""
    if isinstance(value, Tensor):
        return "tensor", str(value.device), digest([value])
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return "array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, torch.Generator):
        return "generator", digest([value.get_state()])
    return None


def _function(function: types.FunctionType, inner: Any) -> Any:
    """A function, described by its code and the outer values that the code reads."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    read = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    own = {name: value for name, value in read.items() if not _is_of_a_library(value)}
    return (
        "function",
        _code(code, inner),
        inner(function.__defaults__),
        inner(function.__kwdefaults__),
        inner([cells, own, sorted(read.keys() - own.keys())]),
    )


def _code(code: types.CodeType, inner: Any) -> Any:
    """Code, described by what it does and not by where it is."""
    constants = [value for value in code.co_consts if not isinstance(value, str) or value != code.co_name]
    return "code", code.co_code.hex(), code.co_names, code.co_varnames, tuple(inner(value) for value in constants)


def _names(code: types.CodeType) -> list[str]:
    """Names that code, and the functions inside it, may read from a module."""
    within = (name for value in code.co_consts if isinstance(value, types.CodeType) for name in _names(value))
    return sorted({*code.co_names, *within})


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_of_a_library(value: object) -> bool:
    """Whether a value belongs to an installed library, whose version determines what it does."""
    if isinstance(value, types.ModuleType):
        return True
    module = getattr(value, "__module__", None)
    return isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and str(module).split(".")[0] in (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "builtins",
        "netclone",
    )


def _source(kind: type) -> str | None:
    """The source text of a class, or None if it cannot be read."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return None


def _named(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _unlike_any_other() -> str:
    return uuid.uuid4().hex
