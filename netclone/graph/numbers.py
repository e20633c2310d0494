"""numbers_digests(traced): digests of a network's weights, as they are and cast to other dtypes.

A clone's classifier reads the target's logits, so it belongs to these very weights. The digest does not depend on their
device, on their layout in memory, or on tensors that no logit depends on: BatchNorm's counters, and buffers that every
constructor computes anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, fx

from netclone.errors import ArgumentError
from netclone.graph.capturing import FACTS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COUNTER = "num_batches_tracked"


def numbers_digests(traced: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """Digests of a network's weights by dtype: first as they are, then cast to each other floating dtype.

    Examples
    --------
    >>> import netclone
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(3, 2))
    >>> traced = netclone.trace(net, torch.zeros(2, 3))
    >>> cast = netclone.trace(net.bfloat16(), torch.zeros(2, 3).bfloat16())
    >>> dict(numbers_digests(traced))["bfloat16"] == numbers_digest(cast)
    True
    """
    own = dtype_of(traced)
    dtypes = sorted(_FLOATS, key=lambda dtype: dtype != own)
    return tuple((_name(dtype), numbers_digest(traced, None if dtype == own else dtype)) for dtype in dtypes)


def numbers_digest(traced: fx.GraphModule, dtype: torch.dtype | None = None, without: Collection[str] = ()) -> str:
    """SHA-256 of the names, shapes, dtypes and bits of all tensors, cast to a floating dtype (None: as they are).

    ``without`` names modules that do not belong to the network itself.

    Raises
    ------
    ArgumentError
        If the tensors are on the meta device and hold no values.
    """
    derived = traced.meta.get(FACTS, {}).get("derived", ())
    tensors: dict[str, Tensor] = {
        **dict(traced.named_parameters(remove_duplicate=False)),
        **dict(traced.named_buffers(remove_duplicate=False)),
    }
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith(_COUNTER) or name in derived or name.partition(".")[0] in without:
            continue
        if tensor.is_meta:
            raise ArgumentError(f"target: tensor '{name}' is on the meta device and holds no values to compare")
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def dtype_of(traced: fx.GraphModule) -> torch.dtype:
    """The floating dtype of a network's parameters."""
    return next((p.dtype for p in traced.parameters() if p.is_floating_point()), torch.float32)


def dtype_name(traced: fx.GraphModule) -> str:
    """The name of that dtype, such as ``"float32"``."""
    return _name(dtype_of(traced))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
