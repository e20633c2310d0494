"""How much to freeze, by size of the clone set: python examples/benchmarks/freezing.py OUT.json [options]

For each suite, seed and size of the clone set: fine-tuning with the first stages frozen, at every depth and learning
rate, of which the best on validation counts (layer defrosting, Gerace et al., arXiv 2303.01429), and the position that
netclone's search chooses for a clone. Beside OUT.json a figure is drawn, OUT.png: both depths against the size.
Finished runs are kept in OUT.json: the same command goes on from there.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from pairs import Pair, Runs, arguments, networks_of
from torch import nn

from netclone.baselines import Problem, Recipe, finetune, stages, tune
from netclone.benchmarking.suites import RATES, Suite
from netclone.learning.data import Samples
from netclone.reporting.style import LIGHT, NETCLONE, figure, label, panel, points, save

NETCLONES = -1
"""What stands for a depth in a record of netclone's position."""


def problem_of(pair: Pair, suite: Suite) -> Problem:
    """The pair's clone set as a problem, with every fifth sample of a class, and the first, for validation."""
    held = torch.zeros(len(pair.labels), dtype=torch.bool)
    for label_ in pair.labels.unique():
        held[(pair.labels == label_).nonzero().flatten()[::5]] = True
    parts = [
        Samples(pair.images[chosen], pair.labels[chosen], what)
        for chosen, what in ((~held, "data"), (held, "validation"))
    ]
    return Problem(pair.target, pair.source, pair.classes, train=parts[0], validation=parts[1], augment=suite.augment)


def fine_tuned(pair: Pair, suite: Suite, frozen: int, steps: int, seed: int) -> dict[str, Any]:
    """Fine-tuning behind so many frozen stages, at the best of the learning rates."""
    recipes = [
        Recipe(lr=rate, steps=steps, batch_size=suite.batch_size, frozen=frozen, seed=seed)
        for rate in RATES["fine-tune"]
    ]
    tuned = tune(finetune, problem_of(pair, suite), recipes)
    depth = frozen / (len(stages(pair.target)) - 1)
    return {"depth": depth, "lr": tuned.recipe.lr, "validation": tuned.score, **pair.scores_of(tuned.model)}


def cloned(pair: Pair, suite: Suite, seed: int) -> dict[str, Any]:
    """A clone of half of the source's MACs at the position that the search finds best."""
    module = pair.cloned(augment=suite.augment, seed=seed, **{**suite.clone, "keep": 0.5})
    at = module.at or "input"
    return {
        "at": at,
        "depth": depth_of(at, pair.target),
        "validation": module.scores["validation"],
        **pair.scored(module),
    }


def depth_of(at: str, target: nn.Module) -> float:
    """The share of the target's stages, but for the last, that lie before a position.

    Examples
    --------
    >>> target = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    >>> depth_of("input", target), depth_of("0", target), depth_of("1.1", target)
    (0.0, 0.5, 1.0)
    """
    names = [name for name, _ in stages(target)]
    first = at.partition(".")[0]
    return (names.index(first) + 1) / (len(names) - 1) if first in names else 0.0


def best(runs: list[dict[str, Any]]) -> dict[tuple[str, int, float], dict[str, Any]]:
    """The fine-tuning of each suite, seed and size that is best on validation; of equal ones the least frozen."""
    found: dict[tuple[str, int, float], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["frozen"]):
        key = run["suite"], run["seed"], float(run["size"][:-1])
        if run["frozen"] != NETCLONES and (key not in found or run["validation"] > found[key]["validation"]):
            found[key] = run
    return found


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot the best depth of freezing, and netclone's, against the size of the clone set, a panel for each suite."""
    frozen = best(runs)
    clones = {(r["suite"], r["seed"], float(r["size"][:-1])): r for r in runs if r["frozen"] == NETCLONES}
    suites = list(dict.fromkeys(run["suite"] for run in runs))
    sheet = figure(300 * len(suites))
    for number, suite in enumerate(suites):
        part = number / len(suites), (number + 1) / len(suites)
        about = "share of stages kept"
        axes = panel(
            sheet,
            f"{suite}: what is kept of the target",
            "clone set, % of the training images",
            about,
            "",
            part,
        )
        named, lines = {}, []
        for name, group, colour in (("fine-tuning", frozen, LIGHT["grey"]), ("netclone", clones, NETCLONE)):
            sizes = sorted({size for of, _, size in group if of == suite})
            depths = [
                statistics.fmean(run["depth"] for (of, _, at), run in group.items() if (of, at) == (suite, size))
                for size in sizes
            ]
            if sizes:
                axes.plot(sizes, depths, "o-", color=colour, lw=points(2), ms=points(8))
                named[name] = (sizes[-1], depths[-1])
                lines.append(list(zip(sizes, depths, strict=True)))
        axes.set_xscale("log")
        axes.set_ylim(-0.08, 1.08)
        ticks = sorted({size for of, _, size in frozen if of == suite})
        axes.set_xticks(ticks, [f"{size:g}" for size in ticks])
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.set_title("", loc="right")
        label(axes, named, lambda name: name == "netclone", lines)
    save(sheet, path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["1%", "3%", "10%", "30%"])
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning; 0: as in the suite's search")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(asked.out, ("suite", "development", "seed", "size", "frozen"))
    for seed in asked.seeds:
        for name in asked.suites:
            networks = networks_of(name, asked)
            suite = networks.suite
            steps = asked.steps or suite.settings[0].search_steps or suite.settings[0].steps
            for size in asked.sizes:
                pair = Pair.of(suite, networks, seed, size)
                for frozen in (NETCLONES, *range(len(stages(pair.target)))):
                    about = (name, asked.development, seed, size, frozen)
                    if not runs.done(*about):
                        found = cloned(pair, suite, seed) if frozen == NETCLONES else None
                        runs.add(*about, **(found or fine_tuned(pair, suite, frozen, steps, seed)))
                        print(*about, *(f"{key} {value}" for key, value in runs.runs[-1].items()), flush=True)
    draw(runs.runs, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
