"""verify(grafted, target, images): compare old logits with the target's, bit by bit, in every way of calling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, fx, nn

from netclone.errors import ArgumentError, BitsError, OutputError, first_line
from netclone.graph.capturing import FACTS
from netclone.graph.exporting import copied
from netclone.graph.modes import COVERING, EVERY, QUICK, Mode
from netclone.graph.outputs import Output, logits_of
from netclone.graph.tracing import same_bits
from netclone.runtime.entering import deterministic, entered


@dataclass(frozen=True)
class Difference:
    """A mode in which old logits differ: the first node that does (empty if not known), and what was seen."""

    mode: Mode
    node: str
    seen: str


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`.

    ``equal`` are the modes in which all old logits equal the target's to the bit, and ``different`` those in which some
    do not. ``unsupported`` are the modes in which the target itself fails, with the reason.
    """

    equal: tuple[Mode, ...]
    different: tuple[Difference, ...] = ()
    unsupported: tuple[tuple[Mode, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether at least one mode was compared, and none differs."""
        return bool(self.equal) and not self.different


@entered()
def verify(
    grafted: nn.Module, target: nn.Module, images: Tensor, *, thorough: bool = False, output: Output = None
) -> Verification:
    """Compare the old logits of a grafted network with the target's, bit by bit, in all modes of deployment.

    The way a network is called decides which kernels torch runs. So copies of both networks, in eval mode, are called
    with gradients, under ``no_grad`` and in ``inference_mode``; in float32, bfloat16 and float16; with channels last;
    with batches of 1 to 9; on one and two threads. Neither the networks nor random states are changed.

    Parameters
    ----------
    grafted
        A grafted network from :func:`inject` or :func:`load_model`, or the result of :func:`remove`.
    target
        The network that it was grafted onto, which returns logits ``(N, K)``.
    images
        ``(N, C, H, W)``, preprocessed for the target. Fewer than nine are repeated.
    thorough
        Whether to try every combination (324 modes) instead of each value with the most important others (75).
    output
        Which part of what the target returns is its logits, as for :func:`trace`.

    Raises
    ------
    ArgumentError
        If there are no images, the target fails on them, or it holds no values (device ``meta``).
    OutputError
        If the target does not return one tensor of logits.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> found = netclone.verify(grafted, target, torch.randn(2, 3, 32, 32))
    >>> found.passed, len(found.equal), found.different
    (True, 75, ())
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or len(images) == 0:
        seen = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"images: expected a batch (N, C, H, W), got {seen}")
    if any(tensor.is_meta for tensor in (*target.parameters(), *target.buffers(), images)):
        raise ArgumentError("target: it is on device meta and holds no values, so there are no bits to compare")
    return compare(grafted, target, images, EVERY if thorough else COVERING, output)


def check_bits(grafted: fx.GraphModule, target: nn.Module, example: Tensor, output: Output = None) -> None:
    """Raise unless a grafted graph's old logits are the target's bits, in the usual ways of calling a network.

    Networks on device ``meta`` hold no values and are not compared.

    Raises
    ------
    BitsError
        If they differ, with the mode and the first node that does.
    """
    if example.is_meta or any(tensor.is_meta for tensor in target.parameters()):
        return
    if example.is_floating_point() and bool((example == example.flatten()[0]).all()):  # zeros would hide differences
        noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
        example = noise.to(example.device, example.dtype)
    found = compare(grafted, target, example, QUICK, output)
    if found.different:
        first = found.different[0]
        raise BitsError(
            f"the grafted graph does not compute the target's logits ({first.mode}): "
            + (f"node '{first.node}' is the first that differs; " if first.node else "")
            + f"{first.seen}. Does forward() look at the mode, the batch size or requires_grad, or change state? "
            "Take that out of it, or pass check=False to get the graph all the same"
        )


def compare(
    grafted: nn.Module, target: nn.Module, images: Tensor, modes: Sequence[Mode], output: Output = None
) -> Verification:
    """As :func:`verify`, for some modes; those that do not apply to the images are left out."""
    equal: list[Mode] = []
    different: list[Difference] = []
    unsupported: list[tuple[Mode, str]] = []
    flat = images.dim() != 4 or any(parameter.dim() == 5 for parameter in target.parameters())
    asked = [mode for mode in modes if not (flat and mode.channels_last)]
    gradients = list(dict.fromkeys(mode.gradients for mode in modes))

    def order(
        mode: Mode,
    ) -> tuple[str, bool, int]:  # a tensor that a network keeps from a call in inference_mode is of no use later
        return str(mode.dtype), mode.channels_last, gradients.index(mode.gradients)

    with deterministic():
        for _, group in groupby(sorted(asked, key=order), key=lambda mode: order(mode)[:2]):
            kind = list(group)
            reference, candidate = _prepared(target, kind[0]), _prepared(grafted, kind[0])
            for mode in kind:
                batch = _batch(images, mode)
                want = _attempt(reference, batch, mode)
                if isinstance(want, Exception):
                    reason = f"{type(want).__name__}: {first_line(want)}"
                    if mode.dtype in (None, images.dtype):
                        raise ArgumentError(f"images: the target fails on them ({mode}): {reason}") from want
                    unsupported.append((mode, reason))
                    continue
                want = _logits(target, want, output)
                got = _attempt(candidate, batch, mode)
                seen = _seen(got, want)
                if not seen:
                    equal.append(mode)
                    continue
                different.append(Difference(mode, _first_difference(candidate, reference, batch, mode), seen))
    return Verification(tuple(equal), tuple(different), tuple(unsupported))


def _prepared(model: nn.Module, mode: Mode) -> nn.Module:
    """A copy in eval mode, in the dtype and layout of a mode."""
    model = copied(model).eval()
    if mode.dtype is not None:
        model = model.to(mode.dtype)
    for tensor in (*model.parameters(), *model.buffers()) if mode.channels_last else ():
        if tensor.dim() == 4:  # nn.Module.to() fails at the first tensor of five axes
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def _batch(images: Tensor, mode: Mode) -> Tensor:
    repeated = images[torch.arange(mode.batch, device=images.device) % len(images)]
    if mode.dtype is not None and repeated.is_floating_point():
        repeated = repeated.to(mode.dtype)
    return repeated.contiguous(memory_format=torch.channels_last) if mode.channels_last else repeated


def _attempt(model: nn.Module, images: Tensor, mode: Mode) -> object:
    """What a network returns, or the error that it raises."""
    try:
        with mode.active():
            out: object = model(images.clone())
            return out
    except Exception as error:  # any model code may run here, perhaps in a dtype that it was never tried in
        return error


def _logits(target: nn.Module, value: object, output: Output) -> Tensor:
    value = logits_of(value, output, type(target).__name__)
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise OutputError(
            f"target: {type(target).__name__} returns {type(value).__name__}; expected one tensor (N, classes)"
        )
    return value


def _seen(got: object, want: Tensor) -> str:
    """How old logits differ; empty if they do not."""
    if isinstance(got, Exception):
        return f"{type(got).__name__}: {first_line(got)}"
    if not isinstance(got, Tensor) or got.dim() != 2 or got.shape[1] < want.shape[1]:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return f"the grafted network returns {shape}, the target {tuple(want.shape)}"
    old = got[:, : want.shape[1]]
    if same_bits(old, want):
        return ""
    if old.dtype != want.dtype:
        return f"old logits are {old.dtype}, the target's {want.dtype}"
    return f"old logits differ by up to {float((old.detach().double() - want.detach().double()).abs().max()):.1e}"


# Which node


class _Values(fx.Interpreter):
    """Runs a graph and yields the value of every node as it is computed."""

    def __init__(self, graph_module: fx.GraphModule, tell: Callable[[str, object], None]) -> None:
        super().__init__(graph_module)
        self._tell = tell

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        self._tell(n.name, value)
        return value


def _first_difference(grafted: nn.Module, target: nn.Module, images: Tensor, mode: Mode) -> str:
    """The first node whose value differs from the target's, among those of its modules or of all its graph."""
    if not isinstance(grafted, fx.GraphModule) or FACTS not in grafted.meta:
        return ""
    values = _target_values(target, grafted.meta[FACTS]["positions"], images, mode)

    differing: list[str] = []

    def look(name: str, value: object) -> None:
        want = values.get(name)
        if not differing and want is not None and isinstance(value, Tensor) and not same_bits(value, want):
            differing.append(name)

    nodes = _Values(grafted, look)
    with suppress(Exception), mode.active():  # an error of the grafted network itself has been reported already
        nodes.run(images.clone())
    return "".join(differing)


def _target_values(target: nn.Module, positions: Mapping[str, str], images: Tensor, mode: Mode) -> dict[str, Tensor]:
    """The values that the target computes, by the names of their nodes in its graph."""
    values: dict[str, Tensor] = {}

    def keep(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            values[name] = value.clone()  # a later node may write into it

    with mode.active():
        if isinstance(target, fx.GraphModule) and FACTS in target.meta:
            _Values(target, keep).run(images.clone())
            return values
        hooks = [
            target.get_submodule(path).register_forward_hook(
                lambda _module, _given, value, node=node: keep(node, value)
            )
            for path, node in positions.items()
        ]
        target(images.clone())
    for hook in hooks:
        hook.remove()
    return values
