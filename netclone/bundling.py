"""Bundle: a grafted network in one file: the target's architecture and tensors, and its clones as their files were.

A bundle is a ``.safetensors`` file. Nothing in it is run or imported: the architecture is a name that
:func:`netclone.load_model` looks up in timm's or torchvision's own registry, the tensors have to be exactly that
network's, and every clone is an archive that is checked as :func:`netclone.load` checks it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from netclone.archiving import from_bytes
from netclone.errors import ArchiveError, CloneNameError
from netclone.graphdata import check_keys, check_list, shown
from netclone.injecting import inject
from netclone.modules import CloneModule
from netclone.writing import write_file

FORMAT_VERSION = 1
_KEY = "netclone_bundle"
_TARGET = "target."  # before the names of the target's tensors
_CLONE = "clone."  # and before those of its clones, whose tensors are the bytes of their archives

Build = Callable[[str, Mapping[str, Tensor]], nn.Module]
"""A network from the name of its architecture and its tensors."""


@dataclass(frozen=True)
class Packed:
    """A clone in a bundle: its name, the position it reads (None: the one it was fitted for) and its archive."""

    name: str
    at: str | None
    archive: bytes

    def module(self) -> CloneModule:
        """The clone.

        Raises
        ------
        ArchiveError
            If the archive is none, or damaged.
        """
        return from_bytes(self.archive, f"clone '{self.name}'")


@dataclass(frozen=True)
class Bundle:
    """A target, named as ``"timm/..."`` or ``"torchvision/..."``, with its tensors, and its clones in order."""

    architecture: str
    tensors: Mapping[str, Tensor]
    clones: tuple[Packed, ...] = ()

    def network(self, build: Build) -> nn.Module:
        """The target with its clones grafted onto it; without any, the target."""
        network = build(self.architecture, self.tensors).eval()
        for packed in self.clones:
            network = inject(network, packed.module(), packed.at, name=packed.name)
        return network

    def without(self, name: str | None) -> Bundle:
        """The bundle without a clone; ``name`` may be None where there is only one.

        Raises
        ------
        CloneNameError
            If there is no clone of that name, or no name was given and there are several.
        """
        names = [packed.name for packed in self.clones]
        if name is None and len(names) == 1:
            return replace(self, clones=())
        if name not in names:
            asked = "no name was given" if name is None else f"no clone {name!r}"
            raise CloneNameError(f"name: {asked}, and the file holds {', '.join(map(repr, names)) or 'none'}")
        return replace(self, clones=tuple(packed for packed in self.clones if packed.name != name))


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a ``.safetensors`` file that says it is a bundle."""
    return Path(path).is_file() and _KEY in _metadata(Path(path))


def write_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Write a bundle, whole or not at all; without clones, a plain checkpoint of the target's tensors.

    Raises
    ------
    ArchiveError
        If it cannot be written.
    """
    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in bundle.tensors.items()}
    if bundle.clones:
        tensors = {f"{_TARGET}{name}": tensor for name, tensor in plain.items()}
        for packed in bundle.clones:
            tensors[f"{_CLONE}{packed.name}"] = torch.frombuffer(bytearray(packed.archive), dtype=torch.uint8)
        header = {
            "format_version": FORMAT_VERSION,
            "architecture": bundle.architecture,
            "clones": [{"name": packed.name, "at": packed.at} for packed in bundle.clones],
        }
        content = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})
    else:
        content = safetensors.torch.save(plain, metadata={"format": "pt"})
    write_file(path, content)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; its clones are checked when they are built.

    Raises
    ------
    ArchiveError
        If the file is none, or not as :func:`write_bundle` writes it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArchiveError(f"cannot read '{path}': there is no such file")
    text = _metadata(path).get(_KEY)
    if text is None:
        raise ArchiveError(f"cannot read '{path}': no grafted network is in it; netclone inject writes such files")
    try:
        facts = check_keys(json.loads(text), ["format_version", "architecture", "clones"], "the bundle's header")
        if facts["format_version"] != FORMAT_VERSION:
            raise ArchiveError(f"format {shown(facts['format_version'])}, this netclone reads {FORMAT_VERSION}")
        architecture, items = facts["architecture"], check_list(facts["clones"], "clones")
        if not isinstance(architecture, str) or not architecture.startswith(("timm/", "torchvision/")):
            raise ArchiveError(f"architecture: got {shown(architecture)}, expected timm/... or torchvision/...")
        tensors = safetensors.torch.load_file(path)
        clones = tuple(_packed(item, tensors) for item in items)
    except ArchiveError as error:
        raise ArchiveError(f"cannot read '{path}': {error}") from error
    except Exception as error:  # of JSON and safetensors
        raise ArchiveError(f"cannot read '{path}': {type(error).__name__}: {shown(str(error))}") from error
    left = [name for name in tensors if not name.startswith(_TARGET)]
    if left:
        raise ArchiveError(f"cannot read '{path}': tensor {shown(left[0])} belongs to nothing")
    return Bundle(architecture, {name.removeprefix(_TARGET): tensor for name, tensor in tensors.items()}, clones)


def _packed(item: Any, tensors: dict[str, Tensor]) -> Packed:
    item = check_keys(item, ["name", "at"], "a clone")
    name, at = item["name"], item["at"]
    if not isinstance(name, str) or not (at is None or isinstance(at, str)):
        raise ArchiveError(f"a clone's name and position are text, got {shown(item)}")
    archive = tensors.pop(f"{_CLONE}{name}", None)
    if archive is None or archive.dtype != torch.uint8:
        raise ArchiveError(f"the archive of clone {shown(name)} is missing")
    return Packed(name, at, archive.numpy().tobytes())


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:  # of safetensors, which has one error for everything; or of the file system
        return {}
