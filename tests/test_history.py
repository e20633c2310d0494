"""The history of the benchmarks' ratios: what is new is appended, once."""

import csv
import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "benchmarks" / "history.py"


def test_figures_with_a_bar_are_appended_when_they_change(tmp_path):
    append = runpy.run_path(str(SCRIPT))["append"]
    results = {"torch": "2.9", "timm": "1.0", "rows": [["steps / step", 1.25, 2.0], ["no bar", 3.0, None]]}
    (tmp_path / "learning.json").write_text(json.dumps(results))
    assert [append(tmp_path, "2026-01-01"), append(tmp_path, "2026-01-02")] == [1, 0]
    results["rows"][0][1] = 1.5
    (tmp_path / "learning.json").write_text(json.dumps(results))
    assert append(tmp_path, "2026-01-03") == 1
    lines = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [(line["date"], line["benchmark"], line["figure"], line["value"], line["bar"]) for line in lines] == [
        ("2026-01-01", "learning", "steps / step", "1.25", "2"),
        ("2026-01-03", "learning", "steps / step", "1.5", "2"),
    ]


def test_the_committed_history_ends_with_the_committed_results(tmp_path):
    append = runpy.run_path(str(SCRIPT))["append"]
    folder = ROOT / "docs" / "results"
    for name in ("surgery.json", "learning.json", "deployment.json", "history.csv"):
        (tmp_path / name).write_text((folder / name).read_text())
    assert append(tmp_path, "2026-01-01") == 0, "run examples/benchmarks/history.py and commit docs/results/history.csv"
