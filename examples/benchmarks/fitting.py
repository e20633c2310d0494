"""Before and after the fit, from few samples to many: python examples/benchmarks/fitting.py OUT.json [options]

For each suite, seed and size of the clone set: one mask and one distilled slim source, grafted at the input, with three
classifiers. "no fit" is the formula, "adam" the fit that clone() had before (the epoch that is best on a held-out
fifth), "clone" the fit it has. Finished runs are kept in OUT.json: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import netclone
from netclone.benchmarking.suites import Suite, in_development, suite_named
from netclone.benchmarking.training import Networks, find, renamed
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


def chosen(networks: Networks, known: tuple[int, ...], size: str, seed: int) -> tuple[Tensor, Tensor]:
    """The first samples of each class in the seed's order: a count, or a share such as 10%. Labels index ``known``."""
    labels, parts = networks.dataset.labels, []
    for label in known:
        index = find(labels, (label,))
        order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1000 * seed + label))]
        count = round(float(size[:-1]) / 100 * len(order)) if size.endswith("%") else int(size)
        parts.append(order[:count])
    index = torch.cat(parts)
    return networks.dataset.images[index], renamed(labels[index], known)


def measured(suite: Suite, networks: Networks, seed: int, size: str, keep: float, with_old: bool) -> dict[str, Any]:
    """The three fits of one slim source, on the suite's test images."""
    data, setting = networks.dataset, suite.settings[0]
    known, old = (*suite.old, *setting.new), len(suite.old)
    images, labels = chosen(networks, known, size, seed)
    new = labels >= old
    classes = tuple(data.columns[label] for label in setting.new)
    source, target = networks.source(seed), networks.target(seed)
    options = {name: value for name, value in suite.clone.items() if name != "search"}
    options |= {"target_data": [(images[~new], labels[~new])] if with_old else None, "augment": suite.augment}
    options |= {"classes": classes, "keep": keep, "seed": seed, "at": "input", "findings": Findings()}
    test = find(data.test_labels, known)
    tested = [(data.test_images[test], renamed(data.test_labels[test], known))]
    reference = networks.target_logits(seed)[test]
    is_old = tested[0][1] < old
    before = float((reference.argmax(1) == tested[0][1])[is_old].double().mean())
    record: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {"no fit": {"epochs": 0}, "adam": {}, "clone": {}}
    for name, change in changes.items():
        started = time.perf_counter()
        fitted = by_adam if name == "adam" else fit_classifier
        with mock.patch.object(searching, "fit_classifier", fitted), warnings.catch_warnings():
            warnings.simplefilter("ignore", netclone.NetcloneWarning)
            named = torch.tensor(classes)[labels[new] - old]
            module = netclone.clone(source, target, [(images[new], named)], **options, **change)
        scores = netclone.evaluate(
            netclone.inject(target, module), tested, old=range(old), new=range(old, len(known)), reference=reference
        )
        assert scores.old is not None and scores.new is not None
        record[name] = {
            "mean": (scores.old + scores.new) / 2,
            "old_lost": 100 * (before - scores.old),
            "new": scores.new,
            "seconds": time.perf_counter() - started,
            "evidence": module.scores,
        }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--suites", nargs="+", default=["cifar10", "zoo", "fashion"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sizes", nargs="+", default=["10%"], help="samples of each class, or a share such as 10%%")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--without-old", action="store_true", help="also without any sample of old classes")
    parser.add_argument("--development", action="store_true", help="look at held-out training images instead")
    asked = parser.parse_args()
    runs = json.loads(asked.out.read_text(encoding="utf-8"))["runs"] if asked.out.is_file() else []
    keys = ("suite", "development", "seed", "size", "keep", "old samples")
    done = {tuple(run[key] for key in keys) for run in runs}
    asked.cache.mkdir(parents=True, exist_ok=True)
    for name in asked.suites:
        suite = in_development(suite_named(name)) if asked.development else suite_named(name)
        networks = Networks(suite, suite.load(asked.data), asked.data, asked.cache, lambda *_: None)
        for seed in asked.seeds:
            for size in asked.sizes:
                for with_old in (True, False) if asked.without_old else (True,):
                    about = (name, asked.development, seed, size, asked.keep, with_old)
                    if about in done:
                        continue
                    found = measured(suite, networks, seed, size, asked.keep, with_old)
                    runs.append({**dict(zip(keys, about, strict=True)), "fits": found})
                    facts = {"netclone": netclone.__version__, "torch": torch.__version__, "runs": runs}
                    asked.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                    line = ", ".join(f"{k} {100 * v['mean']:.1f} (-{v['old_lost']:.1f})" for k, v in found.items())
                    print(*about, line, flush=True)


if __name__ == "__main__":
    main()
