"""Bundle: a grafted network in one file: the target's architecture and tensors, and its clones as their files were.

A bundle is a ``.safetensors`` file. Nothing in it is run or imported: the architecture is a name that
:func:`netclone.load_model` looks up in the own registry of timm, torchvision or transformers, the tensors have to be
exactly that network's, and every clone is an archive that is checked as :func:`netclone.load` checks it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from netclone.errors import ArchiveError, CloneNameError
from netclone.files.archiving import path_of
from netclone.files.graphdata import check_keys, check_list, shown
from netclone.files.options import SAID, checked_architecture, checked_config, checked_options
from netclone.files.provenance import Event, History, log_from_data, log_to_data, sha256
from netclone.graph.describing import facts_about, given_names
from netclone.graph.preparing import preparation
from netclone.runtime.digests import content_digest
from netclone.runtime.text import is_plain_text
from netclone.runtime.writing import write_file

FORMAT_VERSION = 3
"""The newest version :func:`read_bundle` reads. A file is written as the oldest that has what it needs."""

_PLAIN_VERSION = 1  # without clones that are off or have columns of their own, and without a log
_SEATED, _LOGGED = 2, 3  # with these, and with a log too
_KEY = "netclone_bundle"
_MOST_COLUMNS = 100_000
_TARGET = "target."  # before the names of the target's tensors
_CLONE = "clone."  # and before those of its clones, whose tensors are the bytes of their archives


@dataclass(frozen=True)
class Packed:
    """A clone in a bundle: its name, the position it reads (None: the one it was fitted for) and its archive.

    ``first`` is its first column where columns are stable, and ``off`` says whether it is switched off.
    """

    name: str
    at: str | None
    archive: bytes
    first: int | None = None
    off: bool = False


@dataclass(frozen=True)
class Bundle:
    """A target, named as ``"timm/..."`` (or another of the libraries), with its tensors, and its clones in order.

    ``options`` are those of its constructor, as data: what :func:`checked_options` lets pass. ``config`` is how it
    wants its images and what its classes are called, by timm's names (those in :data:`CONFIG`). ``log`` is what was
    done to the file, as far as that is known; :meth:`logged` continues it.
    """

    architecture: str
    tensors: Mapping[str, Tensor]
    clones: tuple[Packed, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    log: tuple[Event, ...] = ()

    @property
    def history(self) -> History:
        """The log, and which clones are there."""
        return History(self.log, {packed.name: sha256(packed.archive) for packed in self.clones})

    def logged(self, since: History, *, files: Mapping[str, str] | None = None, by: str = "") -> Bundle:
        """The bundle with a log of what became of a file of that history, as :meth:`History.until` writes it."""
        archives = {packed.name: packed.archive for packed in self.clones}
        return replace(self, log=since.until(archives, files=files, by=by))

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
    """Whether a file is a ``.safetensors`` file that holds a bundle."""
    return os.path.isfile(path) and _KEY in _metadata(Path(path))


def is_plain_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is what :func:`write_bundle` leaves of a bundle without clones."""
    return os.path.isfile(path) and SAID in _metadata(Path(path))


def write_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Write a bundle, whole or not at all; without clones, a plain checkpoint of the target's tensors.

    A plain checkpoint records architecture, options and config in its metadata, which :func:`netclone.load_model` reads
    and every other reader of ``.safetensors`` ignores.

    Raises
    ------
    ArchiveError
        If it cannot be written.
    """
    path = path_of(path)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in bundle.tensors.items()}
    if bundle.clones:
        tensors = {f"{_TARGET}{name}": tensor for name, tensor in plain.items()}
        for packed in bundle.clones:
            tensors[f"{_CLONE}{packed.name}"] = torch.frombuffer(bytearray(packed.archive), dtype=torch.uint8)
        items: list[dict[str, object]] = [{"name": packed.name, "at": packed.at} for packed in bundle.clones]
        seated = any(packed.off or packed.first is not None for packed in bundle.clones)
        version = _LOGGED if bundle.log else _SEATED if seated else _PLAIN_VERSION
        for item, packed in zip(items, () if version == _PLAIN_VERSION else bundle.clones, strict=False):
            item |= {"first": packed.first, "off": packed.off}
        header: dict[str, object] = {
            "format_version": version,
            "architecture": bundle.architecture,
            "clones": items,
            "config": checked_config(bundle.config),
        }
        if bundle.options:
            header["options"] = checked_options(bundle.options)
        if bundle.log:
            header["log"] = log_to_data(bundle.log)
        header["sha256"] = content_digest(header, tensors)
        content = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})
    else:
        said: dict[str, object] = {
            "architecture": bundle.architecture,
            "config": checked_config(bundle.config),
            "options": checked_options(bundle.options),
        }
        if bundle.log:
            said["log"] = log_to_data(bundle.log)
        content = safetensors.torch.save(plain, metadata={"format": "pt", SAID: json.dumps(said)})
    write_file(path, content)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; its clones are checked when they are built.

    Raises
    ------
    ArchiveError
        If the file is none, or not as :func:`write_bundle` writes it.
    """
    path = path_of(path)
    if not os.path.isfile(path):
        raise ArchiveError(f"cannot read '{path}': there is no such file")
    text = _metadata(path).get(_KEY)
    if text is None:
        raise ArchiveError(f"cannot read '{path}': it holds no grafted network; netclone inject writes such files")
    try:
        facts = json.loads(text)
        signed = dict(facts) if isinstance(facts, dict) else {}
        if signed and "sha256" not in signed:
            raise ArchiveError(
                "it was written before such files had a digest, so damage would go unnoticed; graft its clones again "
                "with netclone inject"
            )
        version = signed.get("format_version", 1)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            known = f"this netclone reads 1 to {FORMAT_VERSION}: upgrade it, or write the file again"
            raise ArchiveError(f"format {shown(version)}, {known}")
        options = facts.pop("options", {}) if isinstance(facts, dict) else {}
        log = facts.pop("log") if version == _LOGGED else []
        facts = check_keys(
            facts, ["format_version", "architecture", "clones", "config", "sha256"], "the bundle's header"
        )
        architecture, items = checked_architecture(facts["architecture"]), check_list(facts["clones"], "clones")
        config, options, events = checked_config(facts["config"]), checked_options(options), log_from_data(log)
        tensors = safetensors.torch.load_file(path)
        signed.pop("sha256")
        if content_digest(signed, tensors) != facts["sha256"]:
            raise ArchiveError("the digest does not match: the file is damaged; write it again")
        clones = tuple(_packed(item, tensors, version) for item in items)
        if len({packed.first is None for packed in clones}) > 1:
            raise ArchiveError("clones: some have columns of their own, and some have none")
    except ArchiveError as error:
        raise ArchiveError(f"cannot read '{path}': {error}") from error
    except Exception as error:  # of JSON and safetensors
        raise ArchiveError(f"cannot read '{path}': {type(error).__name__}: {shown(str(error))}") from error
    left = [name for name in tensors if not name.startswith(_TARGET)]
    if left:
        raise ArchiveError(f"cannot read '{path}': tensor {shown(left[0])} is not the target's and not a clone")
    own = {name.removeprefix(_TARGET): tensor for name, tensor in tensors.items()}
    return Bundle(architecture, own, clones, config, options, events)


def log_of(path: str | os.PathLike[str]) -> tuple[Event, ...]:
    """The log of a grafted network's file, or of the checkpoint that its target became when the last clone was removed.

    Raises
    ------
    ArchiveError
        If the file is neither.
    """
    if not is_plain_checkpoint(path):
        return read_bundle(path).log
    try:
        said = json.loads(_metadata(Path(path))[SAID])
        return log_from_data(said.get("log", []) if isinstance(said, dict) else [])
    except ValueError as error:  # of JSON too
        raise ArchiveError(f"cannot read '{path}': {shown(str(error))}") from error


def config_of(network: nn.Module) -> dict[str, object]:
    """The preprocessing of a network's images and its class names, as a bundle stores them."""
    config = preparation(network).as_config()
    facts = facts_about(network)
    labels = given_names(facts, len(facts.get("label_names") or ()))
    return config | ({"label_names": list(labels)} if labels else {})


def _packed(item: object, tensors: dict[str, Tensor], version: int) -> Packed:
    item = check_keys(item, ["name", "at", *(["first", "off"] if version > _PLAIN_VERSION else [])], "a clone")
    name, at, first, off = item["name"], item["at"], item.get("first"), item.get("off", False)
    if not (first is None or (type(first) is int and 0 <= first <= _MOST_COLUMNS)) or type(off) is not bool:
        raise ArchiveError(f"clone {shown(name)}: 'first' or 'off' has an invalid value, {shown(item)}")
    if not is_plain_text(name) or not (at is None or is_plain_text(at)):
        raise ArchiveError(f"a clone's name and position are text without control characters, got {shown(item)}")
    archive = tensors.pop(f"{_CLONE}{name}", None)
    if archive is None or archive.dtype != torch.uint8:
        raise ArchiveError(f"the archive of clone {shown(name)} is missing")
    return Packed(name, at, archive.numpy().tobytes(), first, off)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:  # of safetensors, which has one error for everything; or of the file system
        return {}
