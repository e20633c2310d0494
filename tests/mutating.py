"""Files of every kind with mutations, signed anew or not, through whatever reads them."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import struct
import tempfile
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from rich.console import Console
from torch import Tensor

from netclone import extract, inject, load_model, localize, save, save_grafted
from netclone.cloning.modules import load
from netclone.errors import NetcloneError
from netclone.files.archiving import _digest, read_header
from netclone.files.bundling import is_bundle, read_bundle
from netclone.files.inspecting import inspect, inspect_bundle, show, show_bundle
from netclone.graph.tracing import same_bits
from netclone.runtime.digests import content_digest
from netclone.runtime.resuming import Findings

KEYS = {"archive": "netclone", "grafted": "netclone_bundle", "part": "netclone_partial"}
"""The kinds of files, and under which key of its metadata each has its header."""

BEHAVED = ("refused", "the same", "another, signed", "another, signed, that fails at its run")
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**62, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e308, float("nan")]
WORDS = [
    "",
    "x",
    "input",
    "layer1",
    "timm/test_vit",
    "timm/[/red]",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "a" * 20_000,
    "/etc",
]
LISTS = [[], {}, [[]], [None], [0], [2, 8], [1] * 2000, {"node": "x"}, {"float": "inf"}, {"dtype": "I8"}]
VALUES: list[Any] = [None, True, False, *NUMBERS, *WORDS, *LISTS]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", 7]


@functools.cache
def original(kind: str) -> bytes:
    """A whole file of a kind."""
    torch.manual_seed(0)
    source, target = (timm.create_model("test_resnet", num_classes=classes).eval() for classes in (6, 4))
    module = extract(source, localize(source, method="magnitude"), classes=[2, 3], class_names=["heron", "ibis"])
    module = module.with_spec(at="input", scores=(("all", 0.5),))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.safetensors")
        if kind == "archive":
            save(module, path)
        elif kind == "grafted":
            save_grafted(inject(target, module, at="input", name="birds"), path)
        else:
            findings = Findings(path)
            findings.open("key")
            findings.keep("mask", {"layer1": torch.rand(8), "layer2": torch.rand(4, 3)}, 0.25)
            findings.keep("refit", {"weight": torch.rand(5, 5, dtype=torch.float64)}, 2)
        return path.read_bytes()


class Mutation:
    """One file made from a whole one, by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kind = list(KEYS)[seed % len(KEYS)]
        self.signed = False
        mutate = self.rng.choice([self._bits, self._cut, self._text, self._length, self._json, self._json, self._table])
        self.how = mutate.__name__[1:]
        self.content = mutate(original(self.kind))

    def _bits(self, content: bytes) -> bytes:
        changed = bytearray(content)
        last = len(content) if self.rng.random() < 0.5 else 8 + int.from_bytes(content[:8], "little")
        for _ in range(self.rng.choice([1, 1, 2, 8])):
            changed[self.rng.randrange(last)] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    def _cut(self, content: bytes) -> bytes:
        a, b = sorted(self.rng.randrange(len(content) + 1) for _ in range(2))
        return self.rng.choice([content[:a], content[a:], content[:a] + content[b:], content + content[a:b], b""])

    def _length(self, content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        other = self.rng.choice([0, 1, 2, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, self.rng.randrange(length)])
        return struct.pack("<Q", other) + content[8:]

    def _text(self, content: bytes) -> bytes:
        """The header's text with pieces lost, doubled or put in."""
        length = int.from_bytes(content[:8], "little")
        head, body = content[8 : 8 + length], content[8 + length :]
        a, b = sorted(self.rng.randrange(length + 1) for _ in range(2))
        b = min(b, a + self.rng.choice([1, 1, 10, 1000]))
        deep = self.rng.choice([b"[", b'{"a":']) * self.rng.choice([100, 200_000])
        head = self.rng.choice(
            [
                head[:a] + head[b:],
                head[:b] + head[a:],
                head[:a] + deep + head[b:],
                deep,
                head + b" " * 9,
                b"\xff" + head,
            ]
        )
        return struct.pack("<Q", len(head)) + head + body

    def _json(self, content: bytes) -> bytes:
        """The header with some of its values replaced, lost or doubled, signed anew."""
        table, facts, body = self._parts(content)
        for _ in range(self.rng.choice([1, 1, 1, 2, 4])):
            self._edit(self.rng.choice([facts, *(part for part in facts.values() if isinstance(part, dict) and part)]))
        self.signed = self.rng.random() < 0.8
        return self._whole(table, facts, body)

    def _table(self, content: bytes) -> bytes:
        """The table of tensors with another dtype, shape, place or name, signed anew."""
        table, facts, body = self._parts(content)
        name = self.rng.choice(list(table))
        entry = table[name]
        what = self.rng.choice(["dtype", "shape", "data_offsets", "name", "any", "lost"])
        if what == "dtype":
            entry["dtype"] = self.rng.choice(DTYPES)
        elif what == "shape":
            entry["shape"] = self.rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [2**62, 4], [-1], [], "x"])
        elif what == "data_offsets":
            entry["data_offsets"] = [end + self.rng.choice([-8, -4, 0, 4, 2**62]) for end in entry["data_offsets"]]
        elif what == "name":
            table[self.rng.choice(["x", "forward", "", "a.b", "\x1b", f"{name}2"])] = table.pop(name)
        elif what == "any":
            self._edit(table)
        else:
            table.pop(name)
        self.signed = self.rng.random() < 0.8
        return self._whole(table, facts, body)

    def _edit(self, place: Any) -> None:
        while True:
            key = self.rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or self.rng.random() < 0.2:
                break
            place = place[key]
        if self.rng.random() < 0.15:
            del place[key]
        elif self.rng.random() < 0.1 and isinstance(place, list):
            place.append(place[key])
        elif self.rng.random() < 0.1 and isinstance(place, dict):
            place["more"] = place[key]
        else:
            place[key] = copy.deepcopy(self.rng.choice(VALUES))  # a later edit may write into it

    def _parts(self, content: bytes) -> tuple[dict[str, Any], Any, bytes]:
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        return table, json.loads(table.pop("__metadata__")[KEYS[self.kind]]), content[8 + length :]

    def _whole(self, table: dict[str, Any], facts: Any, body: bytes) -> bytes:
        if self.signed:
            try:
                facts["sha256"] = self._signature(table, facts, body)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, safetensors.SafetensorError):
                self.signed = False  # no digest can be made of it
        head = json.dumps({"__metadata__": {KEYS[self.kind]: json.dumps(facts)}, **table}).encode()
        return struct.pack("<Q", len(head)) + head + body

    def _signature(self, table: dict[str, Any], facts: Any, body: bytes) -> str:
        facts.pop("sha256", None)
        if self.kind == "archive":
            entries = []
            for item in facts["tensors"]:
                entry = table[item["name"]]
                begin, end = entry["data_offsets"]
                dtype = safetensors.torch._TYPES[entry["dtype"]]
                entries.append((item["name"], entry["shape"], dtype, memoryview(body[begin:end])))
            return _digest(facts, entries)
        head = json.dumps(table).encode()
        return content_digest(facts, safetensors.torch.load(struct.pack("<Q", len(head)) + head + body))


def run(seed: int) -> str:
    """What becomes of the file of a seed, in one of a few words."""
    mutation = Mutation(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "file.safetensors")
        path.write_bytes(mutation.content)
        found = {"archive": _archive, "grafted": _grafted, "part": _part}[mutation.kind](path)
    return (
        found
        if found in BEHAVED[:2]
        else found.replace("another", f"another, {'' if mutation.signed else 'NOT '}signed")
    )


@functools.cache
def _whole_file(kind: str, read: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.safetensors")
        path.write_bytes(original(kind))
        return read(path)


def _archive(path: Path) -> str:
    try:
        read_header(path)
        _shown(lambda console: show(inspect(path), console))
        module = load(path)
    except NetcloneError as error:
        return _refused(error)
    want = _whole_file("archive", load)
    inputs = [torch.ones(2, *shape) for shape in (module.spec.input_shape, module.spec.feature_shape) if shape]
    if (
        module.spec == want.spec
        and module.body.code == want.body.code
        and _same(module.state_dict(), want.state_dict())
    ):
        return "the same"
    try:
        module(*inputs)
    except RuntimeError:
        return "another, that fails at its run"
    return "another"


def _grafted(path: Path) -> str:
    try:
        if not is_bundle(path):
            return "refused"
        _shown(lambda console: show_bundle(inspect_bundle(path), console))
        bundle = read_bundle(path)
        load_model(str(path))
    except NetcloneError as error:
        return _refused(error)
    want = _whole_file("grafted", read_bundle)
    facts = [(one.architecture, one.clones, one.config, one.options) for one in (bundle, want)]
    return "the same" if facts[0] == facts[1] and _same(bundle.tensors, want.tensors) else "another"


def _part(path: Path) -> str:
    found, want = Findings(path), _whole_file("part", _opened)
    found.open("key")
    if not found.stages:
        return "refused"
    for name in found.stages:
        tensors, number = found.recall(name) or ({}, 0.0)
        int(number)
        if name not in want.stages or want.recall(name)[1] != number or not _same(tensors, want.recall(name)[0]):
            return "another"
    return "the same" if found.stages == want.stages else "another"


def _opened(path: Path) -> Findings:
    findings = Findings(path)
    findings.open("key")
    return findings


def _same(one: Any, two: Any) -> bool:
    one, two = dict(one), dict(two)
    return one.keys() == two.keys() and all(_bits(one[name], two[name]) for name in one)


def _bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and same_bits(one, two)


def _shown(print_to: Callable[[Console], None]) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_to(console)
    _check_plain(console.file.getvalue())  # type: ignore[attr-defined]


def _refused(error: NetcloneError) -> str:
    _check_plain(str(error))
    return "refused"


def _check_plain(text: str) -> None:
    steering = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs") and letter != "\n"}
    if steering:
        raise AssertionError(f"shown with {steering}")
