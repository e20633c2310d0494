"""Clones in files: one ``.safetensors`` file with tensors, the graph as data, and what is known about the clone.

A file may come from anyone. It names nothing that is imported: the graph is rebuilt from pure operators
(:mod:`netclone.graph.purity`), under names checked to be identifiers before fx writes code with them, and is run on
shapes alone, at several batch sizes and within a budget, before a tensor is made (:mod:`netclone.graph.dry_run`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from netclone.errors import ArchiveError
from netclone.files.graphdata import (
    check_keys,
    check_list,
    check_shape,
    check_tensor_name,
    graph_from_data,
    graph_to_data,
    shown,
)
from netclone.files.provenance import is_absolute_path
from netclone.files.quantizing import STORED, dequantized, error_of, is_stored_in_fewer_bits, quantized
from netclone.files.spec import CloneSpec, spec_from_data, spec_to_data
from netclone.graph.dry_run import dry_run
from netclone.runtime.writing import check_place, write_file

FORMAT_VERSION = 5
"""The newest version :func:`read_archive` reads. A file is written as the oldest that has what it needs."""

_PLAIN_VERSION, _STORED_VERSION, _GATE_VERSION = 2, 3, 4  # tensors in fewer bits are new in 3; a bias is new in 5

Router: TypeAlias = tuple[Tensor, Tensor]
"""Weight ``(F,)`` and bias ``()`` of the router of a clone with a gate."""

_KEY = "netclone"
_ROUTER = ("router:weight", "router:bias")  # no names that tensors of a graph can have
_SMALL = 8192  # nodes that a graph may have however small its file is, for 75 MB of memory at most
_SHA256 = re.compile("[0-9a-f]{64}")
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an archive; ``order`` lists its axes from the slowest to the fastest in memory.

    Its bytes are of ``stored``, which may have fewer bits than ``dtype``, what it is read as. int8 has scales, too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool
    order: tuple[int, ...]
    begin: int
    end: int
    stored: torch.dtype
    scale: tuple[int, int] | None


@dataclass(frozen=True)
class ArchiveHeader:
    """What an archive says about itself; ``graph`` has been checked against ``spec`` and ``tensors``.

    ``router`` are weight and bias of a clone with a gate; else there are none.
    """

    format_version: int
    spec: CloneSpec
    graph: fx.Graph
    tensors: tuple[TensorEntry, ...]
    router: tuple[TensorEntry, ...]
    sha256: str


def write_archive(
    body: fx.GraphModule,
    spec: CloneSpec,
    path: str | os.PathLike[str],
    dtype: str | None = None,
    router: Router | None = None,
) -> None:
    """Write a graph with its tensors, a spec and perhaps a router to one ``.safetensors`` file, whole or not at all.

    The file is checked as :func:`read_archive` checks it before anything is written, and it replaces ``path`` in one
    step. Written are the tensors the graph reads, on the CPU; tensors that share memory are written one by one.

    Raises
    ------
    ArchiveError
        If there is what an archive may not contain (operators outside :mod:`netclone.graph.purity` are named by their
        nodes), or the file cannot be written.
    """
    path = path_of(path)
    check_place(path)
    with _only_archive_errors(f"cannot save to '{path}'"):
        content = _checked_bytes(body, spec, dtype, router)
    write_file(path, content)


def read_archive(path: str | os.PathLike[str]) -> tuple[fx.GraphModule, CloneSpec, Router | None]:
    """Read what :func:`write_archive` wrote; safe on files from strangers.

    Raises
    ------
    ArchiveError
        If the file is missing, damaged, written by a newer netclone, or asks for anything an archive may not contain.
    """
    with _only_archive_errors(f"cannot load {_quoted(path)}"), _opened(path) as file:
        return _content_of(memoryview(file.read()))


def to_bytes(body: fx.GraphModule, spec: CloneSpec, what: str, router: Router | None = None) -> bytes:
    """The content of the file that :func:`write_archive` would write; ``what`` names it in messages.

    Raises
    ------
    ArchiveError
        As :func:`write_archive`.
    """
    with _only_archive_errors(f"cannot write {what}"):
        return _checked_bytes(body, spec, None, router)


def from_bytes(content: bytes, what: str) -> tuple[fx.GraphModule, CloneSpec, Router | None]:
    """What :func:`read_archive` would read from a file of this content; ``what`` names it in messages.

    Raises
    ------
    ArchiveError
        As :func:`read_archive`.
    """
    with _only_archive_errors(f"cannot read {what}"):
        return _content_of(memoryview(content))


def read_header(path: str | os.PathLike[str]) -> ArchiveHeader:
    """Read what an archive says about itself, checked, without reading its tensors.

    Returns
    -------
    The header. Its digest also covers the tensors, so only :func:`read_archive` verifies it.

    Raises
    ------
    ArchiveError
        As :func:`read_archive`, for all but the tensors' bytes.
    """
    with _only_archive_errors(f"cannot read {_quoted(path)}"), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        return _header_from(length + file.read(_header_length(length, size)), size)[0]


def header_from_bytes(content: bytes, what: str) -> ArchiveHeader:
    """As :func:`read_header`, from the bytes of a whole file; ``what`` names them in messages.

    Raises
    ------
    ArchiveError
        As :func:`read_header`.
    """
    with _only_archive_errors(f"cannot read {what}"):
        length = _header_length(content[:8], len(content))
        return _header_from(content[: 8 + length], len(content))[0]


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path that an argument is.

    Raises
    ------
    ArchiveError
        If it is none.
    """
    try:
        return Path(os.fsdecode(path))
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"path: got {shown(path)}, expected the path of a file, as text or pathlib.Path") from error


def _quoted(path: object) -> str:
    return f"'{path}'" if isinstance(path, (str, os.PathLike)) else shown(path)


@contextmanager
def _only_archive_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ArchiveError) else f"{type(error).__name__}: {shown(str(error))}"
        raise ArchiveError(f"{what}: {reason}") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    path = path_of(path)
    if not os.path.exists(path):
        raise ArchiveError("there is no such file")
    if not os.path.isfile(path):
        raise ArchiveError("it is not a file")
    with open(path, "rb") as file:
        yield file


# Writing


def _checked_bytes(body: fx.GraphModule, spec: CloneSpec, dtype: str | None, router: Router | None) -> bytes:
    """A file's content, read once as :func:`read_archive` reads it."""
    content = _archive_bytes(body, spec, dtype, router)
    read = _content_of(memoryview(content))[0]
    if read.code != body.code:
        raise ArchiveError("the body's code is more than its graph of operators: capture it with netclone.extract")
    if dtype is None:
        return content
    return _archive_bytes(body, replace(spec, stored=((dtype, error_of(body, read, spec)),)), dtype, router)


def _archive_bytes(body: fx.GraphModule, spec: CloneSpec, dtype: str | None, router: Router | None) -> bytes:
    in_full = not spec.stored and dtype is None
    version = _PLAIN_VERSION if in_full else _STORED_VERSION
    version = FORMAT_VERSION if spec.bias else _GATE_VERSION if spec.gate is not None else version
    used = {node.target for node in body.graph.nodes if node.op == "get_attr"}
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    table: list[dict[str, object]] = []
    for prefix, container in body.named_modules(remove_duplicate=False):
        owned: list[tuple[str, Tensor]] = [
            *container.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *container.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ]
        for name, tensor in owned:
            if name not in used:
                continue
            if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES.values():
                raise ArchiveError(f"tensor '{name}': {tensor.layout} {tensor.dtype} on {tensor.device} has no bytes")
            order = [axis for _, axis in sorted((-stride, axis) for axis, stride in enumerate(tensor.stride()))]
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            table.append({"name": name, "kind": kind, "requires_grad": tensor.requires_grad, "order": order})
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            if version > _PLAIN_VERSION:
                table[-1]["dtype"] = next(word for word, known in _DTYPES.items() if known == tensor.dtype)
            if dtype is not None and is_stored_in_fewer_bits(tensor):
                if dtype == "int8":
                    tensors[name], scales[_scale_of(name)] = quantized(tensors[name])
                elif tensor.dtype.itemsize > STORED[dtype].itemsize:
                    tensors[name] = tensors[name].to(STORED[dtype])
    if missing := sorted(used - tensors.keys()):
        raise ArchiveError(f"node reads '{missing[0]}', which is no parameter or buffer: register it as a buffer")
    tensors |= scales
    if router is not None:
        tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in zip(_ROUTER, router, strict=True)}
    facts = spec_to_data(spec)
    for name, first in (("stored", _STORED_VERSION), ("gate", _GATE_VERSION), ("bias", FORMAT_VERSION)):
        if version < first:
            del facts[name]
    header: dict[str, object] = {
        "format_version": version,
        "spec": facts,
        "graph": graph_to_data(body.graph),
        "tensors": table,
    }
    entries = [(name, list(tensor.shape), tensor.dtype, _raw(tensor)) for name, tensor in tensors.items()]
    header["sha256"] = _digest(header, entries)
    return safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header, allow_nan=False)})


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# Reading


def _content_of(content: memoryview) -> tuple[fx.GraphModule, CloneSpec, Router | None]:
    length = _header_length(content[:8], len(content))
    header, data = _header_from(bytes(content[: 8 + length]), len(content))
    stored = content[8 + length :]
    entries = [(item.name, list(item.shape), item.stored, stored[item.begin : item.end]) for item in header.tensors]
    scales = {
        item.name: (_scale_of(item.name), [item.shape[0]], torch.float32, stored[item.scale[0] : item.scale[1]])
        for item in header.tensors
        if item.scale is not None
    }
    entries += scales.values()
    entries += [(item.name, list(item.shape), item.stored, stored[item.begin : item.end]) for item in header.router]
    if header.sha256 != _digest(data, entries):
        raise ArchiveError("the digest does not match: the file was damaged or changed; get it again")
    body = fx.GraphModule(nn.Module(), fx.Graph())
    for entry in header.tensors:
        scale = scales[entry.name][3] if entry.name in scales else None
        _register(body, entry, _tensor_from(entry, stored[entry.begin : entry.end], scale))
    body.graph = header.graph
    body.graph.lint()
    body.eval()
    parts = [_tensor_from(entry, stored[entry.begin : entry.end], None) for entry in header.router]
    return body, header.spec, (parts[0], parts[1]) if parts else None


def _header_length(start: bytes | memoryview, size: int) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= size - 8:
        raise ArchiveError(f"not a whole .safetensors file: {size} bytes cannot hold the header it announces")
    return length


def _header_from(content: bytes, size: int) -> tuple[ArchiveHeader, dict[str, object]]:
    """The header, checked, and the same as the data its digest is made from."""
    text = content[8:].decode("utf-8")
    # What JSON and graph take in memory, up to 100 bytes per separator and 9,000 per node, is held to 10 times the
    # size of the file, plus a constant for small files.
    if 100 * sum(text.count(mark) for mark in "[{,:") > 10 * size + 2**22:
        raise ArchiveError("the header holds too many items for a file of this size")
    table = _parsed(text)
    metadata = check_keys(table.pop("__metadata__", None), [_KEY], "the metadata of a netclone archive")
    data = _parsed(metadata[_KEY])
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise ArchiveError(f"not a netclone archive: format version {shown(version)}")
    if version > FORMAT_VERSION:
        raise ArchiveError(
            f"written by a newer netclone (format {shown(version)}; this one reads up to {FORMAT_VERSION}): "
            f"upgrade netclone"
        )
    check_keys(data, ["format_version", "spec", "graph", "tensors", "sha256"], "the header")
    _refuse_absolute_paths([table, data])
    sha256 = data.pop("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ArchiveError(f"sha256: got {shown(sha256)}, expected 64 hexadecimal digits")
    spec = spec_from_data(data["spec"])
    router = _router_from(table, size - len(content)) if spec.gate is not None else ()
    tensors = _table_from(data["tensors"], table, size - len(content), version, router)
    graph = graph_from_data(data["graph"], {entry.name for entry in tensors}, max_nodes=_SMALL + size // 1000)
    if unread := {entry.name for entry in tensors} - {node.target for node in graph.nodes}:
        raise ArchiveError(f"tensor {shown(min(unread))} is not read by the graph")
    dtype = _input_dtype(tensors)
    shapes = [shape for shape in (spec.input_shape, spec.feature_shape) if shape is not None]
    dry_run(graph, {entry.name: _on_meta(entry) for entry in tensors}, shapes, dtype, len(spec.classes))
    return ArchiveHeader(version, spec, graph, tensors, router, sha256), data


def _parsed(text: object) -> dict[str, object]:
    """A JSON object, strictly: no key twice, no words outside the standard."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ArchiveError(f"the header has a duplicate key among {shown([key for key, _ in pairs])}")
        return made

    def refused(word: str) -> None:
        raise ArchiveError(f"the header has {word}, which is not JSON")

    if not isinstance(text, str):
        raise ArchiveError(f"the header has to be JSON text, got {shown(text)}")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refused)
    except RecursionError as error:
        raise ArchiveError("the header is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ArchiveError(f"the header is not JSON ({error.msg}): not a netclone archive, or damaged") from error
    if not isinstance(value, dict):
        raise ArchiveError(f"the header has to be a JSON object, got {shown(value)}")
    return value


def _refuse_absolute_paths(data: object) -> None:
    left: list[object] = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and is_absolute_path(value):
            raise ArchiveError(f"the header holds an absolute path, {shown(value)}: an archive names nothing outside")


def _router_from(table: dict[str, object], size: int) -> tuple[TensorEntry, ...]:
    """Weight and bias of a router, taken out of the file's tensors."""
    found = []
    for name in _ROUTER:
        dtype, shape, offsets = _stored_from(table.pop(name, None), f"tensor '{name}'", size)
        found.append(TensorEntry(name, shape, dtype, False, False, tuple(range(len(shape))), *offsets, dtype, None))
    weight, bias = found
    if len(weight.shape) != 1 or bias.shape != () or weight.dtype != bias.dtype or not weight.dtype.is_floating_point:
        raise ArchiveError(
            f"a router has a floating weight (F,) and a bias () of its dtype, got {weight.dtype} {weight.shape} and "
            f"{bias.dtype} {bias.shape}"
        )
    return weight, bias


def _table_from(
    data: object, table: dict[str, object], size: int, version: int, others: Sequence[TensorEntry] = ()
) -> tuple[TensorEntry, ...]:
    """The tensors, in the module's order, once they and the ``others`` are known to fill ``size`` bytes exactly."""
    entries, spans = [], [((other.begin, other.end), other.name) for other in others]
    keys = ["name", "kind", "requires_grad", "order", *(["dtype"] if version > _PLAIN_VERSION else [])]
    for index, item in enumerate(check_list(data, "tensors")):
        item = check_keys(item, keys, f"tensors {index}")
        if not isinstance(item["name"], str) or item["name"] not in table:
            raise ArchiveError(f"tensor {shown(item['name'])} is listed twice or not in the file")
        name = check_tensor_name(item["name"])
        where = f"tensor '{name}'"
        stored, shape, offsets = _stored_from(table.pop(name), where, size)
        spans.append((offsets, name))
        dtype = _dtype_from(item["dtype"], where) if version > _PLAIN_VERSION else stored
        scale = None
        if stored == torch.int8 and dtype.is_floating_point:
            of_scale, rows, scale = _stored_from(table.pop(_scale_of(name), None), f"the scale of {where}", size)
            spans.append((scale, _scale_of(name)))
            if of_scale != torch.float32 or len(shape) < 2 or rows != shape[:1]:
                raise ArchiveError(f"{where}: has to have a float32 scale for each of its rows, not {of_scale} {rows}")
        elif stored != dtype and not (dtype.is_floating_point and stored in (torch.bfloat16, torch.float16)):
            raise ArchiveError(f"{where}: {stored} cannot stand for {dtype}")
        order = cast("list[int]", check_list(item["order"], where))
        if not all(type(axis) is int for axis in order) or sorted(order) != list(range(len(shape))):
            raise ArchiveError(f"{where}: {shown(order)} is no order of {len(shape)} axes")
        if item["kind"] not in ("parameter", "buffer") or type(item["requires_grad"]) is not bool:
            raise ArchiveError(f"{where}: has to be a parameter or buffer with requires_grad true or false")
        if item["requires_grad"] and not dtype.is_floating_point:
            raise ArchiveError(f"{where}: {dtype} cannot require a gradient")
        is_parameter = item["kind"] == "parameter"
        entries.append(
            TensorEntry(name, shape, dtype, is_parameter, item["requires_grad"], tuple(order), *offsets, stored, scale)
        )
    if table:
        raise ArchiveError(f"tensor {shown(min(table))} is in the file but not in the header")
    containers = {".".join(path[:depth]) for path in (e.name.split(".") for e in entries) for depth in range(len(path))}
    if both := containers & {entry.name for entry in entries}:
        raise ArchiveError(f"tensor '{min(both)}' has another tensor below it")
    end = 0
    for (first, last), name in sorted(spans):
        if first != end:
            words = "overlap" if first < end else "leave a hole"
            raise ArchiveError(f"tensors {words} at byte {first} ('{name}')")
        end = last
    if end != size:
        raise ArchiveError(f"tensors end at byte {end} of {size}: the file is cut short or has a hole")
    return tuple(entries)


def _stored_from(data: object, where: str, size: int) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """The dtype, shape and place that the file gives for a tensor's bytes, which have to fit each other."""
    stored = check_keys(data, ["dtype", "shape", "data_offsets"], where)
    dtype = _dtype_from(stored["dtype"], where)
    shape = check_shape(stored["shape"], where)
    offsets = cast("list[int]", check_list(stored["data_offsets"], where))
    if len(offsets) != 2 or not all(type(offset) is int and 0 <= offset <= size for offset in offsets):
        raise ArchiveError(f"{where}: offsets {shown(offsets)} lie outside the file's {size} bytes of tensors")
    needed, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != given:
        words = "is too large" if needed > given else "is too small"
        raise ArchiveError(f"{where}: shape {shape} {words}, it takes {needed} bytes and has {given}")
    return dtype, shape, (offsets[0], offsets[1])


def _dtype_from(word: object, where: str) -> torch.dtype:
    if not isinstance(word, str) or word not in _DTYPES:
        raise ArchiveError(f"{where}: unknown dtype {shown(word)}")
    return _DTYPES[word]


def _scale_of(name: str) -> str:
    """What the scales of a tensor are called in the file: no name that a tensor of a graph can have."""
    return f"{name}:scale"


def _digest(header: dict[str, object], entries: Sequence[tuple[str, list[int], torch.dtype, memoryview]]) -> str:
    """SHA-256 over all that influences the clone: header, and each tensor's name, shape, dtype and bytes."""
    digest = hashlib.sha256()
    facts = [(name, shape, str(dtype)) for name, shape, dtype, _ in entries]
    digest.update(json.dumps([header, facts], sort_keys=True, allow_nan=False).encode())
    for _, _, _, raw in entries:
        digest.update(raw)
    return digest.hexdigest()


def _input_dtype(tensors: Sequence[TensorEntry]) -> torch.dtype:
    """The floating dtype that most numbers have: what the clone computes in."""
    counts: dict[torch.dtype, int] = {torch.float32: 0}
    for entry in tensors:
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(counts, key=lambda dtype: counts[dtype])


def _on_meta(entry: TensorEntry) -> Tensor:
    return _in_order(torch.empty(entry.shape, dtype=entry.dtype, device="meta"), entry.order)


def _tensor_from(entry: TensorEntry, raw: memoryview, scale: memoryview | None) -> Tensor:
    if entry.dtype == torch.bool and set(bytes(raw)) - {0, 1}:
        raise ArchiveError(f"tensor '{entry.name}': bytes other than 0 and 1 in a tensor of bool")
    flat = torch.frombuffer(bytearray(raw), dtype=entry.stored) if len(raw) else torch.empty(0, dtype=entry.stored)
    value = flat.reshape(entry.shape)
    if scale is not None:
        scales = torch.frombuffer(bytearray(scale), dtype=torch.float32) if len(scale) else torch.empty(0)
        value = dequantized(value, scales, entry.dtype)
    return _in_order(value.to(entry.dtype), entry.order).requires_grad_(entry.requires_grad)


def _in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A copy with its axes laid out in memory in this order."""
    inverse = sorted(range(len(order)), key=lambda position: order[position])
    return tensor.permute(tuple(order)).clone(memory_format=torch.contiguous_format).permute(tuple(inverse))


def _register(body: fx.GraphModule, entry: TensorEntry, tensor: Tensor) -> None:
    *path, last = entry.name.split(".")
    container: nn.Module = body
    for segment in path:
        children = dict(container.named_children())
        if segment not in children:
            container.add_module(segment, nn.Module())
        container = container.get_submodule(segment)
    if entry.is_parameter:
        container.register_parameter(last, nn.Parameter(tensor, requires_grad=entry.requires_grad))
    else:
        container.register_buffer(last, tensor)
