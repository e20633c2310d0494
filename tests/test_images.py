"""What a caller passed is checked with a reason in words, empty where nothing is wrong."""

import pytest
import torch

from netclone.graph.images import images_fault, not_finite, tensor_fault


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_batch_of_values_or_indices_has_no_fault(dtype):
    assert images_fault(torch.zeros(2, 3, dtype=dtype)) == ""


@pytest.mark.parametrize(
    ("tensor", "fault", "way_out"),
    [
        (torch.eye(2).to_sparse(), "torch.sparse_coo", ".to_dense()"),
        (torch.zeros(2, device="meta"), "meta device", "real images"),
        (torch.zeros(2, dtype=torch.uint8), "torch.uint8", ".float() / 255"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64", "torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_named_with_the_way_out(tensor, fault, way_out):
    words = images_fault(tensor)
    assert fault in words and way_out in words


def test_images_without_values_may_be_asked_for():
    assert images_fault(torch.zeros(2, device="meta"), values=False) == ""


def test_only_layout_is_a_fault_of_a_tensor():
    assert tensor_fault(torch.zeros(2, dtype=torch.uint8)) == tensor_fault(torch.zeros(2, device="meta")) == ""


def test_values_that_are_not_finite_are_counted():
    assert "3 values" in not_finite(torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf]))
    assert not_finite(torch.tensor([1, 2])) == not_finite(torch.zeros(2, device="meta")) == ""
