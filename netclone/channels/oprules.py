"""Rules: how each kind of operator treats labels, and how its literal arguments change when channels are removed.

Grouping, masking and slimming use them. :mod:`netclone.graph.operators` says which operators are of which kind. An
operator of no kind keeps all channels that it touches, and is reported by name.

A label rule takes the running :class:`~netclone.channels.labelling.Labelling` and the node, and returns the labels of
the output. A resize rule takes a :class:`~netclone.channels.slimming.Resizer` and the node, and returns the node's new
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from netclone.channels.labels import Event, Labelled, compact, varies
from netclone.channels.normalising import norm_over_channels
from netclone.graph.calls import argument, call
from netclone.graph.calls import arguments as _args
from netclone.graph.operators import KEPT_WHOLE, kind_of

if TYPE_CHECKING:
    from netclone.channels.labelling import Labelling
    from netclone.channels.slimming import Resizer

aten = torch.ops.aten

LabelRule = Callable[["Labelling", fx.Node], Labelled]
ResizeRule = Callable[["Resizer", fx.Node], tuple[Any, ...]]


@dataclass(frozen=True)
class Rule:
    """How one operator treats labels (``None``: no rule, its channels stay), and how its literals change."""

    label: LabelRule | None
    resize: ResizeRule | None = None


# ---------------------------------------------------------------- elementwise


def _pointwise(run: Labelling, node: fx.Node) -> Labelled:
    """Elements that are combined are kept or removed together."""
    return run.meet(node, [a for a in (*_args(node), *node.kwargs.values()) if isinstance(a, fx.Node)])


def _like(run: Labelling, node: fx.Node) -> Labelled:
    """New values in the shape of another tensor."""
    return run.data(_args(node)[0])


def _made(run: Labelling, node: fx.Node) -> Labelled:
    """New values of fixed sizes; only dtype and device come from another tensor."""
    return torch.zeros((), dtype=torch.long).expand(run.shapes(node)[0])


def _are_tensors(run: Labelling, *operands: Any) -> bool:
    """Whether operands are parameters or buffers, or left out. A computed operand has no slices to remove."""
    return all(run.name(operand) is not None for operand in operands if operand is not None)


def _prelu(run: Labelling, node: fx.Node) -> Labelled:
    x, weight = run.data(_args(node)[0]), _args(node)[1]
    if not _are_tensors(run, weight):
        return run.opaque(node, "its slopes are computed")
    channels = run.along(node, x, 1, "prelu needs one slope per channel")
    if run.tensor_of(weight).numel() > 1:
        run.slot(weight, 0, channels, "along")
    return x


# ---------------------------------------------------------------- data movement


def _move(run: Labelling, node: fx.Node) -> Labelled:
    """Data movement is executed on the labels, which is exact and needs no further rule."""
    args, kwargs = run.literal(node)
    target = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    return run.executed(target, args, kwargs)


def _cat(run: Labelling, node: fx.Node) -> Labelled:
    """Movement. Pieces whose units lie across the joined axis (tokens with the same channels) share these units."""
    args, kwargs = run.literal(node)
    pieces = args[0]
    axis = (args[1] if len(args) > 1 else 0) % pieces[0].dim()
    across = [
        piece.narrow(axis, 0, 1)
        for piece in pieces
        if any(run.labels.varies(piece, other) for other in range(piece.dim()) if other != axis)
    ]
    for piece in across[1:]:
        run.unite(node, across[0], piece, "are joined along another axis")
    return run.executed(node.target, args, kwargs)


def _move_fixed_axes(axes: Callable[[tuple[Any, ...]], list[int]]) -> LabelRule:
    """Movement whose literals are positions along some axes (none: all); units along these axes are united."""

    def rule(run: Labelling, node: fx.Node) -> Labelled:
        args, kwargs = run.literal(node)
        x = args[0]
        for axis in axes(_args(node)) or range(x.dim()):
            x = run.merge(node, x, [axis % x.dim()], "moves elements along this axis").expand(x.shape)
        return run.executed(node.target, (x, *args[1:]), kwargs)

    return rule


def _channel_shuffle(run: Labelling, node: fx.Node) -> Labelled:
    """The channels at one place of every group are united, so that the groups stay equally wide."""
    x, groups = run.data(_args(node)[0]), _args(node)[1]
    channels = run.along(node, x, 1, "needs whole channels")
    places = run.merge(node, channels.reshape(groups, -1), [0], "shuffles groups of equal width")
    x = run.spread(places.expand(groups, len(channels) // groups).reshape(-1), 1, x.shape)
    return run.executed(node.target, (x, groups), {})


def _slice(run: Labelling, node: fx.Node) -> Labelled:
    """Executed on the labels. Of every so many that a step passes over, all are united, so that the step stays."""
    args, kwargs = run.literal(node)
    x, step = args[0], args[4] if len(args) > 4 else 1
    if step != 1:
        axis, why = args[1] % x.dim(), "is sliced with a step"
        size = x.size(axis)
        if size % step == 0 and (args[2] or 0) in range(step) and (args[3] is None or args[3] >= size):
            steps = x.unflatten(axis, (size // step, step))
            x = run.merge(node, steps, [axis + 1], why).expand(steps.shape).flatten(axis, axis + 1)
        else:
            x = run.merge(node, x, [axis], why).expand(x.shape)
    return run.executed(node.target, (x, *args[1:]), kwargs)


def _index(run: Labelling, node: fx.Node) -> Labelled:
    indices = [run.tensor_of(i) if isinstance(i, fx.Node) and i.op == "get_attr" else i for i in _args(node)[1]]
    if any(isinstance(i, fx.Node) for i in indices):
        return run.opaque(node, "an index that depends on the input")
    x = run.data(_args(node)[0])
    for axis, index in enumerate(indices):
        if index is not None:
            x = run.merge(node, x, [axis], "is indexed along this axis").expand(x.shape)
    return run.executed(node.target, (x, [None if i is None else i.cpu() for i in indices]), {})


def _index_select(run: Labelling, node: fx.Node) -> Labelled:
    x, axis, index = run.data(_args(node)[0]), _args(node)[1], _args(node)[2]
    run.keep(node, index, "chooses what is read")
    return run.merge(node, x, [axis % x.dim()], "is indexed along this axis").expand(run.shapes(node)[0])


def _index_fill(run: Labelling, node: fx.Node) -> Labelled:
    x, axis, index = run.data(_args(node)[0]), _args(node)[1], _args(node)[2]
    run.keep(node, index, "chooses what is written")
    return run.merge(node, x, [axis % x.dim()], "is indexed along this axis").expand(x.shape)


def _gather(run: Labelling, node: fx.Node) -> Labelled:
    """Units along the read axis are united; along other axes, indices are combined with what they index."""
    x, axis, index = run.data(_args(node)[0]), _args(node)[1], run.data(_args(node)[2])
    if x.dim() == 0 or any(x.size(other) != index.size(other) for other in range(x.dim()) if other != axis % x.dim()):
        return run.opaque(node, "gathers from a part of a tensor")
    axis %= x.dim()
    x = run.merge(node, x, [axis], "is indexed along this axis")
    index = run.merge(node, index, [axis], "is indexed along this axis")
    run.unite(node, x, index, "are indexed by each other")
    return x.expand(run.shapes(node)[0])


def _embedding(run: Labelling, node: fx.Node) -> Labelled:
    """Makes units along the second axis of its table."""
    table, index = _args(node)[:2]
    if not _are_tensors(run, table):
        return run.opaque(node, "its table is computed from the input")
    run.keep(node, index, "chooses what is read")
    shape = run.shapes(node)[0]
    return run.spread(run.rows(table, 1), len(shape) - 1, shape)


def _grid_sampler(run: Labelling, node: fx.Node) -> Labelled:
    x = run.data(_args(node)[0])
    run.keep(node, _args(node)[1], "says where to sample")
    return run.spread(run.along(node, x, 1, "mixes positions"), 1, run.shapes(node)[0])


def _im2col(run: Labelling, node: fx.Node) -> Labelled:
    args, kwargs = run.literal(node)
    moved = call(node, (args[0].double().contiguous(), *args[1:]), kwargs)
    return run.trim(moved.long())


def _pad(run: Labelling, node: fx.Node) -> Labelled:
    """Padding repeats the label along axes of one label; padded channels are new units of their own."""
    x, amounts = run.data(_args(node)[0]), list(_args(node)[1])
    mode = _args(node)[2] if len(_args(node)) > 2 else "constant"
    for i in range(len(amounts) // 2):
        axis, left, right = x.dim() - 1 - i, amounts[2 * i], amounts[2 * i + 1]
        if not run.labels.varies(x, axis):
            size = x.size(axis) + left + right
            x = x.narrow(axis, 0, 1).expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
            continue
        if mode != "constant" or left < 0 or right < 0:
            return run.opaque(node, "pads channels by reflection")
        sides = []
        for amount in (left, right):
            shape = [1] * x.dim()
            shape[axis] = amount
            sides.append(run.labels.fresh(amount).reshape(shape).expand(*x.shape[:axis], amount, *x.shape[axis + 1 :]))
        x = torch.cat([sides[0], x, sides[1]], axis)
    return run.trim(x)


def _halves(run: Labelling, node: fx.Node) -> Labelled:
    """One half of the channels is gated by the other."""
    x, axis = run.data(_args(node)[0]), argument(node, "dim")
    first, second = x.chunk(2, axis)
    run.unite(node, first, second, "gate each other")
    return run.trim(first)


def _getitem(run: Labelling, node: fx.Node) -> Labelled:
    container, index = _args(node)
    piece: Tensor = cast("tuple[Tensor, ...]", run.value(container))[index]
    return piece


def _arithmetic(run: Labelling, node: fx.Node) -> Labelled:
    args, kwargs = run.literal(node)
    number: float = call(node, args, kwargs)
    return number


def _reshaped(sizes_at: int) -> ResizeRule:
    def rule(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
        sizes = list(_args(node)[sizes_at])
        before, after = new.old_shape(node), new.shape(node)
        first = _args(node)[1] % (len(before) - len(sizes) + 1) if node.target is aten.unflatten.int else 0
        for i, size in enumerate(sizes):
            axis = first + i + (len(before) - len(sizes) if node.target is aten.expand.default else 0)
            if before[axis] != after[axis] and size != -1:
                if isinstance(size, fx.Node) and -1 in sizes:
                    new.refuse(node, "two sizes of this reshape depend on the channels that stay")
                sizes[i] = -1 if isinstance(size, fx.Node) else after[axis]
        return (*_args(node)[:sizes_at], sizes, *_args(node)[sizes_at + 1 :])

    return rule


def _split_sizes(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    dim: Any = _args(node)[2] if len(_args(node)) > 2 else node.kwargs.get("dim", 0)
    axis = dim % len(new.old_shape(_args(node)[0]))
    sizes = [shape[axis] for shape in new.shapes(node)]
    if sizes == [shape[axis] for shape in new.old_shapes(node)]:
        return _args(node)
    new.replace_target(node, aten.split_with_sizes.default)
    return (_args(node)[0], sizes, axis)


def _pieces(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    """Only the pieces of which channels are left."""
    return ([piece for piece in _args(node)[0] if piece.op == "get_attr" or not new.vanishes(piece)], *_args(node)[1:])


def _slice_bounds(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    source = _args(node)[0]
    given = list(_args(node)[1:])
    axis, start, end = (given + [0, None, None][len(given) :])[:3]
    axis %= len(new.old_shape(source))
    if new.old_shape(source)[axis] == new.shape(source)[axis] or given[3:] not in ([], [1]):
        return _args(node)  # what a step passes over goes together
    start, end, _ = slice(start, end).indices(new.old_shape(source)[axis])
    return (source, axis, new.kept_before(source, axis, start), new.kept_before(source, axis, max(start, end)))


def _select_index(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    source, axis, index = _args(node)[:3]
    size = new.old_shape(source)[axis]
    return (source, axis, index if new.shape(source)[axis] == size else new.kept_before(source, axis, index % size))


def _pad_amounts(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    amounts, source = list(_args(node)[1]), _args(node)[0]
    before = new.old_shape(source)
    for i in range(len(amounts) // 2):
        axis, left = len(before) - 1 - i, amounts[2 * i]
        if new.old_shape(node)[axis] != new.shape(node)[axis]:
            amounts[2 * i] = new.kept_before(node, axis, left)
            amounts[2 * i + 1] = new.shape(node)[axis] - new.kept_before(node, axis, left + before[axis])
    return (source, amounts, *_args(node)[2:])


# ---------------------------------------------------------------- reductions and normalisation


def _dims(node: fx.Node, rank: int) -> list[int]:
    """The axes that an operator works along, by its schema; all, if it has or is given none."""
    dims = argument(node, "dim", "dims")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []


def _reduce(run: Labelling, node: fx.Node) -> Labelled:
    """Elements that are reduced together are united."""
    x = run.data(_args(node)[0])
    dims = _dims(node, x.dim())
    merged = run.merge(node, x, dims, "reduces over this axis")
    shapes = run.shapes(node)
    out = [merged.expand(s) if len(s) == x.dim() else merged.squeeze(dims).expand(s) for s in shapes]
    return tuple(out) if run.is_list(node) else out[0]


def _over(why: str, axes: Callable[[fx.Node, int], list[int]] = _dims) -> LabelRule:
    """Elements along some axes are processed together and united; the shape does not change."""

    def rule(run: Labelling, node: fx.Node) -> Labelled:
        x = run.data(_args(node)[0])
        merged = run.merge(node, x, axes(node, x.dim()), why)
        out = [merged.expand(shape) for shape in run.shapes(node)]
        return tuple(out) if run.is_list(node) else out[0]

    return rule


def _layer_norm(run: Labelling, node: fx.Node) -> Labelled:
    x = run.data(_args(node)[0])
    if _through_norm(run, node):
        return x
    last = list(range(x.dim() - len(_args(node)[1]), x.dim()))
    return run.merge(node, x, last, "normalises over the channels").expand(x.shape)


def _through_norm(run: Labelling, node: fx.Node) -> bool:
    """Whether a norm's channels stay units of their own, with masked ones left out of its statistics."""
    norm = norm_over_channels(node) if run.through_norms else None
    if norm is None or not _are_tensors(run, norm.weight, norm.bias):
        return False
    x = run.data(norm.source)
    axis = norm.axis % x.dim()
    if not run.labels.varies(x, axis) or any(run.labels.varies(x, other) for other in range(x.dim()) if other != axis):
        return False
    channels = run.along(node, x, axis, "needs whole channels")
    for operand in (norm.weight, norm.bias):
        if operand is not None:
            run.slot(operand, 0, channels, "along")
    run.norms[node.name] = channels
    return True


def _normalized_shape(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    source, size = _args(node)[:2]
    return (source, list(new.shape(source)[-len(size) :]), *_args(node)[2:])


def _batch_norm(run: Labelling, node: fx.Node) -> Labelled:
    if not _are_tensors(run, *_args(node)[1:5]):
        return run.opaque(node, "its weight is computed from the input")
    x = run.data(_args(node)[0])
    channels = run.along(node, x, 1, "needs whole channels")
    for parameter in _args(node)[1:5]:
        if isinstance(parameter, fx.Node):
            run.slot(parameter, 0, channels, "along")
    return run.spread(channels, 1, x.shape)


def _group_norm(run: Labelling, node: fx.Node) -> Labelled:
    x, groups = run.data(_args(node)[0]), _args(node)[1]
    if not isinstance(groups, int) or not _are_tensors(run, *_args(node)[2:4]):
        return run.opaque(node, "its weight or its number of groups is computed from the input")
    if _through_norm(run, node):
        return x
    channels = run.along(node, x, 1, "needs whole channels")
    merged = run.merge(node, channels.reshape(groups, -1), [1], "normalises over the channels of a group")
    channels = merged.expand(groups, x.size(1) // groups).reshape(-1)
    for parameter in _args(node)[2:4]:
        if isinstance(parameter, fx.Node):
            run.slot(parameter, 0, channels, "along")
    return run.spread(channels, 1, x.shape)


def _group_count(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    source, groups = _args(node)[:2]
    if groups == 1:
        return _args(node)
    width = new.old_shape(source)[1] // groups
    return (source, new.shape(source)[1] // width, *_args(node)[2:])


def _spatial(run: Labelling, node: fx.Node) -> Labelled:
    """Pooling and resizing mix the last axes and leave the channels alone."""
    x = run.data(_args(node)[0])
    rank = 1 if "1d" in str(node.target) else 3 if "3d" in str(node.target) else 2
    merged = run.merge(node, x, list(range(x.dim() - rank, x.dim())), "mixes positions")
    out = [merged.expand(shape) for shape in run.shapes(node)]
    return tuple(out) if run.is_list(node) else out[0]


# ---------------------------------------------------------------- parametric operators


def _convolution(run: Labelling, node: fx.Node) -> Labelled:
    """Reads units along its input channels, and makes units along its output channels.

    With groups, the units are whole groups or, in ``run.by_place``, the channels at one place in every group.
    """
    weight, bias = _args(node)[1], _args(node)[2] if len(_args(node)) > 2 else None
    groups = _args(node)[6] if len(_args(node)) > 6 else 1
    if not isinstance(groups, int) or not _are_tensors(run, weight, bias):
        return run.opaque(node, "its weight or its number of groups is computed from the input")
    x = run.data(_args(node)[0])
    channels = run.along(node, x, x.dim() - run.tensor_of(weight).dim() + 1, "needs whole channels")
    if groups == 1:
        run.slot(weight, 1, channels, "in")
        rows = run.rows(weight, 0)
    elif node.name in run.by_place:
        run.balance(node, channels, groups)
        run.slot(weight, 1, channels, "in")
        rows = run.rows(weight, 0, groups)
    else:
        if len(channels) > groups:
            run.grouped[node.name] = channels
        merged = run.merge(node, channels.reshape(groups, -1), [1], "convolves the channels of a group together")
        run.labels.unite(merged.expand(groups, len(channels) // groups).reshape(-1), channels)
        count = run.tensor_of(weight).size(0)
        rows = merged.expand(groups, count // groups).reshape(-1)
        run.slot(weight, 0, rows, "along")
    if bias is not None:
        run.slot(bias, 0, rows, "along")
    return run.spread(rows, 1, run.shapes(node)[0])


def _convolution_groups(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    groups = _args(node)[6] if len(_args(node)) > 6 else 1
    if not isinstance(groups, int) or groups == 1:
        return _args(node)
    stays = new.kept_along(_args(node)[0], len(new.old_shape(node)) - len(new.tensor_shape(_args(node)[1])) + 1)
    return (*_args(node)[:6], int(stays.reshape(groups, -1).any(1).sum()), *_args(node)[7:])


def _transposed_convolution(run: Labelling, node: fx.Node) -> Labelled:
    weight, bias = _args(node)[1], _args(node)[2] if len(_args(node)) > 2 else None
    groups = _args(node)[6] if len(_args(node)) > 6 else 1
    if not _are_tensors(run, weight, bias):
        return run.opaque(node, "its weight is computed from the input")
    if groups != 1:
        return run.opaque(node, "grouped transposed convolution")
    run.slot(weight, 0, run.along(node, run.data(_args(node)[0]), 1, "needs whole channels"), "in")
    rows = run.rows(weight, 1)
    if bias is not None:
        run.slot(bias, 0, rows, "along")
    return run.spread(rows, 1, run.shapes(node)[0])


def _linear(run: Labelling, node: fx.Node) -> Labelled:
    weight, bias = _args(node)[1], _args(node)[2] if len(_args(node)) > 2 else None
    return _matrix(run, node, _args(node)[0], weight, bias, columns=1)


def _addmm(run: Labelling, node: fx.Node) -> Labelled:
    return _matrix(run, node, _args(node)[1], _args(node)[2], _args(node)[0], columns=0)


def _matrix(run: Labelling, node: fx.Node, source: Any, weight: Any, bias: Any, columns: int) -> Labelled:
    """A matrix applied to the last axis of ``source``; ``columns`` is the weight's axis of inputs."""
    if not _are_tensors(run, weight, bias):
        return run.opaque(node, "its weight is computed from the input")
    x, shape = run.data(source), run.shapes(node)[0]
    last = x.dim() - 1
    alike = not run.labels.varies(x, last)  # every feature belongs to the same unit
    units = run.labels.removable(x) if alike else x
    if alike and any(varies(units, axis) for axis in range(last)):
        return x.narrow(last, 0, 1).expand(shape)  # applied to every unit alike, to heads for example
    run.slot(weight, columns, run.along(node, x, last, "needs whole features"), "in")
    rows = run.rows(weight, 1 - columns)
    if bias is not None:
        run.slot(bias, 0, rows, "along")
    return run.spread(rows, last, shape)


def _matmul(run: Labelling, node: fx.Node) -> Labelled:
    a, b = _args(node)[:2]
    if run.name(b) is not None and run.tensor_of(b).dim() == 2:
        return _matrix(run, node, a, b, None, columns=0)
    if run.name(b) is not None and run.tensor_of(b).dim() == 1:
        return _weighted_sum(run, node, a, b)
    return _product(run, node, a, b)


def _weighted_sum(run: Labelling, node: fx.Node, source: Any, weight: Any) -> Labelled:
    """A vector of weights applied to the last axis: a matrix of one row, which does not make a unit."""
    x, shape = run.data(source), run.shapes(node)[0]
    if not run.labels.varies(x, x.dim() - 1) and any(run.labels.varies(x, axis) for axis in range(x.dim() - 1)):
        return x.select(x.dim() - 1, 0).expand(shape)  # applied to every unit alike
    run.slot(weight, 0, run.along(node, x, x.dim() - 1, "needs whole features"), "in")
    return torch.zeros((), dtype=torch.long).expand(shape)


def _product(run: Labelling, node: fx.Node, a: Any, b: Any) -> Labelled:
    x, y = run.data(a), run.data(b)
    if x.dim() < 2 or y.dim() < 2:
        return run.opaque(node, "a product with a vector")
    if run.dims:
        axes = [*_numbered(x.dim() - 2), "row", "sum"], [*_numbered(y.dim() - 2), "sum", "column"]
        out = [*_numbered(max(x.dim(), y.dim()) - 2), "row", "column"]
        return run.multiplied(node, a, b, axes, out, run.shapes(node)[0])
    x = run.merge(node, x, [x.dim() - 1], "is summed over in a product")
    y = run.merge(node, y, [y.dim() - 2], "is summed over in a product")
    return run.contract(node, x, y).expand(
        (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.size(-2), y.size(-1))
    )


def _sum_with_product(run: Labelling, node: fx.Node) -> Labelled:
    """``baddbmm``: a tensor is added to a product."""
    source, a, b = _args(node)[:3]
    product = _product(run, node, a, b)
    assert isinstance(product, Tensor)
    return run.meet_labels(node, product, source).expand(run.shapes(node)[0])


def _einsum(run: Labelling, node: fx.Node) -> Labelled:
    operands = [run.data(n) for n in _args(node)[1]]
    terms, right = _axes_by_letter(str(_args(node)[0]), [operand.dim() for operand in operands])
    if any(len(set(t)) != len(t) for t in terms):
        return run.opaque(node, f"einsum '{_args(node)[0]}'")
    if run.dims and len(operands) == 2:
        a, b = _args(node)[1]
        return run.multiplied(node, a, b, (terms[0], terms[1]), right, run.shapes(node)[0])
    out: Tensor | None = None
    for term, labels in zip(terms, operands, strict=True):
        summed = [axis for axis, letter in enumerate(term) if letter not in right]
        kept = [letter for letter in term if letter in right]
        labels = run.merge(node, labels, summed, "is summed over in a product")
        labels = labels.squeeze(summed) if summed else labels
        labels = labels.permute([kept.index(letter) for letter in right if letter in kept])
        for axis, letter in enumerate(right):
            if letter not in kept:
                labels = labels.unsqueeze(axis)
        out = labels if out is None else run.contract(node, out, labels)
    assert out is not None
    return out.expand(run.shapes(node)[0])


def _axes_by_letter(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """The axes of an einsum's operands and result, one name each; ``...`` stands for axes counted from the right.

    Examples
    --------
    >>> _axes_by_letter("...ij,kj->...ik", [3, 2])
    ([['-1', 'i', 'j'], ['k', 'j']], ['-1', 'i', 'k'])
    >>> _axes_by_letter("bi,ij", [2, 2])
    ([['b', 'i'], ['i', 'j']], ['b', 'j'])
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    widest = max((width for term, width in zip(terms, widths, strict=True) if "..." in term), default=0)

    def axes(term: str, width: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(_numbered(width) if dots else []), *after]

    if not arrow:
        right = ("..." if "..." in left else "") + "".join(
            sorted(letter for letter in set(left) - {",", "."} if left.count(letter) == 1)
        )
    return [axes(term, width) for term, width in zip(terms, widths, strict=True)], axes(right, widest)


def _pinned_scale(new: Resizer, node: fx.Node) -> tuple[Any, ...]:
    """Queries with fewer dimensions are scaled as before."""
    before, after = (shapes(_args(node)[0])[-1] for shapes in (new.old_shape, new.shape))
    if before != after and node.kwargs.get("scale") is None:
        new.set_option(node, "scale", 1 / math.sqrt(before))
    return _args(node)


def _numbered(count: int) -> list[str]:
    """Names of axes that are counted from the right."""
    return [str(axis) for axis in range(-count, 0)]


def _attention(run: Labelling, node: fx.Node) -> Labelled:
    if run.dims:
        return _attention_by_dims(run, node)
    q, k, v = (run.data(n) for n in _args(node)[:3])
    if q.size(-3) != k.size(-3) and node.kwargs.get("enable_gqa"):
        repeat = q.size(-3) // k.size(-3)
        k, v = (t.repeat_interleave(repeat, -3) for t in (k, v))
    why = "is summed over in attention"
    q = run.merge(node, q, [q.dim() - 1], why)
    k = run.merge(node, k, [k.dim() - 2, k.dim() - 1], why)
    v = run.merge(node, v, [v.dim() - 2], why)
    scores = run.contract(node, q, k)
    mask = _args(node)[3] if len(_args(node)) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        tokens = (*scores.shape[:-2], q.size(-2), run.data(_args(node)[1]).size(-2))
        scores = run.merge(node, run.meet_labels(node, scores.expand(tokens), mask), [len(tokens) - 1], why)
    return run.contract(node, scores, v).expand(run.shapes(node)[0])


def _attention_by_dims(run: Labelling, node: fx.Node) -> Labelled:
    """Units are dimensions of queries and keys, which are summed over, and of values, which the result has."""
    query, key, value = _args(node)[:3]
    batch, shape = _numbered(len(run.shapes(query)[0]) - 2), run.shapes(node)[0]
    tokens = (*shape[:-1], run.shapes(key)[0][-2])
    axes = [*batch, "row", "sum"], [*batch, "token", "sum"]
    scores = run.multiplied(node, query, key, axes, [*batch, "row", "token"], tokens)
    mask = _args(node)[3] if len(_args(node)) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        scores = run.meet_labels(node, scores, mask)
    run.labels.fix(scores, Event(node.name, "is normalised over all tokens"))
    run.operands.append(compact(run.data(value)))
    values = run.along(node, run.data(value), len(shape) - 1, "is the same in every head")
    if not run.labels.varies(values, 0):
        run.labels.fix(values, Event(node.name, "is all one unit"))
    return run.spread(values, len(shape) - 1, shape)


# ---------------------------------------------------------------- the table

RULES: dict[str, Rule] = {
    "elementwise": Rule(_pointwise),
    "made": Rule(_made),
    "like another": Rule(_like),
    "prelu": Rule(_prelu),
    "movement": Rule(_move),
    "joined": Rule(_cat, _pieces),
    "channel shuffle": Rule(_channel_shuffle),
    "view": Rule(_move, _reshaped(1)),
    "unflatten": Rule(_move, _reshaped(2)),
    "split": Rule(_move, _split_sizes),
    "slice": Rule(_slice, _slice_bounds),
    "select": Rule(_move, _select_index),
    "roll": Rule(_move_fixed_axes(lambda args: list(args[2]) if len(args) > 2 else [])),
    "flip": Rule(_move_fixed_axes(lambda args: list(args[1]))),
    "unfold": Rule(_move_fixed_axes(lambda args: [args[1]])),
    "diagonal": Rule(_move_fixed_axes(lambda args: [*args[2:], *(0, 1)[len(args[2:]) :]])),
    "rotation": Rule(_move_fixed_axes(lambda args: list(args[2]) if len(args) > 2 else [0, 1])),
    "index": Rule(_index),
    "index select": Rule(_index_select),
    "gather": Rule(_gather),
    "index fill": Rule(_index_fill),
    "embedding": Rule(_embedding),
    "grid sample": Rule(_grid_sampler),
    "halves": Rule(_halves),
    "im2col": Rule(_im2col),
    "pad": Rule(_pad, _pad_amounts),
    "reduction": Rule(_reduce),
    "along an axis": Rule(_over("is worked on along this axis")),
    "triangle": Rule(_over("is cut off by place", lambda node, rank: [rank - 2, rank - 1])),
    "layer norm": Rule(_layer_norm, _normalized_shape),
    "batch norm": Rule(_batch_norm),
    "group norm": Rule(_group_norm, _group_count),
    "spatial": Rule(_spatial),
    "convolution": Rule(_convolution, _convolution_groups),
    "transposed convolution": Rule(_transposed_convolution),
    "linear": Rule(_linear),
    "addmm": Rule(_addmm),
    "product": Rule(_matmul),
    "sum with product": Rule(_sum_with_product),
    "einsum": Rule(_einsum),
    "attention": Rule(_attention, _pinned_scale),
    KEPT_WHOLE: Rule(None),
    "size": Rule(_arithmetic),
    "part": Rule(_getitem),
}
"""A rule for each kind of operator."""


def rule_of(function: Any) -> Rule | None:
    """The rule for an operator's kind; None if the kind is not known.

    Examples
    --------
    >>> rule_of(torch.ops.aten.sinc.default) is rule_of(torch.ops.aten.relu.default)
    True
    """
    kind = kind_of(function)
    return None if kind is None else RULES[kind]
