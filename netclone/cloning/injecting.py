"""inject(target, module) -> GraftedModule, and remove(grafted): the only file that edits a target graph, its own copy.

A grafted graph is always written from two things: the target's own nodes, with their order and names, and the list of
branches in ``GraphModule.meta``. So it depends on which clones it holds, and never on the steps that led there.
"""

from __future__ import annotations

import copy
import difflib
import keyword
import operator
import re
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target
from torch.fx.passes.shape_prop import TensorMetadata

from netclone.arguments import check_choice
from netclone.cloning.modules import CloneModule, Slot
from netclone.cloning.target_features import HEAD, forward_features, forward_head, get_classifier
from netclone.cloning.verifying import check_bits
from netclone.errors import (
    AdapterError,
    ArchiveError,
    ArgumentError,
    CloneNameError,
    PositionError,
    SameNameWarning,
    TargetError,
    TargetWarning,
)
from netclone.files.spec import CloneSpec
from netclone.graph.capturing import FACTS
from netclone.graph.class_names import ClassNames
from netclone.graph.describing import NAMES, column_names, columns_by_name, describe, described, plain, widened
from netclone.graph.dry_run import dry_run, is_of_operators, on_meta
from netclone.graph.holding import hold
from netclone.graph.joining import join
from netclone.graph.numbers import dtype_name, numbers_digest
from netclone.graph.outputs import Output
from netclone.graph.preparing import Preparation, said_preparation
from netclone.graph.tracing import INPUT, check_one_device_and_dtype, logits_node, position, same_bits, shape_of, trace
from netclone.runtime.entering import entered

_RECORD = "netclone_clones"  # key in GraphModule.meta of a grafted graph
_BRANCH = "netclone_branch"  # key in Node.meta of every node that is not the target's own

_READING_MODULES = (  # modules that never write into their inputs and return new memory
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
)
_READING_FUNCTIONS = {  # the same for functions; operators declare it in their schema
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.cat,
    nn.functional.conv2d,
    nn.functional.layer_norm,
    nn.functional.linear,
}

Columns = Literal["packed", "stable"]
"""Whether the columns of a clone move up when one before it is gone."""

_AnyGraph = TypeVar("_AnyGraph", bound=fx.GraphModule)


@dataclass(frozen=True)
class Seat:
    """Where the columns of a clone are: whether those of its graph are stable, the first, and whether it is off."""

    columns: Columns | None = None
    first: int | None = None
    off: bool = False


@dataclass(frozen=True)
class _Branch:
    """One clone in a graph: its name and the names of the target's nodes that it reads, in order.

    ``first`` is its first column where columns are stable. None: it follows those before it.
    """

    name: str
    reads: tuple[str, ...]
    first: int | None = None


@dataclass(frozen=True)
class _Record:
    """The clones in a graph, and the target's former state: modules in train mode, trainable parameters, attributes."""

    branches: tuple[_Branch, ...]
    training: tuple[str, ...]
    trainable: tuple[str, ...]
    attributes: dict[str, object]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)

    @property
    def stable(self) -> bool:
        """Whether every clone has columns of its own, which do not move."""
        return any(branch.first is not None for branch in self.branches)


@final
class GraftedModule(fx.GraphModule):
    """A target's graph with clones. Only the clones follow ``train()``: the target's modules stay in eval mode.

    ``clones`` maps the name of each clone to its :class:`CloneModule`, in order of injection. ``columns`` maps it to
    the clone's columns in the logits ``(N, C + K)``, which follow the target's own; a clone that is off may have none.
    ``label_names`` has one name per column, or None where it is not known: the first of several names of a class.
    ``own`` holds the target's own nodes. A module of the target that has one of these names is found under it instead;
    :func:`netclone.clones` gives the names in any case.

    Examples
    --------
    >>> import netclone, timm
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7], class_names=["shirt", "coat"])
    >>> grafted = netclone.inject(timm.create_model("test_resnet", num_classes=2), module, name="shirts", at="layer2")
    >>> grafted.columns, grafted.clones["shirts"].classes, grafted.label_names
    ({'shirts': range(2, 4)}, (5, 7), (None, None, 'shirt', 'coat'))
    """

    if TYPE_CHECKING:
        clones: Mapping[str, CloneModule]
        columns: Mapping[str, range]
        label_names: tuple[str | None, ...]
        own: tuple[fx.Node, ...]

    def __getattr__(self, name: str) -> Any:
        """What a module holds under a name, and then the views of the clones: the target's names come first."""
        view = _VIEWS.get(name)
        held = any(name in self.__dict__.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
        if view is None or held or _RECORD not in self.__dict__.get("meta", ()):
            return super().__getattr__(name)
        return view(self)

    def train(self, mode: bool = True) -> GraftedModule:
        """Switch the clones (and this module's own flag) to train or eval mode; the target's modules stay in eval."""
        super().train(False)
        for clone in modules_of(self).values():
            clone.train(mode)
        self.training = mode
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The target's parameters: they get no gradient, so DistributedDataParallel (whose name this is) skips them."""
        names = self.meta[_RECORD].names
        return [path for path, _ in self.named_parameters() if path.partition(".")[0] not in names]


@entered()
def inject(  # noqa: PLR0913 - public
    target: nn.Module,
    module: CloneModule,
    at: str | None = None,
    *,
    name: str | None = None,
    columns: Columns | None = None,
    share_parameters: bool = False,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    check: bool = True,
    allow_mismatch: bool = False,
    output: Output = None,
    allow_same_names: bool = False,
) -> GraftedModule:
    """Graft a clone onto a copy of a target: the clone's logits follow the target's ``(N, K)``, which keep every bit.

    The target never learns: its modules stay in eval mode even after ``train()``, and its parameters get no gradient.
    They keep their ``requires_grad``, because torch chooses kernels by it, and kernels decide the bits. Instead, the
    features that a clone reads are detached. Neither ``target`` nor ``module`` is changed. As timm's networks do, the
    graph has ``num_classes`` (old and new ones together) and the target's ``pretrained_cfg``, with as many classes.

    Parameters
    ----------
    target
        A module, a traced graph, or a graph that holds clones already. Clones read the target, never each other.
    module
        The clone; the graph gets a copy.
    at
        Position whose output ``(N, *module.spec.input_shape)`` the clone reads: a module path or node name. None: the
        position that the clone was fitted for.
    name
        Name of the clone, an identifier. None: the first free one of ``"clone"``, ``"clone_2"``, ...
    columns
        ``"packed"``: the columns of a clone move up when one before it is removed or off. ``"stable"``: every clone
        keeps its columns. Those of one that is off, or was removed from before another, hold minus infinity. It holds
        for all clones of a graph. None: as in ``target``, and packed if it has no clones.
    share_parameters
        Whether the graph's tensors share memory with those of ``target``. Training one then changes the other. Flags
        and modes stay separate, and clones are always copied.
    example_inputs
        One batch ``(N, C, H, W)`` to trace a plain module with. May be left out if the clone or the model records the
        size of its images.
    check
        Whether to compare the old logits with those of ``target``, bit by bit, on example inputs: with gradients, under
        ``no_grad`` and in ``inference_mode``, for batches of one and two. :func:`verify` compares in more modes.
    allow_mismatch
        Whether to graft a clone that :func:`netclone.clone` fitted to another target, with a
        :class:`~netclone.errors.TargetWarning`. Its logits depend on the target's, so they will be off.
    allow_same_names
        Whether the clone may know a class by a name that a column of ``target`` has already, with a
        :class:`~netclone.errors.SameNameWarning`. Two columns of one class compete for its images.
    output
        Which part of what the target returns is its logits, as for :func:`trace`. The graph returns logits alone.

    Returns
    -------
    The grafted graph, whose output is ``torch.cat([logits, clone, clone_2, ...], 1)`` in order of injection.

    Raises
    ------
    PositionError
        If there is no such position, its output is not one tensor, or it belongs to another clone.
    AdapterError
        If the target's shapes do not fit the clone's inputs, or its second input is missing.
    CloneNameError
        If the name is taken or not an identifier.
    ArgumentError
        If ``module`` is not a clone, is on another device or in another dtype than ``target``, its graph does more
        than compute logits, a class name is taken, or ``columns`` is neither word.
    OutputError
        If the target does not return one tensor of logits.
    BitsError
        If old logits differ from the target's; the message names the mode and the first node that differs.
    TargetError
        If the clone was fitted to a target with other weights, or with other preprocessing of images.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> images = torch.randn(2, 3, 160, 160)
    >>> grafted(images).shape, torch.equal(grafted(images)[:, :4], target(images))
    (torch.Size([2, 6]), True)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3, "insert".
    """
    if columns is not None:
        check_choice(columns, Columns, "columns")
    if name in _VIEWS:  # a file that holds such a name can be read all the same
        raise CloneNameError(f"name: '{name}' is a property of grafted models; choose another, such as '{name}_1'")
    grafted = graft(
        target,
        module,
        at,
        name=name,
        seat=Seat(columns),
        share_parameters=share_parameters,
        example_inputs=example_inputs,
        check=check,
        output=output,
    )
    tell_mismatch(differences(grafted, module.spec, said_preparation(grafted)), allow_mismatch)
    tell_same_names(target, module, allow_same_names)
    return grafted


def differences(grafted: fx.GraphModule, spec: CloneSpec, given: Preparation | None) -> list[str]:
    """How the target of a grafted graph, and its preprocessing, differ from those that a clone was fitted to.

    A cast of the same target does not count; a :class:`~netclone.errors.TargetWarning` says that its last bits differ.
    """
    found = []
    fitted = dict(spec.target_digests)
    if fitted:
        dtype, first = dtype_name(grafted), spec.target_digests[0][0]
        if fitted.get(dtype) != numbers_digest(grafted, without=clones(grafted)):
            found.append(f"its weights were others ({first}; here {dtype})")
        elif dtype != first:
            warnings.warn(
                f"module: the clone was fitted to this target in {first}, and here the target is cast to {dtype}: its "
                "logits differ from those by rounding",
                TargetWarning,
                stacklevel=3,
            )
    if spec.target_preparation is not None and given is not None:
        for what in ("mean", "std", "interpolation"):
            then, now = getattr(spec.target_preparation, what), getattr(given, what)
            if then != now:
                found.append(f"the {what} of its images was {then}, here it is {now}")
    return found


def tell_same_names(target: nn.Module, module: CloneModule, allow_same_names: bool) -> None:
    """Raise if the target, or a clone in it, already has a class of the same name as the clone; or warn if allowed.

    Raises
    ------
    ArgumentError
        If there is one, and it is not allowed.
    """
    known = names_in(target).columns
    both = [name for name in module.class_names if plain(name) in known and not plain(name).isdigit()]
    if not both:
        return
    text = (
        f"module: the target already has a column called {', '.join(map(repr, both[:5]))}; two columns of one class "
        "compete for its images"
    )
    if not allow_same_names:
        raise ArgumentError(
            f"{text}: swap the other clone for this one with netclone.replace(...), remove it, pass other class_names, "
            "or graft it all the same with allow_same_names=True (--force)"
        )
    warnings.warn(text, SameNameWarning, stacklevel=3)


def tell_mismatch(found: Sequence[str], allow_mismatch: bool) -> None:
    """Raise if a target differs from the one that a clone was fitted to, or warn if that is allowed.

    Raises
    ------
    TargetError
        If there is a difference, and it is not allowed.
    """
    if not found:
        return
    text = f"module: the clone was fitted to another target: {'; '.join(found)}"
    if not allow_mismatch:
        raise TargetError(
            f"{text}. Its logits depend on the target's: clone for this target with netclone.clone(source, target, "
            "data), or graft it all the same with allow_mismatch=True (--force)"
        )
    warnings.warn(text, TargetWarning, stacklevel=3)


def graft(  # noqa: PLR0913 - those of inject, and where the columns are
    target: nn.Module,
    module: CloneModule,
    at: str | None = None,
    *,
    name: str | None = None,
    seat: Seat | None = None,
    share_parameters: bool = False,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    check: bool = True,
    output: Output = None,
) -> GraftedModule:
    """As :func:`inject`, without comparing the target with the one that the clone was fitted to.

    ``seat`` says where its columns are. None: as in the target, behind all others.

    Raises
    ------
    PositionError, AdapterError, CloneNameError, ArgumentError, OutputError, BitsError
        As :func:`inject`.
    """
    check_clone(module)
    check_same_kind(target, module)
    check_pure(target, module)
    traced = _traced(target, module, at, share_parameters, example_inputs, output)
    record = traced.meta.get(_RECORD) or _Record(
        branches=(),
        training=tuple(path for path, part in traced.named_modules() if part.training),
        trainable=tuple(path for path, parameter in traced.named_parameters() if parameter.requires_grad),
        attributes=described(traced),
    )
    name = _checked_name(name, (target, traced, GraftedModule), record.names)
    logits_node(traced)
    reads = tuple(node.name for node in reads_of(traced, module.spec, at))
    seat = seat or Seat()
    branches = _placed(traced, record, seat.columns)
    if seat.columns == "stable" or (record.stable and seat.columns is None):
        end = _end(traced, branches)
        if seat.first is not None and seat.first < end:
            raise ArgumentError(f"first: column {seat.first} is another's; the first free one is {end}")
        branch = _Branch(name, reads, end if seat.first is None else seat.first)
    else:
        branch = _Branch(name, reads)

    own = traced is not target  # traced just now: no second copy is needed
    grafted = _copy(traced, GraftedModule, None if own else _shared(traced, record.names) if share_parameters else {})
    clone = copy.deepcopy(module)
    clone.slot = Slot("", seat.off)  # _write gives it its key
    grafted.add_module(name, clone)
    _write(grafted, traced.graph, replace(record, branches=(*branches, branch)))
    if check:
        before = target if branches == record.branches else _written(traced, replace(record, branches=branches))
        check_bits(grafted, before, traced.meta[FACTS]["example"], output if before is target else None)
    return grafted


def clones(grafted: nn.Module) -> tuple[str, ...]:
    """Names of the clones in a grafted graph, in order of injection; none in any other network.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> netclone.clones(netclone.inject(grafted, module, at="layer2"))
    ('shirts', 'clone')

    Reference: docs/adr/0004-grafting.md.
    """
    model = getattr(grafted, "_orig_mod", grafted)  # of a compiled one, what was compiled
    return record_of(model).names if isinstance(model, GraftedModule) else ()


def modules_of(grafted: fx.GraphModule) -> dict[str, CloneModule]:
    """The clones in a grafted graph by name, in order of injection.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    return {name: cast(CloneModule, grafted.get_submodule(name)) for name in record_of(grafted).names}


def names_in(target: nn.Module) -> ClassNames:
    """The class names of a network's columns, clones included; empty if they are not known."""
    if not isinstance(target, GraftedModule):
        return ClassNames.of(target, "target")
    attributes = record_of(target).attributes
    facts, count = attributes.get("pretrained_cfg"), attributes.get("num_classes")
    own = columns_by_name(facts if isinstance(facts, Mapping) else {}, count if isinstance(count, int) else None)
    found = {name: list(numbers) for name, numbers in own.items()}
    for name, numbers in columns(target).items():
        for column, called in zip(numbers, modules_of(target)[name].class_names, strict=False):
            found.setdefault(plain(called), []).append(column)
    return ClassNames({name: tuple(numbers) for name, numbers in found.items()}, "target")


def own_columns(grafted: fx.GraphModule) -> range:
    """The target's own columns of a grafted graph's logits.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    record_of(grafted)
    (width,) = shape_of(own_logits(grafted)) or (0,)
    return range(width)


def columns(grafted: fx.GraphModule) -> dict[str, range]:
    """The columns of each clone in a grafted graph's logits, by name. They follow the target's, in order of injection.

    The range of a clone that is off is empty, unless columns are stable.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    return _columns(grafted, lambda slot: slot.is_off)


def _columns(grafted: fx.GraphModule, is_off: Callable[[Slot], bool]) -> dict[str, range]:
    found, end = {}, len(own_columns(grafted))
    for branch, (name, clone) in zip(record_of(grafted).branches, modules_of(grafted).items(), strict=True):
        first = end if branch.first is None else branch.first
        gone = branch.first is None and clone.slot is not None and is_off(clone.slot)
        end = first if gone else first + len(clone.classes)
        found[name] = range(first, end)
    return found


def label_names(grafted: fx.GraphModule) -> tuple[str | None, ...]:
    """One name per column of a grafted graph's logits; None where it is not known, or where no clone is any more.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    own = own_columns(grafted)
    known = column_names(record_of(grafted).attributes, len(own)) or [None] * len(own)
    return *known, *_added_names(grafted, columns(grafted))


def _added_names(grafted: fx.GraphModule, of_clones: Mapping[str, range]) -> tuple[str | None, ...]:
    """A name for each column behind the target's own."""
    own, found = len(own_columns(grafted)), list[str | None]()
    for name, clone in modules_of(grafted).items():
        place = of_clones[name]
        found += [None] * (place.start - own - len(found))
        found += (clone.class_names or [None] * len(place)) if place else ()
    return tuple(found)


def own_nodes(grafted: fx.GraphModule) -> list[fx.Node]:
    """The target's own nodes of a grafted graph, in order, with its inputs and the output."""
    return [node for node in grafted.graph.nodes if _BRANCH not in node.meta]


def own_logits(grafted: fx.GraphModule) -> fx.Node:
    """The target's node that gives its logits: what the cat at the end joins first, behind the node that holds it."""
    joined = logits_node(grafted)
    return cast(fx.Node, joined.args[0].args[0])  # type: ignore[union-attr]


_VIEWS: dict[str, Callable[[GraftedModule], Any]] = {
    "clones": modules_of,
    "columns": columns,
    "label_names": label_names,
    "own": lambda grafted: tuple(own_nodes(grafted)),
    "forward_features": lambda grafted: forward_features(grafted, own_nodes(grafted)),
    "forward_head": lambda grafted: forward_head(grafted, own_nodes(grafted)),
    "get_classifier": lambda grafted: get_classifier(grafted, modules_of(grafted)),
}


def seat_of(grafted: fx.GraphModule, name: str) -> Seat:
    """Where a clone's columns are, and whether it is switched off for good; the first is known if they are stable.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    (branch,) = (branch for branch in record_of(grafted).branches if branch.name == name)
    slot = modules_of(grafted)[name].slot
    off = slot is not None and slot.off
    return Seat("packed" if branch.first is None else "stable", branch.first, off)


def new_slot(grafted: GraftedModule, name: str) -> Slot:
    """A slot of its own for a clone in a graph, off if the clone is."""
    seat, clone = seat_of(grafted, name), modules_of(grafted)[name]
    return Slot(uuid.uuid4().hex, seat.off, 0 if seat.first is None else len(clone.classes))


def read_by(grafted: fx.GraphModule, name: str) -> tuple[fx.Node, ...]:
    """The target's nodes that a clone reads: the tapped one, then its second input and those of its gate, if any.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    nodes = {node.name: node for node in own_nodes(grafted)}
    (branch,) = (branch for branch in record_of(grafted).branches if branch.name == name)
    return tuple(nodes[read] for read in branch.reads)


@entered()
def remove(grafted: fx.GraphModule, name: str | None = None) -> fx.GraphModule:
    """Remove one clone from a copy of a grafted graph, leaving nothing of it; ``grafted`` is not changed.

    Once its last clone is removed, the result is the traced target as it was: a plain ``fx.GraphModule`` with the same
    code, tensors, names, ``requires_grad`` and training flags. The columns of later clones move up, unless they are
    stable (see :func:`inject`).

    Parameters
    ----------
    grafted
        The graph that :func:`inject` returned.
    name
        The clone to remove. May be left out if there is only one.

    Raises
    ------
    CloneNameError
        If there is no clone of that name, or there are several and no name was given.
    ArgumentError
        If ``grafted`` holds no clones.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> restored = netclone.remove(netclone.inject(target, module, at="layer2"))
    >>> restored(torch.randn(2, 3, 160, 160)).shape, restored.state_dict().keys() == target.state_dict().keys()
    (torch.Size([2, 4]), True)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3, "usage 2".
    """
    record = record_of(grafted)
    if name is None and len(record.names) > 1:
        raise CloneNameError(f"name: the graph holds the clones {_listed(record.names)}; say which one to remove")
    name = record.names[0] if name is None else present(record, name)
    left = tuple(branch for branch in record.branches if branch.name != name)
    result = _copy(grafted, GraftedModule if left else fx.GraphModule, {}, without=name)
    _write(result, grafted.graph, replace(record, branches=left))
    return result


def record_of(grafted: fx.GraphModule) -> _Record:
    if not isinstance(grafted, GraftedModule):
        raise ArgumentError(
            f"grafted: {type(grafted).__name__} holds no clones; pass the graph that netclone.inject(...) returned "
            "(of a compiled one, the module that was compiled)"
        )
    record: _Record = grafted.meta[_RECORD]
    return record


def present(record: _Record, name: str) -> str:
    """The name itself.

    Raises
    ------
    CloneNameError
        If no clone has it.
    """
    if name not in record.names:
        near = difflib.get_close_matches(str(name), record.names, n=1, cutoff=0.0)[0]
        raise CloneNameError(
            f"name: no clone {name!r} in the graph, which holds {_listed(record.names)}; did you mean '{near}'?"
        )
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# What inject requires


def _traced(
    target: nn.Module,
    module: CloneModule,
    at: str | None,
    share_parameters: bool,
    example_inputs: Tensor | tuple[Tensor] | None,
    output: Output,
) -> fx.GraphModule:
    """The target itself if it is a traced graph, else a fresh trace of it (on the target's memory, if shared)."""
    if isinstance(target, fx.GraphModule) and FACTS in target.meta:
        check_one_device_and_dtype(target, "target")
        return target
    size = module.spec.input_shape if (at or module.spec.at) == INPUT else module.spec.target_input_shape
    if example_inputs is None and size is not None:
        dtype, device = _kind(target) or (None, None)
        example_inputs = torch.zeros(2, *size, dtype=dtype, device=device)
    traced = trace(target, example_inputs, output=output)
    if share_parameters:
        originals = {**dict(target.named_parameters()), **dict(target.named_buffers())}
        for path, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
            if path in originals and same_bits(tensor, originals[path]):
                tensor.data = originals[path].data
    return traced


def reads_of(traced: fx.GraphModule, spec: CloneSpec, at: str | None) -> list[fx.Node]:
    """The target's nodes that a clone reads: the one at ``at``, its second input, if any, and those of its gate."""
    at = spec.at if at is None else at
    if at is None:
        some = list(traced.meta[FACTS]["positions"])[:3]
        raise PositionError(
            "at: this clone was not fitted for a position, so name one of the target's module paths "
            f"({_listed(some)}, ...) or nodes"
        )
    tap = _own_position(traced, at)
    fit = f"fit an adapter with netclone.clone(source, target, data, at={at!r})"
    if shape_of(tap) != spec.input_shape:
        raise AdapterError(
            f"at: the target's features at '{at}' (node '{tap.name}') have shape {_batch(shape_of(tap))}, the clone "
            f"takes {_batch(spec.input_shape)}: {fit}"
        )
    if spec.feature_shape is None:
        return [tap]
    if spec.feature_node is None:
        raise AdapterError(
            f"module.spec.feature_node is None, but the clone takes the target's features {_batch(spec.feature_shape)} "
            f"as second input: name their node with module.with_spec(feature_node=...), or {fit}"
        )
    others = [(spec.feature_node, spec.feature_shape, "second input", "module.spec.feature_node")]
    if spec.gate is not None:
        others += [(node, shape, "router", "module.spec.gate") for node, shape in spec.gate.reads]
    reads = [tap]
    for name, shape, what, where in others:
        try:
            reads.append(_own_position(traced, name))
        except PositionError as error:
            raise AdapterError(f"what the clone's {what} reads, {where}, is missing: {error}; {fit}") from error
        if shape_of(reads[-1]) != shape:
            raise AdapterError(
                f"the target's features at node '{reads[-1].name}' ({where}) have shape "
                f"{_batch(shape_of(reads[-1]))}, the clone's {what} takes {_batch(shape)}: {fit}"
            )
    return reads


def _own_position(traced: fx.GraphModule, at: str) -> fx.Node:
    node = position(traced, at)
    if _BRANCH in node.meta:
        some = list(traced.meta[FACTS]["positions"])[:3]
        raise PositionError(
            f"position '{at}' belongs to a clone, and clones read the target only: choose one of the target's own "
            f"positions, such as {_listed(some)}"
        )
    return node


def _batch(shape: tuple[int, ...] | None) -> str:
    return f"({', '.join(['N', *map(str, shape or ())])})"


def _kind(model: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return None


def check_clone(module: object) -> None:
    """Raise unless it is a clone.

    Raises
    ------
    ArgumentError
        If it is not.
    """
    if not isinstance(module, CloneModule):
        raise ArgumentError(
            f"module: expected a CloneModule, got {type(module).__name__}; make one with netclone.clone(...) or "
            "netclone.extract(...), or load one with netclone.load(...)"
        )


def check_same_kind(target: nn.Module, module: CloneModule) -> None:
    check_one_device_and_dtype(module, "module")
    seen, expected = _kind(module), _kind(target)
    if seen is not None and expected is not None and seen != expected:
        raise ArgumentError(
            f"module: its tensors are {seen[0]} on {seen[1]}, the target's are {expected[0]} on {expected[1]}: "
            f"bring it there with module.to('{expected[1]}', {expected[0]})"
        )


def check_pure(target: nn.Module, module: CloneModule) -> None:
    """Raise unless an operator graph only computes logits from features, in the target's dtype."""
    body, spec = module.body, module.spec
    if not isinstance(body, fx.GraphModule) or not is_of_operators(body.graph):
        return  # the caller's own code, which no file can hold
    kind = _kind(target) or _kind(module)
    shapes = [shape for shape in (spec.input_shape, spec.feature_shape) if shape is not None]
    try:
        dry_run(body.graph, on_meta(body), shapes, kind[0] if kind else torch.float32, len(spec.classes))
    except ArchiveError as error:
        raise ArgumentError(f"module: its graph cannot be part of a network: {error}") from error


def _checked_name(name: str | None, owners: Sequence[object], present: tuple[str, ...]) -> str:
    """The clone's name, or the first free default; raises unless it is an identifier that is free in every owner."""

    def taken(candidate: str) -> bool:
        return candidate in NAMES or any(hasattr(owner, candidate) for owner in owners)

    def free(base: str) -> str:
        names = (base if index == 1 else f"{base}_{index}" for index in count(1))
        return next(candidate for candidate in names if not taken(candidate))

    if name is None:
        return free("clone")
    if isinstance(name, str) and name in present:
        raise CloneNameError(f"name: the graph already holds a clone '{name}'; '{free(name)}' is free")
    # Python reads identifiers in normal form, and `self` is the generated function's own argument.
    valid = isinstance(name, str) and name.isidentifier() and unicodedata.normalize("NFKC", name) == name
    if not valid or keyword.iskeyword(name) or name == "self":
        plain = re.sub(r"\W", "_", str(name), flags=re.ASCII).strip("_")
        raise CloneNameError(
            f"name: {name!r} is not a Python identifier that can name a module; '{free('clone_' + plain)}' is free"
        )
    if taken(name):
        raise CloneNameError(f"name: '{name}' is already an attribute of the target; '{free(name)}' is free")
    return name


# The edit


def _shared(traced: fx.GraphModule, names: tuple[str, ...]) -> dict[int, object]:
    """A deepcopy memo that keeps the target's tensors on the same memory, in new objects; clones are copied."""
    memo: dict[int, object] = {}
    for path, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
        if path.partition(".")[0] not in names:
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(tensor.data, tensor.requires_grad) if is_parameter else tensor.data
    return memo


def _copy(
    source: fx.GraphModule, kind: type[_AnyGraph], memo: dict[int, object] | None, without: str | None = None
) -> _AnyGraph:
    """Copy a graph module into another class, without its graph and without the clone ``without``.

    ``memo`` is that of :func:`copy.deepcopy`. None: move what ``source`` holds instead of copying it.
    """
    result = kind(nn.Module(), fx.Graph(), type(source).__name__)
    state = {key: value for key, value in source.__dict__.items() if key != "_graph"}
    state["_modules"] = {path: part for path, part in source._modules.items() if path != without}
    if memo is not None:
        memo[id(source)] = result
        state = copy.deepcopy(state, memo)
    result.__dict__.update(state)
    return result


def _written(traced: fx.GraphModule, record: _Record) -> GraftedModule:
    """A copy of a graph with other columns."""
    result = _copy(traced, GraftedModule, {})
    _write(result, traced.graph, record)
    return result


def _write(result: fx.GraphModule, old: fx.Graph, record: _Record) -> None:
    """Write the target's part of ``old`` and a record's branches into a module; set its flags and record to match."""
    graph = fx.Graph(tracer_cls=old._tracer_cls)
    graph.set_codegen(copy.deepcopy(old._codegen))
    copied: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        if _BRANCH not in node.meta:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        elif node.target is join:
            copied[node] = copied[node.args[0].args[0]]  # the target's logits, which a node holds
    own = list(graph.nodes)
    assert [node.name for node in own] == [node.name for node in old.nodes if _BRANCH not in node.meta]
    if record.branches:
        _graft(result, graph, record.branches)
    graph.owning_module = result
    graph.lint()
    result.graph = graph  # recompiles

    clone_paths = set(record.names)
    for path, part in result.named_modules():
        if path.partition(".")[0] not in clone_paths:
            part.training = not record.branches and path in record.training
    for path, parameter in result.named_parameters():
        if path.partition(".")[0] not in clone_paths:
            parameter.requires_grad_(path in record.trainable)
    if record.branches:
        result.meta[_RECORD] = record
        for branch in record.branches:
            cast(CloneModule, result.get_submodule(branch.name)).slot = new_slot(
                cast(GraftedModule, result), branch.name
            )
        tell(cast(GraftedModule, result))
    else:
        del result.meta[_RECORD]
        result.meta.pop(HEAD, None)
        describe(result, copy.deepcopy(record.attributes))


def tell(grafted: GraftedModule) -> None:
    """Bring what a grafted graph says of its columns up to date: their number, and the target's attributes."""
    own = len(own_columns(grafted))
    added = _added_names(grafted, _columns(grafted, lambda slot: slot.off))
    logits_node(grafted).meta["tensor_meta"] = _logits_meta(grafted, own_logits(grafted), own + len(added))
    describe(grafted, widened(record_of(grafted).attributes, own, added))


def _placed(traced: fx.GraphModule, record: _Record, columns: Columns | None) -> tuple[_Branch, ...]:
    """The branches of a graph with stable columns, or packed ones, or as they are."""
    if columns == "packed":
        return tuple(replace(branch, first=None) for branch in record.branches)
    if columns is None or record.stable:
        return record.branches
    found: list[_Branch] = []
    for branch in record.branches:
        found.append(replace(branch, first=_end(traced, found)))
    return tuple(found)


def _end(traced: fx.GraphModule, branches: Sequence[_Branch]) -> int:
    """The first column behind all branches, which have stable columns."""
    if not branches:
        (width,) = shape_of(own_logits(traced) if isinstance(traced, GraftedModule) else logits_node(traced)) or (0,)
        return width
    last, clone = branches[-1], cast(CloneModule, traced.get_submodule(branches[-1].name))
    assert last.first is not None
    return last.first + len(clone.classes)


def _graft(result: fx.GraphModule, graph: fx.Graph, branches: tuple[_Branch, ...]) -> None:
    """Add to the target's own graph one call per branch, right behind the nodes it reads, and one join at the end."""
    own = {node.name: index for index, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    behind: dict[fx.Node, fx.Node] = {}

    def insert(after: fx.Node, op: str, target: Target, args: tuple[Argument, ...], name: str | None = None) -> fx.Node:
        while after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(behind.get(after, after)):
            node = graph.create_node(op, target, args, name=name)
        node.meta[_BRANCH] = True
        behind[after] = node
        return node

    output = nodes[-1]
    images = next(node for node in nodes if node.op == "placeholder")
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    calls = []
    for branch in branches:
        reads = [nodes[own[name]] for name in branch.reads]
        last = max(reads, key=lambda node: own[node.name])
        args = []
        for node in reads:
            copied = node is not last and _may_be_written(result, nodes, node, last)
            given = (node, images, True) if copied else (node, images)
            direct = node is images and not copied
            args.append(node if direct else insert(node, "call_function", hold, given, f"{branch.name}_input"))
        calls.append(insert(last, "call_module", branch.name, tuple(args), branch.name))
        clone = cast(CloneModule, result.get_submodule(branch.name))
        calls[-1].meta["tensor_meta"] = _logits_meta(result, logits, len(clone.spec.classes))
    held = insert(output.prev, "call_function", hold, (logits, images), f"{logits.name}_held")
    parts: list[Argument] = []
    (end,) = shape_of(logits) or (0,)
    for branch, call in zip(branches, calls, strict=True):
        if branch.first is not None and branch.first > end:  # columns of clones that were removed
            parts.append(branch.first - end)
        parts.append(call)
        end = (end if branch.first is None else branch.first) + (shape_of(call) or (0,))[0]
    joined = insert(output.prev, "call_function", join, (held, parts))
    joined.meta["tensor_meta"] = _logits_meta(result, logits, end)
    output.replace_input_with(logits, joined)


def _logits_meta(result: fx.GraphModule, logits: fx.Node, width: int) -> TensorMetadata:
    like = logits.meta.get("tensor_meta")
    dtype = (like if isinstance(like, TensorMetadata) else logits.meta["val"]).dtype
    shape = torch.Size((len(result.meta[FACTS]["example"]), width))
    return TensorMetadata(shape, dtype, False, (width, 1), torch.contiguous_format, False, {})


def _may_be_written(root: fx.GraphModule, nodes: list[fx.Node], value: fx.Node, last: fx.Node) -> bool:
    """Whether a node after ``value``, up to ``last``, may work in place on its memory. Unknown operators may.

    An operator that is not known to return new memory may also return the memory of any of its inputs.
    """
    memory: dict[fx.Node, set[fx.Node]] = {}  # by node, the nodes whose memory it may share
    for node in nodes:
        memory[node] = {node}
        if not _only_reads(root, node):
            memory[node].update(*(memory[read] for read in node.all_input_nodes))
            if value in memory and node is not value and not memory[node].isdisjoint(memory[value]):
                return True
        if node is last:
            break
    return False


def _only_reads(root: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _READING_MODULES)
    if isinstance(node.target, torch._ops.OpOverload):
        return all(argument.alias_info is None for argument in node.target._schema.arguments)
    return node.target in _READING_FUNCTIONS
