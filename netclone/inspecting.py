"""inspect(path) -> Inspection: what a clone's file says about itself, read from its header alone, and shown."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from netclone.archiving import read_header
from netclone.modules import CloneSpec

_WIDTH = 20  # of a bar, in characters


@dataclass(frozen=True)
class Inspection:
    """A clone's file: its size in bytes, its digest, what it holds and what is known about the clone."""

    file: str
    bytes: int
    format_version: int
    sha256: str
    parameters: int
    buffers: int
    dtypes: tuple[str, ...]
    nodes: int
    spec: CloneSpec

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data, what is known about the clone side by side with the rest."""
        facts = asdict(self)
        return {**facts.pop("spec"), **facts}


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """What a file says about its clone; no tensor is read, so the digest is not verified.

    Raises
    ------
    ArchiveError
        If it is no netclone archive, or its header is not as :func:`netclone.save` writes it.

    Examples
    --------
    >>> import tempfile, timm, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> module = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1, 3])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     netclone.save(module, f"{folder}/clone.safetensors")
    ...     inspect(f"{folder}/clone.safetensors").spec.classes
    (1, 3)
    """
    header = read_header(path)
    counts = {
        kind: sum(math.prod(entry.shape) for entry in header.tensors if entry.is_parameter == kind)
        for kind in (True, False)
    }
    return Inspection(
        file=Path(path).name,
        bytes=os.path.getsize(path),
        format_version=header.format_version,
        sha256=header.sha256,
        parameters=counts[True],
        buffers=counts[False],
        dtypes=tuple(sorted({str(entry.dtype).removeprefix("torch.") for entry in header.tensors})),
        nodes=len(header.graph.nodes),
        spec=header.spec,
    )


def facts(inspection: Inspection) -> dict[str, str]:
    """What a file says about its clone, in words, by name; empty where it does not say."""
    spec = inspection.spec
    return {
        "classes": described(spec),
        "grafted at": spec.at or "not fitted to a target: extracted only",
        "cut behind": spec.source_at or "the source's input",
        "takes": _shape(spec.input_shape)
        + (f" and, from '{spec.feature_node}', {_shape(spec.feature_shape)}" if spec.feature_shape else ""),
        "target's images": _shape(spec.target_input_shape) if spec.target_input_shape else "",
        "size": f"{inspection.parameters:,} parameters, {inspection.bytes:,} bytes, {inspection.nodes} nodes, "
        + ", ".join(inspection.dtypes),
        "certificate": f"{spec.certificate:.1e} (max |masked - slim| / max |masked|, float64)",
        "scores": ", ".join(f"{name} {value:.4g}" for name, value in spec.scores),
        "source, target": " ".join(f[:12] for f in (spec.source_fingerprint, spec.target_fingerprint) if f),
        "digest": f"{inspection.sha256[:12]} (format {inspection.format_version}; verified when loaded)",
    }


def show(inspection: Inspection, console: Console) -> None:
    """Print it: the facts, how much of each group of channels was kept, and the positions that were tried."""
    spec = inspection.spec
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, fact in facts(inspection).items():
        if fact:
            table.add_row(f"[bold]{name}[/bold]", escape(fact))
    console.print(table)
    if spec.kept:
        table = Table("group of channels", "", title="Kept of the source", title_justify="left")
        table.add_column("kept", justify="right")
        for name, kept, size in spec.kept:
            filled = round(_WIDTH * kept / size)
            table.add_row(escape(name), "█" * filled + "░" * (_WIDTH - filled), f"{kept} of {size}")
        console.print(table)
    if spec.search:
        table = Table("position", "source cut behind", title="Positions tried", title_justify="left")
        table.add_column("score", justify="right")
        table.add_column("rejected because")
        for tried in spec.search:
            score = "" if tried.score is None else f"{tried.score:.1%}"
            table.add_row(escape(tried.at), escape(tried.source_at or "input"), score, escape(tried.reason))
        console.print(table)


def described(spec: CloneSpec) -> str:
    """The classes of a clone: index in the source, and name where there is one."""
    names = spec.class_names or ("",) * len(spec.classes)
    return ", ".join(f"{index} {name}".rstrip() for index, name in zip(spec.classes, names, strict=True))


def _shape(shape: tuple[int, ...]) -> str:
    return f"(N, {', '.join(map(str, shape))})"
