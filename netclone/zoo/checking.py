"""check(name) -> Row: one network as a target (graft at three positions, remove) and as a source (slim)."""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.channels.certifying import TOLERANCE
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract
from netclone.cloning.grafted import GraftedModule, clones, own_nodes
from netclone.cloning.injecting import inject, remove
from netclone.cloning.modules import CloneModule
from netclone.cloning.verifying import Verification, compare
from netclone.errors import NetcloneError
from netclone.graph.capturing import FACTS, is_captured
from netclone.graph.exporting import copied
from netclone.graph.modes import SPREAD, Mode
from netclone.graph.timing import seconds_in_turn
from netclone.graph.tracing import INPUT, position, same_bits, shape_of, trace
from netclone.learning.localizing import localize
from netclone.metrics.evaluating import cost
from netclone.zoo.building import Network, build, randomised
from netclone.zoo.naming import known

KEEP = 0.5  # share of every channel group that is kept, by magnitude
REAL = 60_000_000  # most parameters of a network that gets weights; larger ones are checked as targets on device meta
FIXED_TARGET = "timm/test_resnet"
_REPEATS = 5  # of a forward pass, to time it
_REASONS = 4  # how many reasons for unprunable parameters are listed


@dataclass(frozen=True)
class TargetResult:
    """The result of a network as a target: its capture, where the fixed module was grafted, seconds; or why it failed.

    ``modes`` is the number of modes of deployment in which old logits were compared and equal to the bit, and
    ``unsupported`` the number in which the network itself fails. Without weights both are 0, since operators and flags
    were compared instead.
    """

    passed: bool
    reason: str = ""
    capture: str = ""
    nodes: int = 0
    positions: tuple[str, ...] = ()
    seconds: float = 0.0
    modes: int = 0
    unsupported: int = 0


@dataclass(frozen=True)
class SourceResult:
    """The result of a network as a source.

    ``error`` is max |masked - slim| / max |masked| in float64 on new images. ``prunable``, ``parameters`` and ``macs``
    are shares of the network's own. ``latency`` is that of the slim network over the full one, in float32. ``seconds``
    is the time of capture, grouping and slimming. ``stays`` gives the reasons why the largest other parts stay.
    ``prunable_through_norms`` and its ``error`` are those of ``channel_groups(through_norms=True)``.
    """

    passed: bool
    reason: str = ""
    error: float | None = None
    prunable: float | None = None
    prunable_through_norms: float | None = None
    error_through_norms: float | None = None
    parameters: float | None = None
    macs: float | None = None
    latency: float | None = None
    nodes: int = 0
    seconds: float = 0.0
    stays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One network. ``source`` is None if it was not checked or has no weights. ``seconds`` is the total time."""

    name: str
    family: str
    parameters: int
    size: tuple[int, ...]
    weights: str
    target: TargetResult
    source: SourceResult | None
    seconds: float
    peak_mb: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all its checks passed."""
        return self.target.passed and (self.source is None or self.source.passed)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row of a dictionary from :meth:`as_dict`, perhaps read from JSON."""
        target, source = values["target"], values["source"]
        return cls(
            **{
                **values,
                "size": tuple(values["size"]),
                "target": TargetResult(**{**target, "positions": tuple(target["positions"])}),
                "source": source and SourceResult(**{**source, "stays": tuple(source["stays"])}),
            }
        )


class CheckFailed(Exception):
    """A promise of netclone does not hold for a network."""


def check(
    name: str,
    *,
    source: bool = True,
    real: int = REAL,
    modes: Sequence[Mode] = SPREAD,
    device: str | torch.device = "cpu",
) -> Row:
    """Check one network. Nothing is raised; failures are in the row.

    Parameters
    ----------
    name
        A name from :func:`netclone.zoo.names`.
    source
        Whether to check it as a source too, if it has at most ``real`` parameters.
    real
        The most parameters of a network that gets (random) weights, so that outputs are compared too.
    modes
        The modes of deployment in which old logits are compared.
    device
        Where a network with weights runs.

    Examples
    --------
    >>> row = check("timm/test_resnet")
    >>> row.passed, len(row.target.positions), row.source.error < 1e-9
    (True, 3, True)
    """
    started = time.perf_counter()
    try:
        network = build(name, "meta")
        small = network.parameters <= real
        if small:
            network = build(name).on(device)
    except Exception as error:  # a library's constructor may raise anything
        why = TargetResult(False, _reason(error))
        return Row(name, known().get(name, ""), 0, (), "", why, None, time.perf_counter() - started)
    target = _attempted(lambda: _as_target(network, modes), TargetResult)
    as_source = None
    if source and small:
        gc.collect()  # graphs are reference cycles: free the memory of the check as a target first
        as_source = _attempted(lambda: _as_source(network), SourceResult)
    return Row(
        name=name,
        family=known().get(name, ""),
        parameters=network.parameters,
        size=network.size,
        weights="random" if small else "meta",
        target=target,
        source=as_source,
        seconds=time.perf_counter() - started,
    )


def _attempted(attempt: Callable[[], Any], result: Callable[..., Any]) -> Any:
    try:
        return attempt()
    except Exception as error:  # an error of netclone, or of the network's own code
        return result(False, _reason(error))


def _reason(error: Exception) -> str:
    """The error in one line, with its place in the code unless it is netclone's own."""
    line = " ".join(str(error).split())[:400] or "no message"
    if isinstance(error, (NetcloneError, CheckFailed)):
        return f"{type(error).__name__}: {line}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line} ({last.name}, {last.filename.rpartition('/')[2]}:{last.lineno})"


def _holds(condition: bool, claim: str) -> None:
    if not condition:
        raise CheckFailed(claim)


# As a target


class Probe(nn.Module):
    """The fixed module that is grafted onto targets: two logits from 16 averages over any features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, 2)`` from features ``(N, ...)``."""
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool1d(features.flatten(1).unsqueeze(1), 16).squeeze(1))
        return logits


@cache
def probe(shape: tuple[int, ...]) -> CloneModule:
    """The fixed module for features ``(N, *shape)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Probe().eval()
    groups = channel_groups(network, torch.zeros(2, *shape))
    return extract(groups, localize(groups, method="magnitude", keep=1.0))


def three_positions(traced: fx.GraphModule) -> tuple[str, ...]:
    """The positions at a quarter, a half and three quarters of all those of a graph that have features."""
    paths: dict[str, str] = {}
    for path, name in traced.meta[FACTS]["positions"].items():
        if path not in traced.meta[FACTS]["not_tensors"]:
            paths.setdefault(name, path)
    nodes = list(traced.graph.nodes)
    batch = _batch(next(node for node in nodes if node.op == "placeholder"))
    found = [paths[node.name] for node in nodes if node.name in paths and shape_of(node) and _batch(node) == batch]
    if not found:
        return (INPUT,)
    return tuple(dict.fromkeys(found[(len(found) * quarter) // 4] for quarter in (1, 2, 3)))


def _batch(node: fx.Node) -> str:
    """The first size of a node's floating point tensor (a symbol in an exported graph), or None."""
    value = node.meta.get("tensor_meta") or node.meta.get("val")
    return str(value.shape[0]) if value is not None and value.dtype.is_floating_point else ""


def _as_target(network: Network, modes: Sequence[Mode]) -> TargetResult:
    """Trace, inject the fixed module at three positions, remove it in another order, and compare every bit."""
    started = time.perf_counter()
    model, images = network.model, network.images(2)
    if not images.is_meta:
        model = randomised(copied(model), images)  # as built, much of it may be zero and hide differences
    traced = trace(model, images)
    before = _state(traced)
    places = three_positions(traced)
    grafted, some = traced, next(iter(traced.parameters()))
    names = tuple(f"probe_{number}" for number in range(len(places)))
    for at, name in zip(places, names, strict=True):
        shape = shape_of(position(traced, at))
        assert shape is not None
        module = copy.deepcopy(probe(shape)).to(some.device, some.dtype)
        grafted = inject(grafted, module, at=at, name=name, check=False)  # compared below, in more modes
        _let_go(some)
    _holds(_operators(grafted) == _operators(traced), "the grafted graph has other operators or flags than the target")
    back = grafted
    for name in (*names[1:], names[0]):
        back = remove(back, name)
        _let_go(some)
    _holds(_state(back) == before, "after removal, names, shapes, flags or code differ from the target's")
    held, own = back.state_dict(), traced.state_dict()
    _holds(all(same_bits(held[n], own[n]) for n in own), "after removal, tensors differ from the target's")
    with torch.no_grad():  # last, since a forward pass may change a network's own state
        want, got, again = (network(images.clone()) for network in (model, grafted, back))
    width = want.shape[1]
    _holds(got.shape == (2, width + 2 * len(names)), f"the grafted output has shape {tuple(got.shape)}")
    _holds(same_bits(got[:, :width], want), "the target's logits have changed bits")
    _holds(same_bits(again, want), "after removal, the logits have changed bits")
    del back
    found = _in_modes(modes, grafted, model, network.images(9))
    return TargetResult(
        passed=True,
        capture="exported" if is_captured(traced) else "symbolic",
        nodes=len(traced.graph.nodes),
        positions=places,
        seconds=time.perf_counter() - started,
        modes=len(found.equal),
        unsupported=len(found.unsupported),
    )


def _in_modes(modes: Sequence[Mode], grafted: fx.GraphModule, model: nn.Module, images: Tensor) -> Verification:
    """Compare old logits in modes of deployment; networks on device meta are not compared."""
    if images.is_meta:
        return Verification(())
    found = compare(grafted, model, images, modes)
    if found.different:
        first = found.different[0]
        raise CheckFailed(
            f"in {len(found.different)} of {len(found.equal) + len(found.different)} modes the target's logits are not "
            f"bitwise what they were, the first {first.mode}: {first.seen}, from node '{first.node}' on"
        )
    return found


def _operators(graph: fx.GraphModule) -> tuple[Any, ...]:
    """All that decides on torch's kernels: the target's nodes, their inputs, and which parameters require gradients."""
    of_clones = tuple(f"{name}." for name in clones(graph)) if isinstance(graph, GraftedModule) else ()
    own = [node for node in own_nodes(graph) if node.op != "output"]
    return (
        tuple((node.op, node.name, str(node.target), str(node.args), str(node.kwargs)) for node in own),
        tuple((n, p.requires_grad) for n, p in graph.named_parameters() if not n.startswith(of_clones)),
        tuple(n.training for path, n in graph.named_modules() if path and not f"{path}.".startswith(of_clones)),
    )


def _let_go(tensor: Tensor) -> None:
    """Collect graphs that are no longer needed: they are reference cycles, and the next step needs as much memory."""
    if not tensor.is_meta:
        gc.collect()


def _state(traced: fx.GraphModule) -> tuple[Any, ...]:
    """All of a graph except the values of its tensors."""
    tensors = [*traced.named_parameters(), *traced.named_buffers()]
    return (
        traced.code,
        tuple((name, tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in tensors),
        tuple((path, type(part).__qualname__, part.training) for path, part in traced.named_modules()),
    )


# As a source


def _as_source(network: Network) -> SourceResult:
    """Capture, group and slim; compare masked and slim in float64; graft the slim network onto a fixed target."""
    model = randomised(network.model.double(), network.images(2, seed=1).double())
    images = network.images(2).double()
    started = time.perf_counter()
    groups = channel_groups(model, images)
    mask = localize(groups, method="magnitude", keep=KEEP)
    module = extract(groups, mask)
    seconds = time.perf_counter() - started
    fresh = network.images(3, seed=2).double()
    with torch.no_grad():
        full = model(fresh.clone())
    _holds(bool(full.isfinite().all()), "the network's logits are not finite")
    masked = _masked(groups, mask, fresh)
    _holds(_relative(full[:1], full[1:]) > 1e-6, "the check is empty: logits are constant")
    _holds(mask.share == 1 or _relative(masked, full) > 1e-6, "the check is empty: the mask changes nothing")
    error = _difference(masked, module, fresh)
    _in_fixed_target(module, fresh)
    whole, part = (cost(net, fresh[:1], repeats=1) for net in (model, module))
    latency = _latency_ratio(module.float(), model.float(), fresh[:1].float())
    del module
    model.to("meta")
    gc.collect()  # the next step needs as much memory
    through = channel_groups(groups.graph_module, through_norms=True)
    mask_through = localize(through, method="magnitude", keep=KEEP)
    error_through = _difference(_masked(through, mask_through, fresh), extract(through, mask_through), fresh)
    return SourceResult(
        passed=True,
        error=error,
        prunable=groups.prunable_parameters / max(groups.parameters, 1),
        prunable_through_norms=through.prunable_parameters / max(through.parameters, 1),
        error_through_norms=error_through,
        parameters=part.parameters / max(whole.parameters, 1),
        macs=part.macs / max(whole.macs, 1),
        latency=latency,
        nodes=len(groups.graph_module.graph.nodes),
        seconds=seconds,
        stays=_stays(groups),
    )


def _masked(groups: ChannelGroups, mask: ChannelMask, images: Tensor) -> Tensor:
    """The masked network's logits."""
    with torch.no_grad():
        logits: Tensor = mask.apply(groups)(images.clone())
    gc.collect()  # the masked copy: graphs are reference cycles
    _holds(bool(logits.isfinite().all()), "the masked network's logits are not finite")
    return logits


def _difference(masked: Tensor, module: CloneModule, images: Tensor) -> float:
    """max |masked - slim| / max |masked| on images, given the masked network's logits there."""
    with torch.no_grad():
        slim = module(images.clone())
    _holds(slim.shape == masked.shape, f"the slim network returns {tuple(slim.shape)}")
    error = _relative(slim, masked)
    _holds(error <= TOLERANCE, f"masked and slim differ by {error:.1e}")
    return error


def _relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))


@cache
def _fixed_target(device: torch.device) -> nn.Module:
    return build(FIXED_TARGET).on(device).model.double()


def _in_fixed_target(module: CloneModule, images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        return  # the fixed target takes images in colour
    target = _fixed_target(images.device)
    traced = trace(target, images)
    grafted = inject(traced, module, at=INPUT)
    with torch.no_grad():
        want, new, got = target(images.clone()), module(images.clone()), grafted(images.clone())
    width = want.shape[1]
    _holds(same_bits(got[:, :width], want), "in the fixed target: its logits have changed bits")
    _holds(same_bits(got[:, width:], new), "in the fixed target: the new logits differ from the module's")
    _holds(_state(remove(grafted)) == _state(traced), "in the fixed target: removal left a difference")


def _latency_ratio(slim: nn.Module, full: nn.Module, images: Tensor) -> float | None:
    """Latency of slim as a share of full; None for a graph with float64 in it, which float32 breaks."""
    calls = [lambda batch, network=network: network(batch.clone()) for network in (slim, full)]
    try:
        part, whole = seconds_in_turn(calls, images, _REPEATS, _REPEATS)
    except RuntimeError:
        return None
    return part / whole


def _stays(groups: ChannelGroups) -> tuple[str, ...]:
    """The reasons why channels are not prunable, sorted by the number of channels."""
    sizes: dict[str, int] = {}
    for item in groups.unprunable:
        sizes[item.reason] = sizes.get(item.reason, 0) + item.size
    most = sorted(sizes.items(), key=lambda pair: -pair[1])[:_REASONS]
    return tuple(f"{size} channels: {reason}" for reason, size in most)
