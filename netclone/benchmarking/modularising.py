"""run(suite, ...) -> results: modules for one class or a few out of a source, by netclone and other ways to prune.

There is no target here, so there is nothing that could be forgotten. A module of one class answers whether an image
shows it, one of several which of them an image shows: the protocol of the literature on modularising networks.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, fx, nn

from netclone.arguments import Method as Localised
from netclone.baselines import InapplicableError, Recipe, validated
from netclone.baselines.modularising import GRADSPLITTER, SEAM, MaskLoss, learned_values, module_of_values
from netclone.baselines.pruning import distilled, finetuned, macs, masked, plain, torch_pruned
from netclone.baselines.subproblems import Given, Part, SubProblem, Told, calibrated
from netclone.benchmarking.bars import Bars
from netclone.benchmarking.module_tables import write
from netclone.benchmarking.networks import VGG, Training
from netclone.benchmarking.reporting import in_threads
from netclone.benchmarking.running import circumstances, opened, threads_used
from netclone.benchmarking.searching import search
from netclone.benchmarking.suites import SUITES, Network, Suite
from netclone.benchmarking.training import Networks, Tell, described, find, hashed
from netclone.channels.masks import ChannelMask
from netclone.cloning.placing import reason
from netclone.errors import NetcloneError
from netclone.graph.capturing import capture
from netclone.graph.folding import fold_batch_norms
from netclone.graph.quickening import quick
from netclone.graph.timing import clock_of_work, relative_time
from netclone.learning.data import Samples
from netclone.runtime.dependencies import code_digest
from netclone.runtime.devices import device_named
from netclone.runtime.journal import Journal

TORCH_PRUNING = "Torch-Pruning"
LOSSES: dict[str, MaskLoss] = {"SeaM": SEAM, "GradSplitter": GRADSPLITTER}
OURS, AS_GIVEN, RESTRICTED = "netclone", "source, as given", "source, restricted"


@dataclass(frozen=True)
class Method:
    """What chooses the channels, and what follows; the learning rate is searched on modules of ``searched_at``."""

    mask: str
    tuning: Literal["none", "fine-tuned", "distilled"]
    searched_at: float = 0.25


METHODS: dict[str, Method] = {
    OURS: Method("taylor", "distilled"),
    "SeaM's loss": Method("SeaM", "none"),
    "SeaM's loss, fine-tuned": Method("SeaM", "fine-tuned"),
    "GradSplitter's loss": Method("GradSplitter", "none"),
    "GradSplitter's loss, fine-tuned": Method("GradSplitter", "fine-tuned"),
    "MPruner, fine-tuned": Method("cka", "fine-tuned", searched_at=0.5),
    "Torch-Pruning, fine-tuned": Method("Torch-Pruning", "fine-tuned"),
    "magnitude": Method("magnitude", "none"),
    "magnitude, fine-tuned": Method("magnitude", "fine-tuned"),
    "magnitude, distilled": Method("magnitude", "distilled"),
    "random": Method("random", "none"),
    "random, fine-tuned": Method("random", "fine-tuned"),
    "random, distilled": Method("random", "distilled"),
}
"""All methods by name; "distilled" is what netclone does with a mask: least squares, then distillation."""


@dataclass(frozen=True)
class Asked:
    """A sub-problem by name: the labels of one class, or of several."""

    name: str
    classes: tuple[int, ...]

    @property
    def group(self) -> str:
        """The table that it belongs to."""
        return "one class" if self.alone else "several classes"

    @property
    def alone(self) -> bool:
        """Whether it is one class."""
        return len(self.classes) == 1


@dataclass(frozen=True)
class ModuleSuite:
    """A benchmark of modules: data and augmentation of ``base``, sources, sub-problems, and sizes as shares of MACs.

    ``fraction`` of the training images of the classes that matter are the clone set, and a fifth of it is held out.
    ``steps`` is the number of steps of a mask that is learned, of fine-tuning and of distillation, each, and
    ``search_steps`` that of the trials of a search. ``others`` is the number of test images of every other class that a
    module of one class is asked about. ``timed`` images at a time are timed.
    """

    name: str
    about: str
    base: Suite
    sources: tuple[Network, ...]
    asked: tuple[Asked, ...]
    keeps: tuple[float, ...]
    fraction: float
    steps: int
    search_steps: int
    batch_size: int
    rates: dict[str, tuple[float, ...]]
    others: int = 100
    timed: int = 16


MODULES = ModuleSuite(
    name="modules",
    about="Modules out of networks for CIFAR-10 saved as JPEG, 1,000 + 500 images a class: a pretrained ResNet-20, and "
    "a VGG16 an eighth as wide as the paper's, trained here",
    base=SUITES["cifar10"],
    sources=(
        SUITES["cifar10"].source,
        Network(
            "VGG16, an eighth as wide",
            lambda classes, seed: _vgg(classes, seed),
            Training(epochs=15, lr=0.1, batch_size=64),
        ),
    ),
    asked=(Asked("cat", (3,)), Asked("vehicles", (0, 1, 8, 9))),
    keeps=(0.1, 0.15, 0.25, 0.5),
    fraction=0.1,
    steps=50,
    search_steps=25,
    batch_size=64,
    rates={"mask": (1e-2, 3e-2, 1e-1), "fine-tuned": (1e-3, 3e-3, 1e-2)},
)


def _vgg(classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return VGG(3, classes, width=8)


@dataclass(frozen=True)
class Job:
    """One run: a method, a size (1: the source itself), a source, a sub-problem and a seed."""

    seed: int
    source: int
    asked: Asked
    method: str
    keep: float

    @property
    def part(self) -> tuple[int, int, str]:
        """Seed, source and sub-problem, which runs share."""
        return self.seed, self.source, self.asked.name

    def key(self, suite: ModuleSuite) -> str:
        """The name of this run in ``runs.jsonl``."""
        source = suite.sources[self.source].name
        return "|".join([suite.name, str(self.seed), source, self.asked.name, self.method, f"{self.keep:g}"])


def planned(suite: ModuleSuite, seeds: int) -> list[Job]:
    """Every run, seed by seed; the runs of a source and a sub-problem follow each other, as they share masks."""
    return [
        Job(seed, source, asked, method, keep)
        for seed in range(seeds)
        for source in range(len(suite.sources))
        for asked in suite.asked
        for method, keeps in [
            *((name, (1.0,)) for name in (AS_GIVEN, RESTRICTED)),
            *((m, suite.keeps) for m in METHODS),
        ]
        for keep in keeps
    ]


def run(
    suite: ModuleSuite,
    data: str | os.PathLike[str] = "data",
    out: str | os.PathLike[str] = "netclone-bench",
    *,
    seeds: int = 3,
    cache: str | os.PathLike[str] | None = None,
    console: Console | None = None,
    device: str | torch.device = "cpu",
    command: str = "",
) -> dict[str, Any]:
    """Run the suite, write ``results.json``, ``results.md`` and a plot, and return the content of ``results.json``.

    Finished runs are kept and not repeated, as by :func:`netclone.benchmarking.run`. Sources are trained once; seeds
    differ in the clone set and in everything random.

    Raises
    ------
    ArgumentError
        If ``seeds`` is not positive, a data file is missing, there is no such device, or ``out`` cannot be written to.
    """
    place = device_named(device) or torch.device("cpu")
    console = console or Console(quiet=True)
    journal, kept = opened(out, cache, seeds)
    with threads_used(), Bars(console) as bars:
        bench = _Bench(suite, Path(data), kept, journal, bars.tell, place)
        jobs = planned(suite, seeds)
        todo = [job for job in jobs if not bench.finished(job)]
        if len(todo) < len(jobs):
            console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished in '{Path(out).name}': skipped.")
        for number, job in enumerate(todo):
            source = suite.sources[job.source].name
            what = f"{source}, {job.asked.name}, seed {job.seed}: {job.method} {100 * job.keep:g}%"
            bars.overall(what, number, len(todo))
            bench.run(job)
        bars.overall("done", len(todo), len(todo))
        facts = {**circumstances(suite.name, suite.about, command, seeds, place), "settings": bench.settings()}
        results = bench.results(jobs, facts)
        write(results, Path(out))
    return results


@dataclass(frozen=True)
class _Chosen:
    """What is left of a source before any tuning: a slim network, its mask if netclone has one, and its time.

    ``share`` is the time as a share of the source's, and ``seconds`` how long it took to choose.
    """

    part: Part
    mask: ChannelMask | None
    share: float
    seconds: float


class _Bench:
    """The runs of a suite: makes modules, measures them, stores the results."""

    def __init__(
        self, suite: ModuleSuite, folder: Path, cache: Path, journal: Journal, tell: Tell, device: torch.device
    ) -> None:
        self.suite, self.journal, self.tell, self.device = suite, journal, tell, device
        self.clock = clock_of_work(device)
        self.dataset = suite.base.load(folder).on(device)
        self.networks = [
            Networks(
                replace(suite.base, name=f"{suite.name}-{number}", source=source, target=source),
                self.dataset,
                folder,
                cache,
                tell,
            )
            for number, source in enumerate(suite.sources)
        ]
        self._now: tuple[int, int, str] | None = None
        self._problems: dict[tuple[int, int, str], SubProblem] = {}
        self._values: dict[tuple[Any, ...], tuple[list[Tensor], float]] = {}
        self._chosen: dict[tuple[Any, ...], _Chosen] = {}

    def digest(self, job: Job) -> str:
        """A digest of everything that a run depends on, code included; if it differs, the run is repeated."""
        method = METHODS.get(job.method)
        library = _torch_pruning() if method is not None and method.mask == TORCH_PRUNING else None
        return self._hashed(job.source, job.asked, job.keep, method, library)

    def _hashed(self, source: int, *facts: object) -> str:
        suite = self.suite
        numbers = (
            suite.fraction,
            suite.steps,
            suite.search_steps,
            suite.batch_size,
            suite.rates,
            suite.others,
            suite.timed,
        )
        augment = getattr(suite.base.augment, "__name__", "")
        return hashed(*map(str, (_code(), *self.networks[source].depend_on(), facts, numbers, augment)))

    def finished(self, job: Job) -> bool:
        record = self.journal.records.get(job.key(self.suite))
        return record is not None and record["digest"] == self.digest(job) and not record["error"]

    def problem(self, job: Job) -> SubProblem:
        """The sub-problem of a seed, with its clone set."""
        if job.part not in self._problems:
            self._problems[job.part] = self._made(job)
        return self._problems[job.part]

    def _made(self, job: Job) -> SubProblem:
        """The first images of each class that matters, in an order set by the seed; a fifth of them is held out."""
        labels, columns = self.dataset.labels, torch.tensor(self.dataset.columns, device=self.device)
        parts: list[list[Tensor]] = [[], []]
        for label in range(len(columns)) if job.asked.alone else job.asked.classes:
            generator = torch.Generator().manual_seed(1000 * job.seed + label)
            index = find(labels, (label,))
            order = index[torch.randperm(len(index), generator=generator).to(self.device)]
            chosen = order[: max(5, round(self.suite.fraction * len(order)))]
            held = max(1, round(0.2 * len(chosen)))
            parts[0].append(chosen[held:])
            parts[1].append(chosen[:held])
        shown, held_out = (
            Samples(self.dataset.images[index], columns[labels[index]], what)
            for index, what in zip(map(torch.cat, parts), ("data", "validation"), strict=True)
        )
        classes = tuple(self.dataset.columns[label] for label in job.asked.classes)
        source = self.networks[job.source].source(0)
        return SubProblem(source, classes, shown, held_out, self.suite.base.augment)

    def test(self, problem: SubProblem, job: Job) -> Samples:
        """The test images that the module is asked about, labelled with the answers."""
        labels, columns = self.dataset.test_labels, torch.tensor(self.dataset.columns, device=self.device)
        others = [label for label in range(len(columns)) if label not in job.asked.classes] if job.asked.alone else []
        outside = [find(labels, (label,))[: self.suite.others] for label in others]
        index = torch.cat([find(labels, job.asked.classes), *outside])
        return problem.answered(Samples(self.dataset.test_images[index], columns[labels[index]], "test"))

    def run(self, job: Job) -> None:
        """Make a module, evaluate it on test images, and store the result, or why there is none."""
        if self._now != job.part:  # masks are shared by the runs of one part, which follow each other
            self._now = job.part
            for kept in (self._problems, self._values, self._chosen):
                kept.clear()
        record: dict[str, Any] = {
            "key": job.key(self.suite),
            "digest": self.digest(job),
            "seed": job.seed,
            "source": self.suite.sources[job.source].name,
            "asked": job.asked.name,
            "group": job.asked.group,
            "method": job.method,
            "keep": job.keep,
            "threads": torch.get_num_threads(),
            "error": "",
            "does_not_apply": "",
        }
        try:
            record |= self._figures(job, self.problem(job))
        except InapplicableError as error:
            record["does_not_apply"] = str(error)
        except NetcloneError as error:
            record["error"] = reason(error)
        self.journal.append(record)

    def _figures(self, job: Job, problem: SubProblem) -> dict[str, Any]:
        """A module, and what it is worth."""
        source, images = problem.groups.graph_module, problem.shown.images
        found: dict[str, Any] = {"macs": 1.0, "parameters": 1.0, "time": 1.0, "seconds": None}
        if job.method == AS_GIVEN:
            module: nn.Module = Given(quick(source, images[:2]), problem.classes)
        elif job.method == RESTRICTED:
            every = tuple(range(problem.outputs))
            module = calibrated(Part(quick(source, images[:2]), Told(every, problem.classes)), problem)
        else:
            chosen = self.chosen(job)
            part, seconds = self._tuned(job, chosen, found)
            found |= {
                "macs": macs(part, images[:1]) / macs(problem.source, images[:1]),
                "parameters": _parameters(part) / _parameters(problem.source),
                "time": chosen.share,
                "seconds": chosen.seconds + seconds,
            }
            module = Part(quick(_graph(part, images[:2]), images[:2]), part.head)
        found["validation"] = validated(module, problem.validation, problem.old)[0]
        found["accuracy"] = validated(module, self.test(problem, job), problem.old)[0]
        return found

    def chosen(self, job: Job) -> _Chosen:
        """What a method's mask leaves of the source, timed; once for all methods that share the mask."""
        mask = METHODS[job.method].mask
        key = *job.part, mask, job.keep
        if key not in self._chosen:
            problem, earlier = self.problem(job), 0.0
            if mask in LOSSES:
                values, earlier = self.values(job)
            kept = None
            started = self.clock()
            if mask in LOSSES:
                recipe = Recipe(lr=0, steps=self.suite.steps, seed=job.seed)
                part = module_of_values(problem, LOSSES[mask], values, job.keep, recipe)
            elif mask == TORCH_PRUNING:
                part = torch_pruned(problem, job.keep)
            else:
                kept = masked(problem, cast("Localised", mask), job.keep, job.seed)
                part = plain(problem, kept)
            seconds = earlier + self.clock() - started
            self._chosen[key] = _Chosen(part, kept, self._share(part, problem), seconds)
        return self._chosen[key]

    def _share(self, part: Part, problem: SubProblem) -> float:
        """The time of a slim network as a share of the source's; the BatchNorms of both are folded."""
        images = problem.shown.images[: self.suite.timed]
        graphs = [copy.deepcopy(graph) for graph in (_graph(part, images[:2]), problem.groups.graph_module)]
        for graph in graphs:
            fold_batch_norms(graph)
        return relative_time(graphs[0], graphs[1], images)

    def values(self, job: Job) -> tuple[list[Tensor], float]:
        """The values of a mask that is learned, at the rate that was found for it, and the seconds that took."""
        method = METHODS[job.method]
        loss, key = LOSSES[method.mask], (*job.part, method.mask)
        if key not in self._values:

            def module(problem: SubProblem, recipe: Recipe) -> nn.Module:
                return module_of_values(
                    problem, loss, learned_values(problem, loss, recipe), method.searched_at, recipe
                )

            recipe = self._recipe(job, self._searched(job, f"{method.mask}, mask", "mask", module)["lr"])
            started = self.clock()
            self._values[key] = learned_values(self.problem(job), loss, recipe), self.clock() - started
        return self._values[key]

    def _tuned(self, job: Job, chosen: _Chosen, found: dict[str, Any]) -> tuple[Part, float]:
        """What follows the mask, and the seconds that took; a recipe that was searched goes into ``found``."""
        method, problem = METHODS[job.method], self.problem(job)
        if method.tuning == "fine-tuned":

            def module(problem: SubProblem, recipe: Recipe) -> nn.Module:
                return finetuned(problem, self.chosen(self._origin(job)).part, recipe)

            recipe = self._recipe(job, self._searched(job, job.method, "fine-tuned", module)["lr"])
            found["recipe"] = asdict(recipe)
        part = copy.deepcopy(chosen.part)
        started = self.clock()
        if method.tuning == "fine-tuned":
            part = finetuned(problem, part, recipe)
        elif method.tuning == "distilled":
            assert chosen.mask is not None
            part = distilled(problem, chosen.mask, self._recipe(job, 0.0))
        return calibrated(part, problem), self.clock() - started

    def _recipe(self, job: Job, lr: float) -> Recipe:
        return Recipe(lr=lr, steps=self.suite.steps, batch_size=self.suite.batch_size, seed=job.seed)

    def _origin(self, job: Job) -> Job:
        """The run on whose module a method's learning rate is searched: of the first seed, the first of its group."""
        asked = next(asked for asked in self.suite.asked if asked.group == job.asked.group)
        return replace(job, seed=0, asked=asked, keep=METHODS[job.method].searched_at)

    def _searched(
        self, job: Job, what: str, rates: str, method: Callable[[SubProblem, Recipe], nn.Module]
    ) -> dict[str, Any]:
        """The recipe of a method that is best on validation; searched once for all seeds and sizes."""
        origin = self._origin(job)
        source = self.suite.sources[job.source].name
        key = "|".join(["search", self.suite.name, source, job.asked.group, what])
        digest = self._hashed(job.source, origin.asked, origin.keep, what)
        known = self.journal.records.get(key)
        if known is None or known["digest"] != digest:

            def tell(done: int, total: int) -> None:
                self.tell(f"tune {what}", done, total)

            base = replace(self._recipe(origin, 1.0), steps=self.suite.search_steps)
            tuned = search(method, self.problem(origin), base, self.suite.rates[rates], progress=tell)
            known = {
                "key": key,
                "digest": digest,
                "source": source,
                "group": job.asked.group,
                "what": what,
                "asked": origin.asked.name,
                "keep": origin.keep,
                "recipe": asdict(tuned.recipe),
                "trials": [asdict(trial) for trial in tuned.trials],
                "seconds": tuned.seconds,
                "threads": torch.get_num_threads(),
            }
            self.journal.append(known)
        recipe: dict[str, Any] = known["recipe"]
        return recipe

    def settings(self) -> dict[str, Any]:
        """The suite as plain data."""
        suite = self.suite
        return {
            "sources": [described(source) for source in suite.sources],
            "asked": [asdict(asked) for asked in suite.asked],
            "keeps": list(suite.keeps),
            "fraction": suite.fraction,
            "steps": suite.steps,
            "search_steps": suite.search_steps,
            "batch_size": suite.batch_size,
            "rates": {name: list(rates) for name, rates in suite.rates.items()},
            "others": suite.others,
            "timed": suite.timed,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
            "ours": OURS,
            "references": [AS_GIVEN, RESTRICTED],
        }

    def results(self, jobs: list[Job], facts: dict[str, Any]) -> dict[str, Any]:
        """Everything that is known about these runs, as plain data."""
        runs = [self.journal.records[job.key(self.suite)] for job in jobs]
        searches = [r for key, r in self.journal.records.items() if key.startswith(f"search|{self.suite.name}|")]
        made = {}
        for source, networks in zip(self.suite.sources, self.networks, strict=True):
            networks.source(0)
            made[source.name] = networks.facts["source, seed 0"]
        spent = {
            "runs": sum(run.get("seconds") or 0 for run in runs),
            "searches": sum(found["seconds"] for found in searches),
            "networks": sum(about["seconds"] or 0 for about in made.values()),
        }
        versions = {**facts["versions"], "torch-pruning": _torch_pruning() or "not installed"}
        return {
            **facts,
            "versions": versions,
            "threads": in_threads(made["threads"] for made in (*runs, *searches)),
            "seconds": spent,
            "networks": made,
            "searches": searches,
            "runs": runs,
        }


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _graph(part: Part, example: Tensor) -> fx.GraphModule:
    """The network of a module as an operator graph; another library's is captured."""
    return part.body if isinstance(part.body, fx.GraphModule) else capture(part.body, example)


def _torch_pruning() -> str | None:
    """The version of Torch-Pruning; None if it is not installed."""
    try:
        return importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _code() -> str:
    """A digest of the code that makes and measures a module."""
    baselines = (f"netclone.baselines.{name}" for name in ("modularising", "pruning", "subproblems"))
    return code_digest(*baselines, "netclone.benchmarking.networks", "netclone.benchmarking.searching")
