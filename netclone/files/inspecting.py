"""inspect(path) -> Inspection: what a clone's file holds, read from its header alone, and how it is printed.

And inspect_bundle(path), for the file of a grafted network.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from netclone.files.archiving import ArchiveHeader, header_from_bytes, read_header
from netclone.files.bundling import read_bundle
from netclone.files.spec import CloneSpec, Gate
from netclone.runtime.text import as_plain_text

_DIGEST = re.compile("(sha256:[0-9a-f]{12})[0-9a-f]+")  # whole ones are in the JSON
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

    def as_dict(self) -> dict[str, object]:
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
    return _inspection(read_header(path), Path(path).name, os.path.getsize(path))


@dataclass(frozen=True)
class BundleInspection:
    """A grafted network's file: its size in bytes, the target, how it wants its images, and its clones by name.

    ``values`` is how many numbers the target's tensors hold, buffers included: a checkpoint does not tell them apart.
    """

    file: str
    bytes: int
    architecture: str
    values: int
    config: dict[str, object]
    clones: tuple[tuple[str, str | None, Inspection], ...]

    def as_dict(self) -> dict[str, object]:
        """All of it as plain data."""
        clones = [{"name": name, "at": at, **found.as_dict()} for name, at, found in self.clones]
        return {**asdict(replace(self, clones=())), "clones": clones}


def inspect_bundle(path: str | os.PathLike[str]) -> BundleInspection:
    """What the file of a grafted network holds; of its clones only the headers are looked at.

    Raises
    ------
    ArchiveError
        If it is none, or a clone in it has no header as :func:`netclone.save` writes it.
    """
    bundle = read_bundle(path)
    clones = []
    for packed in bundle.clones:
        header = header_from_bytes(packed.archive, f"clone '{packed.name}'")
        clones.append((packed.name, packed.at, _inspection(header, packed.name, len(packed.archive))))
    return BundleInspection(
        file=Path(path).name,
        bytes=os.path.getsize(path),
        architecture=bundle.architecture,
        values=sum(tensor.numel() for tensor in bundle.tensors.values()),
        config=dict(bundle.config),
        clones=tuple(clones),
    )


def show_bundle(inspection: BundleInspection, console: Console) -> None:
    """Print it: the target, and in short what each clone is."""
    config, count = inspection.config, len(inspection.clones)
    names = ", ".join(name for name, _, _ in inspection.clones)
    answer = f"{inspection.architecture} with {count} clone{'s' * (count != 1)}: {names}"
    console.print(Text(as_plain_text(answer), style="bold"), soft_wrap=True)
    about = {
        "target": f"{inspection.architecture}, {inspection.values:,} numbers",
        "its images": ", ".join(f"{name} {value}" for name, value in config.items() if name != "label_names"),
        "size": f"{inspection.bytes:,} bytes",
    }
    console.print(_table_of(about))
    table = Table("clone", "classes", "grafted at", title="Clones, in order", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("certificate", justify="right")
    for name, at, found in inspection.clones:
        facts = (
            classes_of(found.spec),
            at or found.spec.at or "",
            f"{found.parameters:,}",
            f"{found.spec.certificate:.1e}",
        )
        table.add_row(*map(_cell, (name, *facts)))
    console.print(table)


def _cell(value: str) -> Text:
    """Text of a file, made safe for a terminal."""
    return Text(as_plain_text(value))


def _table_of(facts: dict[str, str]) -> Table:
    """A table of facts by name, without those that are empty; as text, never as markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, fact in facts.items():
        if fact:
            table.add_row(Text(name, style="bold"), _cell(fact))
    return table


def _inspection(header: ArchiveHeader, file: str, size: int) -> Inspection:
    counts = {
        kind: sum(math.prod(entry.shape) for entry in header.tensors if entry.is_parameter == kind)
        for kind in (True, False)
    }
    return Inspection(
        file=file,
        bytes=size,
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
        "classes": classes_of(spec),
        "grafted at": spec.at or "not fitted to a target: extracted only",
        "cut behind": spec.source_at or "the source's input",
        "takes": _shape(spec.input_shape)
        + (f" and, from '{spec.feature_node}', {_shape(spec.feature_shape)}" if spec.feature_shape else ""),
        "target's images": _shape(spec.target_input_shape) if spec.target_input_shape else "",
        "size": f"{inspection.parameters:,} parameters, {inspection.bytes:,} bytes, {inspection.nodes} nodes, "
        + ", ".join(inspection.dtypes),
        "gate": _gate(spec.gate) if spec.gate else "",
        "bias": f"{spec.bias:+.4g} on its logits" if spec.bias else "",
        "stored as": ", ".join(f"{word} (off by {error:.1e} of the largest logit)" for word, error in spec.stored),
        "certificate": f"{spec.certificate:.1e} (max |masked - slim| / max |masked|, float64)",
        "scores": ", ".join(f"{name} {value:.4g}" for name, value in spec.scores if ", " not in name),
        **_origin(dict(spec.origin)),
        "made by": " ".join(f"{name} {fact}" for name, fact in spec.versions),
        "recipe": ", ".join(f"{name} {value.strip(chr(34))}" for name, value in spec.recipe),
        "structures": " ".join(f[:12] for f in (spec.source_fingerprint, spec.target_fingerprint) if f),
        "digest": f"{inspection.sha256[:12]} (format {inspection.format_version}; verified when loaded)",
    }


_PLACES = {"macs": "MACs", "params": "parameters", "latency": "time", "channels": "channels"}
_SHARES = {0.25: "a quarter", 0.5: "half", 0.75: "three quarters"}


def summary(spec: CloneSpec) -> str:
    """What became of a clone, in one line: classes, position, size, and accuracy on images that were held out.

    Examples
    --------
    >>> scores = (("validation", 0.779), ("old before", 0.722), ("old", 0.718), ("new", 0.84))
    >>> recipe = (("keep", "0.5"), ("budget", '"macs"'))
    >>> summary(CloneSpec((5, 7), (), None, (3, 8, 8), 0.0, at="input", scores=scores, recipe=recipe))
    '2 classes at input, at most half of the MACs of the source; on held-out images old 72.2% to 71.8%, new 84.0%'
    """
    count = len(spec.classes)
    text = f"{count} class{'es' * (count > 1)} {f'at {spec.at}' if spec.at else 'extracted, not fitted to a target'}"
    recipe, scores = dict(spec.recipe), dict(spec.scores)
    try:
        keep, budget = float(recipe["keep"]), _PLACES[recipe["budget"].strip('"')]
        share = f"at most {_SHARES.get(keep, f'{keep:.0%}')} of the {budget} of the source"
        text += f", {share if keep < 1 else 'the whole source'}"
    except (KeyError, ValueError):  # not made by netclone.clone, or by another version
        pass
    figures = []
    if "old before" in scores and "old" in scores:
        figures.append(f"old {scores['old before']:.1%} to {scores['old']:.1%}")
    if "new" in scores:
        figures.append(f"new {scores['new']:.1%}")
    return text + (f"; on held-out images {', '.join(figures)}" if figures else "")


def _origin(origin: dict[str, str]) -> dict[str, str]:
    """Where a clone comes from, in words, by name: networks, images, day and person, as far as the file says."""
    found = {}
    for what in ("source", "target", "data", "target data"):
        told = {name.removeprefix(what).strip(): fact for name, fact in origin.items() if _is_of(name, what)}
        first = told.pop("", "")
        found["target's data" if what == "target data" else what] = ", ".join(
            [*filter(None, [first]), *(f"{name} {fact}" for name, fact in told.items())]
        )
    rest = [name for name in origin if name.split()[0] not in ("source", "target", "data", "date", "by")]
    day = f"{origin.get('date', '')}{' by ' * ('by' in origin)}{origin.get('by', '')}"
    return {**found, "made on": ", ".join(filter(None, [day, *(f"{name} {origin[name]}" for name in rest)]))}


def _is_of(name: str, what: str) -> bool:
    """Whether a fact of an origin is about one of its parts: ``"source weights"`` is about the source."""
    return (name == what or name.startswith(f"{what} ")) and (what != "target" or not name.startswith("target data"))


def show(inspection: Inspection, console: Console) -> None:
    """Print it: the answer, the facts, how much of each group was kept, and the positions that were tried."""
    spec = inspection.spec
    console.print(Text(as_plain_text(summary(spec)), style="bold"), soft_wrap=True)
    told = {name: _DIGEST.sub(r"\1", fact) for name, fact in facts(inspection).items()}
    console.print(_table_of(told))
    if spec.kept:
        table = Table("group of channels", "", title="Kept of the source", title_justify="left")
        table.add_column("kept", justify="right")
        for name, kept, size in spec.kept:
            filled = round(_WIDTH * kept / size)
            table.add_row(_cell(name), "█" * filled + "░" * (_WIDTH - filled), f"{kept} of {size}")
        console.print(table)
    if fits := _fits(spec):
        measures = sorted({measure for measured in fits.values() for measure in measured})
        table = Table("fit of the classifier", title="Judged by cross-validation", title_justify="left")
        for measure in measures:
            table.add_column(as_plain_text(measure), justify="right")
        for name, measured in fits.items():
            table.add_row(*map(_cell, (name, *(f"{measured[m]:.4g}" if m in measured else "" for m in measures))))
        console.print(table)
    if spec.search:
        table = Table("position", "source cut behind", title="Positions tried", title_justify="left")
        table.add_column("validation", justify="right")
        table.add_column("rejected because")
        for tried in spec.search:
            score = "" if tried.score is None else f"{tried.score:.1%}"
            table.add_row(*map(_cell, (tried.at, tried.source_at or "input", score, tried.reason)))
        console.print(table)


def _gate(gate: Gate) -> str:
    reads = ", ".join(node for node, _ in gate.reads)
    sent = f"{1 - gate.skipped:.0%} of old images and {1 - gate.missed:.0%} of new ones are sent to the clone"
    return f"{sent} (cross-validated); reads {reads}"


def _fits(spec: CloneSpec) -> dict[str, dict[str, float]]:
    """The scores of what was tried for one thing, by name and by measure: those named ``"measure, name"``."""
    found: dict[str, dict[str, float]] = {}
    for score, value in spec.scores:
        measure, _, name = score.partition(", ")
        if name:
            found.setdefault(name, {})[measure] = value
    return found


def classes_of(spec: CloneSpec) -> str:
    """The classes of a clone: index in the source, and name where there is one that says more."""
    names = spec.class_names or ("",) * len(spec.classes)
    pairs = zip(spec.classes, names, strict=True)
    return ", ".join(f"{index}" if name in ("", str(index)) else f"{index} {name}" for index, name in pairs)


def _shape(shape: tuple[int, ...]) -> str:
    return f"(N, {', '.join(map(str, shape))})"
