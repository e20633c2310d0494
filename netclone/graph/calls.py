"""The operator that a node calls, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments: literals and nodes, in the order of the operator's schema."""
    return node.args


def argument(node: fx.Node, *names: str) -> Any:
    """The argument that has one of these names; its default if left out, None if the operator has no such argument.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> node = graph.call_function(torch.ops.aten.sort.default, (graph.placeholder("x"),))
    >>> argument(node, "dim"), argument(node, "k")
    (-1, None)
    """
    target: Any = node.target
    for position, asked in enumerate(target._schema.arguments):
        if asked.name in names:
            if not asked.kwarg_only and position < len(node.args):
                return node.args[position]
            return node.kwargs.get(asked.name, asked.default_value)
    return None


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call the operator of a node."""
    function: Any = node.target
    return function(*args, **kwargs)


def is_composite(function: Any) -> bool:
    """Whether torch computes an operator from other operators on every device."""
    return isinstance(function, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    )
