"""Operators with random arguments of every kind, through load's own check, and then a real run."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from netclone.errors import ArchiveError
from netclone.files.graphdata import graph_from_data
from netclone.graph.dry_run import dry_run
from netclone.graph.purity import find_operator, type_of

SHAPES = [(4,), (3, 4), (4, 6, 6), (8, 5), (1,), (2, 3, 4, 5), (0,), (16, 1, 1)]
STORED = [(4,), (1,), (), (4, 4), (3, 4), (8, 4, 3, 3), (4, 1, 3, 3), (2, 8), (0, 4), (5, 5), (8,), (2, 3, 4)]
DTYPES = ["float32", "float32", "float32", "float64", "int64", "bool", "int32", "uint8", "float16", "bfloat16"]
INTEGERS = [0, 1, 1, 2, 2, 3, 4, 5, -1, -1, -2, 7, 64, 1000, 10**6, 2**30, 2**31, -(2**31), 2**31 + 1, 2**63 - 1]
FLOATS = [0.0, 1.0, 0.5, -1.0, 2.0, 1e-5, 1e300, -1e30]
WORDS = [
    "same",
    "valid",
    "constant",
    "reflect",
    "circular",
    "trunc",
    "none",
    "tanh",
    "sum",
    "mean",
    "amax",
    "ij",
    "left",
]
WORDS += ["ortho", "ij,jk->ik", "nc,nc->n", "...i->...", "linear", "x", "", "fro", "\x00"]
LITERALS = [{"dtype": name} for name in DTYPES] + [{"memory_format": "channels_last"}, {"layout": "strided"}]
LITERALS += [{"device": "cpu"}, {"float": "nan"}, {"float": "inf"}, {"memory_format": "contiguous_format"}]


@functools.cache
def names() -> list[str]:
    """All operators that a file may name."""
    found = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    full = [f"aten.{name}" if "." in name else f"aten.{name}.default" for name in sorted(found)]
    return [name for name in full if find_operator(name) is not None]


class Case:
    """One graph with one call of random arguments, from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        self.shape = rng.choice(SHAPES)
        self.name = names()[seed % len(names())]
        self.stored = {f"w{i}": (rng.choice(STORED), rng.choice(DTYPES)) for i in range(4)}
        self.nodes = [_node("x", "x", op="placeholder")]
        self.nodes += [_node(name, name, op="get_attr") for name in self.stored]
        if self.shape[0] and rng.random() < 0.3:
            self.nodes.append(_node("v0", "aten.transpose.int", {"node": "x"}, 0, rng.randrange(len(self.shape) + 1)))
        elif rng.random() < 0.4:
            self.nodes.append(_node("v0", "aten.mul.Tensor", {"node": "x"}, 2.0))
        self.nodes.append(_node("n0", "aten.sym_size.int", {"node": "x"}, 0))
        args, kwargs = [], {}
        operator: Any = find_operator(self.name)
        for argument in operator._schema.arguments:
            if argument.has_default_value() and rng.random() < 0.4:
                if argument.kwarg_only:
                    continue
                args.append(_plain(argument.default_value))
            elif argument.kwarg_only:
                kwargs[argument.name] = self.value(argument)
            else:
                args.append(self.value(argument))
        self.nodes.append(_node("z", self.name, *args, **kwargs))
        self.nodes.append(_node("f", "aten.reshape.default", {"node": "x"}, [{"node": "n0"}, math.prod(self.shape)]))
        self.nodes.append(_node("s", "aten.sum.dim_IntList", {"node": "f"}, [1], True))
        self.nodes += [
            _node("e", "aten.expand.default", {"node": "s"}, [-1, 2]),
            _node("output", "output", {"node": "e"}, op="output"),
        ]

    def value(self, argument: Any) -> Any:
        """A value of the kind that is expected, most times."""
        kind, many, optional = type_of(argument)
        if self.rng.random() < 0.04:
            kind = self.rng.choice(["Tensor", "int", "float", "bool", "str", "ScalarType"])
        if optional and self.rng.random() < 0.3:
            return None
        if many or self.rng.random() < 0.01:
            count = argument.N if argument.N and self.rng.random() < 0.7 else self.rng.choice([0, 1, 2, 2, 3, 4])
            return [self.item(kind) for _ in range(count)]
        return self.item(kind)

    def item(self, kind: str) -> Any:
        rng = self.rng
        if kind.startswith("Tensor"):
            tensors = [node["name"] for node in self.nodes if node["name"] not in ("n0",)]
            weights = [3 if name in ("x", "v0") else 1 for name in tensors]
            return {"node": rng.choices(tensors, weights)[0]} if rng.random() < 0.97 else rng.choice([None, 1, 0.5])
        if kind == "int":
            return {"node": "n0"} if rng.random() < 0.05 else rng.choice(INTEGERS[: rng.choice([8, 12, 20])])
        if kind in ("float", "number"):
            return rng.choice(FLOATS + ([2, True] if kind == "number" else []))
        if kind == "bool":
            return rng.random() < 0.5
        if kind == "str":
            return rng.choice(WORDS)
        return rng.choice(LITERALS)


def _node(name: str, target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else None


def _filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        if tensor.numel() and seed % 5 == 0:
            tensor.view(-1)[0] = [math.nan, math.inf, -math.inf][seed % 3]
        return tensor
    high = 2 if dtype == torch.bool else 4
    return torch.randint(0 if dtype in (torch.bool, torch.uint8) else -1, high, shape, generator=generator).to(dtype)


def run(seed: int) -> str:
    """What became of one case: "refused", "ran", "raised" (in the real run), or how it misbehaved."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _run(Case(seed), seed)


def _run(case: Case, seed: int) -> str:
    dtypes = {name: getattr(torch, dtype) for name, (_, dtype) in case.stored.items()}
    try:
        graph = graph_from_data(case.nodes, case.stored, max_nodes=100)
        meta = {n: torch.empty(s, dtype=dtypes[n], device="meta") for n, (s, _) in case.stored.items()}
        dry_run(graph, meta, [case.shape], torch.float32, 2)
    except ArchiveError:
        return "refused"
    own = {
        name: _filled(shape, dtypes[name], seed + index) for index, (name, (shape, _)) in enumerate(case.stored.items())
    }
    x = _filled((2, *case.shape), torch.float32, seed)
    before = [tensor.clone() for tensor in (x, *own.values())]
    state = torch.get_rng_state()
    try:
        values = [_values(graph, own, x) for _ in range(2)]
    except (RuntimeError, IndexError, ValueError, NotImplementedError, TypeError) as error:
        if "alloc" in str(error):
            return "took too much memory"
        return "raised" if all(map(_same, before, (x, *own.values()))) else "wrote into what is not its own"
    except MemoryError:
        return "took too much memory"
    if not all(map(_same, before, (x, *own.values()))):
        return "wrote into what is not its own"
    if not torch.equal(state, torch.get_rng_state()):
        return "drew at random"
    if not all(map(_same, values[0], values[1])):
        return "gave another result the second time"
    try:
        wanted = _values(graph, meta, torch.empty(2, *case.shape, device="meta"))
    except Exception:  # a factory, which knows no device of its own
        return "ran"
    if [(v.shape, v.dtype) for v in values[0]] != [(v.shape, v.dtype) for v in wanted]:
        return "gave another shape than it was checked with"
    return "ran"


def _values(graph: fx.Graph, tensors: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Run a graph, and give what node ``z`` gives, as a list of tensors."""
    values: dict[fx.Node, Any] = {}
    found: list[Tensor] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)]
        elif node.op == "call_function":
            called: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = called(*args, **kwargs)
        if node.name == "z":
            items = values[node] if isinstance(values[node], (list, tuple)) else [values[node]]
            found = [item.clone() for item in items if isinstance(item, Tensor)]
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    return bool(((one == other) | ((one != one) & (other != other))).all())


def tally(kinds: list[str]) -> dict[str, int]:
    """How many of each."""
    return dict(sorted(Counter(kinds).items()))
