"""record(model, examples) -> Recording: the operators that a model calls, from two runs on tensors without data.

This gives what torch.export gives, in a fraction of its time, since it computes with numbers where torch.export
computes with symbols. The two runs have different batch sizes, so a comparison shows what depends on them. The sizes
that the model reads tell when it decides by them (:mod:`netclone.graph.sizes`). Everything else is left to torch.export
(:class:`Unrecorded`): decisions by values, tensors that are not the model's, writing into the model's own, autocast,
and sizes that are no multiple of the batch size.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

from netclone.graph.batching import BATCH
from netclone.graph.shapes import BY_SHAPE
from netclone.graph.sizes import SizesRead, Undecided

aten = torch.ops.aten

_FEW = 1009  # the first run's batch size; a prime, like that of the second
_MOST = 20_000  # operators in a model

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Unrecorded(Exception):
    """Something that only torch.export can capture, or refuse; the message says what."""


@dataclass(frozen=True)
class Value:
    """A tensor of a recording: an input, a tensor of the model, or what a call returned (``part`` of several)."""

    kind: str  # input, tensor, call
    of: int | str
    part: int | None = None


@dataclass(frozen=True)
class Batches:
    """A size of ``times`` batches."""

    times: int


@dataclass
class Call:
    """A call of an operator, with :class:`Value` for tensors, and what it returned."""

    function: Any
    args: Any
    kwargs: Any
    returned: Tensor | Sequence[Tensor]


class Recording:
    """The calls of one run at batch size ``batch``.

    ``constants`` are tensors that the model makes from numbers, by name.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self.calls: list[Call] = []
        self.constants: dict[str, Tensor] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.output = Value("input", 0)
        self.positions: dict[str, Value] = {}

    def read(self) -> set[int | str]:
        """The names of the tensors of the model that are read."""
        found: list[Value] = [self.output, *self.positions.values()]
        for call in self.calls:
            found += _values((call.args, call.kwargs))
        return {value.of for value in found if value.kind == "tensor"}


def _values(value: Any) -> list[Value]:
    if isinstance(value, Value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in _values(item)] if isinstance(value, (list, tuple)) else []


Note = Callable[[str, Tensor, bool], None]


@dataclass(frozen=True)
class Subject:
    """A model without data.

    ``run`` calls it, and ``weights`` are its tensors on device meta, by name. ``watch`` is given a function that is to
    be called with the path and value of each position, and whether an in-place operator overwrites that value later.
    """

    run: Callable[..., Any]
    weights: Mapping[str, Tensor]
    watch: Callable[[Note], None]


def record(start: Callable[[], Subject], examples: Sequence[Tensor]) -> Recording:
    """Record a model twice, and return the second run, with :class:`Batches` for the sizes that follow the batch size.

    Parameters
    ----------
    start
        Makes the model; called again if it cannot run twice, as one that keeps tensors from its first run.
    examples
        One batch per input; only their shapes, dtypes and device count.

    Raises
    ------
    Unrecorded
        If the runs differ in more than sizes that are multiples of the batch size, or one cannot be recorded.
    """
    subject = start()
    first = _recorded(subject, examples, _FEW)
    try:
        second = _recorded(subject, examples, BATCH)
    except Unrecorded:
        second = _recorded(start(), examples, BATCH)
    _differ_in_sizes(first, second)
    return second


def _differ_in_sizes(first: Recording, second: Recording) -> None:
    """Write the sizes that differ between two runs as :class:`Batches` in the second."""
    if len(first.calls) != len(second.calls) or first.output != second.output or first.positions != second.positions:
        raise Unrecorded("what it calls depends on the batch size")
    if first.constants.keys() != second.constants.keys() or not all(
        torch.equal(tensor, second.constants[name]) for name, tensor in first.constants.items()
    ):
        raise Unrecorded("its constants depend on the batch size")
    for one, other in zip(first.calls, second.calls, strict=True):
        if one.function is not other.function:
            raise Unrecorded("what it calls depends on the batch size")
        other.args, other.kwargs = _joined(one.args, other.args), _joined(one.kwargs, other.kwargs)
        for small, large in zip(_listed(one.returned), _listed(other.returned), strict=True):
            if small.dtype != large.dtype:
                raise Unrecorded("a dtype depends on the batch size")
            _joined(tuple(small.shape), tuple(large.shape))


def _listed(returned: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [returned] if isinstance(returned, Tensor) else returned


def _joined(one: Any, other: Any) -> Any:
    """The argument of both runs: sizes that differ have to be the same multiple of the batch size."""
    if isinstance(one, (list, tuple)):
        if type(one) is not type(other) or len(one) != len(other):
            raise Unrecorded("the number of arguments depends on the batch size")
        return type(one)(_joined(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            raise Unrecorded("the arguments depend on the batch size")
        return {key: _joined(value, other[key]) for key, value in one.items()}
    if type(one) is type(other) and one == other:
        return one
    if type(one) is int and type(other) is int and one % _FEW == 0 and one // _FEW * BATCH == other:
        return Batches(one // _FEW)
    if isinstance(one, float) and isinstance(other, float) and one != one and other != other:
        return one
    raise Unrecorded(f"{other!r} for {one!r} is no multiple of the batch size")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, buffers and other tensors by name; one of several names is listed under each."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                named[f"{path}.{name}" if path else name] = value
    return named


def weightless(model: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """A copy of a model whose tensors are on device meta. ``memo`` is deepcopy's, for some of them."""
    known = dict(memo)
    for name, tensor in named_tensors(model).items():
        if type(tensor) not in _PLAIN:
            raise Unrecorded(f"{name} is a {type(tensor).__name__}")
        if id(tensor) in known and known[id(tensor)].is_meta:
            continue
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        known[id(tensor)] = empty
    return copy.deepcopy(model, known)


def written_down(
    recording: Recording, tensors: Mapping[str, Tensor]
) -> tuple[fx.Graph, dict[Value, fx.Node], list[str]]:
    """A recording as a graph, the node of each value, and the names of the tensors that it reads."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes: dict[Value, fx.Node] = {}
    device = recording.device

    def described(value: Tensor) -> dict[str, Any]:
        return {"val": FakeTensor(mode, value.detach(), device)}

    read = recording.read()
    names = [name for name in tensors if name in read]
    for name in names:
        tensor = tensors[name]
        kind = "c" if name in recording.constants else "p" if isinstance(tensor, nn.Parameter) else "b"
        node = graph.create_node("get_attr", name, name=f"{kind}_model_{name}".replace(".", "_"))
        node.meta = described(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
        nodes[Value("tensor", name)] = node
    for index, tensor in enumerate(recording.inputs):
        nodes[Value("input", index)] = node = graph.placeholder(f"inputs_{index}")
        node.meta = described(tensor)
    first = node
    for number, call in enumerate(recording.calls):
        args, kwargs = _with_nodes(call.args, nodes), _with_nodes(call.kwargs, nodes)
        name = graph._target_to_str(call.function.overloadpacket.__name__)
        node = graph.create_node("call_function", call.function, (), {}, name=name)
        node.args, node.kwargs = args, kwargs
        nodes[Value("call", number)] = node
        if isinstance(call.returned, Tensor):
            node.meta = described(call.returned)
            continue
        node.meta = {"val": [described(item)["val"] for item in call.returned]}
        for index, item in enumerate(call.returned):
            nodes[Value("call", number, index)] = part = graph.call_function(operator.getitem, (node, index))
            part.meta = described(item)
    graph.output(nodes[recording.output])
    _write_sizes(graph, node_of_input=first)
    return graph, nodes, names


def _with_nodes(value: Any, nodes: Mapping[Value, fx.Node]) -> Any:
    if isinstance(value, Value):
        return nodes[value]
    if isinstance(value, (list, tuple)):
        return type(value)(_with_nodes(item, nodes) for item in value)
    if isinstance(value, dict):
        return {key: _with_nodes(item, nodes) for key, item in value.items()}
    return value


def _write_sizes(graph: fx.Graph, node_of_input: fx.Node) -> None:
    """Put nodes in place of :class:`Batches`: the first input's size, and products of it before the first reader."""
    sizes: dict[int, fx.Node] = {}

    def size_of(value: Any, reader: fx.Node) -> Any:
        if isinstance(value, Batches):
            if not sizes:
                with graph.inserting_after(node_of_input):
                    sizes[1] = graph.call_function(aten.sym_size.int, (node_of_input, 0))
                sizes[1].meta = {"val": BATCH}
            if value.times not in sizes:
                with graph.inserting_before(reader):
                    sizes[value.times] = made = graph.call_function(operator.mul, (value.times, sizes[1]))
                made.meta = {"val": value.times * BATCH}
            return sizes[value.times]
        if isinstance(value, (list, tuple)):
            return type(value)(size_of(item, reader) for item in value)
        if isinstance(value, dict):
            return {key: size_of(item, reader) for key, item in value.items()}
        return value

    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args, node.kwargs = size_of(node.args, node), size_of(node.kwargs, node)


def _recorded(subject: Subject, examples: Sequence[Tensor], batch: int) -> Recording:
    device = examples[0].device
    recording = Recording(batch, device)
    recording.inputs = tuple(
        torch.empty((batch, *example.shape[1:]), dtype=example.dtype, device="meta") for example in examples
    )
    recorder = _Recorder(recording, device)
    for name, tensor in subject.weights.items():
        recorder.know(tensor, Value("tensor", name))
    for index, tensor in enumerate(recording.inputs):
        recorder.know(tensor, Value("input", index))

    kept: dict[str, Tensor] = {}

    def note(path: str, value: Tensor, overwritten: bool) -> None:
        recording.positions[path] = recorder.value_of(value)
        kept.pop(path, None)
        if not overwritten:
            kept[path] = value

    subject.watch(note)
    with enable_python_dispatcher(), SizesRead(batch, device), recorder:
        try:
            out = subject.run(*recording.inputs)
        except Undecided as why:
            raise Unrecorded(str(why)) from why
    if recorder.refused:
        raise Unrecorded(recorder.refused)
    if not isinstance(out, Tensor):
        raise Unrecorded("it does not return a tensor")
    recording.output = recorder.value_of(out)
    recording.positions |= {path: recorder.value_of(value) for path, value in kept.items()}
    return recording


class _Recorder(ProxyTorchDispatchMode):
    """Writes down the operators that are called, whole, before torch takes them apart.

    Only torch's own two modes may do so; this one takes the place of that which records for torch.export.
    """

    def __init__(self, recording: Recording, device: torch.device) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)
        self.recording = recording
        self.device = device
        self.known: dict[int, tuple[Tensor, Value]] = {}  # the tensors are held, so that ids stay unique
        self.made: dict[int, tuple[Tensor, Value]] = {}  # from numbers alone, by memory: torch gives a copy of these
        self.refused = ""

    def __enter__(self) -> Any:
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *raised: Any) -> Any:
        return TorchDispatchMode.__exit__(self, *raised)

    def know(self, tensor: Tensor, value: Value) -> None:
        self.known[id(tensor)] = tensor, value

    def value_of(self, tensor: Tensor) -> Value:
        if id(tensor) not in self.known:
            made = self.made.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None
            if made is None or made[0].shape != tensor.shape:
                self.refuse("it reads a tensor that is not its own")
            self.know(tensor, made[1])
        return self.known[id(tensor)][1]

    def refuse(self, why: str) -> NoReturn:
        """Give up; said again at the end, in case the model catches the error."""
        self.refused = self.refused or why
        raise Unrecorded(why)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recording, kwargs = self.recording, kwargs or {}
        if len(recording.calls) >= _MOST:
            self.refuse("it calls too many operators")
        if torch.Tag.data_dependent_output in func.tags:
            self.refuse(f"{func} depends on values")
        if torch.is_autocast_enabled(self.device.type):
            self.refuse("autocast")
        if func is aten.lift_fresh.default:
            func, args = aten.lift_fresh_copy.default, (self.constant(args[0]),)
        written = self.written(args), self.written(kwargs)
        if func._schema.is_mutable and any(self.is_own(tensor) for tensor in _changed(func, args, kwargs)):
            self.refuse(f"{func} writes into a tensor of the model")
        returned = self.computed(func, args, kwargs)
        number = len(recording.calls)
        if isinstance(returned, Tensor):
            self.know(returned, Value("call", number))
            if not any(isinstance(value, Tensor) for value in args):
                self.made[returned.untyped_storage()._cdata] = returned, Value("call", number)
        else:
            for index, item in enumerate(returned):
                self.know(item, Value("call", number, index))
        recording.calls.append(Call(func, *written, returned))
        return returned

    def computed(self, func: Any, args: Any, kwargs: Any) -> Tensor | Sequence[Tensor]:
        """What an operator returns for tensors without data."""
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisablePythonDispatcher():
            returned = BY_SHAPE[func](*args, **kwargs) if func in BY_SHAPE else None
            if returned is None:
                returned = func(*self.runnable(args), **self.on_meta(func, args, self.runnable(kwargs)))
        tensors: Any = [returned] if isinstance(returned, Tensor) else returned
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) and t.is_meta for t in tensors):
            self.refuse(f"{func} returns no tensor without data")
        if len(tensors) >= self.recording.batch:
            self.refuse("it takes a batch apart")
        return returned

    def constant(self, made: Tensor) -> Tensor:
        """The stand-in for a tensor that was made from numbers."""
        if made.device.type == "meta":
            self.refuse("a constant without data")
        name = f"lifted_tensor_{len(self.recording.constants)}"
        self.recording.constants[name] = made.detach().clone()
        empty = made.new_empty(made.shape, device="meta")
        self.know(empty, Value("tensor", name))
        return empty

    def written(self, value: Any) -> Any:
        """Arguments with values in place of tensors."""
        kind = type(value)
        if kind is int or kind is float or kind is bool or value is None:
            return value
        if isinstance(value, Tensor):
            return self.value_of(value)
        if kind is tuple or kind is list:
            return kind(map(self.written, value))
        if kind is dict:
            return {key: self.written(item) for key, item in value.items()}
        if kind is torch.Generator:
            self.refuse("it draws from a generator")
        return value

    def runnable(self, value: Any) -> Any:
        """Arguments with device meta in place of the model's."""
        kind = type(value)
        if kind is torch.device:
            if value.type != self.device.type:
                self.refuse(f"it works on {value} too")
            return torch.device("meta")
        if kind is tuple or kind is list:
            return kind(map(self.runnable, value))
        if kind is dict:
            return {key: self.runnable(item) for key, item in value.items()}
        return value

    def on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Keyword arguments, with device meta for an operator that would choose one by itself."""
        takes = any(argument.name == "device" for argument in func._schema.arguments)
        if not takes or kwargs.get("device") is not None or any(isinstance(value, Tensor) for value in args):
            return kwargs
        return {**kwargs, "device": torch.device("meta")}

    def is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the model's, or shares its memory."""
        value = self.value_of(tensor)
        while value.kind == "call" and isinstance(value.of, int):
            call = self.recording.calls[value.of]
            if not _returns_memory(call.function) or not isinstance(call.args[0], Value):
                return False
            value = call.args[0]
        return value.kind == "tensor"


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (item for item in (value if isinstance(value, (list, tuple)) else [value]) if item is not None)


def _returns_memory(func: Any) -> bool:
    return any(argument.alias_info is not None for argument in func._schema.arguments)
