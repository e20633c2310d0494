from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import netclone
from netclone.cloning.modules import CloneModule, load, save
from netclone.errors import ArchiveError
from netclone.files import archiving, graphdata
from netclone.files import spec as spec_module
from netclone.files.archiving import FORMAT_VERSION, read_header
from netclone.files.provenance import is_absolute_path
from netclone.files.spec import Candidate, CloneSpec
from netclone.graph.dry_run import dry_run
from netclone.graph.recurrent import recurrent_by_shape
from netclone.runtime.text import is_plain_text

aten = torch.ops.aten
SPEC = CloneSpec(
    classes=(5, 7),
    class_names=("coat", "bag"),
    source_at="layer2",
    input_shape=(3, 8, 8),
    certificate=2.5e-16,
    at="layer1.0",
    target_input_shape=(3, 32, 32),
    source_fingerprint="ab12",
    kept=(("layer3.0", 3, 8), ("fc", 2, 2)),
    scores=(("accuracy", 0.9), ("locality", 0.25)),
    search=(Candidate("layer1.0", "layer2", 0.9), Candidate("layer2.0", None, None, "shapes differ")),
)


def make(spec: CloneSpec = SPEC, width: int = 8) -> CloneModule:
    """conv, batch norm, relu, clamp to infinity, pool, linear: tensors in nested containers."""
    torch.manual_seed(len(spec.classes) + width)
    root = nn.Module()
    root.layer3 = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    root.fc = nn.Linear(width, len(spec.classes))
    root.fc.bias.requires_grad_(False)
    nn.init.normal_(root.layer3[1].running_mean)
    graph = fx.Graph()
    x = graph.placeholder("features")
    names = ("weight", "bias", "running_mean", "running_var")
    conv = [graph.get_attr(f"layer3.0.{name}") for name in names[:2]]
    norm = [graph.get_attr(f"layer3.1.{name}") for name in names]
    x = graph.call_function(aten.conv2d.default, (x, *conv, [1, 1], [1, 1]))
    x = graph.call_function(aten.batch_norm.default, (x, *norm, False, 0.1, 1e-5, True))
    x = graph.call_function(aten.relu.default, (x,))
    x = graph.call_function(aten.clamp.default, (x,), {"max": math.inf})
    x = graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32, "device": torch.device("cpu")})
    x = graph.call_function(aten.adaptive_avg_pool2d.default, (x, (1, 1)))
    x = graph.call_function(aten.flatten.using_ints, (x, 1))
    graph.output(graph.call_function(aten.linear.default, (x, graph.get_attr("fc.weight"), graph.get_attr("fc.bias"))))
    return CloneModule(fx.GraphModule(root, graph), spec).eval()


def small(*calls: tuple[Any, ...], tensors: dict[str, torch.Tensor] | None = None) -> CloneModule:
    """``(N, 2)`` in, ``(N, 2)`` out: a chain of operators, each on the value before it."""
    body = fx.GraphModule(nn.Module(), fx.Graph())
    graph = fx.Graph()
    for name, tensor in (tensors or {}).items():
        body.register_buffer(name, tensor)
    x = graph.placeholder("x")
    for target, *args in calls:
        x = graph.call_function(target, (x, *(graph.get_attr(a) if isinstance(a, str) else a for a in args)))
    graph.output(x)
    body.graph = graph
    return CloneModule(body, CloneSpec((0, 1), (), None, (2,), 0.0)).eval()


def assert_same(one: CloneModule, other: CloneModule) -> None:
    assert one.spec == other.spec
    assert one.body.code == other.body.code
    assert [node.name for node in one.body.graph.nodes] == [node.name for node in other.body.graph.nodes]
    state, expected = one.body.state_dict(keep_vars=True), other.body.state_dict(keep_vars=True)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert type(tensor) is type(expected[name]) and tensor.dtype == expected[name].dtype
        assert tensor.requires_grad == expected[name].requires_grad
        assert tensor.stride() == expected[name].stride()
        assert torch.equal(tensor, expected[name])
    x = torch.randn(3, *one.spec.input_shape)
    assert torch.equal(one(x), other(x))


def test_names_with_hyphens_round_trip(folder: Path) -> None:
    root = nn.Module()
    root.add_module("block1-0", nn.Linear(2, 2))
    graph = fx.Graph()
    tensors = [graph.get_attr(f"block1-0.{name}") for name in ("weight", "bias")]
    graph.output(graph.call_function(aten.linear.default, (graph.placeholder("x"), *tensors)))
    module = CloneModule(fx.GraphModule(root, graph), CloneSpec((0, 1), (), None, (2,), 0.0)).eval()
    save(module, folder / "hyphens.safetensors")
    assert_same(load(folder / "hyphens.safetensors"), module)


class Positions(nn.Module):
    """What an encoder adds to its tokens, picked from a table by a product with ones and zeros, and tiled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table, self.head = nn.Linear(3, 8), nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = nn.functional.one_hot(torch.arange(4).expand(x.shape[0], 4) // 2, num_classes=4).to(self.table)
        tokens = self.embed(x).relu() + torch.tile((places @ self.table)[:, 1:3], (1, 3, 1))
        return self.head(tokens.mean(1))


def test_embeddings_by_one_hot_and_tile_round_trip(folder: Path) -> None:
    model, x = Positions().eval(), torch.randn(2, 6, 3)
    groups = netclone.channel_groups(model, x)
    module = netclone.extract(groups, netclone.localize(groups, method="magnitude", keep=0.5))
    save(module, folder / "positions.safetensors")
    again = load(folder / "positions.safetensors")
    fresh = torch.randn(4, 6, 3)
    assert torch.equal(again(fresh), module(fresh))


@contextmanager
def guard(seconds: int = 20) -> Iterator[None]:
    """Fail instead of hanging."""

    def fail(*_: object) -> None:
        raise BaseException(f"a load took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name has none of the words that messages are searched for."""
    return tmp_path_factory.mktemp("f")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("f") / "a.safetensors"
    save(make(), path)
    return path.read_bytes()


def loaded(content: bytes, folder: Path) -> CloneModule:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    with guard():
        return load(path)


def taken_apart(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    [length] = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    return table, json.loads(table.pop("__metadata__")["netclone"]), content[8 + length :]


def put_together(table: dict[str, Any], header: dict[str, Any], data: bytes) -> bytes:
    """A file as an attacker would make it: whatever it says, its digest is right."""
    header.pop("sha256", None)
    facts, raw = [], []
    for item in header["tensors"]:
        stored = table.get(item["name"], {"dtype": "F32", "shape": [], "data_offsets": [0, 0]})
        facts.append([item["name"], stored["shape"], str(archiving._DTYPES.get(str(stored["dtype"])))])
        raw.append(data[slice(*map(int, stored["data_offsets"]))])
    digest = hashlib.sha256(json.dumps([header, facts], sort_keys=True).encode() + b"".join(raw))
    text = json.dumps({**header, "sha256": digest.hexdigest()})
    return container(json.dumps({"__metadata__": {"netclone": text}, **table}), data)


def container(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def node(header: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [item for item in header["graph"] if item["name"] == name]
    return found


# Round trips


def test_round_trip(folder: Path) -> None:
    module = make()
    save(module, folder / "a.safetensors")
    assert_same(load(folder / "a.safetensors"), module)
    assert not load(str(folder / "a.safetensors")).training
    assert os.listdir(folder) == ["a.safetensors"]


def test_saving_twice_gives_the_same_bytes(folder: Path) -> None:
    save(make(), folder / "a.safetensors")
    save(load(folder / "a.safetensors"), folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_the_file_is_plain_safetensors(folder: Path) -> None:
    save(make(), folder / "a.safetensors")
    tensors = safetensors.torch.load_file(folder / "a.safetensors")
    expected = make().body.state_dict()
    assert set(tensors) == {name for name in expected if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_read_header(folder: Path) -> None:
    save(make(), folder / "a.safetensors")
    header = read_header(folder / "a.safetensors")
    assert header.spec == SPEC
    assert header.format_version == 2 and FORMAT_VERSION == 5  # which is for clones with a bias
    shapes = {entry.name: entry.shape for entry in header.tensors}
    assert shapes["layer3.0.weight"] == (8, 3, 3, 3) and len(shapes) == 8
    assert {entry.name for entry in header.tensors if not entry.is_parameter} == {
        "layer3.1.running_mean",
        "layer3.1.running_var",
    }


def test_two_inputs(folder: Path) -> None:
    module = small((aten.relu.default,))
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("target_features")
    graph.output(graph.call_function(aten.add.Tensor, (x, y), {"alpha": 0.5}))
    spec = replace(module.spec, feature_shape=(2,), feature_node="pool")
    module = CloneModule(fx.GraphModule(nn.Module(), graph), spec)
    save(module, folder / "a.safetensors")
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(load(folder / "a.safetensors")(x, y), module(x, y))


def test_tensors_of_every_layout_and_dtype(folder: Path) -> None:
    base = torch.randn(4, 2, 5, 2)
    tensors = {
        "sliced": base[0, :, 0, :1].reshape(2),
        "shared": base[0, :, 0, 0],
        "expanded": torch.randn(1).expand(2),
        "transposed": torch.randn(2, 3, 2).transpose(0, 2),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 2),
        "_lifted_0": torch.tensor([True, False]),
        **{f"as_{str(dtype)[6:]}": torch.tensor([1, 2]).to(dtype) for dtype in archiving._DTYPES.values()},
    }
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
        x = graph.call_function(
            aten.add.Tensor, (x, graph.call_function(aten.sum.dim_IntList, (graph.get_attr(name), None)))
        )
    graph.output(graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32}))
    module = CloneModule(fx.GraphModule(root, graph), small().spec)
    save(module, folder / "a.safetensors")
    again = load(folder / "a.safetensors")
    assert again.body.code == module.body.code
    for name, tensor in tensors.items():
        got = again.body.get_buffer(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    assert again.body.transposed.stride() == tensors["transposed"].stride()
    assert again.body.channels_last.is_contiguous(memory_format=torch.channels_last)
    storages = [again.body.get_buffer(name).untyped_storage().data_ptr() for name in ("sliced", "shared")]
    assert storages[0] != storages[1]
    x = torch.randn(3, 2)
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("at", [None, "layer2"])
def test_an_extracted_module_round_trips(folder: Path, at: str | None) -> None:
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=6).eval()
    mask = netclone.localize(source, method="magnitude", keep=0.5)
    module = netclone.extract(source, mask, at=at, classes=[1, 3], class_names=["coat", "bag"])
    save(module, folder / "a.safetensors")
    assert_same(load(folder / "a.safetensors"), module)
    content = (folder / "a.safetensors").read_bytes()
    assert peak_of_load(content, folder) <= 10 * len(content)


text = st.text(max_size=8).filter(lambda value: is_plain_text(value) and not is_absolute_path(value))
name = st.none() | text
sizes = st.lists(st.integers(1, 40), max_size=4).map(tuple)
whole = st.integers(-(2**62), 2**62)
finite = st.floats(-1e30, 1e30)
pairs = st.tuples(text, finite)
kept = st.integers(1, 2**31).flatmap(lambda size: st.tuples(text, st.integers(0, size), st.just(size)))


@st.composite
def specs(draw: st.DrawFn) -> CloneSpec:
    classes = tuple(draw(st.lists(whole, min_size=1, max_size=4)))
    names = draw(st.sampled_from([0, len(classes)]))
    return CloneSpec(
        classes=classes,
        class_names=tuple(draw(st.lists(text, min_size=names, max_size=names))),
        source_at=draw(name),
        input_shape=(3, draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        certificate=draw(st.floats(0, 1e30)),
        at=draw(name),
        feature_node=draw(name),
        target_input_shape=draw(st.none() | sizes),
        source_fingerprint=draw(text),
        target_fingerprint=draw(text),
        kept=tuple(draw(st.lists(kept, max_size=3))),
        scores=tuple(draw(st.lists(pairs, max_size=3))),
        search=tuple(draw(st.lists(st.builds(Candidate, text, name, st.none() | finite, text), max_size=3))),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(specs())
def test_any_spec_round_trips(tmp_path_factory: pytest.TempPathFactory, spec: CloneSpec) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    module = make(spec, width=2)
    save(module, path)
    again = load(path)
    assert repr(again.spec) == repr(spec)  # repr, since nan is not equal to itself
    assert again.body.code == module.body.code


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31)
    | st.just(sys.maxsize)
    | st.floats()
    | text
    | st.sampled_from([value for names in graphdata._LITERALS.values() for value in names.values()]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
).filter(lambda value: repr(value).count("[") + repr(value).count("(") < 8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(literals, max_size=4), st.dictionaries(st.sampled_from(["dim", "alpha", "dtype"]), literals))
def test_any_literal_round_trips(args: list[Any], kwargs: dict[str, Any]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.relu.default, (x, *args, [x, (x, None)]), kwargs))
    data = json.loads(json.dumps(graphdata.graph_to_data(graph), allow_nan=False))
    again = graphdata.graph_from_data(data, (), max_nodes=3)
    for one, other in zip(again.nodes, graph.nodes, strict=True):
        assert one.op == other.op and one.name == other.name and one.target == other.target
        assert repr(one.args) == repr(other.args) and repr(one.kwargs) == repr(other.kwargs)


def test_a_file_of_format_1_is_read() -> None:
    module = load(Path(__file__).parent / "data" / "format_1.safetensors")
    assert (module.classes, module.class_names, module.at) == ((2, 3), ("heron", "ibis"), "body")
    assert (module.spec.recipe, module.spec.versions, module.spec.origin) == ((), (), ())
    assert module(torch.ones(2, 8, 16, 16), torch.ones(2, 2)).shape == (2, 2)


def test_every_field_of_the_spec_is_archived() -> None:
    assert list(spec_module._SPEC) == [field.name for field in fields(CloneSpec)]
    assert list(spec_module._CANDIDATE) == [field.name for field in fields(Candidate)]


# Damage


def test_damaged_files_load_to_the_same_function_or_raise(content: bytes, folder: Path) -> None:
    rng = random.Random(0)
    module, refused = make(), 0
    for trial in range(1000):
        if trial % 4:
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        else:
            damaged = bytearray(content[: rng.randrange(len(content))])
        try:
            again = loaded(bytes(damaged), folder)
        except ArchiveError:
            refused += 1
        else:
            assert_same(again, module)
    assert refused > 900


@pytest.mark.parametrize("position", [-1, -100, 700])
def test_a_changed_bit_is_called_damage(content: bytes, folder: Path, position: int) -> None:
    _, _, data = taken_apart(content)
    changed = bytearray(data)
    changed[position] ^= 1
    with pytest.raises(ArchiveError, match="digest does not match"):
        loaded(content[: -len(data)] + bytes(changed), folder)


def peak_of_load(content: bytes, folder: Path) -> int:
    tracemalloc.start()
    try:
        loaded(content, folder)
    except ArchiveError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_bounded_by_the_size_of_the_file(folder: Path) -> None:
    save(make(width=4096), folder / "big.safetensors")
    content = (folder / "big.safetensors").read_bytes()
    rng = random.Random(1)
    assert peak_of_load(content, folder) <= 10 * len(content)
    for trial in range(30):
        damaged = bytearray(content)
        damaged[rng.randrange(8 if trial % 3 == 0 else len(content))] ^= rng.randrange(1, 256)
        assert peak_of_load(bytes(damaged), folder) <= 10 * len(content)


def test_memory_is_bounded_for_a_header_of_nothing_but_items(folder: Path) -> None:
    rooms = [
        json.dumps({"__metadata__": [[]] * 300_000}),
        json.dumps({"__metadata__": {"netclone": "[" + "[]," * 300_000 + "[]]"}}),
        json.dumps({str(index): 1 for index in range(100_000)}),
    ]
    module = small(*[(aten.relu.default,)] * 1000)
    save(module, folder / "a.safetensors")
    for content in (*map(container, rooms), (folder / "a.safetensors").read_bytes()):
        assert peak_of_load(content, folder) <= 10 * len(content) + 2**24


# Hostile files, each with a valid digest


def test_a_forged_file_without_offence_loads(content: bytes, folder: Path) -> None:
    table, header, data = taken_apart(content)
    header["spec"]["class_names"] = ["hat", "shoe"]
    assert loaded(put_together(table, header, data), folder).class_names == ("hat", "shoe")


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """An edit of ``{"table": ..., "header": ..., "node": {name: node}}`` at a path."""

    def edit(table: dict[str, Any], header: dict[str, Any]) -> None:
        *most, last = path
        nodes = {item["name"]: item for item in header["graph"]}
        place: Any = {"table": table, "header": header, "node": nodes}
        for key in most:
            place = place[key]
        place[last] = value

    return edit


def _rename(new: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def edit(table: dict[str, Any], header: dict[str, Any]) -> None:
        table[new] = table.pop("fc.bias")
        node(header, "fc_bias")["target"] = new
        header["tensors"][-1]["name"] = new

    return edit


def _insert(target: str, *args: Any, times: int = 1) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Call an operator on the input, before all others."""

    def edit(table: dict[str, Any], header: dict[str, Any]) -> None:
        before = "features"
        for index in range(times):
            item = {"op": "call_function", "name": f"extra_{index}", "target": target, "kwargs": {}}
            header["graph"].insert(1 + index, {**item, "args": [{"node": before}, *args]})
            before = f"extra_{index}"

    return edit


def _overlap(table: dict[str, Any], header: dict[str, Any]) -> None:
    table["layer3.0.bias"]["data_offsets"] = table["layer3.1.weight"]["data_offsets"]


def _swap_nodes(table: dict[str, Any], header: dict[str, Any]) -> None:
    header["graph"].insert(0, header["graph"].pop(-2))


def _unread(table: dict[str, Any], header: dict[str, Any]) -> None:
    node(header, "linear_default")["args"][2] = None
    header["graph"].remove(node(header, "fc_bias"))


def _power_tower(table: dict[str, Any], header: dict[str, Any]) -> None:
    """Squares of squares: a number of 2**200 digits."""
    _insert("aten.sym_size.int", 0)(table, header)
    for index in range(200):
        call = {"op": "call_function", "name": f"square_{index}", "target": "operator.mul", "kwargs": {}}
        before = {"node": f"square_{index - 1}" if index else "extra_0"}
        header["graph"].insert(2 + index, {**call, "args": [before, before]})


def _many_pieces(table: dict[str, Any], header: dict[str, Any]) -> None:
    """Take the input apart once by all its rows, time and again."""
    header["spec"]["input_shape"] = [3, 1000, 8]
    for index in range(100):
        call = {"op": "call_function", "name": f"u_{index}", "target": "aten.unbind.int", "kwargs": {"dim": 2}}
        header["graph"].insert(1, {**call, "args": [{"node": "features"}]})


HUGE = 2**40
FORGED = {
    "operator": (_set("node", "relu_default", "target", value="aten.foo"), "operator 'aten.foo' is not on the allow"),
    "operator of the system": (_set("node", "relu_default", "target", value="os.system"), "not on the allow-list"),
    "operator that is no text": (_set("node", "relu_default", "target", value=["x"]), "not on the allow-list"),
    "posix path": (_set("header", "spec", "source_at", value="/etc/passwd"), "absolute path"),
    "windows path": (_set("header", "spec", "class_names", 0, value="C:\\boot.ini"), "absolute path"),
    "more kept than there are": (_set("header", "spec", "kept", 0, 1, value=9), "9 of 8 channels kept"),
    "fewer kept than none": (_set("header", "spec", "kept", 0, 1, value=-1), "-1 of 8 channels kept"),
    "kept of none": (_set("header", "spec", "kept", 0, value=["a", 0, 0]), "0 of 0 channels kept"),
    "kept of too many": (_set("header", "spec", "kept", 0, 2, value=2**62), "channels kept"),
    "certificate below zero": (_set("header", "spec", "certificate", value=-1e-9), "error of 0 or more"),
    "no certificate": (_set("header", "spec", "certificate", value={"float": "nan"}), "a finite number"),
    "score beyond a float": (_set("header", "spec", "scores", value=[["all", 10**400]]), "expected a"),
    "half a character": (_set("header", "spec", "class_names", 0, value="\ud800"), "without control characters"),
    "terminal escape": (_set("header", "spec", "source_at", value="\x1b[2J"), "without control characters"),
    "text from right to left": (_set("header", "spec", "kept", 0, 0, value="\u202e"), "without control characters"),
    "endless text": (_set("header", "spec", "source_fingerprint", value="x" * 10_001), "without control characters"),
    "unc path": (_set("header", "spec", "kept", 0, 0, value="\\\\host\\share"), "absolute path"),
    "path as operator": (_set("node", "relu_default", "target", value="/usr/lib/x.so"), "absolute path"),
    "path as literal": (_set("node", "relu_default", "args", value=[" /etc/x"]), "absolute path"),
    "path as tensor": (_rename("/etc/x"), "absolute path"),
    "path as key": (_set("header", "spec", "D:/x", value=1), "absolute path"),
    "huge tensor": (_set("table", "fc.bias", "shape", value=[HUGE]), r"shape .*too large"),
    "long tensor": (_set("table", "fc.bias", "shape", value=[2**20, 2**20]), r"shape .*too large"),
    "tensor larger than its bytes": (_set("table", "fc.bias", "shape", value=[3]), r"shape .*too large"),
    "tensor smaller than its bytes": (_set("table", "fc.bias", "shape", value=[1]), r"shape .*too small"),
    "huge input": (_set("header", "spec", "input_shape", value=[3, 2**20, 2**20]), r"input_shape.*shape .*too large"),
    "huge batch": (_set("header", "spec", "input_shape", value=[2**31]), r"input_shape.*shape .*too large"),
    "huge features": (_set("header", "spec", "feature_shape", value=[HUGE]), r"feature_shape.*shape .*too large"),
    "huge literal": (_set("node", "adaptive_avg_pool2d_default", "args", 1, value=[HUGE, 1]), r"shape .*too large"),
    "huge pool": (_set("node", "adaptive_avg_pool2d_default", "args", 1, value=[2**16] * 2), r"shape .*too large"),
    "overflowing pool": (
        _set("node", "adaptive_avg_pool2d_default", "args", 1, value=[2**31] * 2),
        r"shape .*too large",
    ),
    "huge repeat": (_insert("aten.repeat.default", [1, 2**20, 2**20, 1]), r"shape .*too large"),
    "huge expand": (_insert("aten.expand.default", [2**31, 2, 3, 8, 8]), r"shape .*too large"),
    "huge axes": (_insert("aten.unsqueeze.default", 0, times=100), r"too large"),
    "huge number": (_power_tower, "too large"),
    "repeated text": (_insert("operator.mul", "x"), "takes numbers"),
    "many pieces": (_insert("aten.split.Tensor", 0, 3), "pieces|does not accept"),
    "many small pieces": (_many_pieces, "too many pieces"),
    "newer": (
        _set("header", "format_version", value=6),
        r"written by a newer netclone \(format 6; this one reads up to 5\): upgrade netclone",
    ),
    "version zero": (_set("header", "format_version", value=0), "not a netclone archive"),
    "version true": (_set("header", "format_version", value=True), "not a netclone archive"),
    "overlap": (_overlap, "overlap|hole"),
    "negative offset": (_set("table", "fc.bias", "data_offsets", value=[-8, 0]), "outside the file"),
    "offset beyond": (_set("table", "fc.bias", "data_offsets", value=[10**6, 10**6 + 8]), "outside the file"),
    "offset of text": (_set("table", "fc.bias", "data_offsets", value=["0", "8"]), "outside the file"),
    "dtype": (_set("table", "fc.bias", "dtype", value="F8_E4M3"), "unknown dtype"),
    "dtype that is a list": (_set("table", "fc.bias", "dtype", value=[]), "unknown dtype"),
    "shape of fractions": (_set("table", "fc.bias", "shape", value=[2.0]), "has to be a shape"),
    "shape of truths": (_set("table", "fc.bias", "shape", value=[True, 2]), "has to be a shape"),
    "negative shape": (_set("table", "fc.bias", "shape", value=[-1, -2]), "has to be a shape"),
    "order": (_set("header", "tensors", 0, "order", value=[0, 0, 1, 2]), "no order of 4 axes"),
    "dunder tensor": (_rename("fc.__class__"), "double underscore"),
    "dunder container": (_rename("__dict__.bias"), "double underscore"),
    "method as tensor": (_rename("fc.forward"), "attribute of every module"),
    "flag as tensor": (_rename("training"), "attribute of every module"),
    "table as container": (_rename("_parameters.bias"), "attribute of every module"),
    "graph as tensor": (_rename("graph"), "attribute of every module"),
    "code as tensor": (_rename("fc.bias; import os"), "not an identifier"),
    "empty segment": (_rename("fc..bias"), "not an identifier"),
    "tensor below a tensor": (_rename("fc.weight.bias"), "'fc.weight' has another tensor below it"),
    "dunder node": (_set("node", "relu_default", "name", value="__import__"), "double underscore"),
    "code as node": (_set("node", "relu_default", "name", value="x = 1\n"), "not an identifier"),
    "keyword as node": (_set("node", "relu_default", "name", value="lambda"), "not an identifier"),
    "self as node": (_set("node", "relu_default", "name", value="self"), "not an identifier"),
    "torch as node": (_set("node", "features", "name", value="torch"), "taken or reserved|not defined"),
    "node twice": (_set("node", "linear_default", "name", value="relu_default"), "taken or reserved"),
    "code as keyword": (_set("node", "relu_default", "kwargs", value={"a=print(1), b": 1}), "not an identifier"),
    "code as placeholder": (_set("node", "features", "target", value="x=print(1)"), "not an identifier"),
    "unknown keyword": (_set("node", "relu_default", "kwargs", value={"alpha": 1}), "does not accept"),
    "unknown tensor": (_set("node", "fc_bias", "target", value="fc.other"), "no tensor"),
    "unread tensor": (_unread, "'fc.bias' is not read by the graph"),
    "node of modules": (_set("node", "relu_default", "op", value="call_module"), "call_module"),
    "use before definition": (_swap_nodes, "not defined before"),
    "unknown tag": (_set("node", "relu_default", "args", 0, value={"eval": "1"}), "no literal"),
    "unknown dtype tag": (_set("node", "relu_default", "args", 0, value={"dtype": "load"}), "no literal"),
    "device": (_set("node", "_to_copy_default", "kwargs", "device", value={"device": "cuda"}), "no literal"),
    "shape that does not fit": (_set("header", "spec", "input_shape", value=[4, 8, 8]), "does not accept"),
    "other classes": (_set("header", "spec", "classes", value=[1, 2, 3]), "class names"),
    "more classes": (_set("header", "spec", "classes", value=[1, 2, 3]), "class names"),
    "no classes": (_set("header", "spec", "classes", value=[]), "0 classes"),
    "classes of text": (_set("header", "spec", "classes", value=["5", "7"]), "expected an integer"),
    "second input": (_set("header", "spec", "feature_shape", value=[4]), "placeholders"),
    "unknown field": (_set("header", "hook", value="x"), "exactly the fields"),
    "unknown field of the spec": (_set("header", "spec", "hook", value="x"), "exactly the fields"),
    "unknown field of a node": (_set("node", "relu_default", "meta", value={}), "exactly the fields"),
    "unknown field of a tensor": (_set("table", "fc.bias", "hook", value=1), "exactly the fields"),
    "unknown tensor field": (_set("header", "tensors", 0, "hook", value=1), "exactly the fields"),
    "tensor outside the header": (_set("table", "y", value={}), "not in the header"),
    "gradient as text": (_set("header", "tensors", 0, "requires_grad", value="yes"), "requires_grad"),
    "deep literal": (_set("node", "relu_default", "args", value=[[[[[[[[[[[1]]]]]]]]]]]), "nested more than"),
    "long literal": (_set("node", "relu_default", "args", value=[[0] * 5000]), "a list of 5000"),
    "no graph": (_set("header", "graph", value=[]), "last node has to be the output|no tensor|not read"),
    "graph as text": (_set("header", "graph", value="x"), "has to be a list"),
    "many nodes": (_insert("aten.relu.default", times=12000), "nodes"),
}


@pytest.mark.parametrize("case", FORGED)
def test_hostile_files_are_refused(content: bytes, folder: Path, case: str) -> None:
    edit, words = FORGED[case]
    table, header, data = taken_apart(content)
    edit(table, header)
    with pytest.raises(ArchiveError, match=words):
        loaded(put_together(table, header, data), folder)
    with guard(), pytest.raises(ArchiveError, match=words):
        read_header(folder / "x.safetensors")


def test_any_change_under_a_valid_digest_loads_or_raises(content: bytes, folder: Path) -> None:
    rng = random.Random(3)
    values = [None, True, 0, 1, -1, 2**31, 2**63 - 1, 10**30, 0.5, "", "x", "features", "fc.bias", [], {}, [[]], [2, 8]]
    values += [{"node": "features"}, {"node": "linear_default"}, {"tuple": [1]}, {"float": "nan"}, {"dtype": "int8"}]
    for _ in range(600):
        table, header, data = taken_apart(content)
        place: Any = rng.choice([table, header, header["graph"], header["graph"]])
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
                break
            place = place[key]
        place[key] = rng.choice([*values, place[rng.choice(list(place))] if isinstance(place, dict) else place[0]])
        try:
            forged = put_together(table, header, data)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # no digest can be made of it
        with suppress(ArchiveError):
            again = loaded(forged, folder)
            with suppress(RuntimeError):
                again(torch.randn(2, *again.spec.input_shape))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_recurrent_shapes(kind: str, bidirectional: bool, batch_first: bool) -> None:
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": batch_first}
    network = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)(4, 5, **options)
    hidden = torch.zeros(4 if bidirectional else 2, 3 if batch_first else 7, 5)
    state = [hidden, hidden] if kind == "lstm" else hidden
    args = (torch.randn(3, 7, 4), state, network._flat_weights, True, 2, 0.0, False, bidirectional, batch_first)
    real = getattr(aten, kind).input(*args)
    assert [one.shape for one in recurrent_by_shape(*args)] == [one.shape for one in real]


def test_many_pieces_are_counted_before_they_are_made(folder: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(aten.unbind.int, (x, 1))
    graph.output(graph.call_function(aten.stack.default, ([graph.call_function(aten.relu.default, (x,))],)))
    graph.lint()
    for target, args in [
        (aten.unbind.int, (1,)),
        (aten.split.Tensor, (1, 1)),
        (aten.chunk.default, (2**23, -1)),
        (aten.split_with_sizes.default, ([1] * 2000, 1)),
    ]:
        parts.target, parts.args = target, (x, *args)
        with guard(), pytest.raises(ArchiveError, match="pieces|a list of 2000"):
            dry_run(graph, {}, [[2**24]], torch.float32, 2)


def _text_of(content: bytes, old: str, new: str) -> bytes:
    """Another header text for the same tensors."""
    [length] = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode()
    assert old in header
    return container(header.replace(old, new, 1), content[8 + length :])


TEXTS = {
    "duplicate key": ('\\"format_version\\": 2', '\\"format_version\\": 2, \\"format_version\\": 1', "duplicate key"),
    "duplicate tensor": ('"fc.bias":', '"fc.weight":{},"fc.bias":', "duplicate key"),
    "nan": ('\\"certificate\\": 2.5e-16', '\\"certificate\\": NaN', "NaN, which is not JSON"),
    "infinity": ('\\"certificate\\": 2.5e-16', '\\"certificate\\": 1e999', "expected a number"),
    "long integer": ('\\"certificate\\": 2.5e-16', '\\"certificate\\": ' + "9" * 6000, "integer string conversion"),
    "deep": ('\\"certificate\\": 2.5e-16', '\\"certificate\\": ' + "[" * 20000 + "]" * 20000, "nested too deeply"),
    "quite deep": ('\\"certificate\\": 2.5e-16', '\\"certificate\\": ' + "[" * 300 + "]" * 300, "expected a number"),
    "other metadata": ('"__metadata__":{', '"__metadata__":{"hook":"x",', "exactly the fields"),
    "other key": ('"__metadata__":{"netclone"', '"__metadata__":{"clone"', "exactly the fields"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_texts_are_refused(content: bytes, folder: Path, case: str) -> None:
    old, new, words = TEXTS[case]
    with pytest.raises(ArchiveError, match=words):
        loaded(_text_of(content, old, new), folder)


@pytest.mark.parametrize(
    ("bare", "words"),
    [
        (b"", "0 bytes cannot hold"),
        (b"\0" * 8, "cannot hold"),
        (b"\xff" * 100, "cannot hold"),
        (container("{}"), "exactly the fields"),
        (container("[]"), "JSON object"),
        (container("[" * 30000), "nested too deeply"),
        (container('{"__metadata__": {"netclone": 1}}'), "JSON text"),
        (container('{"__metadata__": {"netclone": "x"}}'), "not JSON"),
        (container('{"__metadata__": {"netclone": "{}"}}'), "format version None"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "UnicodeDecodeError"),
        (b"PK\x03\x04" + b"\0" * 60, "cannot hold"),
    ],
)
def test_other_files_are_refused(folder: Path, bare: bytes, words: str) -> None:
    with pytest.raises(ArchiveError, match=words):
        loaded(bare, folder)


def test_a_safetensors_file_of_another_program_is_refused(folder: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, folder / "w.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchiveError, match="metadata of a netclone archive"):
        load(folder / "w.safetensors")


def test_bool_bytes_are_checked(folder: Path) -> None:
    save(small((aten.mul.Tensor, "gate"), tensors={"gate": torch.tensor([True, False])}), folder / "a.safetensors")
    table, header, _ = taken_apart((folder / "a.safetensors").read_bytes())
    with pytest.raises(ArchiveError, match="other than 0 and 1"):
        loaded(put_together(table, header, b"\x07\x00"), folder)


def test_missing_files(folder: Path) -> None:
    for read in (load, read_header):
        with pytest.raises(ArchiveError, match=r"none\.safetensors.*no such file"):
            read(folder / "none.safetensors")
        with pytest.raises(ValueError, match="not a file"):
            read(folder)


# Saving, whole or not at all


def _call_module() -> CloneModule:
    return CloneModule(fx.symbolic_trace(nn.Sequential(nn.ReLU())), small().spec)


def _unregistered() -> CloneModule:
    module = small((aten.mul.Tensor, "gate"), tensors={"gate": torch.ones(2)})
    gate = module.body.gate
    del module.body.gate
    module.body.gate = gate
    return module


UNSAVABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "operator": (lambda: small((torch.sin,)), "node 'sin'.*operator '.*sin' is not on the allow-list"),
    "overload": (lambda: small((aten.sin.out,)), "not on the allow-list"),
    "module call": (_call_module, "node '_0' is a call_module"),
    "argument": (lambda: small((aten.relu.default, slice(1))), "node 'relu_default'.*slice"),
    "device": (lambda: small((aten.to.device, torch.device("cuda:1"), torch.float32)), "on the CPU"),
    "unregistered": (_unregistered, "'gate'.*register it as a buffer"),
    "meta": (lambda: small((aten.mul.Tensor, "g"), tensors={"g": torch.ones(2, device="meta")}), "'g'"),
    "complex": (lambda: small((aten.mul.Tensor, "g"), tensors={"g": torch.ones(2, dtype=torch.complex64)}), "'g'"),
    "output": (lambda: small((aten.unsqueeze.default, 0)), "the output is"),
    "spec": (lambda: small().with_spec(scores=(("x", "high"),)), "spec.scores: expected a number"),
    "path": (lambda: small().with_spec(source_fingerprint="/home/me/model.pt"), "absolute path"),
    "object": (lambda: nn.Linear(2, 2), "only a CloneModule"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_loaded_is_not_written(folder: Path, case: str) -> None:
    build, words = UNSAVABLE[case]
    save(small((aten.relu.default,)), folder / "a.safetensors")
    before = (folder / "a.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(ArchiveError, match=words):
            save(build(), folder / name)
    assert os.listdir(folder) == ["a.safetensors"]
    assert (folder / "a.safetensors").read_bytes() == before


def test_saving_into_a_missing_folder(folder: Path) -> None:
    with pytest.raises(ArchiveError, match="create it first"):
        save(small(), folder / "no" / "a.safetensors")
    with pytest.raises(ArchiveError, match="add a file name"):
        save(small(), folder)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("raised", "seen"), [(OSError, ArchiveError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_an_interrupted_save_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, raised: type[BaseException], seen: type[BaseException]
) -> None:
    save(make(), folder / "a.safetensors")

    def fail(*_: object) -> None:
        raise raised("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(seen, match="no space left"):
        save(small(), folder / "a.safetensors")
    monkeypatch.undo()
    assert os.listdir(folder) == ["a.safetensors"]
    assert_same(load(folder / "a.safetensors"), make())


KILLED = """
import os, sys
sys.path[:0] = sys.argv[2:]
from netclone.cloning.modules import load, save
first = load(sys.argv[1])
second = first.with_spec(source_fingerprint="second")
while sys.stdin.readline():
    child = os.fork()
    if child == 0:
        for _ in range(500):
            save(second, sys.argv[1])
            save(first, sys.argv[1])
        os._exit(0)
    print(child, flush=True)
"""


def test_a_killed_save_leaves_a_whole_file(folder: Path) -> None:
    path = folder / "a.safetensors"
    save(make(width=512), path)
    known = {"ab12", "second"}
    rng = random.Random(2)
    root = str(Path(netclone.__file__).parent.parent)
    command = [sys.executable, "-c", KILLED, str(path), root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin and saver.stdout
        for _ in range(20):
            saver.stdin.write("go\n")
            saver.stdin.flush()
            child = int(saver.stdout.readline())
            time.sleep(0.02 + 0.1 * rng.random())
            os.kill(child, signal.SIGKILL)
            assert load(path).spec.source_fingerprint in known
        saver.stdin.close()
    assert saver.returncode == 0


# The source itself


@pytest.mark.parametrize("module", [archiving, graphdata])
def test_no_way_to_run_or_import_what_a_file_names(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for item in ast.walk(tree) if isinstance(item, ast.Import) for alias in item.names}
    imported |= {str(item.module) for item in ast.walk(tree) if isinstance(item, ast.ImportFrom)}
    forbidden = {"pickle", "importlib", "marshal", "shelve", "runpy", "dill", "cloudpickle", "builtins", "ctypes"}
    assert not {name.partition(".")[0] for name in imported} & forbidden
    called = {item.id for item in ast.walk(tree) if isinstance(item, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__", "getattr", "setattr", "globals", "open_code"}
    dotted = {ast.unparse(item) for item in ast.walk(tree) if isinstance(item, ast.Attribute)}
    assert not dotted & {"torch.load", "torch.save", "sys.modules", "torch.classes", "torch.package"}


@pytest.mark.parametrize("path", [None, 7, b"\xff" * 300, "x" * 300, "a\0b", ["a"]])
def test_what_is_no_path_of_a_file_is_a_typed_error(path):
    with pytest.raises(ArchiveError, match="cannot load"):
        load(path)


def test_a_folder_is_no_archive(tmp_path):
    with pytest.raises(ArchiveError, match="it is not a file"):
        load(tmp_path)
