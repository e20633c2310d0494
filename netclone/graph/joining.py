"""join(logits, parts): a target's logits and those of its clones side by side, also where a clone is off or gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def join(logits: Tensor, parts: Sequence[Tensor | int]) -> Tensor:
    """The logits ``(N, C)`` and then each part ``(N, K)``: ``(N, C + K + ...)``.

    A part that is a number stands for that many columns without a clone. They hold minus infinity, so that no image is
    ever predicted to be of them.

    Examples
    --------
    >>> join(torch.zeros(1, 2), [torch.ones(1, 1), 0, 2]).tolist()
    [[0.0, 0.0, 1.0, -inf, -inf]]
    """
    if has_torch_function((logits, *parts)):  # one node if the graph is traced again
        joined: Tensor = handle_torch_function(join, (logits, *parts), logits, parts)
        return joined
    columns = [logits]
    for part in parts:
        if not isinstance(part, int):
            columns.append(part)
        elif part:
            columns.append(logits.new_full((logits.shape[0], part), -torch.inf))
    return torch.cat(columns, 1)
