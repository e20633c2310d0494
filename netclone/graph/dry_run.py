"""dry_run(graph, ...): raise unless a graph is a pure function of its inputs, within a budget, at every batch size.

The graph is run on shapes alone, at several batch sizes side by side. Every size has to be a linear function of the
batch size, so that it is known at all others too.
"""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.errors import ArchiveError, first_line
from netclone.graph.budgets import Meter, budget, memory_of
from netclone.graph.purity import SIZE_FUNCTIONS, functional_twin, impurity, may_be_archived
from netclone.graph.recurrent import GATES, recurrent_by_shape
from netclone.graph.signatures import MAX_ITEMS, bind

MAX_ELEMENTS = 2**31
"""The most elements of one tensor, stored or computed from a batch of two."""

BATCHES = (2, 3, 4096)
"""The batch sizes of a run on shapes: two that differ by one sample, and a large one."""

_MAX_INTEGER = 2**63 - 1
_MAX_AXES = 64
_MAX_SECONDS = 30.0  # the largest networks need two
aten = torch.ops.aten


def dry_run(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    input_shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    output_width: int,
) -> None:
    """Run a graph on the meta device, where nothing is allocated, and raise unless it returns ``(N, output_width)``.

    Parameters
    ----------
    graph
        A graph of operators, with one placeholder per input.
    tensors
        The tensors that its ``get_attr`` nodes read, on the meta device, in their own dtypes.
    input_shapes
        Shapes without the batch dimension.

    Raises
    ------
    ArchiveError
        If an operator is not pure or refuses its arguments, or if the graph writes into memory that is not its own,
        exceeds its budget, grows faster than the batch, or has another output. The message names the node.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(input_shapes):
        raise ArchiveError(f"graph: {len(placeholders)} placeholders, the spec describes {len(input_shapes)} inputs")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Runs(graph, tensors, input_shapes, dtype).run(output_width)


def is_of_operators(graph: fx.Graph) -> bool:
    """Whether a file could hold a graph: it calls only torch's operators and functions of sizes."""
    return all(
        isinstance(node.target, torch._ops.OpOverload) or may_be_archived(node.target)
        if node.op == "call_function"
        else node.op in ("placeholder", "get_attr", "output")
        for node in graph.nodes
    )


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, on the meta device."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for name, tensor in held
    }


class _Runs:
    """One run per batch size, side by side: every node's value is a tuple with one entry per run."""

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        input_shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.meter = Meter()
        self.operations = [0 for _ in BATCHES]
        self.values: dict[fx.Node, tuple[Any, ...]] = {}
        shapes = iter(input_shapes)
        for node in graph.nodes:
            if node.op == "placeholder":
                shape = next(shapes)
                self.values[node] = tuple(torch.empty((n, *shape), dtype=dtype, device="meta") for n in BATCHES)
        self.inputs = list(self.values.values())  # kept alive, since memory that is freed may be reused
        self.given = {memory_of(tensor) for tensor in _flat([self.inputs, tensors])}
        sample = sum(math.prod(shape) for shape in input_shapes)
        stored = sum(tensor.numel() for tensor in tensors.values())
        self.budgets = tuple(budget(n, sample, stored) for n in BATCHES)
        self.pieces_left = 4 * len(graph.nodes) + 4 * MAX_ITEMS
        self.last_use = {read: node for node in graph.nodes for read in node.all_input_nodes}
        self.held = tuple(Counter[int]() for _ in BATCHES)  # per run, how many live nodes hold each memory
        self.live = [0 for _ in BATCHES]  # elements in these memories
        self.peaks = [0 for _ in BATCHES]

    def run(self, output_width: int) -> None:
        with self.meter:
            self._run(output_width)
        for what, counts in (("elements", self.peaks), ("operations", self.operations)):
            if _grows(counts):
                raise ArchiveError(f"graph: the number of {what} grows faster than the batch, too large for large ones")

    def _run(self, output_width: int) -> None:
        deadline = time.monotonic() + _MAX_SECONDS
        for node in self.graph.nodes:
            where = f"node '{node.name}'"
            if time.monotonic() > deadline:
                raise ArchiveError(f"{where}: checking the graph takes more than {_MAX_SECONDS:.0f} seconds")
            if node.op == "get_attr":
                self.values[node] = (self.tensors[node.target],) * len(BATCHES)
            elif node.op == "call_function":
                self._call(node, f"node '{node.name}' ({_name(node.target)})")
            elif node.op == "output":
                self._check_output(self.values[node.args[0]], output_width)
            for read in node.all_input_nodes:
                if self.last_use[read] is node:
                    self._drop(read)

    def _call(self, node: fx.Node, where: str) -> None:
        calls = []
        for index in range(len(BATCHES)):
            values = {read: self.values[read][index] for read in node.all_input_nodes}
            args = fx.map_arg(node.args, values.__getitem__)
            calls.append((args, dict(fx.map_arg(node.kwargs, values.__getitem__))))
        if isinstance(node.target, torch._ops.OpOverload):
            made = tuple(self._operator(node, index, *call, where) for index, call in enumerate(calls))
        else:
            made = _of_sizes(node.target, [args for args, _ in calls], node.kwargs, where)
        _check_growth(made, where)
        self.values[node] = made
        if isinstance(made[0], (list, tuple)):
            self.pieces_left -= len(made[0])
        if self.pieces_left < 0:
            raise ArchiveError(f"{where}: the graph takes tensors into too many pieces")
        self._hold(node, where)

    def _operator(self, node: fx.Node, index: int, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> Any:
        target: Any = node.target
        bound = bind(target, args, kwargs, where)
        twin = functional_twin(target)
        if not (may_be_archived(target) or twin is not None):
            raise ArchiveError(
                f"{where} is not pure: it may write, draw at random, or return shapes that depend on values"
            )
        if twin is not None:
            self._check_in_place(node, index, where)
        reason = impurity(twin or target, bound)
        if reason:
            raise ArchiveError(f"{where}: {reason}; a clone is a function of its input")
        if any(str(returned.type).startswith("List") for returned in target._schema.returns):
            _check_pieces(bound, where)
        if index == 0:
            _check_sizes(bound, where)
        if "device" in bound:  # otherwise a factory would allocate on the CPU
            bound["device"] = torch.device("meta")
        if bound.get("pin_memory"):
            raise ArchiveError(f"{where}: asks for pinned memory")
        if twin is None:
            return self._metered(target, index, bound, where)
        changed, value = next(iter(bound.values())), self._metered(twin, index, bound, where)
        if (value.shape, value.dtype) != (changed.shape, changed.dtype):
            raise ArchiveError(f"{where} does not accept its arguments: its result does not fit into the first of them")
        return changed

    def _metered(self, target: Any, index: int, bound: dict[str, Any], where: str) -> Any:
        meter, held = self.meter, self.held[index]
        meter.where, meter.elements, meter.operations = where, 0, 0
        meter.may_write = lambda memory: memory not in self.given and not held[memory]
        try:
            value = _recurrent(meter, target, bound) if target in GATES else _called(target, bound)
        except ArchiveError:
            raise
        except Exception as error:
            raise ArchiveError(
                f"{where} does not accept its arguments: {type(error).__name__}: {first_line(error)[:120]}"
            ) from error
        self.operations[index] += meter.operations
        limit = self.budgets[index]
        for item in _flat(value):
            if item.numel() > limit.elements or (index == 0 and item.numel() > MAX_ELEMENTS) or item.dim() > _MAX_AXES:
                raise ArchiveError(f"{where}: shape {tuple(item.shape)[:8]} is too large")
        if self.live[index] + meter.elements > limit.elements:
            raise ArchiveError(
                f"{where}: the graph holds {self.live[index] + meter.elements} elements at a time for a batch of "
                f"{BATCHES[index]}, too large: the limit for its input and its tensors is {limit.elements}"
            )
        self.peaks[index] = max(self.peaks[index], self.live[index] + meter.elements)
        if self.operations[index] > limit.operations:
            raise ArchiveError(
                f"{where}: the graph takes {self.operations[index]} operations for a batch of {BATCHES[index]}, too "
                f"large: the limit for its input and its tensors is {limit.operations}"
            )
        return value

    def _check_in_place(self, node: fx.Node, index: int, where: str) -> None:
        """Raise unless an in-place operator overwrites memory of the graph's own that nothing else reads."""
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node) or changed.op != "call_function" or len(changed.users) > 1:
            raise ArchiveError(f"{where}: writes into memory that is not its own, or that is read elsewhere")
        if not gives_new_memory(changed.target) or sum(read is changed for read in _reads(node)) > 1:
            raise ArchiveError(f"{where}: writes into memory that may belong to another tensor")
        value = self.values[changed][index]
        memory = memory_of(value)
        if memory in self.given or self.held[index][memory] > 1:
            raise ArchiveError(f"{where}: writes into memory that is read elsewhere")

    def _hold(self, node: fx.Node, where: str) -> None:
        for index, value in enumerate(self.values[node]):
            for memory, elements in {memory_of(t): _stored_elements(t) for t in _flat(value)}.items():
                if memory not in self.given:
                    self.live[index] += 0 if self.held[index][memory] else elements
                    self.held[index][memory] += 1
        if not node.users:
            self._drop(node)

    def _drop(self, node: fx.Node) -> None:
        for index, value in enumerate(self.values.pop(node)):
            for memory, elements in {memory_of(t): _stored_elements(t) for t in _flat(value)}.items():
                if memory not in self.given:
                    self.held[index][memory] -= 1
                    if not self.held[index][memory]:
                        del self.held[index][memory]
                        self.live[index] -= elements

    def _check_output(self, results: tuple[Any, ...], width: int) -> None:
        for n, result in zip(BATCHES, results, strict=True):
            seen = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            if seen != (n, width):
                raise ArchiveError(f"graph: the output is {seen}, the classes ask for {(n, width)}")
        if not results[0].is_floating_point():
            raise ArchiveError(f"graph: the output is {results[0].dtype}, logits are floating-point numbers")


def gives_new_memory(target: Any) -> bool:
    """Whether an operator never returns the memory of an argument, whatever its layout.

    Operators that are composed of others (``type_as``, ``einsum``) may return it without declaring it in their schema.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if functional_twin(target) is not None:
        return True  # its first argument, which is checked separately
    name = target._schema.name.partition("::")[2]
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return False
    made = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not made or name.startswith(_NEW)


_NEW = (
    *("conv", "linear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "matmul", "softmax"),
    *(
        "log_softmax",
        "max_pool",
        "avg_pool",
        "adaptive_",
        "upsample_",
        "scaled_dot",
        "lstm",
        "gru",
        "rnn_",
        "add",
        "mul",
    ),
    *("sub", "div", "silu", "relu", "selu", "gelu", "mish", "hard", "sigmoid", "where", "cross"),
)


def _reads(node: fx.Node) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return iter(found)


def _called(target: Any, bound: Mapping[str, Any]) -> Any:
    schema = target._schema.arguments
    args = [bound[argument.name] for argument in schema if not argument.kwarg_only]
    return target(*args, **{argument.name: bound[argument.name] for argument in schema if argument.kwarg_only})


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{getattr(target, '__name__', '')}"


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


def _stored_elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _recurrent(meter: Meter, target: Any, bound: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The shapes that an LSTM, GRU or RNN returns, after a check of its weights; torch would run every time step."""
    source, weights, layers = bound["input"], bound["params"], bound["num_layers"]
    states = list(bound["hx"]) if isinstance(bound["hx"], (list, tuple)) else [bound["hx"]]
    directions, biases = 2 if bound["bidirectional"] else 1, 2 if bound["has_biases"] else 0
    if source.dim() != 3 or len(states) != (2 if target is aten.lstm.input else 1) or not 1 <= layers <= 64:
        raise ValueError("an LSTM, GRU or RNN takes (N, T, C) or (T, N, C), its states and at least one layer")
    given, width = states[0].shape[-1], states[-1].shape[-1]  # these differ in an LSTM with projections
    batch = source.shape[0 if bound["batch_first"] else 1]
    if [tuple(s.shape) for s in states] != [(layers * directions, batch, w) for w in (given, width)[: len(states)]]:
        raise ValueError(f"states {[tuple(state.shape) for state in states]} do not fit {tuple(source.shape)}")
    if len({tensor.dtype for tensor in (source, *states, *weights)}) != 1:
        raise ValueError("a recurrent network and its input have one dtype")
    rows, expected = GATES[target] * width, []
    for layer in range(layers):
        inner = source.shape[2] if layer == 0 else directions * given
        projection = [] if given == width else [(given, width)]
        expected += directions * [(rows, inner), (rows, given), *biases * [(rows,)], *projection]
    if [tuple(weight.shape) for weight in weights] != expected:
        raise ValueError(f"weights of other shapes than {layers} layers of width {width} have")
    steps = source.shape[0] * source.shape[1]
    value = recurrent_by_shape(*bound.values())
    meter.operations += 2 * steps * sum(weight.numel() for weight in weights) + source.numel()
    meter.elements += 5 * layers * directions * steps * width
    return value


def _of_sizes(target: Any, calls: Sequence[Sequence[Any]], kwargs: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """Compute with sizes; one that depends on the batch may only be a linear function of it."""
    if kwargs:
        raise ArchiveError(f"{where}: takes no keywords")
    if target is operator.getitem:
        made = []
        for args in calls:
            if len(args) != 2 or not isinstance(args[0], (list, tuple)) or type(args[1]) is not int:
                raise ArchiveError(f"{where}: takes one tensor of several by its number")
            if not -len(args[0]) <= args[1] < len(args[0]):
                raise ArchiveError(f"{where}: there is no number {args[1]} among {len(args[0])}")
            made.append(args[0][args[1]])
        return tuple(made)
    if target not in SIZE_FUNCTIONS.values():
        raise ArchiveError(f"{where} is not an operator that a file may hold")
    for args in calls:
        if not all(type(value) in (int, float) for value in args):
            raise ArchiveError(f"{where}: takes numbers, got {args!r:.80}")
    try:
        results = tuple(target(*args) for args in calls)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ArchiveError(f"{where} does not accept its arguments: {error}") from error
    varying = [len({args[place] for args in calls}) > 1 for place in range(len(calls[0]))]
    if (
        any(varying)
        and target not in (operator.add, operator.sub, operator.neg)
        and not _is_line(target, calls, varying)
    ):
        raise ArchiveError(
            f"{where}: computes a size that is not linear in the batch size, and may be too large for some"
        )
    return results


def _is_line(target: Callable[..., Any], calls: Sequence[Sequence[Any]], varying: Sequence[bool]) -> bool:
    """Whether a product or quotient of linear functions of the batch size is linear too."""
    if target is operator.mul:
        return not all(varying)
    if target is math.floor:
        return all(float(args[0]).is_integer() for args in calls)
    exact = all(type(value) is int for args in calls for value in args) and not any(a % b for a, b in calls)
    if exact and (not varying[1] or len({a // b for a, b in calls}) == 1):
        return True
    if target is operator.mod and not varying[1]:  # the slope is a multiple, so the remainder is always the same
        (first, divisor), (second, _) = calls[0], calls[1]
        return type(first) is int and type(divisor) is int and (second - first) % divisor == 0
    return False


def _check_growth(values: tuple[Any, ...], where: str) -> None:
    """Raise unless sizes are linear in the batch size, along at most one axis, and dtypes and counts are constant."""
    first = values[0]
    if isinstance(first, Tensor):
        if len({(value.dim(), value.dtype) for value in values}) > 1:
            raise ArchiveError(f"{where}: returns another kind of tensor at another batch size")
        growing = [sizes for sizes in zip(*(value.shape for value in values), strict=True) if len(set(sizes)) > 1]
        if len(growing) > 1 or not all(map(_straight, growing)):
            raise ArchiveError(
                f"{where}: shapes {', '.join(str(tuple(value.shape)) for value in values)} at batches of "
                f"{', '.join(map(str, BATCHES))} do not grow with the batch: too large, or empty, at some"
            )
    elif isinstance(first, (list, tuple)):
        if len({len(value) for value in values}) > 1:
            raise ArchiveError(f"{where}: splits a tensor into as many pieces as the batch has")
        for items in zip(*values, strict=True):
            _check_growth(items, where)
    elif isinstance(first, (int, float)):
        if any(abs(value) > _MAX_INTEGER for value in values):
            raise ArchiveError(f"{where}: the size it computes is too large")
        if type(first) is int and len(set(values)) > 1 and not _straight(values):
            raise ArchiveError(f"{where}: computes a size that does not grow with the batch")


def _straight(sizes: Sequence[int]) -> bool:
    slope = sizes[1] - sizes[0]
    return sizes[2] - sizes[0] == slope * (BATCHES[2] - BATCHES[0])


def _grows(counts: Sequence[int]) -> bool:
    """Whether a count grows faster than the batch, beyond rounding."""
    line = counts[0] + (counts[1] - counts[0]) * (BATCHES[2] - BATCHES[0])
    return counts[2] > 1.01 * line + 2**16


def _check_sizes(bound: Mapping[str, Any], where: str) -> None:
    """Raise for a shape that no tensor may have, before an operator multiplies its sizes."""
    for name in ("size", "output_size", "repeats", "shape", "dims"):
        sizes = bound.get(name)
        if isinstance(sizes, (list, tuple)) and math.prod(abs(size) for size in sizes) > MAX_ELEMENTS:
            raise ArchiveError(f"{where}: shape {tuple(sizes)[:8]} is too large")


def _check_pieces(bound: Mapping[str, Any], where: str) -> None:
    """Count the tensors that an operator would return before it makes them."""
    tensor, dim = bound.get("self"), bound.get("dim", 0)
    if not isinstance(tensor, Tensor) or not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        return  # takes a list of tensors, which is short; or fails
    sections = next((value for name, value in bound.items() if name not in ("self", "dim")), 1)
    if not isinstance(sections, (int, list, tuple)):
        return  # of gradient(), where a number is not a size
    if isinstance(sections, (list, tuple)):
        pieces = len(sections)
    elif "chunks" in bound or "sections" in bound:
        pieces = sections
    else:
        pieces = -(-tensor.shape[dim] // max(1, sections))
    if pieces > MAX_ITEMS:
        raise ArchiveError(f"{where}: would split the tensor into {pieces} pieces, the limit is {MAX_ITEMS}")
