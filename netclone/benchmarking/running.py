"""run(suite, ...) -> results: every method with every seed and clone set; each finished run is stored at once."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import nn

import netclone
from netclone.baselines import ENSEMBLES, HEADS, TUNING, InapplicableError, Problem, Recipe, Tuned, stages, validated
from netclone.baselines.ensembling import Columns
from netclone.baselines.frozen import Beside
from netclone.benchmarking.bars import Bars
from netclone.benchmarking.choices import OLD_WEIGHTS, choices_of
from netclone.benchmarking.planning import Job, amount, bound, planned, sized
from netclone.benchmarking.reporting import CLOCK, in_threads, write
from netclone.benchmarking.searching import search
from netclone.benchmarking.suites import Options, Suite
from netclone.benchmarking.training import Networks, Tell, described, find, hashed, renamed
from netclone.cloning.injecting import inject
from netclone.cloning.method import clone
from netclone.cloning.placing import reason
from netclone.errors import ArgumentError, NetcloneError, NetcloneWarning
from netclone.graph.timing import clock_of_work, seconds_in_turn
from netclone.graph.tracing import same_bits
from netclone.learning.data import Samples
from netclone.metrics.evaluating import evaluate
from netclone.runtime.dependencies import code_digest
from netclone.runtime.devices import device_named
from netclone.runtime.journal import Journal

TIMED = 32
"""How many images are timed at once."""


def run(
    suite: Suite,
    data: str | os.PathLike[str] = "data",
    out: str | os.PathLike[str] = "netclone-bench",
    *,
    seeds: int = 3,
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    console: Console | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run a suite, write ``results.json``, ``results.md`` and plots, and return the content of ``results.json``.

    Every finished run is a line of ``runs.jsonl``. When started again, runs that are there with the same settings
    are not repeated. Trained networks are kept in ``cache``. The same seeds on the same number of threads give the same
    figures, except for times.

    Parameters
    ----------
    data
        Folder with the data and weights.
    cache
        Folder of trained networks. None: ``cache`` in ``out``.
    device
        Where networks are trained, run and timed, by torch's name, or ``"auto"``.
    command
        The command line of this call, for the results.

    Raises
    ------
    ArgumentError
        If ``seeds`` is not positive, a data file is missing, there is no such device, or ``out`` cannot be written to.
    """
    place = device_named(device) or torch.device("cpu")
    console = console or Console(quiet=True)
    journal, kept = opened(out, cache, seeds)
    out = Path(out)
    with threads_used(), Bars(console) as bars:
        networks = Networks(suite, suite.load(Path(data)).on(place), Path(data), kept, bars.tell)
        bench = _Bench(networks, journal, bars.tell)
        jobs = planned(suite, seeds, networks)
        todo = [job for job in jobs if not bench.finished(job)]
        if len(todo) < len(jobs):
            console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished in '{out.name}': skipped.")
        facts = {**circumstances(suite.name, suite.about, command, seeds, place), "settings": bench.settings()}
        results: dict[str, Any] = {}
        for number, job in enumerate(todo):
            words = f"{job.setting.name}, {amount(job.fraction)}, seed {job.seed}: {job.method}"
            bars.overall(words, number, len(todo))
            bench.run(job)
            after = todo[number + 1] if number + 1 < len(todo) else None
            if after is None or after.part != job.part:
                results = bench.results(jobs, facts)
                write(results, out, plots=after is None)
        bars.overall("done", len(todo), len(todo))
        if not todo:
            results = bench.results(jobs, facts)
            write(results, out)
    return results


def opened(out: str | os.PathLike[str], cache: str | os.PathLike[str] | None, seeds: int) -> tuple[Journal, Path]:
    """The journal of finished runs in a folder, and the folder of trained networks; both are made if need be.

    Raises
    ------
    ArgumentError
        If ``seeds`` is not positive, or ``out`` cannot be written to.
    """
    if seeds < 1:
        raise ArgumentError(f"seeds: got {seeds}, expected 1 or more")
    kept = Path(out, "cache") if cache is None else Path(cache)
    try:
        for folder in (Path(out), kept):
            folder.mkdir(parents=True, exist_ok=True)
        return Journal(Path(out, "runs.jsonl")), kept
    except OSError as error:
        raise ArgumentError(f"out: cannot write to '{out}': {error.strerror or error}") from error


def circumstances(name: str, about: str, command: str, seeds: int, device: torch.device) -> dict[str, Any]:
    """What was run, when and with what, for the results of a suite."""
    return {
        "suite": name,
        "about": about,
        "command": command,
        "seeds": list(range(seeds)),
        "clock": CLOCK if device.type == "cpu" else "seconds",
        "device": _called(device),
        "versions": {
            "netclone": netclone.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _called(device: torch.device) -> str:
    """The maker's name of a device, if torch knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Bench:
    """The runs of a suite: makes networks, measures them, stores the results."""

    def __init__(self, networks: Networks, journal: Journal, tell: Tell) -> None:
        self.networks, self.journal, self.tell = networks, journal, tell
        self.suite, self.dataset = networks.suite, networks.dataset
        self.bound = bound(self.suite)
        self.clock = clock_of_work(networks.device)

    def digest(self, job: Job) -> str:
        """A digest of everything that a run depends on, code included; if it differs, the run is repeated."""
        suite = self.suite
        parts: list[Any] = [
            _code(job),
            *self.networks.depend_on(),
            suite.old,
            suite.source_knows,
            job.setting.new,
            job.options,
        ]
        if not job.options:
            parts += [
                job.setting.steps,
                job.setting.search_steps,
                suite.batch_size,
                suite.rates.get(job.method),
                suite.depths,
                choices_of(job.method, suite.depths, all_of_them=True),
            ]
        parts.append(getattr(suite.augment, "__name__", ""))
        return hashed(*map(str, parts))

    def finished(self, job: Job) -> bool:
        record = self.journal.records.get(job.key(self.suite))
        return record is not None and record["digest"] == self.digest(job) and not record["error"]

    def problem(self, job: Job) -> Problem:
        """The clone set, with a fifth for validation: the first samples of each class, in an order set by the seed."""
        known = (*self.suite.old, *job.setting.new)
        train, validation = [], []
        for label in known:
            generator = torch.Generator().manual_seed(1000 * job.seed + label)
            index = find(self.dataset.labels, (label,))
            order = index[torch.randperm(len(index), generator=generator).to(index.device)]
            share = job.fraction < 1
            chosen = order[: max(5, round(job.fraction * len(order))) if share else int(job.fraction)]
            held = max(1, round(0.2 * len(chosen)))
            validation.append(chosen[:held])
            train.append(chosen if job.single else chosen[held:])
        parts = []
        for what, chosen in (("data", torch.cat(train)), ("validation", torch.cat(validation))):
            labels = renamed(self.dataset.labels[chosen], known)
            parts.append(Samples(self.dataset.images[chosen], labels, what))
        return Problem(
            self.networks.target(job.seed),
            self.networks.source(job.seed),
            tuple(self.networks.columns("source")[label] for label in job.setting.new),
            train=parts[0],
            validation=parts[1],
            keep=0.5,
            augment=self.suite.augment,
        )

    def run(self, job: Job) -> None:
        """Make a network, evaluate it on the test split, and store the result, or why there is none."""
        problem = self.problem(job)
        record: dict[str, Any] = {
            "key": job.key(self.suite),
            "digest": self.digest(job),
            "study": job.study,
            "setting": job.setting.name,
            "group": job.setting.group,
            "fraction": job.fraction,
            "seed": job.seed,
            "method": job.method,
            "options": dict(job.options),
            "threads": torch.get_num_threads(),
            "error": "",
            "does_not_apply": "",
        }
        started = self.clock()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", NetcloneWarning)
            try:
                model = self._made(job, problem, record)
            except InapplicableError as error:
                record["does_not_apply"] = str(error)
            except NetcloneError as error:
                record["error"] = reason(error)
            else:
                record.setdefault("seconds", self.clock() - started)
                record |= self._figures(job, problem, model)
        record["warnings"] = [str(w.message) for w in seen if issubclass(w.category, NetcloneWarning)]
        self.journal.append(record)

    def _made(self, job: Job, problem: Problem, record: dict[str, Any]) -> nn.Module:
        if job.options:
            return self._cloned(job, problem, record)
        if job.method == self.bound:
            columns = tuple(self.networks.columns("joint")[label] for label in (*self.suite.old, *job.setting.new))
            joint = self.networks.joint(job.seed)
            role = "source" if joint is problem.source else "joint"
            record["seconds"] = self.networks.facts[f"{role}, seed {job.seed}"]["seconds"]
            model: nn.Module = Columns(joint, columns, problem.train.images.device).eval()
        elif job.method in (fixed := {**ENSEMBLES, **HEADS}):
            model = fixed[job.method](problem, Recipe(lr=0, steps=0, seed=job.seed))
        else:
            model = self._trained(job, problem, record)
        left_out = model.left_out if isinstance(model, Beside) else None  # it was fitted to the validation samples too
        record["validation"] = validated(model, problem.validation, problem.old)[0] if left_out is None else left_out
        return model

    def _cloned(self, job: Job, problem: Problem, record: dict[str, Any]) -> nn.Module:
        """All samples of the clone set, since clone() itself holds a fifth of them out."""
        images, labels = problem.samples.images, problem.samples.labels
        new = labels >= problem.old
        named = torch.tensor(problem.classes, device=labels.device)[labels[new] - problem.old]
        given = {"target_data": [(images[~new], labels[~new])], "augment": self.suite.augment}
        options: Options = {**given, **dict(job.options)}
        module = clone(
            problem.source,
            problem.target,
            [(images[new], named)],
            classes=problem.classes,
            seed=job.seed,
            progress=self.tell,
            **options,
        )
        record["validation"] = module.scores["validation"]
        record["at"], record["source_at"] = module.at, module.source_at
        record["search"] = [asdict(candidate) for candidate in module.spec.search]
        return inject(problem.target, module, name="bench")

    def _trained(self, job: Job, problem: Problem, record: dict[str, Any]) -> nn.Module:
        """A tuning baseline with the recipe that was found on the first seed of the group."""
        method, steps = TUNING[job.method], job.setting.search_steps or job.setting.steps
        base = Recipe(lr=1.0, steps=steps, batch_size=self.suite.batch_size)
        first = next(setting for setting in self.suite.settings if setting.group == job.setting.group)
        origin = replace(job, setting=first, fraction=first.fractions[0], seed=0)
        key = f"search|{origin.key(self.suite)}"
        known = self.journal.records.get(key)
        tuned: Tuned | None = None
        if known is None or known["digest"] != self.digest(origin):
            rates = self.suite.rates[job.method]
            target = self.networks.target(0)
            depths = tuple(depth for depth in self.suite.depths if depth < len(stages(target)))

            def tell(done: int, total: int) -> None:
                self.tell(f"tune {job.method}", done, total)

            choices = choices_of(job.method, depths, all_of_them=len(rates) >= 3)
            tuned = search(method, self.problem(origin), base, rates, choices, tell)
            known = {
                "key": key,
                "digest": self.digest(origin),
                "method": job.method,
                "group": job.setting.group,
                "setting": first.name,
                "fraction": origin.fraction,
                "seed": 0,
                "recipe": asdict(tuned.recipe),
                "trials": [asdict(trial) for trial in tuned.trials],
                "seconds": tuned.seconds,
                "threads": torch.get_num_threads(),
            }
            self.journal.append(known)
        recipe = replace(Recipe(**known["recipe"]), steps=job.setting.steps, seed=job.seed)
        record["recipe"], record["search_seconds"] = asdict(recipe), known["seconds"]
        if tuned is not None and origin.key(self.suite) == job.key(self.suite) and tuned.recipe == recipe:
            record["seconds"] = next(trial.seconds for trial in tuned.trials if trial.recipe == recipe)
            return tuned.model
        started = self.clock()
        model = method(problem, recipe)
        record["seconds"] = self.clock() - started
        return model

    def _figures(self, job: Job, problem: Problem, model: nn.Module) -> dict[str, Any]:
        """Accuracies on the test split, and the share of weights that do not belong to the target."""
        known = (*self.suite.old, *job.setting.new)
        index = find(self.dataset.test_labels, known)
        labels = renamed(self.dataset.test_labels[index], known)
        test = [(self.dataset.test_images[index], labels)]
        old, new = range(problem.old), range(problem.old, problem.columns)
        reference = self.networks.target_logits(job.seed)[index]
        scores = evaluate(model, test, old=old, new=new, reference=reference)
        is_old = labels < problem.old
        before = float((reference.argmax(1) == labels)[is_old].double().mean())
        assert scores.old is not None and scores.new is not None
        added = changed(problem.target, model)
        size = sum(parameter.numel() for parameter in problem.source.parameters())
        images = self.dataset.test_images[index][:TIMED]
        seconds = seconds_in_turn([model.eval(), problem.target], images)
        ms, target_ms = (1000 * each / len(images) for each in seconds)
        return {
            "old": scores.old,
            "new": scores.new,
            "mean": (scores.old + scores.new) / 2,
            "all": scores.all,
            "old_before": before,
            "old_lost": 100 * (before - scores.old),
            "locality_open": scores.locality_open,
            "locality_closed": scores.locality_closed,
            "calibration_error": scores.calibration_error,
            "parameters": added,
            "size": added / size,
            "ms": ms,
            "target_ms": target_ms,
        }

    def settings(self) -> dict[str, Any]:
        """The suite as plain data."""
        suite = self.suite
        return {
            "source": described(suite.source),
            "target": described(suite.target),
            "old": list(suite.old),
            "settings": [asdict(setting) for setting in suite.settings],
            "augment": getattr(suite.augment, "__name__", ""),
            "rates": {name: list(rates) for name, rates in suite.rates.items()},
            "depths": list(suite.depths),
            "old_weights": list(OLD_WEIGHTS),
            "batch_size": suite.batch_size,
            "clone": suite.clone,
            "tuning": list(TUNING),
            "ensembles": list(ENSEMBLES),
            "heads": list(HEADS),
            "joint": self.bound,
            "ours": sized(suite.settings[0].keeps[0]),
        }

    def results(self, jobs: list[Job], facts: dict[str, Any]) -> dict[str, Any]:
        """Everything that is known about these runs, as plain data."""
        records = [self.journal.records.get(job.key(self.suite)) for job in jobs]
        runs = [record for record in records if record is not None]
        searches = [r for key, r in self.journal.records.items() if key.startswith(f"search|{self.suite.name}|")]
        for seed in facts["seeds"]:
            self.networks.source(seed), self.networks.target(seed)
        spent = [r["seconds"] or 0 for r in runs if r["method"] != self.bound and "seconds" in r]
        made = [about["seconds"] or 0 for about in self.networks.facts.values()]
        return {
            **facts,
            "threads": in_threads(made["threads"] for made in (*runs, *searches)),
            "seconds": {"runs": sum(spent), "searches": sum(s["seconds"] for s in searches), "networks": sum(made)},
            "networks": self.networks.facts,
            "searches": searches,
            "runs": runs,
        }


def changed(target: nn.Module, model: nn.Module) -> int:
    """The number of weights that a model adds or changes: those in tensors that equal none of the target's in all bits.

    Examples
    --------
    >>> target = nn.Linear(3, 2)
    >>> changed(target, nn.Sequential(target, nn.Linear(2, 2)))
    6
    """
    own = list(target.parameters())
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if not any(parameter.shape == other.shape and same_bits(parameter, other) for other in own)
    )


def _code(job: Job) -> str:
    """A digest of the code that makes a clone; for a baseline of what it uses alone: other results are kept."""
    common = "netclone.metrics.evaluating", "netclone.benchmarking.networks", "netclone.benchmarking.searching"
    if job.options:
        return code_digest("netclone.cloning.method", *common)
    method = {**TUNING, **ENSEMBLES, **HEADS}.get(job.method, Columns)  # the upper bound is columns of a network
    own = getattr(method, "func", method).__module__
    return code_digest(own, *common, within=("netclone.baselines", "netclone.learning"))


@contextlib.contextmanager
def threads_used() -> Iterator[None]:
    """Use as many threads as this process has CPUs, unless the user has set OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
