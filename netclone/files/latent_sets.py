"""Latent clone sets in files: one ``.safetensors`` file with features, logits and labels, and what they are of."""

from __future__ import annotations

import json
import os

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from netclone.errors import ArchiveError
from netclone.files.archiving import path_of
from netclone.files.graphdata import check_keys, shown
from netclone.files.spec import CloneSpec, spec_from_data, spec_to_data
from netclone.runtime.digests import content_digest
from netclone.runtime.writing import write_file

FORMAT_VERSION = 2
_PLAIN_VERSION = 1  # of a set without the target's features
_KEY = "netclone_latents"
_TENSORS = ("features", "labels", "logits")
_OF_TARGET = "target_features"  # where the clone reads these, and not the target's logits
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write_latents(spec: CloneSpec, body: str, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a latent clone set, whole or not at all.

    ``spec`` is that of the clone it was made for, and ``body`` a digest of what else of the clone the features depend
    on; empty if nothing.

    Raises
    ------
    ArchiveError
        If it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    version = FORMAT_VERSION if _OF_TARGET in plain else _PLAIN_VERSION
    header: dict[str, object] = {"format_version": version, "spec": spec_to_data(spec), "body": body}
    header["sha256"] = content_digest(header, plain)
    content = safetensors.torch.save(plain, metadata={_KEY: json.dumps(header, allow_nan=False)})
    write_file(path_of(path), content)


def read_latents(path: str | os.PathLike[str]) -> tuple[CloneSpec, str, dict[str, Tensor]]:
    """Read what :func:`write_latents` wrote; safe on files from strangers: numbers, and facts that are checked.

    Raises
    ------
    ArchiveError
        If the file is missing, damaged, no latent clone set, or of a newer netclone.
    """
    path = path_of(path)
    if not os.path.isfile(path):
        raise ArchiveError(f"cannot read '{path}': there is no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ArchiveError("it holds no latent clone set; Latents.save writes such files")
        header = json.loads(text)
        version = header.get("format_version") if isinstance(header, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise ArchiveError(f"written by a newer netclone (format {shown(version)}): upgrade netclone")
        header = check_keys(header, ["format_version", "spec", "body", "sha256"], "the header")
        if type(version) is not int or version < _PLAIN_VERSION:
            raise ArchiveError(f"format {shown(version)}, this netclone reads {_PLAIN_VERSION} to {FORMAT_VERSION}")
        tensors = safetensors.torch.load_file(path)
        if content_digest({name: header[name] for name in header if name != "sha256"}, tensors) != header["sha256"]:
            raise ArchiveError("the digest does not match: the file was damaged or changed; get it again")
        spec, body = spec_from_data(header["spec"]), header["body"]
        if not isinstance(body, str):
            raise ArchiveError(f"body: got {shown(body)}, expected a digest")
        _check(spec, tensors, (*_TENSORS, _OF_TARGET) if version > _PLAIN_VERSION else _TENSORS)
    except ArchiveError as error:
        raise ArchiveError(f"cannot read '{path}': {error}") from error
    except Exception as error:  # of JSON and safetensors
        raise ArchiveError(f"cannot read '{path}': {type(error).__name__}: {shown(str(error))}") from error
    return spec, body, tensors


def _check(spec: CloneSpec, tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise unless the tensors are features, labels and logits of the same samples, of the clone's columns."""
    if sorted(tensors) != list(names):
        raise ArchiveError(f"it holds the tensors {shown(sorted(tensors))}, expected {', '.join(names)}")
    labels, logits, read = tensors["labels"], tensors["logits"], tensors[names[-1]]
    floats = [tensor for name, tensor in tensors.items() if name != "labels"]
    if any(tensor.dtype not in _FLOATS for tensor in floats) or labels.dtype != torch.int64:
        kinds = ", ".join(f"{name} {tensors[name].dtype}" for name in names)
        raise ArchiveError(f"it holds {kinds}, expected floats, and int64 labels")
    count = len(labels) if labels.dim() == 1 else 0
    features = tensors["features"]
    fits = features.dim() >= 2 and logits.dim() == 2 and spec.feature_shape == tuple(read.shape[1:])
    if not count or not fits or len(features) != count:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
        raise ArchiveError(f"{shapes}: these are not features, labels and {names[-1]} {spec.feature_shape} of one set")
    if any(len(tensor) != count or not bool(torch.isfinite(tensor).all()) for tensor in floats):
        raise ArchiveError(f"{' or '.join(names[2:])} of other samples, or numbers that are not finite")
    columns = logits.shape[1] + len(spec.classes)
    if int(labels.min()) < 0 or int(labels.max()) >= columns:
        raise ArchiveError(f"labels run from {int(labels.min())} to {int(labels.max())}, of {columns} columns")
