"""Certificates: in float64, a slim network computes what the masked one does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from netclone.channels.emptying import constant_name, double, emptied, stored
from netclone.channels.grouping import ChannelGroups, columns_without
from netclone.channels.masks import leave_out_removed, silenced, silent_columns
from netclone.channels.slimming import Resizer
from netclone.errors import CertificateError, first_line
from netclone.graph.capturing import tensor_at
from netclone.graph.cutting import cut
from netclone.runtime.entering import deterministic

TOLERANCE = 1e-9
"""Relative, in float64: what "equal" means in a certificate."""


def certify(
    groups: ChannelGroups, removed: Tensor, slim: fx.GraphModule, weights: Mapping[str, Tensor], at: str | None
) -> float:
    """max |masked - slim| / max |masked| in float64 on the example input, for what follows a node (None: all of it).

    ``slim`` is the source without the ``removed`` units, and ``weights`` its tensors by name, as they were cut out.
    Constants that took the place of layers without channels are compared before they were rounded to the weights'
    dtype.

    Raises
    ------
    CertificateError
        If it is not within :data:`TOLERANCE`, or the source cannot be run in float64.
    """
    new = Resizer(groups.labelling, removed)
    weights = {**weights, **_before_rounding(new, weights)}
    cut_node = next((node for node in groups.graph_module.graph.nodes if node.name == at), None)
    example = groups.example[:1].to(double(groups.example.dtype))
    silent = silent_columns(groups.labelling, removed)
    full = groups.graph_module
    if groups.labelling.norms or groups.labelling.summed:
        full = fx.GraphModule(full, copy.deepcopy(full.graph))
        leave_out_removed(full, groups.labelling, removed)

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
        given, part = example, slim
        if cut_node is not None:
            part = cut(part, cut_node.name)
            assert seen.value is not None
            given = seen.value
            labels = groups.labelling.data(cut_node)
            for axis in range(1, given.dim()):
                kept = new.kept(labels, axis)
                given = given.index_select(axis, kept.nonzero().flatten().to(given.device))
        got = _InFloat64(part, lambda name: weights[name].clone()).run(given)
    want = want[:, list(columns_without(groups, removed))]
    error = float((got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if not error <= TOLERANCE:
        raise CertificateError(
            f"slim and masked network differ by {error:.1e} (relative, float64; expected <= {TOLERANCE:.0e}): this is "
            "a fault of netclone, please report the model"
        )
    return error


def _before_rounding(new: Resizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants of a slim network in float64, by name; raises if those among its weights are others."""
    empty, exact = emptied(new), dict[str, Tensor]()
    for node, value in ({} if empty is None else empty.constants).items():
        name = constant_name(node)
        exact[name] = stored(value, node, value.dtype)
        if not torch.equal(weights[name], stored(value, node)):
            raise CertificateError(f"'{name}' is not the constant that node '{node.name}' becomes")
    return exact


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
            value = n.meta.get("val")
            if _makes(n.target) and isinstance(value, Tensor) and "dtype" not in kwargs:  # torch would use its default
                kwargs = {**kwargs, "dtype": double(value.dtype)}
        return args, kwargs

    def _given(self, argument: Argument) -> Argument:
        if not isinstance(argument, fx.Node):
            return double(argument)
        if argument.op != "get_attr":
            value: Argument = self.env[argument]
            return value
        tensor = self.tensor(str(argument.target))
        return tensor.to(double(tensor.dtype))


@functools.cache
def _makes(function: torch._ops.OpOverload) -> bool:
    """Whether an operator makes tensors of a dtype, from no other tensor."""
    kinds = {argument.name: str(argument.type) for argument in function._schema.arguments}
    return "dtype" in kinds and not any("Tensor" in kind for kind in kinds.values())
