"""LSTM, GRU and RNN as one operator each; torch would derive their shapes step by step, which takes minutes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

aten = torch.ops.aten

GATES: dict[Any, int] = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
"""The operators, and how many times the width their weights have as rows."""


def recurrent_by_shape(source: Tensor, state: Any, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    """The shapes that a recurrent operator returns; ``state`` is two tensors for an LSTM, one for the others.

    Examples
    --------
    >>> out, hidden = recurrent_by_shape(torch.ones(3, 7, 4), torch.ones(2, 3, 5), [], True, 1, 0.0, False, True, True)
    >>> out.shape, hidden.shape
    (torch.Size([3, 7, 10]), torch.Size([2, 3, 5]))
    """
    layers, bidirectional = rest[2], rest[5]
    directions = 2 if bidirectional else 1
    states = [state] if isinstance(state, Tensor) else list(state)
    hidden = states[0]
    if source.dim() != 3 or hidden.shape[0] != layers * directions:
        raise ValueError(f"input {tuple(source.shape)} and state {tuple(hidden.shape)} do not fit")
    return source.new_empty((*source.shape[:2], directions * hidden.shape[2])), *states


@torch.library.custom_op("netclone::lstm", mutates_args=())
def _lstm(  # noqa: PLR0913 - torch's own signature
    source: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for an LSTM during an export; the graph gets torch's own operator."""
    out: tuple[Tensor, Tensor, Tensor] = aten.lstm.input(
        source, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )
    return out


@_lstm.register_fake
def _(
    source: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, hidden, cell = recurrent_by_shape(source, state, weights, *options)
    return out, hidden.clone(), cell.clone()


@torch.library.custom_op("netclone::recurrent", mutates_args=())
def _recurrent(  # noqa: PLR0913 - torch's own signature
    kind: str,
    source: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """As ``_lstm``, for a GRU or RNN, by the name of torch's operator."""
    out: tuple[Tensor, Tensor] = getattr(aten, kind).input(
        source, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )
    return out


@_recurrent.register_fake
def _(kind: str, source: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, hidden = recurrent_by_shape(source, state, *rest)
    return out, hidden.clone()


_KINDS = {function: function.__name__ for function in (torch.gru, torch.rnn_tanh, torch.rnn_relu)}


def exported_by_shape(function: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """The replacement for a recurrent function of torch during an export; None for others, or a packed sequence."""
    if function is torch.lstm:
        return _lstm if isinstance(args[1], (list, tuple)) else None
    if function in _KINDS and isinstance(args[2], (list, tuple)):
        return functools.partial(_recurrent, _KINDS[function])
    return None


def as_torch_has_it(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an exported recurrent operator by torch's own; zero states get its dtype, and other nodes stay."""
    if node.target is torch.ops.netclone.lstm.default:
        source, state, *rest = node.args
        started = [_started(graph, node, source, start) for start in cast("list[Argument]", state)]
        node.target, node.args = aten.lstm.input, (source, started, *rest)
    elif node.target is torch.ops.netclone.recurrent.default:
        kind, source, state, *rest = node.args
        node.target = getattr(aten, str(kind)).input
        node.args = (source, _started(graph, node, source, state), *rest)


def _started(graph: fx.Graph, reader: fx.Node, source: Argument, start: Argument) -> Argument:
    """An initial state, in the input's dtype if it is zeros."""
    if not isinstance(start, fx.Node) or start.target is not aten.zeros.default:
        return start
    with graph.inserting_before(reader):
        made = graph.call_function(aten.new_zeros.default, (source, start.args[0]))
    made.meta = dict(start.meta)
    return made
