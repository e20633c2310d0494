"""How many random projections a classifier of old and new classes needs: python examples/benchmarks/joint.py OUT.json

The measurements behind docs/adr/0024: pairs of networks whose sources know the new classes alone, clones of half of the
MACs at the input. None: the classifier that regresses new logits. Finished runs are kept in OUT.json: the same command
goes on from there.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

from pairs import Pair, Runs, arguments, networks_of

import netclone
from netclone.benchmarking.suites import Suite
from netclone.cloning import searching
from netclone.learning import joint

PROJECTIONS = (None, 50, 100, 200, 500, 2000)


def with_projections(suite: Suite, pair: Pair, seed: int, projections: int | None) -> netclone.CloneModule:
    options = {name: value for name, value in suite.clone.items() if name != "search"}
    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(searching, "SMALL", 0.0 if projections is None else 1.0))
        if projections is not None:
            changes.enter_context(mock.patch.object(joint, "PROJECTIONS", projections))
        return pair.cloned(augment=suite.augment, at="input", seed=seed, **options)


def main() -> None:
    asked = arguments(__doc__).parse_args()
    runs = Runs(asked.out, ("suite", "seed", "projections"))
    for name in asked.suites:
        networks = networks_of(name, asked)
        for seed, projections in itertools.product(asked.seeds, PROJECTIONS):
            if runs.done(name, seed, projections):
                continue
            pair = Pair.of(networks.suite, networks, seed, "10%")
            module = with_projections(networks.suite, pair, seed, projections)
            reads_features = module.spec.feature_shape != (pair.old,)
            assert reads_features == (projections is not None), "another classifier than the one asked for"
            runs.add(name, seed, projections, **pair.scored(module))
            print(runs.runs[-1])


if __name__ == "__main__":
    main()
