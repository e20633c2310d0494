"""check_clone, check_pure, reads_of, differences: what a graft requires of the target, the clone and its name."""

from __future__ import annotations

import keyword
import re
import unicodedata
import warnings
from collections.abc import Sequence
from itertools import chain, count

import torch
from torch import fx, nn

from netclone.cloning.grafted import BRANCH, clones, listed, names_in
from netclone.cloning.modules import CloneModule
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
from netclone.graph.describing import NAMES, plain
from netclone.graph.dry_run import dry_run, is_of_operators, on_meta
from netclone.graph.numbers import dtype_name, numbers_digest
from netclone.graph.preparing import Preparation
from netclone.graph.tracing import check_one_device_and_dtype, node_named, position, shape_of


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
    seen, expected = kind_of(module), kind_of(target)
    for name, tensor in () if module.router is None else module.router.named_buffers():
        if seen is not None and (tensor.dtype, tensor.device) != seen:
            raise ArgumentError(
                f"module: its router's '{name}' is {tensor.dtype} on {tensor.device}, its other tensors are {seen[0]} "
                f"on {seen[1]}: bring them together with module.to('{seen[1]}', {seen[0]})"
            )
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
    kind = kind_of(target) or kind_of(module)
    shapes = [shape for shape in (spec.input_shape, spec.feature_shape) if shape is not None]
    try:
        dry_run(body.graph, on_meta(body), shapes, kind[0] if kind else torch.float32, len(spec.classes))
    except ArchiveError as error:
        raise ArgumentError(f"module: its graph cannot be part of a network: {error}") from error


def kind_of(model: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """Dtype and device of a model's first floating-point tensor; None if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return None


def reads_of(traced: fx.GraphModule, spec: CloneSpec, at: str | None) -> list[fx.Node]:
    """The target's nodes that a clone reads: the one at ``at``, its second input, if any, and those of its gate."""
    at = spec.at if at is None else at
    if at is None:
        some = list(traced.meta[FACTS]["positions"])[:3]
        raise PositionError(
            "at: this clone was not fitted for a position, so name one of the target's module paths "
            f"({listed(some)}, ...) or nodes"
        )
    tap = _own(traced, at, position(traced, at))
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
            reads.append(_own(traced, name, node_named(traced, name)))
        except PositionError as error:
            raise AdapterError(f"what the clone's {what} reads, {where}, is missing: {error}; {fit}") from error
        if shape_of(reads[-1]) != shape:
            raise AdapterError(
                f"the target's features at node '{reads[-1].name}' ({where}) have shape "
                f"{_batch(shape_of(reads[-1]))}, the clone's {what} takes {_batch(shape)}: {fit}"
            )
    return reads


def _own(traced: fx.GraphModule, at: str, node: fx.Node) -> fx.Node:
    if BRANCH in node.meta:
        some = list(traced.meta[FACTS]["positions"])[:3]
        raise PositionError(
            f"position '{at}' belongs to a clone, and clones read the target only: choose one of the target's own "
            f"positions, such as {listed(some)}"
        )
    return node


def _batch(shape: tuple[int, ...] | None) -> str:
    return f"({', '.join(['N', *map(str, shape or ())])})"


def checked_name(name: str | None, owners: Sequence[object], present: tuple[str, ...]) -> str:
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
