"""write(rows, out, command): zoo.json, and the table as zoo.md and zoo.html; report(out): the table from the JSON."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import netclone
from netclone.errors import ArchiveError, ArgumentError
from netclone.graph.modes import SPREAD
from netclone.reporting.rendering import render
from netclone.runtime.writing import make_folder, write_text
from netclone.zoo.checking import Row

HEADINGS = (
    "network",
    "parameters, M",
    "target",
    "old logits, to the bit",
    "source",
    "error",
    "prunable",
    "through norms",
    "parameters left",
    "MACs left",
    "latency",
    "slimming, s",
    "all, s",
    "peak, MB",
    "why not; what stays",
)
_BITS = HEADINGS.index("old logits, to the bit")
_OF_SOURCES = range(HEADINGS.index("source"), HEADINGS.index("slimming, s") + 1)  # columns

PASSED, FAILED = "\N{CHECK MARK}", "\N{BALLOT X} failed"


def write(rows: Sequence[Row], out: Path, command: str) -> None:
    """Write the three files, each completely or not at all.

    Raises
    ------
    ArgumentError
        If they cannot be written.
    """
    facts = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "netclone": netclone.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
        },
        "summary": summary(rows),
    }
    text = json.dumps({**facts, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n"
    _write(out, {"zoo.json": text, "zoo.md": markdown(rows, facts), "zoo.html": page(rows, facts)})


def report(out: Path) -> tuple[Row, ...]:
    """Write ``zoo.md`` and ``zoo.html`` again from the ``zoo.json`` of a folder, and give its rows.

    Raises
    ------
    ArgumentError
        If it does not exist, or is not one of a sweep, or the files cannot be written.
    """
    try:
        facts = json.loads((out / "zoo.json").read_text(encoding="utf-8"))
        rows = tuple(Row.from_dict(row) for row in facts["rows"])
        texts = {"zoo.md": markdown(rows, facts), "zoo.html": page(rows, facts)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"out: no zoo in '{out}' ({type(error).__name__}); run the sweep first, or give its folder"
        ) from error
    _write(out, texts)
    return rows


def _write(out: Path, texts: Mapping[str, str]) -> None:
    try:
        make_folder(out)
        for name, text in texts.items():
            write_text(out / name, text)
    except ArchiveError as error:
        raise ArgumentError(f"out: {error}") from error


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How many networks passed, and medians and extremes over the sources that did."""
    asked = [row.source for row in rows if row.source is not None]
    good = [source for source in asked if source.passed]
    numbers: dict[str, Any] = {
        "networks": len(rows),
        "targets": sum(row.target.passed for row in rows),
        "targets_in_modes": sum(row.target.passed and row.target.modes > 0 for row in rows),
        "modes": len(SPREAD),
        "sources_asked": len(asked),
        "sources": len(good),
    }
    for name in (
        "error",
        "prunable",
        "prunable_through_norms",
        "parameters",
        "macs",
        "latency",
        "seconds",
    ):
        values = [value for source in good if (value := getattr(source, name)) is not None]
        if values:
            numbers[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return numbers


def _told(facts: Mapping[str, Any]) -> list[str]:
    """The summary in sentences."""
    s = facts["summary"]
    lines = [
        f"{s['targets']} of {s['networks']} networks pass as targets. Each is traced, and a fixed module is injected "
        "at three positions and removed in another order. After removal, code, names, shapes and flags are as before. "
        "For networks with weights so are all values, and the target's logits are equal to the bit throughout.",
    ]
    if "targets_in_modes" in s:  # it is missing from sweeps before modes were checked
        lines.append(
            f"Old logits were compared to the bit on {s['targets_in_modes']} of them, with every constant randomised, "
            f"in {s['modes']} modes (plain, no_grad and inference_mode, in float32, bfloat16 and float16, channels "
            "last, for batches of 1 to 9, on one and two threads), without those in which the network itself fails or "
            "that do not apply to its images. Networks without weights have no bits to compare. For them the operators "
            "and flags of the grafted graph were compared with the target's, since torch chooses kernels by these."
        )
    if s["sources_asked"]:
        lines.append(
            f"{s['sources']} of {s['sources_asked']} pass as sources. Each is captured, grouped and slimmed to half of "
            "every group's channels by magnitude. The masked and the slim network agree to 1e-9 in float64 on new "
            "images, with every constant randomised. The batch size is free. When it is grafted onto a fixed target, "
            "that one's logits keep every bit."
        )
    if "prunable" in s:
        latency = f", at {s['latency']['median']:.0%} of the latency (float32, one image)" if "latency" in s else ""
        lines.append(
            f"Medians over those: {s['prunable']['median']:.0%} of the parameters are prunable; slimmed to half, "
            f"{s['parameters']['median']:.0%} of the parameters and {s['macs']['median']:.0%} of the MACs are "
            f"left{latency}. Capture, grouping and slimming take {s['seconds']['median']:.1f} s, at most "
            f"{s['seconds']['most']:.1f} s, on one thread. The largest error is {s['error']['most']:.0e}. With "
            "through_norms=True, which also removes channels that a norm averages over, "
            f"{s['prunable_through_norms']['median']:.0%} are prunable."
        )
    return lines


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADINGS without the last; a tick is passed, a cross failed."""
    source = row.source
    figures = [""] * 7
    if source is not None and source.passed:
        shares = (
            source.prunable,
            source.prunable_through_norms,
            source.parameters,
            source.macs,
            source.latency,
        )
        figures = [
            "" if source.error is None else f"{source.error:.0e}",
            *("" if share is None else f"{share:.0%}" for share in shares),
            f"{source.seconds:.1f}",
        ]
    capture = f"{PASSED}\N{NO-BREAK SPACE}{row.target.capture}{' (no weights)' * (row.weights == 'meta')}"
    return (
        row.name,
        f"{row.parameters / 1e6:.1f}",
        capture if row.target.passed else FAILED,
        _bits(row),
        "" if source is None else PASSED if source.passed else FAILED,
        *figures,
        f"{row.seconds:.1f}",
        f"{row.peak_mb:.0f}",
    )


def reasons(row: Row) -> tuple[str, ...]:
    """The reasons why a network failed, or why some of its channels stay."""
    why = [f"target: {row.target.reason}"] if row.target.reason else []
    if row.source is not None:
        why += [f"source: {row.source.reason}"] if row.source.reason else row.source.stays
    return tuple(why)


def _bits(row: Row) -> str:
    """The number of modes in which old logits were compared; without weights, what was compared instead."""
    if not row.target.passed:
        return FAILED
    if row.weights == "meta":
        return "same operators and flags"
    fails = f", of {row.target.modes + row.target.unsupported}; it fails in the others" * bool(row.target.unsupported)
    return f"{row.target.modes} modes{fails}" if row.target.modes else "not in modes"


def table(rows: Sequence[Row], facts: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[Row, tuple[str, ...]]]]:
    """Headings, and rows with their cells, sorted by name; without the columns of checks that were not made."""
    hidden = set() if facts["summary"]["sources_asked"] else {*_OF_SOURCES}
    hidden |= set() if "targets_in_modes" in facts["summary"] else {_BITS}
    shown = [column for column in range(len(HEADINGS) - 1) if column not in hidden]
    found = [(row, cells(row)) for row in sorted(rows, key=lambda row: row.name)]
    return (*(HEADINGS[c] for c in shown), HEADINGS[-1]), [(row, tuple(line[c] for c in shown)) for row, line in found]


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The summary and the table as Markdown; the reasons of a network are folded behind their number."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = ["# The zoo", "", f"`{facts['command']}`, {facts['date'][:10]}; {versions}.", ""]
    for told in _told(facts):
        lines += [told, ""]
    headings, body = table(rows, facts)
    lines += ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row, line in body:
        why = "<br>".join(html.escape(reason, quote=False) for reason in reasons(row))
        folded = f"<details><summary>{len(reasons(row))}</summary>{why}</details>" if why else ""
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*line, folded)) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The summary and the table as one self-contained HTML page; the reasons of failures are unfolded."""
    headings, body = table(rows, facts)
    return render(
        "zoo/table.html.jinja",
        facts=facts,
        told=_told(facts),
        headings=headings,
        rows=[(row.passed, line, reasons(row)) for row, line in body],
    )
