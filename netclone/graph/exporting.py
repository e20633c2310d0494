"""export(model, examples) -> Exported: torch.export of a copy, with the model's own names and positions."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from netclone.errors import TraceError, first_line
from netclone.graph.isolation import as_in_export, isolated
from netclone.graph.outputs import Output, chosen, picked
from netclone.graph.recording import Note, Subject, named_tensors, record, weightless, written_down
from netclone.graph.recurrent import as_torch_has_it, exported_by_shape

_log = logging.getLogger(__package__)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor, which torch types as what it gives
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_MODES = {  # operators that run a part of the model under a mode, and the argument that holds the part
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    _AUTOCAST: 4,
}


@dataclass(frozen=True)
class Exported:
    """A model as a graph of operators, still with the model's in-place operators.

    ``graph`` has one placeholder per input, ``get_attr`` nodes for ``tensors`` under the model's own names, and one
    tensor out. ``positions`` maps a module (or, for a symbolic graph, a node) to the node that computes its value.
    ``value`` is the model's own output for the first of the examples, in eval mode. ``recorded``: the graph does not
    come from ``torch.export``, which may still do better.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    positions: Mapping[str, str]
    value: Tensor
    recorded: bool


def export(
    model: nn.Module,
    examples: tuple[Tensor, ...],
    paths: Mapping[str, str],
    recorded: bool = True,
    output: Output = None,
) -> Exported:
    """Export a model with a free batch size; only copies of the model are run or changed.

    Its operators are recorded (:mod:`netclone.graph.recording`); if that fails, ``torch.export`` is asked.

    Parameters
    ----------
    model
        A module that takes ``len(examples)`` tensors ``(N, ...)`` and returns one tensor, or something that holds it.
    examples
        One batch of at least two per input.
    paths
        Further positions of a graph module: path to the name of a node.
    recorded
        Whether to record at all; the two graphs are the same where both can be had.
    output
        As for :func:`netclone.trace`.

    Raises
    ------
    TraceError
        If the model cannot be copied, ``torch.export`` fails on it, or its batch size is fixed.
    OutputError
        If it is not clear which tensor of those that the model returns is meant.
    """
    for path, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"torch.export: {f'module {path!r} of ' if path else ''}{type(model).__name__} is TorchScript, which "
                "holds no Python code to capture: give the Python module that it was made from"
            )
    value, key, overwritten, tensors = _observed(model, examples, output)
    if recorded:
        try:
            found = _recorded(model, examples, tensors, overwritten, key)
        except Exception as why:  # torch.export can do it, or says why not
            _log.debug("%s: not recorded: %s: %s", type(model).__name__, type(why).__name__, first_line(why))
            recorded = False
    if not recorded:
        found = _exported(model, examples, overwritten, key)
    graph, tensors, positions = found
    positions |= {path: positions[name] for path, name in paths.items() if name in positions}
    return Exported(graph, tensors, positions, value, recorded)


def _recorded(
    model: nn.Module,
    examples: tuple[Tensor, ...],
    tensors: Mapping[str, Tensor],
    overwritten: set[str],
    output: Output,
) -> tuple[fx.Graph, dict[str, Tensor], dict[str, str]]:
    """The graph, its tensors and positions of a model that needs no symbols."""

    def start() -> Subject:
        empty = weightless(model, _computed(model))
        tapped = _Tapped(empty.eval(), notes := _Notes(overwritten), output)

        def run(*inputs: Tensor) -> Any:
            with _ByShape(norms=False):
                return tapped(*inputs)[0]

        return Subject(run, named_tensors(empty), notes.watch)

    with isolated(), as_in_export():
        recording = record(start, examples)
    tensors = {**tensors, **recording.constants}
    graph, nodes, names = written_down(recording, tensors)
    for node in list(graph.nodes):
        _as_torch_has_it(graph, node)
    positions = {path: nodes[value].name for path, value in recording.positions.items()}
    return graph, {name: tensors[name] for name in names}, positions


def _exported(
    model: nn.Module, examples: tuple[Tensor, ...], overwritten: set[str], output: Output
) -> tuple[fx.Graph, dict[str, Tensor], dict[str, str]]:
    """The same from torch.export."""
    program, taps = _program(model, examples, overwritten, output)
    graph, tensors, copies = _with_named_tensors(program, len(examples), type(model).__name__)
    positions = {}
    for path, node in taps.items():  # a value that is overwritten later was copied; the copy's source is meant
        positions[path] = (copies[node].args[0] if path in overwritten else copies[node]).name
    return graph, tensors, positions


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a caller's model, which itself is never run, since its forward may change its state.

    Raises
    ------
    TraceError
        If the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, _computed(model))
    except Exception as error:  # a model may hold anything
        raise TraceError(
            f"copy.deepcopy: {type(error).__name__}: {first_line(error)} (in {type(model).__name__}); netclone works "
            "on a copy of the model: take out what cannot be copied, such as tensors with a gradient that an earlier "
            "forward() kept in an attribute"
        ) from error


def _computed(model: nn.Module) -> dict[int, Any]:
    """A deepcopy memo for tensors that torch computed from others and that a module holds as attributes.

    ``nn.utils.weight_norm`` and ``nn.utils.prune`` keep such weights, as do modules that keep their last inputs.
    """
    held = [value for module in model.modules() for value in module.__dict__.values()]
    made = [value for value in held if isinstance(value, Tensor) and value.grad_fn is not None]
    return {id(value): value.detach().clone() for value in made}


def one_of(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first sample of each batch, copied, since a model may work in place on its input."""
    return tuple(example[:1].clone() for example in examples)


class _Taps:
    """The values that modules or nodes returned, by path (not a module's attribute, since export watches those)."""

    def __init__(self, overwritten: set[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self.versions: dict[str, tuple[Tensor, int]] = {}
        self.overwritten = overwritten

    def take(self, path: str, out: Tensor) -> None:
        """Record a value; only if a later in-place operator changes it is it copied, which costs as much as a layer."""
        with torch._C.DisableTorchFunction():  # without this, each check would go through all of export's modes
            version = None if out.is_inference() else out._version  # inference tensors do not count changes
        if version is not None and path not in self.overwritten:
            self.values[path] = out
            self.versions[path] = (out, version)
        else:
            self.overwritten.add(path)
            self.values[path] = out.clone()

    def hook(self, path: str) -> Any:
        """A forward hook that records what a module returns."""

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                self.take(path, out)

        return hook

    def newly_overwritten(self) -> bool:
        """Whether values that were not copied have changed since; they are copied from now on."""
        moved = {path for path, (out, version) in self.versions.items() if out._version != version}
        self.overwritten |= moved
        return bool(moved)


class _Notes(_Taps):
    """Tells of values as they come, before any operator can overwrite them."""

    note: Note

    def watch(self, note: Note) -> None:
        """Have a function told of each value."""
        self.note = note

    def take(self, path: str, out: Tensor) -> None:
        self.note(path, out, path in self.overwritten)


class _Tapped(nn.Module):
    """The logits of a model with the value of every module (or, for a symbolic graph, of every node)."""

    def __init__(self, model: nn.Module, taps: _Taps, output: Output) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        self.output = output
        if not isinstance(model, fx.GraphModule):
            for path, module in model.named_modules():
                if path:
                    module.register_forward_hook(self.taps.hook(path))

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        self.taps.values.clear()
        self.taps.versions.clear()
        if isinstance(self.model, fx.GraphModule):
            out = _TappedInterpreter(self.model, self.taps).run(*inputs)
        else:
            out = self.model(*inputs)
        return (picked(out, self.output), *self.taps.values.values())


class _TappedInterpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, taps: _Taps) -> None:
        super().__init__(module)
        self.taps = taps

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor) and n.op in ("call_module", "call_function", "call_method"):
            self.taps.take(n.name, out)
        return out


def _observed(
    model: nn.Module, examples: tuple[Tensor, ...], output: Output
) -> tuple[Tensor, Output, set[str], dict[str, Tensor]]:
    """The model's logits for the first example and their key, the positions overwritten later, and tensors' copies."""
    overwritten: set[str] = set()
    tapped = _Tapped(copied(model).eval(), _Taps(overwritten), None)
    tensors = named_tensors(tapped.model)
    with _refusals(model, examples), torch.no_grad():
        want = tapped.model(*one_of(examples))
        if isinstance(model, fx.GraphModule):  # its nodes are tapped by the interpreter only
            tapped(*one_of(examples))
    tapped.taps.newly_overwritten()
    key = chosen(want, output, type(model).__name__)
    return picked(want, key), key, overwritten, tensors


def _program(
    model: nn.Module, examples: tuple[Tensor, ...], overwritten: set[str], output: Output
) -> tuple[torch.export.ExportedProgram, dict[str, fx.Node]]:
    """The exported program, and the node of each position; every attempt uses a fresh copy of the model."""
    batch: Any = torch.export.Dim.DYNAMIC if len(examples) == 1 else torch.export.Dim("batch")
    while True:
        tapped = _Tapped(copied(model).eval(), _Taps(overwritten), output)
        with _refusals(model, examples), isolated(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
            with _ByShape():
                program = torch.export.export(
                    tapped,
                    tuple(example.clone() for example in examples),  # one tensor given twice would become one input
                    strict=False,
                    dynamic_shapes=(tuple({0: batch} for _ in examples),),
                )
        if not tapped.taps.newly_overwritten():
            break
    values: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    return program, dict(zip(tapped.taps.values, values[1:], strict=True))


@torch.library.custom_op("netclone::batch_norm", mutates_args=())
def _batch_norm(  # noqa: PLR0913 - torch's own signature
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Stands for a BatchNorm with running statistics during an export; the graph gets torch's own operator."""
    out: Tensor = torch.batch_norm(source, weight, bias, mean, variance, training, momentum, eps, cudnn_enabled)
    return out


@_batch_norm.register_fake
def _(source: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(source)


def _by_running_statistics(
    source: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, exported by its shape if it uses running statistics."""
    if mean is None or variance is None or training:
        return nn.functional.batch_norm(source, mean, variance, weight, bias, training, momentum, eps)
    out: Tensor = _batch_norm(source, weight, bias, mean, variance, False, momentum, eps, torch.backends.cudnn.enabled)
    return out


def _taken_along(source: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """``torch.take_along_dim``."""
    if dim is None:
        return source.flatten().gather(0, indices.flatten())

    def widened(tensor: Tensor, other: Tensor) -> Tensor:
        pairs = enumerate(zip(tensor.shape, other.shape, strict=True))
        return tensor.expand([b if a == 1 and axis != dim % source.dim() else a for axis, (a, b) in pairs])

    return widened(source, indices).gather(dim, widened(indices, source))


def _bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.bilinear``."""
    out = torch.einsum("...i,oij,...j->...o", first, weight, second)
    return out if bias is None else out + bias


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """``torch.cdist``."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _product_of(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.linalg.multi_dot``, from left to right."""
    return functools.reduce(torch.matmul, tensors)


_WITH_FREE_SIZES: dict[Any, Callable[..., Tensor]] = {  # for functions whose export would fix the batch size
    torch.take_along_dim: _taken_along,
    torch.Tensor.take_along_dim: _taken_along,
    nn.functional.bilinear: _bilinear,
    torch.cdist: _distances,
    torch.linalg.multi_dot: _product_of,
}


class _ByShape(TorchFunctionMode):
    """Export some operators by the shapes that they return; torch would derive these from their parts.

    For a recurrent operator torch would take minutes, since it goes through the sequence step by step. For BatchNorm
    it would take a quarter of an export's time.
    """

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        self.norms = norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recurrent = exported_by_shape(func, args)
        if recurrent is not None:
            func = recurrent
        elif func is nn.functional.batch_norm and self.norms:
            func = _by_running_statistics
        elif func in _WITH_FREE_SIZES:
            func = _WITH_FREE_SIZES[func]
        elif func == _DATA:  # which computes the same and is invisible to torch.export
            func = torch.Tensor.detach
        return func(*args, **(kwargs or {}))


def _as_torch_has_it(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an operator that was exported by its shapes with torch's own."""
    if node.target is torch.ops.netclone.batch_norm.default:
        node.target = torch.ops.aten.batch_norm.default
    else:
        as_torch_has_it(graph, node)


@contextlib.contextmanager
def _refusals(model: nn.Module, examples: tuple[Tensor, ...]) -> Iterator[None]:
    """Raise any error of the model or torch.export as a TraceError."""
    try:
        yield
    except Exception as error:
        raise TraceError(
            f"torch.export: {type(error).__name__}: {first_line(error)} (in {type(model).__name__})"
            + other_dtype(model, examples)
        ) from error


def other_dtype(model: nn.Module, examples: tuple[Tensor, ...]) -> str:
    """A hint for an error message if the model and the images have different floating dtypes; else empty."""
    theirs = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    given = {example.dtype for example in examples}
    if not theirs or given <= theirs:
        return ""
    seen, expected = (", ".join(sorted(map(str, dtypes))) for dtypes in (given, theirs))
    return f"; the images are {seen}, the model's parameters {expected}: bring one to the dtype of the other with .to()"


def _with_named_tensors(
    program: torch.export.ExportedProgram, inputs: int, model: str
) -> tuple[fx.Graph, dict[str, Tensor], dict[fx.Node, Any]]:
    """The program's graph, with parameters, buffers and constants as get_attr nodes under the model's own names.

    Also returns these tensors, and what became of every node: another node, or a tuple of nodes.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.constants, **program.state_dict}
    parameters = set(signature.inputs_to_parameters.values())
    tensors: dict[str, Tensor] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            full = names[node.name]
            short = full.removeprefix("model.")
            tensor = held[full]
            if full in parameters and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            tensors[short] = tensor
            copies[node] = graph.create_node("get_attr", short, name=node.name)
            copies[node].meta = _described(node)
        else:
            copies[node] = _written_out(graph, node, copies, program.graph_module, model)
    assert sum(node.op == "placeholder" for node in graph.nodes) == inputs
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    return graph, tensors, copies


def _written_out(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], owner: nn.Module, model: str) -> Any:
    """Copy a node into a graph; a part that runs without gradient or autocast is copied node by node."""
    if node.op == "get_attr":
        return getattr(owner, str(node.target))  # a subgraph that some operator runs
    args: Any = fx.node.map_arg(node.args, copies.__getitem__)
    if node.target is operator.getitem and isinstance(args[0], tuple):
        return args[0][args[1]]
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        new = graph.node_copy(node, copies.__getitem__)
        _as_torch_has_it(graph, new)
        new.meta = _described(node)
        return new
    part_at = _MODES.get(node.target)
    if part_at is None or (node.target is _AUTOCAST and args[2]):
        raise TraceError(
            f"torch.export: node '{node.name}' ({node.target}) of {model} runs a part of the model on a condition or "
            "under a mode such as autocast, which netclone cannot follow: take it out of forward(), and bring the "
            "model to one dtype with .to()"
        )
    part, given = args[part_at], iter(args[part_at + 1 :])
    inside: dict[fx.Node, Any] = {}
    *body, output = part.graph.nodes
    for inner in body:
        inside[inner] = next(given) if inner.op == "placeholder" else _written_out(graph, inner, inside, part, model)
    return tuple(fx.node.map_arg(output.args[0], inside.__getitem__))


def _described(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
