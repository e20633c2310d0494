"""extract(source, mask) -> CloneModule: the masked source as a physically slim network, cut at a position."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from netclone.channels.grouping import ChannelGroups, channel_groups, columns_without, unused_outputs
from netclone.channels.masks import ChannelMask, leave_out_of_norms, silenced, silent_columns
from netclone.channels.slimming import Resizer, slim
from netclone.cloning.modules import CloneModule
from netclone.errors import CertificateError, PositionError, first_line
from netclone.files.spec import CloneSpec
from netclone.graph.calls import arguments
from netclone.graph.capturing import FACTS, drop_unused_tensors, set_tensor, tensor_at
from netclone.graph.folding import fold_batch_norms
from netclone.graph.functionalizing import in_place_again
from netclone.graph.tracing import position, shape_of
from netclone.learning.data import Batches, Samples, check_classes, check_names, gather
from netclone.learning.reconstructing import reconstruct_slim
from netclone.runtime.entering import deterministic, entered
from netclone.runtime.sharing import ALONE, Workers

aten = torch.ops.aten
TOLERANCE = 1e-9  # relative, in float64: what "equal" means in a certificate


@entered()
def extract(
    source: nn.Module | ChannelGroups,
    mask: ChannelMask,
    at: str | None = None,
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    reconstruct: Batches | None = None,
    fold_batch_norm: bool = False,
    example_inputs: Tensor | tuple[Tensor] | None = None,
) -> CloneModule:
    """Cut the masked source at a position and store only what is kept.

    Parameters
    ----------
    source
        The network: a module, a traced graph, or the groups found in one, which saves finding them again. Untouched.
    mask
        The channels to keep, from a mask made for this source.
    at
        Where to cut: the module's input is the source's (slim) features there. None: the source's input.
    classes
        Columns of the output to keep, in this order; None keeps every class.
    class_names
        One name per class, stored with the module.
    fold_batch_norm
        Whether to fold BatchNorm into the convolutions before it. This is about a tenth faster and equal up to one
        rounding of the weights; the certificate is computed before.
    reconstruct
        Images and labels in any form that :func:`netclone.clone` takes. On them, layers that read removed channels are
        refitted by least squares, one after another, to the outputs of the full source. None: the paper's plain copy.

    Raises
    ------
    MaskError
        If the mask was made for another model.
    DataError
        If the samples to refit on are empty or not finite, do not fit the source's input, or have labels outside its
        classes.
    PositionError
        If ``at`` is unknown, its output is not one tensor, or some path of the network goes round it.
    CertificateError
        If the slim network does not equal the masked one in float64 (never expected).

    Examples
    --------
    >>> import timm, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> mask = netclone.localize(source, method="magnitude", keep=0.5)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[1, 3])
    >>> module.classes, module.source_at, module.certificate < 1e-9
    ((1, 3), 'layer2', True)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.3.
    """
    groups = channel_groups(source, example_inputs)
    samples = None if reconstruct is None else gather(reconstruct, "reconstruct")
    if samples is not None:
        samples.check_images(groups.example, "source")
        samples.check_labels(groups.outputs, "source")
    slimmed = slim_down(groups, mask, classes, refit=samples is not None)
    if samples is not None:
        slimmed.reconstruct(samples, at)
    return replace(slimmed, fold=fold_batch_norm).module(at, class_names=class_names)


def slim_down(groups: ChannelGroups, mask: ChannelMask, classes: Sequence[int] | None, refit: bool = True) -> Slimmed:
    """Remove the masked channels from the whole source; modules are cut from the result, after a refit if wanted."""
    chosen = check_classes(classes, groups.outputs)
    removed = torch.cat([mask.removed_units(groups), unused_outputs(groups, chosen)]).sort().values
    graph_module = slim(groups.labelling, removed)
    state = graph_module.state_dict()
    plain = {name: tensor.clone() for name, tensor in state.items()} if refit else state
    return Slimmed(groups, mask, chosen, removed, columns_without(groups, removed), graph_module, plain)


@dataclass(frozen=True)
class Slimmed:
    """A masked source whose removed channels are gone. It is not cut yet, so its weights can be refitted in place.

    ``graph_module`` is the slim network from images to the logits of the source's ``columns``, ascending, which include
    ``classes``. ``plain`` is its state before any refit; the certificate is about this state. ``fold``: whether modules
    cut from it get their BatchNorms folded.
    """

    groups: ChannelGroups
    mask: ChannelMask
    classes: tuple[int, ...]
    removed: Tensor
    columns: tuple[int, ...]
    graph_module: fx.GraphModule
    plain: Mapping[str, Tensor]
    fold: bool = False

    def certify(self, at: str | None) -> float:
        """max |masked - slim| / max |masked| in float64, for the plain copy behind a cut."""
        return _certify(self, None if at is None else position(self.groups.graph_module, at))

    def reconstruct(self, samples: Samples, at: str | None, workers: Workers = ALONE) -> None:
        """Refit the layers behind a cut that read removed channels, by least squares and in place."""
        full = self.groups.graph_module
        new = Resizer(self.groups.labelling, self.removed)
        cut_node = None if at is None else position(full, at).name
        reconstruct_slim(full, self.graph_module, new, samples, cut_node, workers=workers)

    def module(self, at: str | None, *, class_names: Sequence[str] = (), features_only: bool = False) -> CloneModule:
        """The part behind a cut as a clone of its own.

        With ``features_only`` it ends before the source's linear classifier, if there is one; its output is then
        ``(N, F)``.
        """
        check_names(class_names, self.classes)
        certificate = self.certify(at)
        whole = copy.deepcopy(self.graph_module)
        if features_only and features_node(whole) is not None:
            _end_before_classifier(whole)
        else:
            _order_outputs(whole, [self.columns.index(c) for c in self.classes], len(self.columns))
        body = whole if at is None else cut(whole, position(self.groups.graph_module, at).name)
        if self.fold:
            fold_batch_norms(body)
        placeholder = next(node for node in body.graph.nodes if node.op == "placeholder")
        input_shape = shape_of(placeholder)
        assert input_shape is not None
        in_place_again(body)
        for node in body.graph.nodes:  # an archive holds no shapes; nor does a fresh module
            node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        spec = CloneSpec(
            classes=self.classes,
            class_names=tuple(class_names),
            source_at=at,
            input_shape=input_shape,
            certificate=certificate,
            source_fingerprint=self.groups.fingerprint,
            kept=self.mask.summary(),
        )
        return CloneModule(body, spec).eval()


def cut(graph_module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The part of an operator graph after a node; the node becomes its input, ``features``.

    Raises
    ------
    PositionError
        If the node's first axis is not the batch, or later nodes also read something before the node.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    at = nodes[name]
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    needed = _needed(output, at)
    around = [n for n in needed if n.op == "placeholder" and not all(_is_batch_size(u) for u in n.users if u in needed)]
    if around or at not in needed:
        through = next((u.name for n in around for u in n.users if u in needed), "output")
        raise PositionError(
            f"position '{name}': what follows also reads earlier features, through node '{through}'; cut where all "
            "paths meet, for example at the end of a block or stage"
        )
    graph = fx.Graph()
    copied = {at: graph.placeholder("features")}
    copied[at].meta = {"val": at.meta["val"]}
    for node in graph_module.graph.nodes:
        if node not in needed or node is at or node.op == "placeholder":
            continue
        if _is_batch_size(node) and node.args[0] not in copied:
            copied[node] = graph.call_function(aten.sym_size.int, (copied[at], 0))
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            set_tensor(root, str(node.target), tensor_at(graph_module, str(node.target)))
    graph.lint()
    part = fx.GraphModule(root, graph, "OperatorGraph")
    part.meta = {FACTS: {"positions": {}, "not_tensors": {}, "operators": True}}
    return part.eval()


def classifier_rows(graph_module: fx.GraphModule, classes: Sequence[int]) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``(classes, F)`` and bias, for some classes, of the linear operator at the end of a graph, or None."""
    if features_node(graph_module) is None:
        return None
    linear = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    weight, *bias = (tensor_at(graph_module, str(node.target)).detach()[list(classes)] for node in linear.args[1:3])
    return weight, bias[0] if bias else None


def features_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """The features ``(N, F)`` read by the last linear operator of a graph; None if it does not end in one."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node) or output.target is not aten.linear.default:
        return None
    features = output.args[0]
    assert isinstance(features, fx.Node)
    shape = shape_of(features)
    return features if shape is not None and len(shape) == 1 else None


def _needed(output: fx.Node, at: fx.Node) -> set[fx.Node]:
    """All nodes that the output is computed from, going back no further than ``at``."""
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node is not at and not _is_batch_size(node):
                stack.extend(node.all_input_nodes)
    return seen


def _is_batch_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int and arguments(node)[1] == 0


def _order_outputs(slimmed: fx.GraphModule, columns: list[int], count: int) -> None:
    """Reduce the output's ``count`` columns to some, in this order; heads that give none of them are dropped."""
    if columns == list(range(count)):
        return
    output = next(node for node in slimmed.graph.nodes if node.op == "output")
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    with slimmed.graph.inserting_before(output):
        read = [_behind_join(logits, c) for c in columns]
        parts = [slimmed.graph.call_function(aten.slice.Tensor, (head, 1, c, c + 1)) for head, c in read]
        ordered = slimmed.graph.call_function(aten.cat.default, (parts, 1))
    value = logits.meta["val"]
    for node, width in [*((part, 1) for part in parts), (ordered, len(columns))]:
        node.meta = {"val": value.new_empty((value.shape[0], width))}
    output.args = (ordered,)
    slimmed.graph.eliminate_dead_code()
    drop_unused_tensors(slimmed)
    slimmed.recompile()


def _behind_join(logits: fx.Node, column: int) -> tuple[fx.Node, int]:
    """The head that a column comes from, and its column there, if the logits are joined from several heads."""
    while logits.target is aten.cat.default and len(logits.args) > 1 and logits.args[1] in (1, -1):
        heads = logits.args[0]
        assert isinstance(heads, (list, tuple))
        for head in heads:
            assert isinstance(head, fx.Node)
            width = head.meta["val"].shape[1]
            if column < width:
                logits = head
                break
            column -= width
    return logits, column


def _end_before_classifier(slimmed: fx.GraphModule) -> None:
    output = next(node for node in slimmed.graph.nodes if node.op == "output")
    output.args = (features_node(slimmed),)
    slimmed.graph.eliminate_dead_code()
    drop_unused_tensors(slimmed)
    slimmed.recompile()


def _certify(slimmed: Slimmed, cut_node: fx.Node | None) -> float:
    """max |masked - slim| / max |masked| in float64 on the example input."""
    groups, new = slimmed.groups, Resizer(slimmed.groups.labelling, slimmed.removed)
    example = groups.example[:1].to(_double(groups.example.dtype))
    silent = silent_columns(groups.labelling, slimmed.removed)
    full = groups.graph_module
    if groups.labelling.norms:
        full = fx.GraphModule(full, copy.deepcopy(full.graph))
        leave_out_of_norms(full, groups.labelling, slimmed.removed)

    def masked(name: str) -> Tensor:
        return silenced(tensor_at(full, name), silent.get(name, ()))

    with torch.no_grad(), deterministic():
        seen = _InFloat64(full, masked, None if cut_node is None else cut_node.name)
        try:
            want = seen.run(example)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as failed:
            raise CertificateError(
                "the masked source cannot be run in float64, so the slim one cannot be compared with it: "
                f"{first_line(failed)}. Operators that take no float64 or read the bits of a number "
                "(x.view(torch.int32)) are the usual cause: take them out of forward()"
            ) from failed
        given, part = example, slimmed.graph_module
        if cut_node is not None:
            part = cut(part, cut_node.name)
            assert seen.value is not None
            given = seen.value
            labels = groups.labelling.data(cut_node)
            for axis in range(1, given.dim()):
                kept = new.kept(labels, axis)
                given = given.index_select(axis, kept.nonzero().flatten().to(given.device))
        got = _InFloat64(part, lambda name: slimmed.plain[name].clone()).run(given)
    want = want[:, list(slimmed.columns)]
    error = float((got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if not error <= TOLERANCE:
        raise CertificateError(
            f"slim and masked network differ by {error:.1e} (relative, float64; expected <= {TOLERANCE:.0e}): this is "
            "a fault of netclone, please report the model"
        )
    return error


class _InFloat64(fx.Interpreter):
    """Runs an operator graph in float64, and records the value of one node.

    Each tensor is read from ``tensor(name)``, a copy made when an operator needs it, so that only one layer is copied
    at a time. Casts, and tensors that ``forward()`` makes in another dtype, are float64 too.
    """

    def __init__(self, module: fx.GraphModule, tensor: Callable[[str], Tensor], wanted: str | None = None) -> None:
        super().__init__(module)
        self.tensor = tensor
        self.wanted = wanted
        self.value: Tensor | None = None

    def run_node(self, n: fx.Node) -> object:
        out = None if n.op == "get_attr" else super().run_node(n)
        if n.name == self.wanted:
            self.value = out
        return out

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        args, kwargs = fx.node.map_aggregate((n.args, n.kwargs), self._given)
        if isinstance(n.target, torch._ops.OpOverload):
            kinds = {argument.name: str(argument.type) for argument in n.target._schema.arguments}
            value = n.meta.get("val")
            makes = "dtype" in kinds and not any("Tensor" in kind for kind in kinds.values())
            if makes and isinstance(value, Tensor) and "dtype" not in kwargs:  # torch would use its default
                kwargs = {**kwargs, "dtype": _double(value.dtype)}
        return args, kwargs

    def _given(self, argument: Argument) -> Argument:
        if not isinstance(argument, fx.Node):
            return _double(argument)
        if argument.op != "get_attr":
            value: Argument = self.env[argument]
            return value
        tensor = self.tensor(str(argument.target))
        return tensor.to(_double(tensor.dtype))


@overload
def _double(value: torch.dtype) -> torch.dtype: ...
@overload
def _double(value: Argument) -> Argument: ...
def _double(value: Argument) -> Argument:
    """The float64 or complex128 counterpart of a floating or complex dtype; anything else unchanged."""
    if not isinstance(value, torch.dtype):
        return value
    return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
