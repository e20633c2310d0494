"""capture(model) -> operator graph: the exact capture, used for sources and for the parts of a clone.

The graph has one placeholder per input, ``get_attr`` for tensors under their own names, ``call_function`` on aten
operators, and one tensor out. Operators without a rule are decomposed into those that have one, if that is possible;
nothing else is. Nodes that serve training or bookkeeping are removed, and in-place operators become functional. Values
that depend on no input are evaluated where an operator needs a plain tensor.
"""

from __future__ import annotations

import copy
import hashlib
import keyword
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.errors import TraceError, first_line
from netclone.graph.batching import is_free
from netclone.graph.calls import arguments, call
from netclone.graph.dumping import dumper
from netclone.graph.exporting import Exported, export, one_of
from netclone.graph.functionalizing import make_functional
from netclone.graph.operators import WEIGHTS, kind_of
from netclone.graph.outputs import Output
from netclone.graph.spelling import spell
from netclone.graph.unstacking import unstack
from netclone.runtime.entering import deterministic

_log = logging.getLogger(__package__)
_OF_MODULES = frozenset(dir(nn.Module()))  # tensors cannot have the names of attributes that exist already
_OF_GRAPHS = frozenset(dir(fx.GraphModule({}, fx.Graph())))
FACTS = "netclone"  # key in GraphModule.meta: positions, example
aten = torch.ops.aten

_FIRST_ARGUMENT = {  # operators that return their first argument in an eval-mode graph
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.dropout_.default,
}
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def is_captured(model: nn.Module) -> bool:
    """Whether a model is an operator graph made by :func:`capture`."""
    return isinstance(model, fx.GraphModule) and bool(model.meta.get(FACTS, {}).get("operators"))


@deterministic()  # the same random numbers for both runs, for a model that draws some
def capture(model: nn.Module, *examples: Tensor, output: Output = None) -> fx.GraphModule:
    """Copy a model into an operator graph with a free batch size; the model is not changed.

    A parameter with two names stays one tensor, under one of them. Views of one memory become separate tensors. With
    ``NETCLONE_DUMP=FOLDER`` in the environment, the graph is written there as text before and after each pass.

    Parameters
    ----------
    model
        A module that takes ``len(examples)`` tensors ``(N, ...)`` and returns one tensor, or something that
        holds it. A symbolic graph keeps its node names as positions. An operator graph is copied.
    examples
        One batch of at least two per input.
    output
        As for :func:`netclone.trace`.

    Raises
    ------
    TraceError
        If ``torch.export`` fails on the model, or fixes its batch size.
    OutputError
        If it is not clear which tensor of those that the model returns is meant.

    Reference: docs/adr/0001-two-captures.md.
    """
    if is_captured(model):
        assert isinstance(model, fx.GraphModule)
        return copy.deepcopy(model)
    paths = model.meta.get(FACTS, {}).get("positions", {}) if isinstance(model, fx.GraphModule) else {}
    exported = export(model, examples, paths, output=output)
    try:
        return _captured(model, examples, exported)
    except Exception as why:  # torch.export can do it, or says why not
        if not exported.recorded:
            raise
        _log.debug("%s: exported after all: %s: %s", type(model).__name__, type(why).__name__, first_line(why))
    return _captured(model, examples, export(model, examples, paths, recorded=False, output=output))


def _captured(model: nn.Module, examples: tuple[Tensor, ...], exported: Exported) -> fx.GraphModule:
    """The operator graph of an export."""
    root, graph = nn.Module(), exported.graph
    names = _names(exported.tensors)
    for name, tensor in _untied(exported.tensors).items():
        set_tensor(root, names[name], tensor)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names[str(node.target)]
    dump = dumper(type(model).__name__)
    dump(graph, "exported")
    make_functional(graph, _FIRST_ARGUMENT, type(model).__name__)
    dump(graph, "made-functional")
    moved = spell(graph)
    _name_squeezed_axes(graph)
    dump(graph, "spelled")
    moved |= _drop_bookkeeping(graph)
    unstack(graph)
    dump(graph, "without-bookkeeping")
    folded = _fold_constants(root, graph)
    graph.eliminate_dead_code()
    dump(graph, "folded")
    _log.debug(
        "%s: %s; %d nodes, folded constants: %s",
        type(model).__name__,
        "recorded" if exported.recorded else "exported",
        len(graph.nodes),
        ", ".join(folded) or "none",
    )
    alive = {node.name for node in graph.nodes}
    positions = {path: _follow(name, moved) for path, name in exported.positions.items()}
    graph.lint()
    graph_module = fx.GraphModule(root, graph, "OperatorGraph")  # with the tensors that are read
    graph_module.meta = {
        FACTS: {
            "positions": {path: name for path, name in positions.items() if name in alive},
            "not_tensors": {},
            "example": examples[0],
            "operators": True,
        }
    }
    _check_same_function(graph_module.eval(), type(model).__name__, examples, exported.value)
    return graph_module


def _check_same_function(graph_module: fx.GraphModule, model: str, examples: tuple[Tensor, ...], want: Tensor) -> None:
    """Raise unless graph and model agree on one example, up to rounding (on device meta: in shape)."""
    with torch.no_grad():
        got = graph_module(*one_of(examples))
    if got.is_meta and got.numel() == want.numel():
        return
    if got.numel() == want.numel():  # for one image, .squeeze() drops the batch in the model, but not in the graph
        want = want.reshape(got.shape)
    scale = float(want.nan_to_num(0, 0, 0).abs().max()) if want.numel() else 0.0
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
        raise TraceError(
            f"torch.export: the captured graph of {model} differs from the model by "
            f"{float((got - want).abs().max()):.1e} on the example input; forward hooks, randomness in eval mode or "
            "state changed by forward() cause this: remove them before capturing"
        )


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, each with its own memory, so that slicing or masking one never changes another."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        if memory and memory in seen:
            copied = tensor.detach().clone()
            tensor = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        seen.add(memory)
        own[name] = tensor
    return own


def _names(tensors: Iterable[str]) -> dict[str, str]:
    """A name for each tensor that is valid in code and files; its own if that is valid.

    A model's modules may have any names: ``1x1``, ``conv 1``, ``class``, ``self``, or that of an attribute of every
    module.
    """
    prefixes: dict[str, str] = {"": ""}
    taken: set[str] = set()
    for name in tensors:  # names that can stay come first, so that no other name takes their place
        taken |= {prefix for prefix in _prefixes(name) if _fit(prefix) == prefix.rpartition(".")[2]}
    found: dict[str, str] = {}
    for name in tensors:
        for prefix in _prefixes(name):
            if prefix in prefixes:
                continue
            above, part = prefixes[prefix.rpartition(".")[0]], _fit(prefix)
            whole = f"{above}.{part}" if above else part
            while whole != prefix and whole in taken:
                whole += "_"
            taken.add(whole)
            prefixes[prefix] = whole
        found[name] = prefixes[name]
    return found


def _prefixes(name: str) -> list[str]:
    """The owners of a dotted name from the outside in, and the name itself."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _fit(name: str) -> str:
    """The last part of a name made valid in code: digits, or an ASCII identifier that is not a module's attribute."""
    above, _, part = name.rpartition(".")
    if part.isascii() and part.isdigit():
        return part
    plain = re.sub(r"[^\w-]", "_", part, flags=re.ASCII)
    if not plain.replace("-", "_").isidentifier() or plain.startswith("__"):
        plain = f"n_{plain}"
    reserved = keyword.iskeyword(plain) or plain == "self" or plain in (_OF_MODULES if above else _OF_GRAPHS)
    return f"{plain}_" if reserved else plain


def fingerprint(graph_module: fx.GraphModule) -> str:
    """Hash of a graph's structure (operators, modules, tensor names and shapes, no values); the same in any process."""
    digest = hashlib.sha256()
    for node in graph_module.graph.nodes:
        target = node.target
        if not isinstance(target, (str, torch._ops.OpOverload)):  # the text of a function contains its address
            target = f"{target.__module__}.{target.__qualname__}"
        digest.update(f"{node.op}:{target}".encode())
        if node.op == "get_attr":
            digest.update(str(tuple(tensor_at(graph_module, str(target)).shape)).encode())
        elif node.op == "call_module":
            shapes = [tuple(tensor.shape) for tensor in graph_module.get_submodule(str(target)).parameters()]
            digest.update(str(shapes).encode())
    return digest.hexdigest()


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with a dotted name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter or buffer under a dotted name; creates missing containers."""
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else []:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def _name_squeezed_axes(graph: fx.Graph) -> None:
    """Let a squeeze drop only the axes that have size one at every batch size, and never the batch."""
    for node in graph.nodes:
        if node.target not in _SQUEEZES:
            continue
        before = node.args[0].meta["val"]
        asked = arguments(node)[1] if len(node.args) > 1 else list(range(before.dim()))
        axes = [axis % before.dim() for axis in (asked if isinstance(asked, (list, tuple)) else [asked])]
        node.target = aten.squeeze.dims
        node.args = (node.args[0], [axis for axis in axes if not is_free(before.shape[axis])])


def _drop_bookkeeping(graph: fx.Graph) -> dict[str, str]:
    """Drop nodes that return their argument; returns their names with those of the nodes that replace them."""
    moved: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
        elif isinstance(source, fx.Node) and (node.target in _FIRST_ARGUMENT or _keeps_value(node, source)):
            moved[node.name] = source.name
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return moved


def _keeps_value(node: fx.Node, source: fx.Node) -> bool:
    """Casts to the same dtype and device, full slices, pads by nothing."""
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    if node.target in (
        aten.to.dtype,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
        aten.to.dtype_layout,
    ):
        return before.dtype == after.dtype and before.device == after.device
    if node.target is aten.slice.Tensor:
        given = list(arguments(node)[2:])
        start, end, step = given + [None, None, 1][len(given) :]
        return bool(start in (0, None) and (end is None or end == 2**63 - 1) and step == 1)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return all(amount == 0 for amount in arguments(node)[1])
    return False


def _fold_constants(root: nn.Module, graph: fx.Graph) -> list[str]:
    """Evaluate nodes that depend on no input, where a plain tensor is needed; returns their names.

    These are integer and boolean values, tensors created from literals, and computed weights of parametric operators
    (weight standardisation). Everything else stays in the graph, so that it can be sliced.
    """
    constant: set[fx.Node] = set()
    pure: set[fx.Node] = set()  # depends on literals alone
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and all(n in constant for n in inputs)):
            constant.add(node)
        value = node.meta.get("val")
        tensors = value if isinstance(value, (list, tuple)) and value else [value]
        made = node.op == "call_function" and all(isinstance(tensor, Tensor) for tensor in tensors)
        if made and all(n in pure for n in inputs):
            pure.add(node)
            constant.add(node)
    wanted: dict[fx.Node, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        computed = node in constant and node.op != "get_attr" and isinstance(value, Tensor)
        if computed and (node in pure or not value.dtype.is_floating_point):
            wanted[node] = None
        for slot in WEIGHTS.get(kind_of(node.target) or "", ()):
            operand = node.args[slot] if slot < len(node.args) else None
            if isinstance(operand, fx.Node) and operand in constant and operand.op == "call_function":
                wanted[operand] = None
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in wanted:
            value = _evaluate(root, node, known)
            name = _folded_name(root, node)
            trainable = any(isinstance(tensor_at(root, str(leaf.target)), nn.Parameter) for leaf in _leaves(node))
            folded = value.detach().clone().contiguous()
            if trainable and folded.is_floating_point():
                folded = nn.Parameter(folded)
            set_tensor(root, name, folded)
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", name, name=f"{node.name}_folded")
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
    return [node.name for node in wanted]


def _evaluate(root: nn.Module, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    stack = [node]
    while stack:
        current = stack[-1]
        missing = [n for n in current.all_input_nodes if n not in known]
        if current in known:
            stack.pop()
        elif missing:
            stack.extend(missing)
        elif current.op == "get_attr":
            known[stack.pop()] = tensor_at(root, str(current.target))
        else:
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), known.__getitem__)
            known[stack.pop()] = call(current, args, kwargs)
    return known[node]


def _leaves(node: fx.Node) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            stack.extend(current.all_input_nodes)
    return [n for n in seen if n.op == "get_attr"]


def _folded_name(root: nn.Module, node: fx.Node) -> str:
    for leaf in _leaves(node):
        name = f"{leaf.target}_folded"
        if tuple(tensor_at(root, str(leaf.target)).shape) == tuple(node.meta["val"].shape):
            break
    else:
        name = f"folded_{node.name}"
    taken = {str(n.target) for n in node.graph.nodes if n.op == "get_attr"}
    while name in taken:
        name += "_"
    return name


def drop_unused_tensors(graph_module: fx.GraphModule) -> None:
    """Delete parameters and buffers that no node reads."""
    root = nn.Module()
    for name in dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"):
        set_tensor(root, name, tensor_at(graph_module, name))
    for name in list(graph_module._modules):
        delattr(graph_module, name)
    for name in [*graph_module._parameters, *graph_module._buffers]:
        delattr(graph_module, name)
    for name, module in root._modules.items():
        graph_module.add_module(name, module)
    for name, parameter in root._parameters.items():
        graph_module.register_parameter(name, parameter)
    for name, buffer in root._buffers.items():
        graph_module.register_buffer(name, buffer)


def _follow(name: str, moved: dict[str, str]) -> str:
    while name in moved:
        name = moved[name]
    return name
