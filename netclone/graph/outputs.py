"""logits_of(value): the logits in what a model returns: one tensor, or a tuple or dictionary that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from netclone.errors import ArgumentError, OutputError

Output: TypeAlias = "str | int | None"
"""The key or index of the logits in what a model returns. None: what it returns is the logits, or it is clear."""

USUAL = "logits"  # as transformers calls them


def chosen(value: Any, output: Output, model: str) -> Output:
    """Where the logits are in what a model returns, as a key for :func:`picked`.

    Parameters
    ----------
    value
        What the model returned.
    output
        The caller's choice. None: what is called ``"logits"``, or else the only tensor, or else the only ``(N, K)``. It
        does not count where the model returns one tensor.
    model
        The model's name, for messages.

    Raises
    ------
    OutputError
        If there is no such part, it is no tensor, or it is not clear which one is meant.
    ArgumentError
        If ``output`` is neither text nor a whole number.

    Examples
    --------
    >>> import torch
    >>> chosen((torch.zeros(2, 5), torch.zeros(2, 7, 8, 8)), None, "Net")
    0
    >>> chosen({"a": torch.zeros(2, 5), "b": torch.zeros(2, 7)}, None, "Net")
    Traceback (most recent call last):
        ...
    netclone.errors.OutputError: Net returns dict of 2: 'a' (2, 5), 'b' (2, 7); say which one is the logits with ...
    """
    if output is not None and (isinstance(output, bool) or not isinstance(output, (str, int))):
        raise ArgumentError(f"output: got {output!r}, expected the key or index of the logits, such as 'logits' or 0")
    if isinstance(value, Tensor):
        return None
    parts = _parts(value)
    tensors = {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    kind = type(value).__name__
    if not tensors:
        raise OutputError(
            f"{model} returns {kind}; expected one tensor (N, classes), or a tuple or dictionary that holds it: wrap "
            "the model in a module that returns its logits"
        )
    listed = ", ".join(f"{key!r} {tuple(part.shape)}" for key, part in tensors.items())
    found = f"{model} returns {kind} of {len(parts)}: {listed}"
    if output is not None:
        if output in tensors:
            return output
        raise OutputError(f"output: {found}; it has no tensor {output!r}; name one that it has")
    flat = [key for key, part in tensors.items() if part.dim() == 2]
    clear: list[list[Any]] = [[key for key in tensors if key == USUAL], list(tensors), flat]
    for keys in clear:
        if len(keys) == 1:
            key: Output = keys[0]
            return key
    raise OutputError(f"{found}; say which one is the logits with output={next(iter(flat or tensors))!r}")


def picked(value: Any, key: Output) -> Any:
    """The part of a value at a key; None: the value itself.

    Examples
    --------
    >>> picked({"logits": 1, "features": 2}, "logits"), picked((1, 2), 1), picked(1, None)
    (1, 2, 1)
    """
    if key is None:
        return value
    if isinstance(value, Mapping) or isinstance(key, int):
        return value[key]
    return getattr(value, key)


def logits_of(value: Any, output: Output, model: str) -> Any:
    """What a model returns, or the logits in it.

    Raises
    ------
    OutputError, ArgumentError
        As :func:`chosen`.

    Examples
    --------
    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 5), "loss": None}, None, "Net").shape
    torch.Size([2, 5])
    """
    return picked(value, chosen(value, output, model))


def _parts(value: Any) -> dict[str | int, Any]:
    """The parts of a tuple, list, dictionary or dataclass by index or name; empty for anything else."""
    if isinstance(value, Mapping):
        return {key: part for key, part in value.items() if isinstance(key, (str, int))}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}
