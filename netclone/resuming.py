"""Resuming: what a run has found so far, in a file beside its result, so that the same command goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from netclone.errors import ArchiveError
from netclone.sharing import ALONE, Workers
from netclone.writing import write_bytes

FORMAT_VERSION = 1
_KEY = "netclone_partial"


class Findings:
    """Stages of a run by name, each a few tensors and a number; kept on disk where there is a ``path``.

    Plain data in one ``.safetensors`` file, written whole or not at all by the main worker, which also reads it for the
    others. A file of another run, or one that is damaged, counts as none.

    Examples
    --------
    >>> import torch
    >>> findings = Findings()
    >>> findings.keep("mask", {"layer1": torch.ones(2)}, 0.5)
    >>> findings.recall("mask")
    ({'layer1': tensor([1., 1.])}, 0.5)
    """

    def __init__(self, path: Path | None = None, workers: Workers = ALONE) -> None:
        self.path, self.workers = path, workers
        self.key = ""
        self._stages: dict[str, tuple[dict[str, Tensor], float]] = {}

    def __len__(self) -> int:
        return len(self._stages)

    def open(self, key: str) -> None:
        """Look for what an earlier run of the same key has found; the key stands for all that the result depends on."""
        self.key = key
        if self.path is None:
            return
        content = b""
        with self.workers.agreed():
            if self.workers.main and self.path.is_file():
                content = self.path.read_bytes()
        self._stages = _stages_from(self.workers.told(content)[0], key)

    def recall(self, name: str) -> tuple[dict[str, Tensor], float] | None:
        """What was found at a stage; None if the stage is still to come."""
        return self._stages.get(name)

    def keep(self, name: str, tensors: Mapping[str, Tensor], number: float = 0.0) -> None:
        """Keep what was found at a stage.

        Raises
        ------
        ArchiveError
            If it cannot be written.
        """
        if self.path is None:
            self._stages[name] = dict(tensors), number
            return
        copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        self._stages[name] = copies, number
        with self.workers.agreed():
            if self.workers.main:
                try:
                    write_bytes(self.path, self._content())
                except OSError as error:
                    raise ArchiveError(
                        f"cannot write '{self.path}', where what was found is kept: {error.strerror or error}; make "
                        "room, or write elsewhere"
                    ) from error

    def forget(self) -> None:
        """Remove the file, where this run has read or written it."""
        if self.path is not None and self._stages and self.workers.main:
            self.path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        stages = list(self._stages.items())
        named = {f"{i}.{key}": tensor for i, (_, (tensors, _)) in enumerate(stages) for key, tensor in tensors.items()}
        facts = {
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "stages": [[name, number] for name, (_, number) in stages],
        }
        return safetensors.torch.save(named, metadata={_KEY: json.dumps(facts)})


def _stages_from(content: bytes, key: str) -> dict[str, tuple[dict[str, Tensor], float]]:
    try:
        header: Any = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][_KEY])
        if (facts["format_version"], facts["key"]) != (FORMAT_VERSION, key):
            return {}
        stages: dict[str, tuple[dict[str, Tensor], float]] = {name: ({}, number) for name, number in facts["stages"]}
        names = list(stages)
        for label, tensor in safetensors.torch.load(content).items():
            number, _, name = label.partition(".")
            stages[names[int(number)]][0][name] = tensor
        return stages
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, safetensors.SafetensorError):
        return {}  # none, torn, or something else: the run begins from the start
