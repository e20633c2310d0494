"""MacCounter: torch's counter of operations, completed by the fused operators that it leaves out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates (MACs) of everything that runs inside the block.

    torch's own counter knows the fused attention of GPUs. This one adds that of the CPU, the fast paths of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, and the LSTM in float32.

    Examples
    --------
    >>> query = torch.zeros(1, 2, 5, 4)
    >>> with MacCounter() as counter:
    ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    >>> counter.macs  # two products of (5, 4) and (4, 5), for each of two heads
    400
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FUSED)

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _multi_head_attention(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    """Projections of queries, keys, values and results, and the attention between them."""
    batch, long, _width = query
    other = key[1]
    return int(2 * batch * width * (width * 2 * (long + other) + 2 * long * other))


def _encoder_layer(source: Any, width: int, *rest: Any, **_: Any) -> int:
    """Attention, and the two layers after it: the first one's weight (hidden, width) is the 13th of the rest."""
    batch, long, _width = source
    hidden, _width = rest[12]
    return _multi_head_attention(source, source, source, width) + int(2 * batch * long * 2 * width * hidden)


def _lstm_layer(source: Any, of_source: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """Both weights of one layer in one direction, at every step of every sequence."""
    return int(2 * source[0] * source[1] * (math.prod(of_source) + math.prod(of_state)))


_FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._native_multi_head_attention: _multi_head_attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mkldnn_rnn_layer: _lstm_layer,
}
