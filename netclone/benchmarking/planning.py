"""planned(suite, seeds, networks) -> jobs: every run of a benchmark, the most important first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from netclone.baselines import ENSEMBLES, HEADS, TUNING
from netclone.benchmarking.suites import Options, Setting, Suite
from netclone.benchmarking.training import Networks
from netclone.cloning.placing import candidates
from netclone.graph.tracing import INPUT, trace

JOINT, GIVEN = "joint, 100%", "source, as given"
"""The upper bound: the source, trained here on all training images, or with weights that were given."""
REFITS: dict[str, Options] = {
    "plain copy": {"reconstruct": False},
    "refitted": {"distill_steps": 0},
    "refitted and distilled": {},
}
"""What follows the mask of a slim source: nothing, least squares, or least squares and distillation."""
BRIEF = ("fine-tune", "LwF", "source as teacher", "RanPAC, both features", "gated ensemble", "fitted gated ensemble")
"""What is compared in the further settings and clone sets of a suite. In the first, all methods are."""


def amount(fraction: float) -> str:
    """The size of a clone set in words.

    Examples
    --------
    >>> amount(0.1), amount(5), amount(1)
    ('10% of the training images', '5 images of each class', '1 image of each class')
    """
    if fraction < 1:
        return f"{fraction:.0%} of the training images"
    return f"{fraction:g} image{'s' * (fraction > 1)} of each class"


@dataclass(frozen=True)
class Job:
    """One run: a method with its options, a setting, a share of the training images, and a seed."""

    study: str
    setting: Setting
    fraction: float
    seed: int
    method: str
    options: tuple[tuple[str, Any], ...] = ()

    def key(self, suite: Suite) -> str:
        """The name of this run in ``runs.jsonl``."""
        return "|".join([suite.name, str(self.seed), self.setting.name, f"{self.fraction:g}", self.study, self.method])

    @property
    def single(self) -> bool:
        """Whether there is one image of each class, to learn from and to validate on."""
        return self.fraction == 1

    @property
    def part(self) -> tuple[str, str, float]:
        """The table that it belongs to."""
        return self.study, self.setting.group, self.fraction


def bound(suite: Suite) -> str:
    """The name of a suite's upper bound."""
    return GIVEN if suite.source.weights else JOINT


def sized(keep: float) -> str:
    """The name of a clone that keeps this share of the source's parameters."""
    return f"netclone {100 * keep:g}%"


def planned(suite: Suite, seeds: int, networks: Networks) -> list[Job]:
    """Every run, the most important first: all settings with the smallest clone set, the studies, larger sets."""
    groups = list(dict.fromkeys(setting.group for setting in suite.settings))
    most = max(len(setting.fractions) for setting in suite.settings)
    first = suite.settings[0]

    def clones(study: str, seed: int, name: str, **options: Any) -> Job:
        return Job(study, first, first.fractions[0], seed, name, tuple({**suite.clone, **options}.items()))

    main = [
        [
            job
            for seed in range(seeds)
            for setting in suite.settings
            if setting.group == group and i < len(setting.fractions)
            for job in _compared(suite, setting, setting.fractions[i], seed)
        ]
        for i in range(most)
        for group in groups
    ]
    jobs = [job for part in main[: len(groups)] for job in part]
    for seed in range(min(seeds, suite.localize_seeds)):
        for method in suite.localize:
            for words, change in REFITS.items():
                name = f"{method}, {words}"
                jobs.append(clones("localize", seed, name, keep=0.5, at=INPUT, method=method, **change))
    for seed in range(min(seeds, suite.study_seeds)):
        jobs += [clones("curve", seed, sized(keep), keep=keep) for keep in suite.curve]
        jobs += [clones("ablation", seed, name, keep=0.5, **change) for name, change in suite.ablations]
        if suite.positions:
            traced = trace(networks.target(seed), networks.dataset.images[:2])
            for at in (*(place.at for place in candidates(traced)), INPUT):
                jobs.append(clones("ablation", seed, f"position: {at}", keep=0.5, at=at))
    return jobs + [job for part in main[len(groups) :] for job in part]


def _compared(suite: Suite, setting: Setting, fraction: float, seed: int) -> list[Job]:
    ours = [(sized(keep), tuple({**suite.clone, "keep": keep}.items())) for keep in setting.keeps]
    first = setting is suite.settings[0] and fraction == setting.fractions[0]
    methods = (*TUNING, *ENSEMBLES, *HEADS) if first else BRIEF
    others = [(name, ()) for name in (*methods, bound(suite))]
    return [Job("main", setting, fraction, seed, name, options) for name, options in [*ours, *others]]
