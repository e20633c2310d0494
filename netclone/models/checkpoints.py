"""read_checkpoint(path) -> Checkpoint: the tensors of a network in a file, whatever they are wrapped in.

Training scripts, Lightning, averaging and compiling each nest the state dict and prefix its names. None of these is
listed here: the state dict is whichever mapping has all of the network's names behind one common prefix.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from netclone.errors import LoadError, NetcloneWarning, first_line
from netclone.files.options import SAID

_PLAIN: list[Any] = [Namespace]  # what training scripts keep beside the tensors: their arguments, as data
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_COUNTER = "num_batches_tracked"  # of BatchNorm: older torch had none, and no logits depend on it
_AVERAGED = {"ema", "swa", "shadow", "polyak", "average", "averaged", "averaging", "n_averaged"}
_USUAL = {"", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params"}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file: nested mappings of tensors and plain data."""

    path: Path
    content: Mapping[Any, Any]

    def tensors_for(self, own: Mapping[str, Tensor], model: str, use_ema: bool | None = None) -> dict[str, Tensor]:
        """The tensors for a network's names, by these names; shapes and dtypes are not checked.

        BatchNorm's counters may be missing. ``use_ema`` is whether averaged weights are wanted (None: if there are
        some).

        Raises
        ------
        LoadError
            If no mapping in the file has all names behind one prefix, if one has further names there, or if several
            fit and it is not clear which one is meant.
        """
        found = [match for path, tensors in _mappings(self.content) for match in _matches(path, tensors, own)]
        complete = [match for match in found if not match.missing]
        if not complete:
            raise LoadError(self._lacking(found, own, model))
        if use_ema and not any(match.averaged for match in complete):
            raise LoadError(f"use_ema: '{self.path}' holds no averaged weights of {model}; leave use_ema out")
        match = self._chosen(complete, own, use_ema is not False)
        if match.more:
            raise LoadError(
                f"weights: '{self.path}' does not fit {model}: it has {len(match.more)} tensors more than the "
                f"{len(own)} expected, such as '{match.more[0]}'; name the architecture (and options) of its training"
            )
        return match.tensors

    def _chosen(self, complete: list[_Match], own: Mapping[str, Tensor], averaged: bool) -> _Match:
        def rank(match: _Match) -> tuple[bool, bool, bool, int]:
            alike = sum(tensor.shape == own[name].shape for name, tensor in match.tensors.items())
            return match.averaged != averaged, bool(match.more), not match.usual, -alike

        complete = sorted(complete, key=rank)
        best = [match for match in complete if rank(match) == rank(complete[0])]
        others = [match for match in best[1:] if not _same(match.tensors, best[0].tensors)]
        if others:
            raise LoadError(
                f"weights: '{self.path}' holds several networks, under '{best[0].where}' and '{others[0].where}', and "
                "it is not clear which one is meant; save the tensors of one with safetensors.torch.save_file"
            )
        return best[0]

    def _lacking(self, found: list[_Match], own: Mapping[str, Tensor], model: str) -> str:
        near = max(found, key=lambda match: len(match.tensors), default=None)
        if near is None and not any(True for _ in _mappings(self.content)):
            return f"weights: '{self.path}' holds no state_dict; expected a mapping of names to tensors"
        missing = _required(own) if near is None else near.missing
        return (
            f"weights: '{self.path}' does not fit {model}: {len(missing)} of {len(own)} tensors are missing, such as "
            f"'{missing[0]}'; name the architecture (and options) of its training"
        )


@dataclass(frozen=True)
class _Match:
    """A mapping's tensors behind one prefix, by their names in a network, and which names are missing or extra."""

    where: str
    tensors: dict[str, Tensor]
    missing: list[str]
    more: list[str]
    averaged: bool
    usual: bool


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of tensors, ``.safetensors`` or torch's; no code in it is run.

    Raises
    ------
    LoadError
        If there is no such file, or it holds anything but tensors and plain data.
    """
    with _tensors_alone(path):
        if path.suffix == ".safetensors":
            return Checkpoint(path, {**safetensors.torch.load_file(path), **_said(path)})
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of forms of tensors that it is new to
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise LoadError(f"weights: '{path}' holds no state_dict; expected a mapping of names to tensors")
    return Checkpoint(path, content)


def _said(path: Path) -> dict[str, Any]:
    """What a file that netclone wrote records beside the tensors; plain data, checked where it is used."""
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(SAID)
    return {} if text is None else {SAID: json.loads(text)}


def fitted(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, model: str) -> dict[str, Tensor]:
    """A checkpoint's tensors in the network's dtypes; counters that are missing keep the network's values.

    Warns where a cast to the network's floating dtype rounds.

    Raises
    ------
    LoadError
        If a tensor has another shape, another kind of numbers, or none that can be read.
    """
    made, rounded = {}, []
    for name, ours in own.items():
        theirs = tensors.get(name)
        if theirs is None or (name.endswith(_COUNTER) and (theirs.is_floating_point() or theirs.dim() != ours.dim())):
            made[name] = ours
            continue
        where = f"weights: '{path}' does not fit {model}: tensor '{name}'"
        if theirs.shape != ours.shape:
            raise LoadError(
                f"{where} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}; check num_classes, in_chans "
                "and img_size"
            )
        made[name] = _of_kind(theirs, ours, where)
        if theirs.dtype != ours.dtype and torch.promote_types(theirs.dtype, ours.dtype) != ours.dtype:
            rounded.append(name)
    if rounded:
        warnings.warn(
            f"weights: {len(rounded)} tensors of '{path}', such as '{rounded[0]}', are {tensors[rounded[0]].dtype} and "
            f"were rounded to {own[rounded[0]].dtype}, the dtype of {model}",
            NetcloneWarning,
            stacklevel=2,
        )
    return made


def _of_kind(theirs: Tensor, ours: Tensor, where: str) -> Tensor:
    """A tensor cast to the dtype of another, if both hold the same kind of numbers."""
    if theirs.layout in _SPARSE and not theirs.is_meta:
        theirs = theirs.to_dense()
    if theirs.is_meta or theirs.layout != torch.strided or theirs.is_quantized:
        raise LoadError(f"{where} is {theirs.dtype} without plain values; save it as a plain tensor")
    if theirs.dtype == ours.dtype or (theirs.dtype in _FLOATS and ours.dtype in _FLOATS):
        return theirs.to(ours.dtype)
    numbers = theirs.dtype in _FLOATS or not (theirs.is_floating_point() or theirs.is_complex())
    if numbers and not (ours.is_floating_point() or ours.is_complex()):
        cast = theirs.to(ours.dtype)
        if torch.equal(cast.to(theirs.dtype), theirs):
            return cast
    raise LoadError(
        f"{where} is {theirs.dtype}, expected {ours.dtype}: a cast would change its values; save the checkpoint before "
        "the network is quantised or converted"
    )


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The named tensors of every mapping, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen: set[int] = set()
    while waiting:
        path, found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        named = {name: value for name, value in found.items() if isinstance(name, str)}
        if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
            yield path, tensors
        waiting += [((*path, name), value) for name, value in named.items() if isinstance(value, Mapping)]


def _matches(path: tuple[str, ...], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[_Match]:
    """How a mapping fits a network: for each prefix of its names, the tensors behind it."""
    counts: Counter[str] = Counter()
    for name in tensors:
        for start in [0, *(dot.end() for dot in re.finditer(r"\.", name))]:
            if name[start:] in own:
                counts[name[:start]] += 1
    for prefix in counts:
        behind = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        owned = {name: tensor for name, tensor in behind.items() if name in own}
        missing = [name for name in _required(own) if name not in owned]
        more = [name for name in behind if name not in own and not name.endswith(_COUNTER)]
        words = {word for part in (*path, *prefix.split(".")) for word in _words(part)}
        averaged = bool(words & _AVERAGED) or "n_averaged" in tensors
        usual = not path or path[-1] in _USUAL
        yield _Match(".".join((*path, prefix)).strip("."), owned, missing, more, averaged, usual)


def _words(name: str) -> set[str]:
    """The words in a name, ``modelEma`` as ``model_ema``, and the name itself."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)} | {name}


def _required(own: Mapping[str, Tensor]) -> list[str]:
    return [name for name in own if not name.endswith(_COUNTER)]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.layout == other[name].layout == torch.strided
        and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


@contextmanager
def _tensors_alone(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong while a checkpoint is read as a LoadError."""
    if not os.path.isfile(path):
        raise LoadError(f"weights: there is no file '{path}'")
    try:
        yield
    except Exception as error:  # torch, safetensors and unpickling have errors of their own
        raise LoadError(
            f"weights: '{path}' cannot be read as tensors alone: {type(error).__name__}: {first_line(error)} (files "
            "with code in them are refused; save the tensors with safetensors.torch.save_file(model.state_dict(), ...))"
        ) from error
