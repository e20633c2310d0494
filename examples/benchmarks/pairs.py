"""A suite's source, target, clone set and test images for one seed, and the record that a script of runs keeps."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import netclone
from netclone.benchmarking.suites import Suite, in_development, suite_named
from netclone.benchmarking.training import Networks, find, renamed


@dataclass(frozen=True)
class Pair:
    """One seed of a suite's first setting. Labels index the known classes: the old ones, and then the new."""

    source: nn.Module
    target: nn.Module
    classes: tuple[int, ...]
    old: int
    images: Tensor
    labels: Tensor
    tested: tuple[Tensor, Tensor]
    reference: Tensor

    @classmethod
    def of(cls, suite: Suite, networks: Networks, seed: int, size: str) -> Pair:
        """The pair of a seed, with a clone set of a size: so many images a class, or a share such as 10%."""
        data, setting = networks.dataset, suite.settings[0]
        known = (*suite.old, *setting.new)
        images, labels = chosen(networks, known, size, seed)
        test = find(data.test_labels, known)
        return cls(
            networks.source(seed),
            networks.target(seed),
            tuple(networks.columns("source")[label] for label in setting.new),
            len(suite.old),
            images,
            labels,
            (data.test_images[test], renamed(data.test_labels[test], known)),
            networks.target_logits(seed)[test],
        )

    @property
    def new_images(self) -> tuple[Tensor, Tensor]:
        """The clone set's images of new classes, with the source's columns as labels."""
        new = self.labels >= self.old
        return self.images[new], torch.tensor(self.classes)[self.labels[new] - self.old]

    @property
    def old_images(self) -> tuple[Tensor, Tensor]:
        """Its images of old classes."""
        old = self.labels < self.old
        return self.images[old], self.labels[old]

    def cloned(self, **options: Any) -> netclone.CloneModule:
        """A clone of the new classes, from all images unless ``options`` say otherwise; warnings are not shown."""
        given = {"classes": self.classes, "target_data": [self.old_images]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", netclone.NetcloneWarning)
            return netclone.clone(self.source, self.target, [self.new_images], **{**given, **options})

    def scored(self, module: netclone.CloneModule) -> dict[str, float]:
        """Accuracies of the grafted target on the test images, and the points that old classes lose."""
        return self.scores_of(netclone.inject(self.target, module))

    def scores_of(self, model: nn.Module) -> dict[str, float]:
        """The same of any network with a logit for each class, old ones first."""
        classes = self.old + len(self.classes)
        scores = netclone.evaluate(
            model,
            [self.tested],
            old=range(self.old),
            new=range(self.old, classes),
            reference=self.reference,
        )
        assert scores.old is not None and scores.new is not None
        labels = self.tested[1]
        before = float((self.reference.argmax(1) == labels)[labels < self.old].double().mean())
        return {"mean": (scores.old + scores.new) / 2, "old_lost": 100 * (before - scores.old), "new": scores.new}


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


class Runs:
    """Finished runs in a file of JSON, each under what was asked; written after every run."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        self.runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []

    def done(self, *asked: Any) -> bool:
        """Whether there is a run of these."""
        return any(all(run[key] == value for key, value in zip(self.keys, asked, strict=True)) for run in self.runs)

    def add(self, *asked: Any, **found: Any) -> None:
        """Keep what a run has found."""
        self.runs.append({**dict(zip(self.keys, asked, strict=True)), **found})
        facts = {"netclone": netclone.__version__, "torch": torch.__version__, "runs": self.runs}
        self.path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that all scripts over pairs have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--suites", nargs="+", default=["cifar10", "zoo", "fashion"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--development", action="store_true", help="look at held-out training images instead")
    return parser


def networks_of(name: str, asked: argparse.Namespace) -> Networks:
    """The networks of a suite, in development if asked."""
    asked.cache.mkdir(parents=True, exist_ok=True)
    suite = in_development(suite_named(name)) if asked.development else suite_named(name)
    return Networks(suite, suite.load(asked.data), asked.data, asked.cache, lambda *_: None)
