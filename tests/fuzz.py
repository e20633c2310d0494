"""Run many random cases and write the figures to docs/results/fuzzing.json.

``python tests/fuzz.py operators|files COUNT [SEED]``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mutating
import torch
from fuzzing import names, run, tally
from limits import Ended, each

PLACE = Path(__file__).parent.parent / "docs" / "results" / "fuzzing.json"
BEHAVED = ("refused", "ran", "raised")


def fuzz_operators(count: int, first: int = 0) -> dict[str, object]:
    """The figures of ``count`` cases from a first seed on: how each ended, and which misbehaved."""
    names()  # found once, not in every process
    ends, wrong = [], []
    for seed, ended in zip(range(first, first + count), each(run, range(first, first + count)), strict=True):
        kind = ended.value if ended.kind == "done" else f"{ended.kind} ({ended.text.partition(':')[0]})"
        ends.append(kind)
        if kind not in BEHAVED:
            wrong.append(f"{seed}: {names()[seed % len(names())]}: {kind}{_text(ended)}")
    return {
        "operators": len(names()),
        "tried": count,
        "first_seed": first,
        "torch": torch.__version__,
        "ends": tally(ends),
        "misbehaved": wrong,
    }


def fuzz_files(count: int, first: int = 0) -> dict[str, object]:
    """The figures of ``count`` files with mutations, from a first seed on: how each ended, by kind."""
    kinds = list(mutating.KEYS)
    for kind in kinds:
        mutating.original(kind)  # made once, not in every process
    ends: dict[str, list[str]] = {kind: [] for kind in kinds}
    wrong = []
    for seed, ended in zip(range(first, first + count), each(mutating.run, range(first, first + count)), strict=True):
        end = ended.value if ended.kind == "done" else f"{ended.kind} ({ended.text.partition(':')[0]})"
        ends[kinds[seed % len(kinds)]].append(end)
        if end not in mutating.BEHAVED:
            wrong.append(f"{seed}: {kinds[seed % len(kinds)]}: {end}{_text(ended)}")
    return {
        "tried": count,
        "first_seed": first,
        "torch": torch.__version__,
        "ends": {kind: tally(found) for kind, found in ends.items()},
        "misbehaved": wrong,
    }


def _text(ended: Ended) -> str:
    """What an error said, on a line."""
    return " ".join(f": {ended.text.partition(':')[2]}".split())[:200] if ended.kind == "raised" else ""


def write(part: str, figures: dict[str, object], place: Path = PLACE) -> None:
    """Put figures under a name into the file; what others wrote into it stays."""
    known = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps({**known, part: figures}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    fuzz = {"operators": fuzz_operators, "files": fuzz_files}[sys.argv[1]]
    write(sys.argv[1], fuzz(*map(int, sys.argv[2:])))
