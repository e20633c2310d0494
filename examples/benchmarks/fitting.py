"""Before and after the fit, from few samples to many: python examples/benchmarks/fitting.py OUT.json [options]

For each suite, seed and size of the clone set: one mask and one distilled slim source, grafted at the input, with three
classifiers. "no fit" is the formula, "adam" the fit that clone() had before (the epoch that is best on a held-out
fifth), "clone" the fit it has. Finished runs are kept in OUT.json: the same command goes on from there.
"""

from __future__ import annotations

import math
import time
from typing import Any
from unittest import mock

from pairs import Pair, Runs, arguments, networks_of
from torch import Tensor

from netclone.benchmarking.suites import Suite
from netclone.cloning import searching
from netclone.learning.adapting import Branch, Cached, fit
from netclone.learning.choosing import Choice, fit_classifier
from netclone.learning.stepping import Loop
from netclone.runtime.resuming import Findings

EPOCHS = 20


def by_adam(
    branch: Branch, train: Cached, held_out: Cached, shows: Tensor, *, loop: Loop, calibrate: bool = True
) -> tuple[float, Choice | None]:
    """The fit as it was: as many steps as the samples without their views take in 20 epochs, the best epoch stays."""
    samples = len(shows[: len(train)].unique())
    epochs = math.ceil(EPOCHS * samples / len(train))
    return fit(branch, train, held_out, epochs=epochs, loop=loop, calibrate=calibrate), None


def measured(suite: Suite, pair: Pair, seed: int, keep: float, with_old: bool) -> dict[str, Any]:
    """The three fits of one slim source, on the suite's test images."""
    options = {name: value for name, value in suite.clone.items() if name != "search"}
    options |= {"target_data": [pair.old_images] if with_old else None, "augment": suite.augment}
    options |= {"keep": keep, "seed": seed, "at": "input", "findings": Findings()}
    record: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {"no fit": {"epochs": 0}, "adam": {}, "clone": {}}
    for name, change in changes.items():
        started = time.perf_counter()
        fitted = by_adam if name == "adam" else fit_classifier
        with mock.patch.object(searching, "fit_classifier", fitted):
            module = pair.cloned(**{**options, **change})
        scores = pair.scored(module)
        record[name] = {**scores, "seconds": time.perf_counter() - started, "evidence": module.scores}
    return record


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["10%"], help="samples of each class, or a share such as 10%%")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--without-old", action="store_true", help="also without any sample of old classes")
    asked = parser.parse_args()
    runs = Runs(asked.out, ("suite", "development", "seed", "size", "keep", "old samples"))
    for name in asked.suites:
        networks = networks_of(name, asked)
        for seed in asked.seeds:
            for size in asked.sizes:
                for with_old in (True, False) if asked.without_old else (True,):
                    about = (name, asked.development, seed, size, asked.keep, with_old)
                    if runs.done(*about):
                        continue
                    pair = Pair.of(networks.suite, networks, seed, size)
                    found = measured(networks.suite, pair, seed, asked.keep, with_old)
                    runs.add(*about, fits=found)
                    line = ", ".join(f"{k} {100 * v['mean']:.1f} (-{v['old_lost']:.1f})" for k, v in found.items())
                    print(*about, line, flush=True)


if __name__ == "__main__":
    main()
