"""unchanged(model): run a caller's model and restore what its forward() changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore buffers, other tensors that are not parameters, and attributes of all modules of a model.

    Parameters are not restored: copies of all of them would double the memory.

    Examples
    --------
    >>> model = nn.BatchNorm1d(3)
    >>> with unchanged(model):
    ...     _ = model(torch.randn(4, 3))
    >>> int(model.num_batches_tracked)
    0
    """
    modules = list(model.modules())
    tables = [table for module in modules for table in (module.__dict__, *_containers(module))]
    entries = [(table, table.copy()) for table in tables]
    values = [(tensor, tensor.detach().clone()) for tensor in _tensors(model, modules)]
    try:
        yield
    finally:
        for table, before in entries:
            if _differ(table, before):
                _refill(table, before)
        for tensor, before in values:
            _write_back(tensor, before)


def _containers(module: nn.Module) -> list[Any]:
    """The lists, sets and dictionaries of a module; its buffers are one of them."""
    return [value for value in module.__dict__.values() if isinstance(value, (MutableMapping, list, set))]


def _tensors(model: nn.Module, modules: list[nn.Module]) -> list[Tensor]:
    held = [*model.buffers(), *(value for module in modules for value in module.__dict__.values())]
    return [
        value
        for value in held
        if isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and not value.is_meta
        and value.layout == torch.strided
    ]


def _differ(table: Any, before: Any) -> bool:
    """Whether a list, set or dictionary holds other objects than before."""
    if len(table) != len(before):
        return True
    if isinstance(table, MutableMapping):
        return any(key not in table or table[key] is not value for key, value in before.items())
    if isinstance(table, list):
        return any(one is not other for one, other in zip(table, before, strict=True))
    return bool(table != before)


def _refill(table: Any, before: Any) -> None:
    table.clear()
    if isinstance(table, list):
        table.extend(before)
    else:
        table.update(before)


def _write_back(tensor: Tensor, before: Tensor) -> None:
    if tensor.shape == before.shape and torch.equal(tensor, before):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape == before.shape:
            tensor.copy_(before)
        else:
            tensor.data = before
