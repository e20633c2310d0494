"""Every method of both benchmarks, once, on a device: run as ``python whole_benchmark.py DEVICE WHICH FOLDER``.

The last line says ``done``, after one line for each method that failed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import strict_device
import torch
from test_modules_suite import TINY

from netclone.baselines import ENSEMBLES, HEADS, TUNING
from netclone.benchmarking import modularising, running
from netclone.benchmarking.suites import SUITES


def main(device: str, which: str, folder: str) -> None:
    """Run the first setting of digits (``methods``), or modules of digits, with as few steps as can be."""
    if device == "strict":
        strict_device.register()
    torch.set_num_threads(1)
    digits = SUITES["digits"]
    brief = replace(
        digits,
        settings=(replace(digits.settings[0], steps=2, keeps=(0.5,)),),
        **{"curve": (), "localize": (), "ablations": ()},
        clone={**digits.clone, "distill_steps": 2, "epochs": 1},
    )
    if which == "methods":
        results = running.run(brief, out=Path(folder), seeds=1, device=device)
    else:
        results = modularising.run(replace(TINY, steps=2), out=Path(folder), seeds=1, device=device)
    assert results["clock"] == "seconds" and results["device"] != "cpu"
    every = len(TUNING) + len(ENSEMBLES) + len(HEADS) + 2  # netclone, and joint training
    assert len(results["runs"]) == every if which == "methods" else len(results["runs"]) > 20
    for run in results["runs"]:
        if run["error"] and not run["method"].startswith("MPruner"):  # it has two blocks to choose from
            print(run["method"], run["error"])
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
