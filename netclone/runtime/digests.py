"""content_digest(facts, tensors): one digest over the metadata and tensors of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def content_digest(facts: object, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, as hexadecimal digits, of plain data and of the names, shapes, dtypes and bits of tensors.

    It detects damage. It does not detect tampering, since anyone who changes a file can compute it again.

    Examples
    --------
    >>> one = content_digest({"name": "birds"}, {"weight": torch.zeros(2)})
    >>> one == content_digest({"name": "birds"}, {"weight": torch.zeros(2)})
    True
    >>> one == content_digest({"name": "birds"}, {"weight": torch.zeros(2, dtype=torch.int32)})
    False
    """
    rows = [[name, list(tensors[name].shape), str(tensors[name].dtype)] for name in sorted(tensors)]
    found = hashlib.sha256(json.dumps([facts, rows], sort_keys=True).encode())
    for name in sorted(tensors):
        plain = tensors[name].detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()
