"""One digest over what a file says and holds: every change shows, and nothing else does."""

import hashlib

import pytest
import torch

from netclone.runtime.digests import content_digest

FACTS = {"name": "birds", "classes": [1, 2]}
TENSORS = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}


def test_order_layout_and_gradients_do_not_matter():
    others = {"count": torch.tensor(3), "weight": TENSORS["weight"].T.contiguous().T.requires_grad_()}
    assert content_digest({"classes": [1, 2], "name": "birds"}, others) == content_digest(FACTS, TENSORS)


@pytest.mark.parametrize(
    ("facts", "tensors"),
    [
        ({**FACTS, "classes": [2, 1]}, TENSORS),
        (FACTS, {**TENSORS, "count": torch.tensor(4)}),
        (FACTS, {**TENSORS, "count": torch.tensor(3, dtype=torch.int32)}),
        (FACTS, {**TENSORS, "weight": TENSORS["weight"].view(3, 2)}),
        (FACTS, {"weights": TENSORS["weight"], "count": TENSORS["count"]}),
        (FACTS, {"weight": TENSORS["weight"]}),
        (FACTS, {**TENSORS, "weight": -TENSORS["weight"]}),
    ],
    ids=["fact", "number", "dtype", "shape", "name", "missing", "sign, of zero as well"],
)
def test_every_change_shows(facts, tensors):
    assert content_digest(facts, tensors) != content_digest(FACTS, TENSORS)


def test_it_is_the_digest_of_facts_rows_and_bits_as_written_by_hand():
    by_hand = b'[{"a": 1}, [["x", [1], "torch.float32"]]]' + b"\x00\x00\x80\x3f"
    assert content_digest({"a": 1}, {"x": torch.ones(1)}) == hashlib.sha256(by_hand).hexdigest()
