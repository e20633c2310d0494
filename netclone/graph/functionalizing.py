"""make_functional(graph): replace in-place operators by functional ones; in_place_again(body): the way back.

A value that is written into a part of a tensor (slices, selections) is joined with the parts around it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from netclone.errors import TraceError
from netclone.graph.batching import is_free
from netclone.graph.calls import call
from netclone.graph.operators import operator_name

IN_PLACE = "netclone_in_place"  # key in Node.meta: the model did this in place
aten = torch.ops.aten
_END = 2**63 - 1  # a slice's "to the end"


def make_functional(graph: fx.Graph, harmless: Collection[Any], model: str) -> None:
    """Replace in-place operators by their functional twins; later readers of the changed tensors read the new values.

    Parameters
    ----------
    harmless
        Operators that are in place by name only and return their first argument.
    model
        Its name, for messages.

    Raises
    ------
    TraceError
        If one changes a tensor that is later read through other views than slices and selections.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or node.target in harmless:
            continue
        changed = node.args[0]
        twin = _functional_twin(node.target)
        if twin is None or not isinstance(changed, fx.Node):
            raise _refusal(node, model)
        chain = [changed]
        if _read_later(chain, node, order):
            chain += _outer(changed)
            if len(chain) == 1 or _read_later(chain, node, order):
                raise _refusal(node, model)
        node.target = twin
        node.meta[IN_PLACE] = True
        part = _copied_as_it_is(node) or _in_the_same_dtype(graph, node, order)
        for inner, whole in zip([None, *chain], chain, strict=False):
            if inner is not None:
                part = _with_part(graph, inner, part, node, order)
            for user in list(whole.users):
                if order[user] > order[node]:
                    user.replace_input_with(whole, part)


def _refusal(node: fx.Node, model: str) -> TraceError:
    return TraceError(
        f"torch.export: node '{node.name}' ({node.target}) of {model} writes into a part of a tensor, which "
        "netclone cannot make functional: rewrite that line of the model without in-place assignment"
    )


def _outer(changed: fx.Node) -> list[fx.Node]:
    """The tensors that a node is a part of, by slices and selections with fixed bounds, from the inside out."""
    found = []
    while _bounds(changed) is not None:
        changed = cast("fx.Node", changed.args[0])
        found.append(changed)
    return found


def _bounds(view: fx.Node) -> tuple[int, int, int] | None:
    """The axis, start and end of a slice or selection; None if they are not fixed."""
    if view.target not in (aten.slice.Tensor, aten.select.int) or view.kwargs or not isinstance(view.args[0], fx.Node):
        return None
    shape = view.args[0].meta["val"].shape
    given: list[Any] = list(view.args[1:])
    if view.target is aten.select.int:
        dim, index = given
        bounds = slice(index, index + 1 or None) if isinstance(index, int) else None
    else:
        dim, start, end, step = given + [0, None, None, 1][len(given) :]
        if (start or 0, _END if end is None else end, step) == (0, _END, 1):
            return dim, 0, _END  # a whole axis of any size
        fixed = step == 1 and all(number is None or isinstance(number, int) for number in (start, end))
        bounds = slice(start, end) if fixed else None
    if bounds is None or is_free(shape[dim]):
        return None
    first, last, _ = bounds.indices(shape[dim])
    return dim % len(shape), first, max(first, last)


def _with_part(graph: fx.Graph, view: fx.Node, part: fx.Node, writer: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """The tensor that was sliced or selected from, with new values in that part."""
    whole, bounds = view.args[0], _bounds(view)
    assert isinstance(whole, fx.Node) and bounds is not None
    dim, first, last = bounds
    cursor = max((part, writer), key=lambda node: order[node])

    def add(target: Any, *args: Any) -> fx.Node:
        nonlocal cursor
        with graph.inserting_after(cursor):
            cursor = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda node: node.meta["val"])
        cursor.meta = {**writer.meta, "val": target(*values)}
        cursor.meta.pop(IN_PLACE, None)
        order[cursor] = order[writer]
        return cursor

    if view.target is aten.select.int:
        part = add(aten.unsqueeze.default, part, dim)
    pieces = [part]
    if first > 0:
        pieces.insert(0, add(aten.slice.Tensor, whole, dim, 0, first))
    if last < _END and last < whole.meta["val"].shape[dim]:
        pieces.append(add(aten.slice.Tensor, whole, dim, last, _END))
    return add(aten.cat.default, pieces, dim) if len(pieces) > 1 else part


def _in_the_same_dtype(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """An operator's result in the dtype of what it once overwrote: an in-place comparison does not give booleans."""
    if _keeps_dtype(node):
        return node
    given: Any = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    args, kwargs = given
    before = args[0]
    after = before if node.target is aten.copy.default else call(node, args, kwargs)
    if after.dtype == before.dtype:
        return node
    with graph.inserting_after(node):
        cast = graph.call_function(aten.to.dtype, (node, before.dtype))
    cast.meta = {**node.meta, "val": before}
    cast.meta.pop(IN_PLACE, None)
    node.meta["val"] = after
    node.meta.pop(IN_PLACE, None)
    order[cast] = order[node]
    return cast


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether an operator plainly returns the one dtype of the tensors that it reads."""
    values = [read.meta["val"] for read in node.all_input_nodes]
    alike = all(isinstance(value, Tensor) and value.dtype == values[0].dtype for value in values)
    name = operator_name(node.target).split(".")[1]
    return alike and name not in _OF_OTHER_DTYPES and values[0].is_floating_point()


_OF_OTHER_DTYPES = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "copy"})


def _copied_as_it_is(node: fx.Node) -> fx.Node | None:
    """The source of a copy that has the shape and dtype of the tensor that it overwrites."""
    if node.target is not aten.copy.default or not isinstance(node.args[1], fx.Node):
        return None
    before, after = cast("fx.Node", node.args[0]).meta["val"], node.args[1].meta["val"]
    alike = before.dim() == after.dim() and before.dtype == after.dtype
    return (
        node.args[1]
        if alike and all(str(a) == str(b) for a, b in zip(before.shape, after.shape, strict=True))
        else None
    )


def in_place_again(graph_module: fx.GraphModule) -> None:
    """Let operators that were in place in the model work in place again, if nothing else reads what they overwrite.

    A finished body is then as fast, and needs as little memory, as the model that it came from.
    """
    found = False
    for node in graph_module.graph.nodes:
        if not node.meta.pop(IN_PLACE, False):
            continue
        packet = getattr(aten, f"{node.target._schema.name.split('::')[1]}_", None)
        target = getattr(packet, node.target._overloadname, None)
        changed = node.args[0]
        fresh = isinstance(changed, fx.Node) and changed.op == "call_function" and not is_view(changed)
        if target is not None and fresh and len(changed.users) == 1 and _same_shape(node, changed):
            node.target, found = target, True
    if found:
        graph_module.recompile()


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return tuple(map(str, x.shape)) == tuple(map(str, y.shape)) and x.dtype == y.dtype


def _functional_twin(target: Any) -> Any:
    """The operator that returns what an in-place one writes; its overload may have another name with the same types."""
    space, _, name = target._schema.name.partition("::")
    if name.startswith("__i") and name.endswith("__"):
        packet = getattr(aten, f"__{name[3:]}", None)
    else:
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    if space != "aten" or packet is None:
        return None
    others = [getattr(packet, overload) for overload in packet.overloads()]
    twins = [other for other in others if not other._schema.is_mutable and _types(other) == _types(target)]
    return getattr(packet, target._overloadname, None) or next(iter(twins), None)


def _types(target: Any) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments]


def is_view(node: fx.Node) -> bool:
    """Whether an operator returns the memory of an argument."""
    target = node.target
    return target is operator.getitem or (
        isinstance(target, torch._ops.OpOverload)
        and any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in target._schema.arguments
        )
    )


def _read_later(chain: Sequence[fx.Node], writer: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether written memory is read later by a node outside the chain: through its base, or another view."""
    base = changed = chain[0]
    while is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    sharing, stack = set(), [base]
    while stack:
        node = stack.pop()
        siblings = node.target is operator.getitem and changed.target is operator.getitem
        beside = siblings and node.args[0] is changed.args[0] and node.args[1] != changed.args[1]
        if node not in sharing and not beside:
            sharing.add(node)
            stack.extend(user for user in node.users if is_view(user) and order[user] < order[writer])
    return any(order[user] > order[writer] for node in sharing - {*chain} for user in node.users)
