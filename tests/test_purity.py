from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch

from netclone.graph.operators import OPERATORS
from netclone.graph.purity import find_operator, functional_twin, impurity, may_be_archived, type_of

aten = torch.ops.aten


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_with_a_rule_may_be_archived(name: str) -> None:
    assert find_operator(name) is OPERATORS[name]


@pytest.mark.parametrize(
    "name", ["mm", "hstack", "concat", "clip", "moveaxis.int", "max.other", "mean", "glu", "fft_rfft2", "gru.input"]
)
def test_other_pure_operators_too(name: str) -> None:
    assert find_operator(f"aten.{name if '.' in name else name + '.default'}") is not None


def test_what_is_computed_with_sizes() -> None:
    assert find_operator("operator.floordiv") is operator.floordiv and find_operator("math.floor") is math.floor
    assert find_operator("operator.getitem") is operator.getitem


REFUSED = {
    "writes": "normal_.default random_.default copy.out set_.source_Tensor resize_.default squeeze_.default",
    "draws": "rand.default randn.default bernoulli.default multinomial.default randperm.default",
    "has a shape that depends on values": "nonzero.default masked_select.default unique_dim.default bincount.default",
    "is no tensor": "item.default equal.default is_nonzero.default dim.default",
    "is no memory of its own": "empty.memory_format empty_like.default new_empty.default as_strided.default",
    "reads a file": "from_file.default",
    "divides by a step of nothing": "range.step range.default",
    "is of a backend": "cudnn_convolution.default mkldnn_linear.default quantize_per_tensor.default",
    "is a gradient": "threshold_backward.default",
    "is no operator": "foo.default relu.foo relu __class__.default relu.__init__ relu.default.default ops.default",
}


@pytest.mark.parametrize("why", REFUSED)
def test_operators_that_are_not_pure_are_not_found(why: str) -> None:
    for name in REFUSED[why].split():
        assert find_operator(f"aten.{name}") is None, name


@pytest.mark.parametrize("name", ["os.system", "operator.add.x", "operator.call", "prims.add", "", None, ["x"], 3])
def test_nothing_beside_is_found(name: Any) -> None:
    assert find_operator(name) is None


def test_no_out_variant_and_no_mutable_schema_is_pure() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        found = find_operator(f"aten.{packet}.{overload or 'default'}")
        if found is not None and may_be_archived(found):
            schema: Any = found
            assert not schema._schema.is_mutable and "out" not in overload.split("_"), name


def test_twins() -> None:
    assert functional_twin(aten.add_.Tensor) is aten.add.Tensor
    assert functional_twin(aten.add.Tensor) is None
    assert functional_twin(aten.bernoulli_.float) is None


def test_arguments_that_make_an_operator_impure() -> None:
    statistics = {"running_mean": torch.zeros(2), "running_var": torch.zeros(2)}
    assert not impurity(aten.batch_norm.default, {**statistics, "training": False})
    assert "statistics" in impurity(aten.batch_norm.default, {**statistics, "training": True})
    assert not impurity(aten.batch_norm.default, {"running_mean": None, "running_var": None, "training": True})
    assert "statistics" in impurity(aten.instance_norm.default, {**statistics, "use_input_stats": True})
    assert "random" in impurity(aten.scaled_dot_product_attention.default, {"dropout_p": 0.1})
    assert "random" in impurity(aten.lstm.input, {"train": True})
    assert not impurity(aten.lstm.input, {"train": False})
    assert "mask" in impurity(aten.index.Tensor, {"indices": [None, torch.ones(2, dtype=torch.bool)]})
    assert "classes" in impurity(aten.one_hot.default, {"num_classes": -1})
    assert not impurity(aten._fft_r2c.default, {"dim": [2, 3]})
    assert "axes" in impurity(aten._fft_r2c.default, {"dim": [1, -2]})
    assert "random" in impurity(aten.rrelu.default, {"training": False, "generator": torch.Generator()})


def test_types_are_those_torch_expects() -> None:
    types = {argument.name: type_of(argument) for argument in aten.sum.dim_IntList._schema.arguments}
    assert types["dim"] == ("int", True, True) and types["dtype"] == ("ScalarType", False, True)
    assert type_of(aten.index.Tensor._schema.arguments[1]) == ("Tensor?", True, False)
