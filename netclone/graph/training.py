"""differing(evaluated, trained): which modules do more in train mode than a trace in eval mode shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx


def differing(evaluated: fx.Graph, trained: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose nodes differ between a model's symbolic graphs in eval and in train mode.

    The model itself is ``""``. Modules that stay modules in the graph are the same in both. Dropout with a rate of zero
    does not count.
    """
    found = Counter(map(_said, _working(evaluated)))
    other = Counter(map(_said, _working(trained)))
    return tuple(sorted({owner for owner, *_ in [*(found - other), *(other - found)]}))


def _working(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if not _drops_nothing(node)]


def _said(node: fx.Node) -> tuple[str, str, str, str]:
    """A node's module, what it calls, and its literals, but not the nodes that it reads."""
    arguments: Any = fx.node.map_arg((node.args, sorted(node.kwargs.items())), lambda read: "node")
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", repr(node.target))
    return _owner(node), node.op, target, repr(arguments)


def _owner(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if node.op == "call_module":  # the innermost module is the one that is called
        stack = stack[:-1]
    return str(stack[-1][0]) if stack else ""


def _drops_nothing(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not ("dropout" in name or "stochastic_depth" in name):
        return False
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)
    return bool(rate == 0)
