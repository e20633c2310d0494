"""What a graph may do and take, whoever wrote it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from netclone.errors import ArchiveError
from netclone.graph.dry_run import dry_run, gives_new_memory
from netclone.graph.signatures import bind

aten = torch.ops.aten
Build = Callable[[fx.Graph, fx.Node], Any]
SHAPE = (4, 8, 8)


def call(graph: fx.Graph, name: str, *args: Any, **kwargs: Any) -> fx.Node:
    packet, _, overload = name.partition(".")
    return graph.call_function(getattr(getattr(aten, packet), overload or "default"), args, kwargs)


def run(build: Build, tensors: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Check a graph: what ``build`` gives of the input, down to two columns."""
    graph = fx.Graph()
    made = build(graph, graph.placeholder("x"))
    flat = call(graph, "flatten.using_ints", made, 1)
    graph.output(call(graph, "slice.Tensor", flat, 1, 0, 2))
    on_meta = {name: tensor.to("meta") for name, tensor in (tensors or {}).items()}
    dry_run(graph, on_meta, [SHAPE], dtype, 2)


def sizes(graph: fx.Graph, x: fx.Node) -> Any:
    return call(graph, "sym_size.int", x, 0)


def norm(graph: fx.Graph, x: fx.Node, training: bool, statistics: bool) -> fx.Node:
    held = [graph.get_attr(name) if statistics else None for name in ("mean", "variance")]
    return call(graph, "batch_norm", x, None, None, *held, training, 0.1, 1e-5, False)


def fresh_then(name: str, *args: Any) -> Build:
    return lambda g, x: call(g, name, call(g, "mul.Tensor", x, 2.0), *args)


STATISTICS = {"mean": torch.zeros(4), "variance": torch.ones(4)}
FINE: dict[str, Build] = {
    "an in-place operator on memory of its own": fresh_then("relu_"),
    "two in-place operators": lambda g, x: call(g, "relu_", call(g, "mul_.Tensor", call(g, "neg", x), 3.0)),
    "running statistics": lambda g, x: norm(g, x, False, True),
    "statistics of the batch": lambda g, x: norm(g, x, True, False),
    "any pure operator": lambda g, x: call(g, "logcumsumexp", x, 1),
    "a reshape by the batch size": lambda g, x: call(g, "view", x, [sizes(g, x), 256]),
    "windows": lambda g, x: call(
        g, "view", call(g, "view", x, [g.call_function(operator.mul, (sizes(g, x), 4)), 64]), [sizes(g, x), 256]
    ),
    "a quotient that is exact": lambda g, x: call(
        g,
        "view",
        x,
        [g.call_function(operator.floordiv, (g.call_function(operator.mul, (sizes(g, x), 4)), 4)), 256],
    ),
    "attention": lambda g, x: call(g, "scaled_dot_product_attention", x, x, x),
    "rows of a table": lambda g, x: call(g, "expand", call(g, "zeros", [1, 8]), [sizes(g, x), 8]),
}


@pytest.mark.parametrize("what", FINE)
def test_harmless_graphs_pass(what: str) -> None:
    run(FINE[what], STATISTICS if "running" in what else None)


def in_place_on_a_view(g: fx.Graph, x: fx.Node) -> fx.Node:
    return call(g, "mul_.Tensor", call(g, "select.int", x, 1, 0), 2.0)


def read_later(g: fx.Graph, x: fx.Node) -> fx.Node:
    y = call(g, "neg", x)
    return call(g, "add.Tensor", call(g, "relu_", y), y)


def shared_by_a_view(g: fx.Graph, x: fx.Node) -> fx.Node:
    y = call(g, "neg", x)
    part = call(g, "select.int", y, 1, 0)
    return call(g, "add.Tensor", call(g, "relu_", call(g, "view", part, [-1, 8, 8])), call(g, "view", y, [-1, 4, 8, 8]))


WRITES: dict[str, Build] = {
    "its input": lambda g, x: call(g, "mul_.Tensor", x, 2.0),
    "a view of its input": in_place_on_a_view,
    "its input by another name": lambda g, x: call(g, "relu_", call(g, "type_as", x, x)),
    "its input, as a product of one": lambda g, x: call(g, "relu_", call(g, "einsum", "nchw->nchw", [x])),
    "its input, unchanged by to": lambda g, x: call(g, "relu_", call(g, "to.dtype", x, torch.float32)),
    "a tensor of its own": lambda g, x: call(g, "add.Tensor", x, call(g, "add_.Tensor", g.get_attr("mean"), 1.0)),
    "what is read later": read_later,
    "what a view shares": shared_by_a_view,
    "running statistics": lambda g, x: norm(g, x, True, True),
}


@pytest.mark.parametrize("what", WRITES)
def test_graphs_that_write_are_refused(what: str) -> None:
    tensors = {"running statistics": STATISTICS, "a tensor of its own": {"mean": torch.zeros(8)}}
    with pytest.raises(ArchiveError, match="writes into"):
        run(WRITES[what], tensors.get(what))


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "feature_dropout"])
def test_dropout_only_where_it_drops_nothing(name: str) -> None:
    run(lambda g, x: call(g, name, x, 0.5, False))
    with pytest.raises(ArchiveError, match="random"):
        run(lambda g, x: call(g, name, x, 0.5, True))


WRONG: dict[str, tuple[Any, ...]] = {
    "softmax.int": (1, 6),
    "sum.dim_IntList": ("1",),
    "mean.dim": ([1.0],),
    "transpose.int": (True, 1),
    "softplus": ([1.0],),
    "gelu": (),
    "max_pool2d": ([2, 2, 2],),
    "cumsum": (1, {}),
    "contiguous": (),
    "add.Tensor": ("x",),
    "leaky_relu": (None,),
    "_fft_r2c": ([1], 2**31, True),
    "grid_sampler_2d": (0.0, 3, 0, False),
    "pow.Tensor_Scalar": (True,),
}
KEYWORDS = {"gelu": {"approximate": "wild"}, "contiguous": {"memory_format": 1}, "cumsum": {"dtype": 6}}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_another_type_are_refused(name: str) -> None:
    args = tuple(value for value in WRONG[name] if value != {})
    with pytest.raises(ArchiveError, match="does not accept its arguments: '"):
        run(lambda g, x: call(g, name, x, *args, **KEYWORDS.get(name, {})))


@pytest.mark.parametrize("number", [0.0, 2, 1.5])
def test_a_number_stands_for_the_tensor_itself_only_where_it_is_broadcast(number: float) -> None:
    run(lambda g, x: call(g, "mul.Tensor", number, x))
    with pytest.raises(ArchiveError, match="'self' has to be Tensor"):
        run(lambda g, x: call(g, "to.other", number, x, True))


def test_arguments_are_bound_by_name() -> None:
    bound = bind(aten.add.Tensor, (torch.ones(1), 2), {}, "here")
    assert list(bound) == ["self", "other", "alpha"] and bound["alpha"] == 1
    for args, kwargs in [((), {}), ((torch.ones(1),) * 3, {}), ((torch.ones(1),), {"self": torch.ones(1)})]:
        with pytest.raises(ArchiveError, match="here does not accept"):
            bind(aten.add.Tensor, args, kwargs, "here")


def stacked(g: fx.Graph, x: fx.Node) -> fx.Node:
    """Many tensors, each of them small enough, held at a time."""
    parts = [call(g, "add.Scalar", call(g, "zeros", [2**20, 8]), index) for index in range(64)]
    rows = [call(g, "sum", part) for part in parts]
    total = rows[0]
    for row in rows[1:]:
        total = call(g, "add.Tensor", total, row)
    return call(g, "add.Tensor", x, total)


def step_in_the_batch(g: fx.Graph, x: fx.Node) -> fx.Node:
    step = g.call_function(operator.floordiv, (sizes(g, x), 100_000))
    wide = g.call_function(operator.mul, (step, 2**30))
    return call(g, "repeat", x, [1, g.call_function(operator.add, (wide, 1)), 1, 1])


def rest_of_the_batch(g: fx.Graph, x: fx.Node) -> fx.Node:
    rest = g.call_function(operator.sub, (g.call_function(operator.mod, (sizes(g, x), 5000)), sizes(g, x)))
    return call(g, "repeat", x, [1, g.call_function(operator.sub, (1, rest)), 1, 1])


def later_samples(g: fx.Graph, x: fx.Node) -> fx.Node:
    late = call(g, "repeat", call(g, "slice.Tensor", x, 0, 1000), [1, 2**16, 1, 1])
    return call(g, "add.Tensor", x, call(g, "sum", late))


def products(g: fx.Graph, x: fx.Node) -> fx.Node:
    y = call(g, "ones", [2**11, 2**11])
    for _ in range(4):
        y = call(g, "mm", y, y)
    return call(g, "add.Tensor", x, call(g, "sum", y))


BOMBS: dict[str, Build] = {
    "many tensors": stacked,
    "a step in the batch size": step_in_the_batch,
    "the rest of the batch size": rest_of_the_batch,
    "samples that only large batches have": later_samples,
    "products": products,
    "a square of the batch": lambda g, x: call(
        g, "add.Tensor", x, call(g, "sum", call(g, "zeros", [sizes(g, x), sizes(g, x)]))
    ),
    "attention across the batch": lambda g, x: call(
        g,
        "transpose.int",
        call(g, "matmul", call(g, "permute", x, [1, 2, 0, 3]), call(g, "permute", x, [1, 2, 3, 0])),
        0,
        2,
    ),
    "a pool of a large window": lambda g, x: call(
        g, "max_pool2d", call(g, "repeat", x, [1, 1, 100, 100]), [401, 401], [1, 1], [200, 200]
    ),
    "as many pieces as samples": lambda g, x: call(g, "stack", call(g, "unbind.int", x, 0), 0),
}


@pytest.mark.parametrize("what", BOMBS)
def test_graphs_that_take_too_much_are_refused(what: str) -> None:
    with pytest.raises(ArchiveError, match=r"too large|pieces|do not grow"):
        run(BOMBS[what])


def test_the_output_has_a_row_for_each_sample() -> None:
    with pytest.raises(ArchiveError, match="the output is"):
        run(lambda g, x: call(g, "slice.Tensor", call(g, "repeat", x, [2, 1, 1, 1]), 0, 0, 2))


def test_dtypes_do_not_meet_by_accident() -> None:
    weight = torch.ones(5, 8, dtype=torch.float64)
    with pytest.raises(ArchiveError, match="float32 and float64"):
        run(lambda g, x: call(g, "linear", x, g.get_attr("w")), {"w": weight})
    run(lambda g, x: call(g, "linear", x, g.get_attr("w")), {"w": weight}, torch.float64)
    run(lambda g, x: call(g, "linear", call(g, "to.dtype", x, torch.float64), g.get_attr("w")), {"w": weight})
    with pytest.raises(ArchiveError, match="floating-point"):
        run(lambda g, x: call(g, "to.dtype", x, torch.int64))


def test_an_lstm_is_measured_by_its_weights() -> None:
    weights = {f"w{i}": w.detach() for i, w in enumerate(torch.nn.LSTM(8, 6, batch_first=True)._flat_weights)}

    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = call(g, "select.int", x, 1, 0)
        state = call(g, "new_zeros", y, [1, sizes(g, x), 6])
        params = [g.get_attr(name) for name in weights]
        out = call(g, "lstm.input", y, [state, state], params, True, 1, 0.0, False, False, True)
        return g.call_function(operator.getitem, (out, 0))

    run(build, weights)
    with pytest.raises(ArchiveError, match="weights of other shapes"):
        run(build, {**weights, "w1": torch.ones(24, 5)})


def test_new_memory() -> None:
    assert gives_new_memory(aten.conv2d.default) and gives_new_memory(aten.add.Tensor)
    for kind in (aten.view.default, aten.type_as.default, aten.einsum.default, operator.getitem, math.floor):
        assert not gives_new_memory(kind)
