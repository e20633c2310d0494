"""What a clone is worth by effort and size: python examples/benchmarks/effort.py OUT.json [options]

For each suite, seed, budget, size and effort: one clone at the input, with its accuracy on the suite's test images,
the processor time that clone() took, and parameters, MACs and measured time as shares of the source's. "whole" is the
source as it is beside the target, with the same classifier: the ceiling. Finished runs are kept in OUT.json: the same
command goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pairs import Pair, Runs, arguments, networks_of

from netclone.cloning.recipe import EFFORTS
from netclone.graph.counting import MacCounter
from netclone.graph.timing import relative_time

WHOLE = "whole"
BATCH = 32  # images at a time wherever time is measured: one small image is all overhead


def options_of(effort: str) -> dict[str, Any]:
    """What clone() is asked for: an effort by name, or steps of distillation, after learned gates if it says so."""
    if effort == WHOLE:
        return {"keep": 1.0}
    if effort in EFFORTS:
        return {"effort": effort}
    method, _, steps = effort.rpartition(" ")
    return {"distill_steps": int(steps), "method": method or "taylor"}


def macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of a call."""
    with torch.no_grad(), MacCounter() as counter:
        run()
    return int(counter.macs)


def measured(pair: Pair, augment: Any, batch_size: int, seed: int, **asked: Any) -> dict[str, Any]:
    """One clone: accuracies, seconds and sizes."""
    options = {"augment": augment, "batch_size": batch_size, "seed": seed, "at": "input", **asked}
    started = time.process_time()
    module = pair.cloned(latency_batch=BATCH, **options)
    seconds = time.process_time() - started
    images, logits = pair.images[:BATCH], pair.reference[:BATCH]
    return {
        **pair.scored(module),
        "seconds": seconds,
        "validation": module.scores["validation"],
        "params": sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in pair.source.parameters()),
        "macs": macs(lambda: module(images, logits)) / macs(lambda: pair.source(images)),
        "time": relative_time(lambda batch: module(batch, logits), pair.source, images),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--efforts", nargs="+", default=[WHOLE, *EFFORTS], help="names, or steps of distillation: 300, 'local 300'"
    )
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5])
    parser.add_argument("--budgets", nargs="+", default=["latency"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(asked.out, ("suite", "development", "seed", "effort", "budget", "keep"))
    for seed in asked.seeds:
        for name in asked.suites:
            networks = networks_of(name, asked)
            suite, pair = networks.suite, Pair.of(networks.suite, networks, seed, "10%")
            sizes = [(e, b, k) for b in asked.budgets for k in asked.keeps for e in asked.efforts if e != WHOLE]
            for effort, budget, keep in [(WHOLE, "macs", 1.0)] * (WHOLE in asked.efforts) + sizes:
                about = (name, asked.development, seed, effort, budget, keep)
                if not runs.done(*about):
                    options = {"budget": budget, "keep": keep, **options_of(effort)}
                    found = measured(pair, suite.augment, suite.batch_size, seed, **options)
                    runs.add(*about, **found)
                    print(*about, *(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
