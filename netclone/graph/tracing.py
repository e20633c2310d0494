"""trace(model) -> GraphModule with shapes: the readable capture, used for targets."""

from __future__ import annotations

import copy
import difflib
import logging
import warnings
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

from netclone.errors import ArgumentError, LostInTrainingWarning, OutputError, PositionError, TraceError, first_line
from netclone.graph.batching import Sizes, sizes_at, why_no_batch, without_batch
from netclone.graph.capturing import FACTS, capture
from netclone.graph.describing import describe, described, facts_about
from netclone.graph.exporting import copied, other_dtype
from netclone.graph.images import images_fault, not_finite
from netclone.graph.isolation import isolated
from netclone.graph.outputs import Output, chosen, picked
from netclone.graph.training import differing
from netclone.runtime.entering import deterministic, entered

_log = logging.getLogger(__package__)
INPUT = "input"
"""The position before all layers: a clone there reads the images and contains the whole slim source."""


class _Shapes(fx.Interpreter):
    """Records the tensors that every node returns, like torch's ShapeProp, but without printing every failure."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        found: list[Any] = []
        map_aggregate(out, found.append)
        if any(isinstance(value, Tensor) for value in found):
            n.meta["tensor_meta"] = map_aggregate(out, _metadata)
        return out


def _metadata(value: Any) -> Any:
    return _extract_tensor_metadata(value) if isinstance(value, Tensor) else value


class _PositionTracer(fx.Tracer):
    """Symbolic tracer with timm's leaf registry that records which node every module path returned."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = tuple(get_notrace_modules())
        self.positions: dict[str, str] = {}
        self.not_tensors: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        """Create a node that is not called ``self``, which is the generated function's own argument."""
        name = "self_" if name is None and target == "self" else name
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if isinstance(out, fx.Proxy):
            self.positions[path] = self._newest(out.node).name
        else:
            self.not_tensors[path] = type(out).__name__
        return out

    def _newest(self, node: fx.Node) -> fx.Node:
        """The last node that worked in place on the value of ``node``, and so has its present value."""
        writers = [user for user in node.users if user.args[:1] == (node,) and self._works_in_place(user)]
        return self._newest(writers[-1]) if writers else node

    def _works_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self.root.get_submodule(str(node.target)), "inplace", False) is True
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


@entered()
def trace(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor] | None = None, *, output: Output = None
) -> fx.GraphModule:
    """Copy a model into a graph whose nodes know their shapes; the model is not changed.

    The model is traced symbolically, which keeps module paths and leaves the input size free. If that fails,
    ``torch.export`` is used. Either result is checked to compute the same bits as the model in eval mode. The graph
    also gets a timm model's descriptive attributes (``num_classes``, ``pretrained_cfg``, ...).

    Parameters
    ----------
    model
        Any module that takes one tensor ``(N, ...)``. A traced graph is copied.
    example_inputs
        One tensor ``(N, C, H, W)``, or a tuple of it. May be left out for models that record their input size:
        those of timm (``default_cfg``), and of transformers (``config.image_size``).
    output
        For a model that returns a tuple, dictionary or dataclass (a ``ModelOutput`` of transformers, for example): the
        key or index of its logits. None: what is called ``"logits"``, or else the only tensor, or the only ``(N, K)``.
        The graph returns the logits alone.

    Raises
    ------
    OutputError
        If it is not clear which part of what the model returns is the logits.
    TraceError
        If neither capture works; the message gives the reason of each.
    ArgumentError
        If no example was given and the model does not record its input size, or the model is spread over devices.

    Examples
    --------
    >>> import timm, netclone
    >>> model = timm.create_model("test_resnet", num_classes=4)
    >>> traced = netclone.trace(model)
    >>> netclone.position(traced, "layer2").name
    'layer2_0_act2'

    Reference: docs/adr/0001-two-captures.md.
    """
    check_one_device_and_dtype(model, "model")
    if isinstance(model, fx.GraphModule) and FACTS in model.meta:
        return copy.deepcopy(model)
    example = example_input(model, example_inputs)
    tracer = _PositionTracer()
    try:
        with deterministic():
            with torch.no_grad():
                want = copied(model).eval()(example.clone())
            output = chosen(want, output, type(model).__name__)
            want = picked(want, output)
            working = copied(model).eval()
            with isolated():
                graph = tracer.trace(working)
            _return(graph, output)
            traced = fx.GraphModule(working, graph, type(model).__name__)
            _restore_tensors(traced, model)
            with torch.no_grad():
                got = _Shapes(traced).run(example.clone())
                one = Sizes(traced)
                one.run(example[:1].clone())
            _restore_tensors(traced, model)
        traced.meta[FACTS] = {
            "positions": tracer.positions,
            "not_tensors": tracer.not_tensors,
            "without_batch": without_batch(one.seen, _shapes(traced)),
            "example": example,
        }
    except (OutputError, ArgumentError):
        raise
    except Exception as symbolic:  # any model code may run here; export is the second try
        _log.debug("%s: no symbolic trace (%s); trying torch.export", type(model).__name__, _named(symbolic))
        try:
            traced = capture(model, example, output=output)
        except TraceError as exported:
            raise TraceError(
                f"neither capture takes {type(model).__name__}.\n  symbolic trace: {_named(symbolic)}\n"
                f"  {_named(exported)}" + _way_out(model, example)
            ) from exported  # which was raised while the other was handled: a traceback shows both
    else:
        if not (isinstance(got, Tensor) and same_bits(got, want)):
            raise TraceError(
                f"the traced graph of {type(model).__name__} does not compute what the model computes on the example "
                "input; a forward hook on the model, randomness in eval mode or state changed by forward() does that: "
                "remove it before tracing"
            )
        _warn_of_what_is_lost(model, graph, output)
        _log.debug(
            "%s: traced symbolically; %d nodes, %d positions",
            type(model).__name__,
            len(graph.nodes),
            len(tracer.positions),
        )
    traced.meta[FACTS]["derived"] = frozenset(dict(model.named_buffers())) - model.state_dict().keys()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in traced.named_modules():
        module.training = modes.get(name, module.training)
    describe(traced, described(model))
    return traced


def _return(graph: fx.Graph, output: Output) -> None:
    """Let a graph return only one part of what it returns."""
    node = next(node for node in graph.nodes if node.op == "output")
    node.args = (picked(node.args[0], output),)


def _warn_of_what_is_lost(model: nn.Module, evaluated: fx.Graph, output: Output) -> None:
    """Warn of modules that do more in train mode than the graph, which was traced in eval mode."""
    with deterministic():
        try:
            with isolated():
                trained = _PositionTracer().trace(copied(model).train())
            _return(trained, output)
        except Exception:  # any model code may run here, and the graph does not depend on its train mode
            lost: tuple[str, ...] = ("",)
        else:
            lost = differing(evaluated, trained)
    if lost:
        named = [f"'{path}'" if path else "the model itself" for path in lost]
        listed = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        warnings.warn(
            f"{type(model).__name__} is traced in eval mode, and in train mode does more: {listed}. What forward() "
            "does only there, such as functional dropout, stochastic depth and auxiliary outputs, is not in the "
            "graph, also after a clone is removed: use modules (nn.Dropout) for it, or train the original",
            LostInTrainingWarning,
            stacklevel=2,
        )


def _way_out(model: nn.Module, example: Tensor) -> str:
    """A hint for a model that neither capture takes, unless the error itself says what to do."""
    if other_dtype(model, (example,)) or isinstance(model, torch.jit.ScriptModule):
        return ""
    return (
        "\nMove control flow that depends on data out of forward(), or register the module that holds it as a "
        "leaf with timm.layers.register_notrace_module."
    )


def _shapes(traced: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The shapes of a symbolic graph's nodes on the example."""
    noted = {node.name: node.meta.get("tensor_meta") for node in traced.graph.nodes}
    return {name: tuple(meta.shape) for name, meta in noted.items() if isinstance(meta, TensorMetadata)}


def _restore_tensors(traced: fx.GraphModule, model: nn.Module) -> None:
    """Restore the model's own values in a graph, since tracing and running it may have changed its buffers."""
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
            if name not in theirs or tensor.is_meta or torch.equal(tensor, theirs[name]):
                continue
            if tensor.shape == theirs[name].shape:
                tensor.copy_(theirs[name])
            else:  # a buffer of a leaf module that forward() creates anew for each input size
                path, _, leaf = name.rpartition(".")
                setattr(traced.get_submodule(path), leaf, theirs[name].detach().clone())


def position(traced: fx.GraphModule, at: str) -> fx.Node:
    """The node whose output is the position ``at``: a module path (``"layer2.0"``), a node name, or ``"input"``.

    Raises
    ------
    PositionError
        If there is no such position (the closest names are suggested), its output is not one tensor, or the tensor's
        first axis is not the batch (frames or windows are folded into it, or it is a sequence).

    Examples
    --------
    >>> import timm, netclone
    >>> traced = netclone.trace(timm.create_model("test_resnet", num_classes=4))
    >>> netclone.position(traced, "layer9")
    Traceback (most recent call last):
        ...
    netclone.errors.PositionError: no position 'layer9' in ResNet; did you mean 'layer4', 'layer3' or 'layer2'?
    """
    facts = traced.meta.get(FACTS, {})
    nodes = _values(traced)
    paths = {path: name for path, name in facts.get("positions", {}).items() if name in nodes}
    model = type(traced).__name__
    if at == INPUT:  # even if a module has that name, whose node can still be named
        images: fx.Node = next(node for node in traced.graph.nodes if node.op == "placeholder")
        return images
    if at in facts.get("not_tensors", {}):
        raise PositionError(
            f"position '{at}' of {model} returns {facts['not_tensors'][at]}, not one tensor: "
            "choose a module inside it, or one that follows it"
        )
    if at not in paths and at not in nodes:
        near = difflib.get_close_matches(str(at), [*paths, *nodes], n=3, cutoff=0.3)
        listed = " or ".join(f"'{n}'" for n in near[-2:]) if near else ""
        if len(near) == 3:
            listed = f"'{near[0]}', {listed}"
        hint = f"did you mean {listed}?" if near else f"positions are module paths such as {sorted(paths)[:3]}"
        raise PositionError(f"no position '{at}' in {model}; {hint}")
    return _checked(traced, at, nodes[paths.get(at, at)])


def node_named(traced: fx.GraphModule, name: str) -> fx.Node:
    """As :func:`position`, but a node of that name comes first: what a clone was fitted to read is told by its node.

    A module that is called twice is the position of its last call, and its name is that of the node of its first.

    Raises
    ------
    PositionError
        As for :func:`position`.
    """
    found = _values(traced).get(name)
    return position(traced, name) if found is None else _checked(traced, name, found)


def _values(traced: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes that may be positions, by name."""
    return {node.name: node for node in traced.graph.nodes if node.op not in ("output", "get_attr")}


def _checked(traced: fx.GraphModule, at: str, node: fx.Node) -> fx.Node:
    model = type(traced).__name__
    if shape_of(node) is None:
        raise PositionError(
            f"position '{at}' (node '{node.name}') of {model} is not one tensor: choose a node that uses it, such as "
            + ", ".join(f"'{user.name}'" for user in list(node.users)[:3])
        )
    if (why := no_batch(traced, node)) is not None:
        raise PositionError(
            f"position '{at}' (node '{node.name}') of {model} cannot be cut or read: {why}; choose a position "
            "before or behind the part of the network with this layout"
        )
    return node


def no_batch(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a node's tensor is not ``(N, ...)`` for every batch size N; None if it is."""
    return why_no_batch(node, graph_module.meta.get(FACTS, {}).get("without_batch", {}))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's output without the batch dimension, or None if it is not one tensor."""
    meta = node.meta.get("tensor_meta")
    if isinstance(meta, TensorMetadata):
        return tuple(int(size) for size in meta.shape[1:])
    value = node.meta.get("val")
    return sizes_at(value, 2)[1:] if isinstance(value, Tensor) else None


def logits_node(traced: fx.GraphModule) -> fx.Node:
    """The node that computes the model's one output, a tensor ``(N, classes)``.

    Raises
    ------
    OutputError
        If the model returns a tuple, a dict, a tensor of another rank, or one whose first axis is not the batch.
    """
    output = next(node for node in traced.graph.nodes if node.op == "output")
    value = output.args[0]
    model = type(traced).__name__
    if not isinstance(value, fx.Node) or shape_of(value) is None:
        kind = type(value).__name__ if not isinstance(value, fx.Node) else "no single tensor"
        raise OutputError(
            f"node 'output' of {model} returns {kind}; expected one tensor (N, classes): wrap the model in a module "
            "that returns its logits"
        )
    shape = shape_of(value)
    if shape is None or len(shape) != 1:
        raise OutputError(f"node '{value.name}' of {model} returns shape (N, {shape}); expected logits (N, classes)")
    if (why := no_batch(traced, value)) is not None:
        raise OutputError(
            f"node '{value.name}' of {model} gives the logits, but {why}; expected (N, classes) for every N: name the "
            "axes to drop instead of .squeeze(), which drops the batch of one image too, as in .flatten(1)"
        )
    return value


def example_input(model: nn.Module, example_inputs: Tensor | tuple[Tensor] | None = None) -> Tensor:
    """One example batch ``(2, ...)``: the caller's first two images, or one that fits the model's ``default_cfg``."""
    if isinstance(example_inputs, (tuple, list)):
        if len(example_inputs) != 1:
            raise ArgumentError(f"example_inputs: netclone takes models of one input, got {len(example_inputs)} inputs")
        example_inputs = example_inputs[0]
    if example_inputs is not None:
        if not isinstance(example_inputs, Tensor):
            raise ArgumentError(
                f"example_inputs: got {type(example_inputs).__name__}; expected one batch of images, a tensor such as "
                "torch.randn(2, 3, 224, 224)"
            )
        if fault := images_fault(example_inputs, values=False) or not_finite(example_inputs):
            raise ArgumentError(f"example_inputs: {fault}")
        if example_inputs.dim() < 2 or len(example_inputs) == 0:
            raise ArgumentError(f"example_inputs: expected a batch (N, ...), got shape {tuple(example_inputs.shape)}")
        few = example_inputs[:2].detach().clone()
        return few if len(few) == 2 else torch.cat([few, few])
    if isinstance(model, fx.GraphModule) and FACTS in model.meta:
        known: Tensor = model.meta[FACTS]["example"]
        return known
    size = facts_about(model).get("input_size")
    if size is None:
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} does not record its input size; pass one batch, such as "
            "example_inputs=torch.randn(2, 3, 224, 224)"
        )
    parameter = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *size, generator=generator).to(parameter.device, parameter.dtype)


def check_one_device_and_dtype(model: nn.Module, what: str) -> None:
    """Raise if a model's parameters are on several devices or in several floating dtypes."""
    first: tuple[str, Tensor] | None = None
    for name, parameter in model.named_parameters():
        if first is None:
            first = name, parameter
        elif (parameter.device, parameter.dtype) != (first[1].device, first[1].dtype):
            raise ArgumentError(
                f"{what}: parameter '{name}' is {parameter.dtype} on {parameter.device}, '{first[0]}' is "
                f"{first[1].dtype} on {first[1].device}; bring the model to one device and dtype with .to()"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit (NaN equals NaN); on device meta only shape and dtype count."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.is_meta == b.is_meta
    return alike and (a.is_meta or bool(((a == b) | (a.isnan() & b.isnan())).all()))


def _named(error: BaseException) -> str:
    """An error's type and first line."""
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
