"""How the benchmarks' ratios change over time: python examples/benchmarks/history.py [FOLDER [DATE]]

Reads what ``surgery.py``, ``learning.py`` and ``deployment.py`` wrote into FOLDER (docs/results), and appends to its
``history.csv`` every figure that has a bar, with the date and the versions. A figure that is as it was is not written
again. Run it after a benchmark, and commit both files.
"""

from __future__ import annotations

import csv
import datetime
import json
import sys
from pathlib import Path

import netclone

FILES = ("surgery.json", "learning.json", "deployment.json")
FIELDS = ("date", "netclone", "torch", "benchmark", "figure", "value", "bar")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def append(folder: Path, date: str) -> int:
    """Append what is new in a folder's results to its history; returns how many figures that were."""
    path = folder / "history.csv"
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    last = {(line["benchmark"], line["figure"]): line["value"] for line in lines}
    new = []
    for name in FILES:
        if not (folder / name).exists():
            continue
        results = json.loads((folder / name).read_text(encoding="utf-8"))
        benchmark = Path(name).stem
        for figure, value, bar in results["rows"]:
            shown = f"{value:.4g}"
            if bar is not None and last.get((benchmark, figure)) != shown:
                new.append((date, netclone.__version__, results["torch"], benchmark, figure, shown, f"{bar:g}"))
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not lines:
            writer.writerow(FIELDS)
        writer.writerows(new)
    return len(new)


def main() -> None:
    """Append, and say how many figures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    date = sys.argv[2] if len(sys.argv) > 2 else datetime.date.today().isoformat()
    print(f"{append(folder, date)} new figures in {folder / 'history.csv'}")


if __name__ == "__main__":
    main()
