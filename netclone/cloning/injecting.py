"""inject(target, module) -> GraftedModule, and remove(grafted): both give a copy, and change nothing they are given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from netclone.arguments import check_choice
from netclone.cloning.grafted import (
    RECORD,
    VIEWS,
    Branch,
    Columns,
    GraftedModule,
    Record,
    Seat,
    listed,
    own_logits,
    present,
    record_of,
)
from netclone.cloning.grafted import clones as clones  # until 0.2: the old name netclone.injecting has it
from netclone.cloning.modules import CloneModule, Slot
from netclone.cloning.requirements import (
    check_clone,
    check_pure,
    check_same_kind,
    checked_name,
    differences,
    kind_of,
    reads_of,
    tell_mismatch,
    tell_same_names,
)
from netclone.cloning.rewriting import copy_as, write
from netclone.cloning.verifying import check_bits
from netclone.errors import ArgumentError, CloneNameError
from netclone.graph.capturing import FACTS
from netclone.graph.describing import described
from netclone.graph.outputs import Output
from netclone.graph.preparing import said_preparation
from netclone.graph.tracing import INPUT, check_one_device_and_dtype, logits_node, same_bits, shape_of, trace
from netclone.runtime.entering import entered

_Branch, _Record = Branch, Record  # graphs that torch.save has pickled whole name them here


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
    if name in VIEWS:  # a file that holds such a name can be read all the same
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
    record = traced.meta.get(RECORD) or Record(
        branches=(),
        training=tuple(path for path, part in traced.named_modules() if part.training),
        trainable=tuple(path for path, parameter in traced.named_parameters() if parameter.requires_grad),
        attributes=described(traced),
    )
    name = checked_name(name, (target, traced, GraftedModule), record.names)
    logits_node(traced)
    reads = tuple(node.name for node in reads_of(traced, module.spec, at))
    seat = seat or Seat()
    branches = _placed(traced, record, seat.columns)
    if seat.columns == "stable" or (record.stable and seat.columns is None):
        end = _end(traced, branches)
        if seat.first is not None and seat.first < end:
            raise ArgumentError(f"first: column {seat.first} is another's; the first free one is {end}")
        branch = Branch(name, reads, end if seat.first is None else seat.first)
    else:
        branch = Branch(name, reads)

    own = traced is not target  # traced just now: no second copy is needed
    grafted = copy_as(traced, GraftedModule, None if own else _shared(traced, record.names) if share_parameters else {})
    clone = copy.deepcopy(module)
    clone.slot = Slot("", seat.off)  # write gives it its key
    grafted.add_module(name, clone)
    write(grafted, traced.graph, replace(record, branches=(*branches, branch)))
    if check:
        before = target if branches == record.branches else _written(traced, replace(record, branches=branches))
        check_bits(grafted, before, traced.meta[FACTS]["example"], output if before is target else None)
    return grafted


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
        raise CloneNameError(f"name: the graph holds the clones {listed(record.names)}; say which one to remove")
    name = record.names[0] if name is None else present(record, name)
    left = tuple(branch for branch in record.branches if branch.name != name)
    result = copy_as(grafted, GraftedModule if left else fx.GraphModule, {}, without=name)
    write(result, grafted.graph, replace(record, branches=left))
    return result


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
        dtype, device = kind_of(target) or (None, None)
        example_inputs = torch.zeros(2, *size, dtype=dtype, device=device)
    traced = trace(target, example_inputs, output=output)
    if share_parameters:
        originals = {**dict(target.named_parameters()), **dict(target.named_buffers())}
        for path, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
            if path in originals and same_bits(tensor, originals[path]):
                tensor.data = originals[path].data
    return traced


def _shared(traced: fx.GraphModule, names: tuple[str, ...]) -> dict[int, object]:
    """A deepcopy memo that keeps the target's tensors on the same memory, in new objects; clones are copied."""
    memo: dict[int, object] = {}
    for path, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
        if path.partition(".")[0] not in names:
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(tensor.data, tensor.requires_grad) if is_parameter else tensor.data
    return memo


def _written(traced: fx.GraphModule, record: Record) -> GraftedModule:
    """A copy of a graph with other columns."""
    result = copy_as(traced, GraftedModule, {})
    write(result, traced.graph, record)
    return result


def _placed(traced: fx.GraphModule, record: Record, columns: Columns | None) -> tuple[Branch, ...]:
    """The branches of a graph with stable columns, or packed ones, or as they are."""
    if columns == "packed":
        return tuple(replace(branch, first=None) for branch in record.branches)
    if columns is None or record.stable:
        return record.branches
    found: list[Branch] = []
    for branch in record.branches:
        found.append(replace(branch, first=_end(traced, found)))
    return tuple(found)


def _end(traced: fx.GraphModule, branches: Sequence[Branch]) -> int:
    """The first column behind all branches, which have stable columns."""
    if not branches:
        (width,) = shape_of(own_logits(traced) if isinstance(traced, GraftedModule) else logits_node(traced)) or (0,)
        return width
    last, clone = branches[-1], cast(CloneModule, traced.get_submodule(branches[-1].name))
    assert last.first is not None
    return last.first + len(clone.classes)
