"""What is known of operators' results without data is what torch computes."""

from typing import Any

import pytest
import torch

from netclone.graph.shapes import BY_SHAPE

aten = torch.ops.aten
IMAGES, TOKENS = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 5, 4)
WEIGHT = torch.randn(4, 3, 3, 2)
TWICE = torch.randn(2, 6, 9, 8)
STATISTICS = torch.rand(6) + 0.5
ARGUMENTS: dict[Any, list[tuple[Any, ...]]] = {
    aten.sub.Tensor: [(IMAGES, TWICE), (IMAGES, 2)],
    aten.layer_norm.default: [(TOKENS, [4]), (TOKENS, [5, 4], None, None, 1e-3)],
    aten.group_norm.default: [(IMAGES, 3)],
    aten.batch_norm.default: [(IMAGES, None, None, STATISTICS, STATISTICS, False, 0.1, 1e-5, True)],
    aten.conv2d.default: [
        (IMAGES, WEIGHT, None, [1], [0], [1], 2),
        (IMAGES, WEIGHT, torch.ones(4), [2, 1], [1, 2], [2, 1], 2),
    ],
    aten.linear.default: [(TOKENS, torch.randn(7, 4)), (TOKENS, torch.randn(7, 4), torch.ones(7))],
    aten.scaled_dot_product_attention.default: [(TOKENS, torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 2))],
    **{target: [(IMAGES, TWICE), (IMAGES, 2)] for target in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor)},
}
CASES = [(target, given) for target in BY_SHAPE for given in ARGUMENTS.get(target, [(IMAGES.clone(),)])]


@pytest.mark.parametrize(("target", "given"), CASES)
def test_the_form_of_a_result_is_that_of_torch(target: Any, given: tuple[Any, ...]) -> None:
    got, want = BY_SHAPE[target](*given), target(*given)
    assert got is not None
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize(
    ("target", "given"),
    [
        (aten.relu.default, (torch.ones(3, dtype=torch.long),)),
        (aten.add.Tensor, (IMAGES, torch.randn(6, 1, 1))),
        (aten.add.Tensor, (IMAGES, TWICE.double())),
        (aten.batch_norm.default, (IMAGES, None, None, STATISTICS, STATISTICS, True, 0.1, 1e-5, True)),
        (aten.conv2d.default, (IMAGES, WEIGHT)),
        (aten.linear.default, (TOKENS, torch.randn(7, 3))),
        (aten.scaled_dot_product_attention.default, (TOKENS, TOKENS[:, :1], TOKENS[:, :1])),
    ],
)
def test_what_is_not_plain_is_left_to_torch(target: Any, given: tuple[Any, ...]) -> None:
    assert BY_SHAPE[target](*given) is None
