"""disable, enable, disabled and replace: what inject and remove give, on a grafted model in place, while it is in use.

A clone that is off is skipped where the graph calls it, and a clone is swapped by one assignment where the graph finds
it. So nothing of the target is copied, no graph is written, and a call that runs meanwhile sees one clone or the other.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, fx, nn

from netclone.cloning.grafted import GraftedModule, modules_of, present, read_by, record_of
from netclone.cloning.modules import CloneModule, Slot, switched_off
from netclone.cloning.requirements import check_clone, check_pure, check_same_kind, differences, reads_of, tell_mismatch
from netclone.cloning.rewriting import new_slot, tell
from netclone.errors import AdapterError, ArgumentError
from netclone.files.spec import CloneSpec
from netclone.graph.dry_run import is_of_operators
from netclone.graph.preparing import said_preparation
from netclone.learning.routing import Router
from netclone.runtime.entering import entered

_log = logging.getLogger(__package__)
_ONE_CHANGE = threading.RLock()


def disable(grafted: nn.Module, *names: str) -> None:
    """Switch clones of a grafted model off, for good and for every thread, without a copy: as if they were removed.

    All other logits keep every bit. The columns of a clone that is off vanish, as :func:`remove` makes them vanish, or
    hold minus infinity if columns are stable (see :func:`inject`). The clone itself stays where it is:
    :func:`enable` switches it on again, deep copies and :func:`save_grafted` keep it as it is.

    Parameters
    ----------
    grafted
        What :func:`inject` returned, or the same compiled by ``torch.compile``, which compiles once for each state.
    names
        The clones. None given: all of them.

    Raises
    ------
    CloneNameError
        If there is no clone of a name; then all stay as they are.
    ArgumentError
        If ``grafted`` holds no clones.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> grafted = netclone.inject(timm.create_model("test_resnet", num_classes=4), module, at="layer2", name="shirts")
    >>> netclone.disable(grafted, "shirts")
    >>> grafted(torch.zeros(1, 3, 64, 64)).shape, grafted.num_classes
    (torch.Size([1, 4]), 4)
    >>> netclone.enable(grafted, "shirts")
    >>> grafted(torch.zeros(1, 3, 64, 64)).shape, grafted.num_classes
    (torch.Size([1, 6]), 6)

    Reference: docs/adr/0019-switching.md.
    """
    _switch(grafted, names, off=True)


def enable(grafted: nn.Module, *names: str) -> None:
    """Switch clones on again that :func:`disable` switched off; those that are on stay on.

    Parameters
    ----------
    grafted
        As for :func:`disable`.
    names
        The clones. None given: all of them.

    Raises
    ------
    CloneNameError
        If there is no clone of a name; then all stay as they are.
    ArgumentError
        If ``grafted`` holds no clones.

    Examples
    --------
    >>> import netclone, timm
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> grafted = netclone.inject(timm.create_model("test_resnet", num_classes=4), module, at="layer2", name="shirts")
    >>> netclone.disable(grafted)
    >>> netclone.enable(grafted)
    >>> grafted.columns
    {'shirts': range(4, 6)}
    """
    _switch(grafted, names, off=False)


@contextmanager
def disabled(grafted: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block, clones are off as :func:`disable` switches them off: ``with netclone.disabled(grafted): ...``.

    As ``torch.no_grad()``, it holds for the calls of this thread (or task of asyncio) alone: others that use the same
    model at the same time see no difference. Blocks may be nested, and an error inside ends them. Deep copies that are
    made inside, such as those of :func:`evaluate` with a device, are off inside too, and on behind it.

    Parameters
    ----------
    grafted
        As for :func:`disable`.
    names
        The clones. None given: all of them.

    Raises
    ------
    CloneNameError
        If there is no clone of a name.
    ArgumentError
        If ``grafted`` holds no clones.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> grafted, images = netclone.inject(target, module, at="layer2", name="shirts"), torch.randn(2, 3, 64, 64)
    >>> with netclone.disabled(grafted, "shirts"):
    ...     torch.equal(grafted(images), target(images))
    True
    """
    model = _grafted_in(grafted)
    with switched_off([_slot_of(name, clone).key for name, clone in _chosen(model, names).items()]):
        yield


@entered()
def replace(grafted: nn.Module, name: str, module: CloneModule, *, allow_mismatch: bool = False) -> CloneModule:
    """Swap a clone of a grafted model for another one in place: same name, same columns, no copy of the target.

    The model then computes what injecting the new clone in that place gives, to the bit. Calls that run in other
    threads meanwhile see all of the old clone or all of the new one. The swap itself is one assignment; before it, the
    new clone is checked and copied, which takes milliseconds that no call waits for. If the clone was off, the new one
    is off.

    A model compiled by ``torch.compile`` goes on without compiling again if both clones have the same graph, and
    tensors of the same shapes, dtypes and ``requires_grad``, as after a new fit of one clone. Otherwise torch compiles
    at the next call.

    Parameters
    ----------
    grafted
        As for :func:`disable`.
    name
        The clone to replace.
    module
        The new clone: as many classes, with the same names if both know theirs, fitted at the same position.
    allow_mismatch
        As for :func:`inject`.

    Returns
    -------
    The clone that was replaced; giving it to ``replace`` swaps it in again.

    Raises
    ------
    CloneNameError
        If there is no clone of that name.
    AdapterError
        If the new clone reads the target elsewhere than the old one.
    ArgumentError
        If it has other classes, is on another device or in another dtype, or is not a graph that only computes logits;
        if ``grafted`` holds no clones.
    TargetError
        If it was fitted to another target.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module, better = (netclone.extract(source, mask, at="layer2", classes=some) for some in ([5, 7], [5, 6]))
    >>> target = timm.create_model("test_resnet", num_classes=4)
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> former = netclone.replace(grafted, "shirts", better)
    >>> images = torch.randn(2, 3, 64, 64)
    >>> torch.equal(grafted(images), netclone.inject(target, better, at="layer2")(images))
    True
    >>> former.classes, grafted.columns
    ((5, 7), {'shirts': range(4, 6)})

    Reference: docs/adr/0019-switching.md.
    """
    model = _grafted_in(grafted)
    check_clone(module)
    with _ONE_CHANGE:
        present(record_of(model), name)
        old = modules_of(model)[name]
        _check_same_classes(name, old, module)
        if _reads(module.spec) != _reads(old.spec):
            _check_same_reads(model, name, module)
        body = _twin(old.body, module.body, old.training)
        alike = body is not None
        if body is None:
            check_same_kind(model, module)
            if not isinstance(module.body, fx.GraphModule) or not is_of_operators(module.body.graph):
                raise ArgumentError(
                    "module: its body is not a graph of operators, and only such a clone is known to change nothing "
                    "else; make one with netclone.clone(...) or netclone.extract(...)"
                )
            check_pure(model, module)
            body = copy.deepcopy(module.body).train(old.training)
        of_target = ("target_digests", "target_preparation")
        if any(getattr(module.spec, fact) != getattr(old.spec, fact) for fact in of_target):
            tell_mismatch(differences(model, module.spec, said_preparation(model)), allow_mismatch)
        new = _clone_of(body, module.spec, copy.deepcopy(module.router), old.training)
        new.slot = old.slot or new_slot(model, name)
        model._modules[name] = new  # a call reads it once: this is the swap
        if old.class_names != new.class_names:
            tell(model)
        _log.debug("clone '%s' replaced; compiled code %s", name, "stays valid" if alike else "is compiled again")
    return _clone_of(old.body, old.spec, old.router, old.training)


def _switch(grafted: nn.Module, names: Sequence[str], *, off: bool) -> None:
    model = _grafted_in(grafted)
    with _ONE_CHANGE:
        for name, clone in _chosen(model, names).items():
            clone.slot = dataclasses.replace(_slot_of(name, clone), off=off)
        tell(model)


def _grafted_in(grafted: nn.Module) -> GraftedModule:
    """The grafted model itself, of a compiled one that which was compiled."""
    model = cast(GraftedModule, getattr(grafted, "_orig_mod", grafted))
    record_of(model)
    return model


def _chosen(model: GraftedModule, names: Sequence[str]) -> dict[str, CloneModule]:
    record, held = record_of(model), modules_of(model)
    return {present(record, name): held[name] for name in names} if names else held


def _slot_of(name: str, clone: CloneModule) -> Slot:
    if clone.slot is None:
        raise ArgumentError(
            f"grafted: '{name}' was set by hand, and not by inject or replace; swap it in with netclone.replace(...)"
        )
    return clone.slot


def _check_same_classes(name: str, old: CloneModule, new: CloneModule) -> None:
    way_out = f"remove '{name}' and inject the other one, which gives another model and may move columns"
    if len(old.classes) != len(new.classes):
        raise ArgumentError(
            f"module: it has {len(new.classes)} classes, the clone '{name}' has {len(old.classes)} and as many "
            f"columns: {way_out}"
        )
    if old.class_names and new.class_names and old.class_names != new.class_names:
        raise ArgumentError(
            f"module: its classes are {', '.join(new.class_names)}, the columns of '{name}' stand for "
            f"{', '.join(old.class_names)}, in this order; clone with the same classes, or {way_out}"
        )


def _check_same_reads(model: GraftedModule, name: str, new: CloneModule) -> None:
    """Raise unless a clone reads what the clone of this name reads; one that was only extracted has no say in where."""
    there = read_by(model, name)
    fitted = modules_of(model)[name].spec.at
    here = reads_of(model, new.spec, there[0].name if new.spec.at in (None, fitted) else None)
    if tuple(here) != there:
        seen, expected = (" and ".join(f"'{node.name}'" for node in nodes) for nodes in (here, there))
        raise AdapterError(
            f"module: it reads the target's nodes {seen}, the clone '{name}' reads {expected}, and a swap while the "
            f"model is in use keeps them: clone with at={fitted or there[0].name!r}, or remove "
            f"'{name}' and inject the other one, which gives another model"
        )


def _reads(spec: CloneSpec) -> tuple[object, ...]:
    """What decides where a clone reads a target: two clones that agree in it read the same nodes."""
    return spec.at, spec.input_shape, spec.feature_node, spec.feature_shape, spec.gate and spec.gate.reads


def _clone_of(body: fx.GraphModule, spec: CloneSpec, router: Router | None, training: bool) -> CloneModule:
    """A clone of parts, with its own mode and its router's; the body has it already."""
    made = CloneModule(body, spec, router if router is None else router.train(training))
    made.training = training
    return made


def _twin(like: nn.Module, other: nn.Module, training: bool) -> fx.GraphModule | None:
    """A copy of an operator graph that shares class, graph and code with ``like``; None unless only values differ.

    A deep copy of a graph module has a class of its own, and torch compiles again for another class.
    """
    if not isinstance(like, fx.GraphModule) or not isinstance(other, fx.GraphModule) or like.code != other.code:
        return None
    if not is_of_operators(other.graph):
        return None
    with torch.no_grad():  # a copy takes no part in the gradients of what it is a copy of
        return cast("fx.GraphModule | None", _with_tensors_of(like, other, training, {}))


def _with_tensors_of(
    like: nn.Module, other: nn.Module, training: bool, copies: dict[int, Tensor | None]
) -> nn.Module | None:
    """``like`` with a copy of each tensor of ``other``; None if these have other names or are of other kinds.

    One walk over both, since a swap waits for it. ``copies`` holds those that are made, by what they are copies of.
    """
    made: nn.Module = object.__new__(type(like))
    state = made.__dict__
    state.update(like.__dict__)
    state["training"] = training
    for kind in ("_parameters", "_buffers"):
        there = other.__dict__[kind]
        if like.__dict__[kind].keys() != there.keys():
            return None
        state[kind] = {}
        for name, tensor in like.__dict__[kind].items():
            given = there[name]
            if not _of_one_kind(tensor, given):
                return None
            if id(given) not in copies:
                copies[id(given)] = None if given is None else _copied(given)
            state[kind][name] = copies[id(given)]
    if like._modules.keys() != other._modules.keys():
        return None
    state["_modules"] = {}
    for name, part in like._modules.items():
        inner = other._modules[name]
        if part is None or inner is None:
            if part is not inner:
                return None
            state["_modules"][name] = None
        elif (twin := _with_tensors_of(part, inner, training, copies)) is None:
            return None
        else:
            state["_modules"][name] = twin
    return made


def _of_one_kind(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (
        type(one) is type(other)
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
        and one.requires_grad == other.requires_grad
    )


def _copied(tensor: Tensor) -> Tensor:
    values = tensor.clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
