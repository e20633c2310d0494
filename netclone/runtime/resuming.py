"""Resuming: the intermediate results of a run, in a file beside its result, from which the same command continues."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from netclone.errors import ArchiveError
from netclone.runtime.digests import content_digest
from netclone.runtime.sharing import ALONE, Workers
from netclone.runtime.writing import write_file

FORMAT_VERSION = 1
PERIOD = 10.0  # seconds between two writes of an unfinished stage, for one process
EVERY = 25  # steps between them, for several processes, which have to agree on the moment
_KEY = "netclone_partial"
_DAMAGED = (
    *(RecursionError, OverflowError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    safetensors.SafetensorError,
)  # errors that reading any other file may raise
_UNFINISHED = ", unfinished"  # suffix of a stage's name


class Findings:
    """Stages of a run by name, each with a few tensors and a number; kept on disk if there is a ``path``.

    The file is one ``.safetensors`` file of plain data. The main worker writes it, completely or not at all, and reads
    it for the others. A damaged file, or one of another run, is ignored.

    Examples
    --------
    >>> import torch
    >>> findings = Findings()
    >>> findings.keep("mask", {"layer1": torch.ones(2)}, 0.5)
    >>> findings.recall("mask")
    ({'layer1': tensor([1., 1.])}, 0.5)
    """

    def __init__(
        self,
        path: Path | None = None,
        workers: Workers = ALONE,
        resumed: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.path, self.workers = path, workers
        self.resumed = resumed  # called with the stages of an earlier run, if there are any
        self.key = ""
        self._stages: dict[str, tuple[dict[str, Tensor], float]] = {}

    def __len__(self) -> int:
        return len(self._stages)

    def open(self, key: str) -> None:
        """Look for results of an earlier run with the same key, which describes all that the result depends on."""
        self.key = key
        if self.path is None:
            return
        content = b""
        with self.workers.agreed():
            if self.workers.main and self.path.is_file():
                content = self.path.read_bytes()
        self._stages = _stages_from(self.workers.told(content)[0], key)
        if self._stages and self.resumed is not None and self.workers.main:
            self.resumed(self.stages)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the finished stages, in order."""
        return tuple(self._stages)

    def recall(self, name: str) -> tuple[dict[str, Tensor], float] | None:
        """The result of a stage; None if it is not finished."""
        return self._stages.get(name)

    def keep(self, name: str, tensors: Mapping[str, Tensor], number: float = 0.0) -> None:
        """Store the result of a stage.

        Raises
        ------
        ArchiveError
            If it cannot be written.
        """
        self._stages.pop(name + _UNFINISHED, None)
        if self.path is None:
            self._stages[name] = dict(tensors), number
            return
        copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        self._stages[name] = copies, number
        with self.workers.agreed():
            if self.workers.main:
                try:
                    write_file(self.path, self._content())
                except ArchiveError as error:
                    raise ArchiveError(f"intermediate results: {error}") from error

    def unfinished(self, name: str) -> Unfinished | None:
        """Where to keep the state of the learning within a stage; None if there is no file."""
        return None if self.path is None else Unfinished(self, name + _UNFINISHED)

    def forget(self) -> None:
        """Remove the file, if this run has read or written it, because the final result exists."""
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
        facts["sha256"] = content_digest(facts, named)
        return safetensors.torch.save(named, metadata={_KEY: json.dumps(facts)})


@dataclass
class Unfinished:
    """A stage in progress, stored now and then: the optimizer with its tensors, last batch and generator state."""

    findings: Findings
    name: str
    _written: float = field(default_factory=lambda: time.monotonic())

    def restore(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """Restore the state of an earlier run; returns its number of steps (0 if there is none) and its last batch."""
        found = self.findings.recall(self.name)
        if found is None:
            return 0, None
        tensors, steps = found
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "parameter":
                with torch.no_grad():
                    parameters[int(rest)].copy_(tensor)
            elif kind == "optimizer":
                number, _, part = rest.partition(".")
                kept.setdefault(int(number), {})[part] = tensor
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(tensors["generator"])
        device = parameters[0].device
        return int(steps), (tensors["points"].to(device), tensors["answers"].to(device))

    def keep(
        self,
        steps: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        """Store the state after so many steps, if it is time."""
        alone = self.findings.workers.count == 1
        if time.monotonic() - self._written < PERIOD if alone else steps % EVERY:
            return
        tensors = {f"parameter.{i}": parameter for i, parameter in enumerate(parameters)}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{part}": tensor for part, tensor in state.items()}
        tensors |= {"generator": generator.get_state(), "points": batch[0], "answers": batch[1]}
        self.findings.keep(self.name, tensors, steps)
        self._written = time.monotonic()


def _stages_from(content: bytes, key: str) -> dict[str, tuple[dict[str, Tensor], float]]:
    try:
        header: Any = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][_KEY])
        if (facts["format_version"], facts["key"]) != (FORMAT_VERSION, key):
            return {}
        tensors = safetensors.torch.load(content)
        if facts.pop("sha256") != content_digest(facts, tensors):
            return {}
        stages: dict[str, tuple[dict[str, Tensor], float]] = {}
        for name, number in facts["stages"]:
            if not isinstance(name, str) or type(number) not in (int, float) or not math.isfinite(number):
                return {}
            stages[name] = {}, number
        names = list(stages)
        for label, tensor in tensors.items():
            number, _, name = label.partition(".")
            stages[names[int(number)]][0][name] = tensor
        return stages
    except _DAMAGED:
        return {}  # missing, incomplete or another file: start anew
