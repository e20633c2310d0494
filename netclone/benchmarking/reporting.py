"""write(results, out): results.json, the tables in results.md, and plots; report(out): the last two from the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from netclone.benchmarking.choices import OPTIONS
from netclone.benchmarking.planning import amount
from netclone.benchmarking.plots import draw
from netclone.benchmarking.scores import Gap, Row, Run, at_rest, gap, heading, known, rows, tables
from netclone.errors import ArgumentError
from netclone.runtime.writing import write_text

CLOCK = "processor seconds"
"""How methods are timed: in seconds of all threads together, which other work on the machine does not lengthen."""


def write(results: dict[str, Any], out: Path, *, plots: bool = True) -> None:
    """Write ``results.json``, ``results.md`` and, if asked for, the plots; each completely or not at all."""
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "results.md", markdown(results))
    if plots:
        draw(results, out)


def report(out: Path) -> dict[str, Any]:
    """Write ``results.md`` and the plots again from ``results.json``.

    Raises
    ------
    ArgumentError
        If that file does not exist, or is not one of a benchmark.
    """
    results, text = stored(out, markdown)
    write_text(out / "results.md", text)
    draw(results, out)
    return results


def in_threads(counts: Iterable[int]) -> str:
    """On how many threads runs were made, in words.

    Examples
    --------
    >>> in_threads([1, 1]), in_threads([2, 1])
    ('1 thread', '1 or 2 threads')
    """
    found = sorted(set(counts))
    return f"{' or '.join(map(str, found))} thread{'s' * (found != [1])}"


def as_now(results: dict[str, Any]) -> dict[str, Any]:
    """Results as they are written now: earlier versions told threads by number and the time that passed, on a CPU."""
    results = {"device": "cpu", **results}
    if "clock" in results:
        return results
    return {**results, "threads": in_threads([results["threads"]]), "clock": "seconds"}


def circumstances_of(results: dict[str, Any]) -> str:
    """When, how and with what results were made, in a line of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds, device = len(results["seeds"]), results["device"]
    return (
        f"`{results['command']}`, {results['date'][:10]}; {seeds} seed{'s' * (seeds != 1)}, {results['threads']}"
        f"{'' if device == 'cpu' else f', on one {device}'}; {versions}."
    )


def stored(out: Path, markdown: Callable[[dict[str, Any]], str]) -> tuple[dict[str, Any], str]:
    """The content of ``results.json`` in a folder, and what ``markdown`` makes of it.

    Raises
    ------
    ArgumentError
        If that file does not exist, or is not one of such a benchmark.
    """
    try:
        results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return results, markdown(results)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            f"out: no results in '{out}' ({type(error).__name__}); run the benchmark first, or give its folder"
        ) from error


def overview(suites: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of every method's mean accuracy, with the lost points of old accuracy, in the first setting.

    One column per suite; methods are sorted by their mean over the suites. The best tuning baseline and ours are bold.
    """
    columns = []
    for results in suites:
        table = tables(results)[0][2]
        found = gap(table, *(results["settings"][name] for name in ("ours", "tuning", "joint")))
        marked = {results["settings"]["ours"], found.best if found else ""}
        cells = {}
        for row in table:
            if row.figures["mean"] is not None:
                cell = f"{100 * known(row, 'mean'):.1f} ({known(row, 'old_lost'):.1f})"
                cells[row.method] = known(row, "mean"), f"**{cell}**" if row.method in marked else cell
        columns.append((f"`{results['suite']}`", cells))
    methods = dict.fromkeys(method for _, cells in columns for method in cells)

    def standing(method: str) -> tuple[int, float]:
        means = [cells[method][0] for _, cells in columns if method in cells]
        return -len(means), -sum(means) / len(means)

    lines = ["| method | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in sorted(methods, key=standing):
        lines.append(f"| {method} | " + " | ".join(cells.get(method, (0, ""))[1] for _, cells in columns) + " |")
    return "\n".join(lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    results = as_now(results)
    facts = results["settings"]
    seconds = results["seconds"]
    lines = [
        f"# Benchmark: {results['suite']}",
        "",
        f"{results['about']}.",
        "",
        f"{circumstances_of(results)} Runs took {seconds['runs']:.0f} {results['clock']}, the search of the "
        f"baselines' recipes {seconds['searches']:.0f}, training of sources and targets {seconds['networks']:.0f}.",
        "",
        "Accuracies are means over seeds on the test split, with the lowest and highest seed in brackets. *mean*: the "
        "mean of old and new accuracy. *old lost*: accuracy on old classes before minus after, in points. *open "
        "locality*: the share of old samples whose prediction over all classes differs from that over the old ones. "
        "*size*: weights that are not the target's, as a share of the source's (LoRA and kernel modulation are merged "
        "into the target's weights, which therefore count as changed). *ms*: milliseconds an image at inference, in "
        "batches of 32. Each network was timed in turn with the target: this is how many times the target's it took, "
        f"times the least that the target took in any run. *s*: {results['clock']} of one run; "
        f"for `{facts['joint']}`, of training the source. The best tuning baseline and ours are bold.",
        "",
        *_how_tuned(results),
    ]
    for group, fraction, table in tables(results):
        lines += ["", f"## {heading(results, group)}, clone set {amount(fraction)}", ""]
        found = gap(table, facts["ours"], facts["tuning"], facts["joint"])
        marked = {facts["ours"], found.best if found else ""}
        searched = {s["method"]: s["seconds"] for s in results["searches"] if s["group"] == group}
        lines += _table(table, marked, searched)
        if found:
            lines += ["", *_gap_lines(found, facts["joint"])]
    lines += _studies(results)
    lines += without_result(results["runs"], lambda run: str(run["setting"]), lambda run: "")
    warned = dict.fromkeys(text for run in results["runs"] for text in run.get("warnings", ()))
    if warned:
        lines += ["", "## Warnings of runs", "", *(f"- {text}" for text in warned)]
    return "\n".join(lines) + "\n"


def without_result(runs: Sequence[Run], place: Callable[[Run], str], where: Callable[[Run], str]) -> list[str]:
    """Sections with the runs that failed, and the methods that do not apply, each with the reason.

    ``place`` says which run of a method failed, and ``where`` what a method does not apply to, if not to all.
    """
    failed = [f"- {r['method']}, {place(r)}, seed {r['seed']}: {r['error']}" for r in runs if r["error"]]
    reasons = dict.fromkeys(
        f"- {r['method']}{where(r)}: {r['does_not_apply']}" for r in runs if r.get("does_not_apply")
    )
    lines = ["", "## Failed runs", "", *failed] if failed else []
    return lines + (["", "## Methods that do not apply here", "", *reasons] if reasons else [])


def _how_tuned(results: dict[str, Any]) -> list[str]:
    facts = results["settings"]
    least, most = facts["old_weights"]
    lengths = dict.fromkeys((setting["group"], setting["steps"]) for setting in facts["settings"])
    steps = ", ".join(f"{count} ({group})" for group, count in lengths)
    ours = any("training" in network for name, network in results["networks"].items() if name.startswith("source"))
    trained = ": a network trained on all training images of both" if ours else ", with its own pretrained weights"
    lines = [
        "Baselines were tuned on the first seed of each setting, with the smallest clone set and, of single classes, "
        "the first one. The search chose the learning rate (extending the grid by factors of 3 while the best was at "
        "an end), then for the methods that fine-tune the freezing depth, then the option that a method has of its own "
        "(the weight of its distillation, sparsity or meta loss, or its number of prompts), "
        f"and last whether a mistake on an old class weighs {least:g} or {most:g} times one on a new class (netclone: "
        f"{most:g}). All runs of the setting then used this recipe, for up to {steps} steps. Every run keeps the best "
        "of eight moments on its validation split, a fifth of the clone set. All methods see the same clone set, of "
        "which `clone()` itself holds out a fifth. Its constants are the same everywhere. They were found on the first "
        "setting of `fashion` (docs/adr/0005), so for `fashion` the figures do not include that search. "
        f"`{facts['joint']}` is the source itself, restricted to the old and new classes{trained}.",
    ]
    if facts.get("heads"):
        lines += [
            "",
            "*gated ensemble*: the whole source beside the target, by the formula that a clone's classifier starts "
            "from, with nothing fitted: the new classes against those that the source takes the old samples for, one "
            "for each old class. *fitted*: the same with the fit of `clone()`. The methods named after features "
            "are classifiers of all old and new classes over frozen features, the target's, the source's or both. "
            "Strength, temperature and gate are chosen within the clone set of each run, mostly by cross-validation "
            "(`netclone/baselines/heads.py`). Old logits stay the target's. Where a classifier reads the source's "
            "features, its size has the source's weights in it.",
        ]
    if results["searches"]:
        lines += ["", "| baseline | setting | recipe found | tried | search, s |", "|---|---|---|---|---|"]
    for found in results["searches"]:
        recipe = found["recipe"]
        depth = f", first {recipe['frozen']} stages frozen" if recipe["frozen"] else ""
        option = OPTIONS.get(found["method"], ("",))[0]
        if option in recipe:
            depth += f", {recipe[option]} prompts" if option == "prompts" else f", {option} weighing {recipe[option]:g}"
        depth += f", old classes weighing {recipe['old_weight']:g}"
        lines.append(
            f"| {found['method']} | {found['group']} | lr {recipe['lr']:.3g}, {recipe['steps']} steps of "
            f"{recipe['batch_size']}{depth} | {len(found['trials'])} | {found['seconds']:.0f} |"
        )
    return lines


def _table(table: Sequence[Row], marked: set[str], searched: dict[str, float] | None = None) -> list[str]:
    lines = [
        "| method | old | new | mean | old lost | open locality | size | ms | s | search, s | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        name = f"**{row.method}**" if row.method in marked else row.method
        if row.figures["mean"] is None:
            why = "does not apply" if row.inapplicable else "failed"
            lines.append(f"| {name} | {why} | | | | | | | | | 0 |")
            continue
        f = row.figures
        search = (searched or {}).get(row.method)
        lines.append(
            f"| {name} | {_percent(f['old'])} | {_percent(f['new'])} | {_percent(f['mean'])} "
            f"[{100 * row.low:.1f}, {100 * row.high:.1f}] | {f['old_lost']:.1f} | {_percent(f['locality_open'])} | "
            f"{_percent(f['size'])} | {_milliseconds(f['ms'])} | {_seconds(f['seconds'])} | {_seconds(search)} | "
            f"{row.runs} |"
        )
    return lines


def _gap_lines(found: Gap, bound: str) -> list[str]:
    closed = f"no gap: {bound} is not better" if found.closed is None else f"{found.closed:.0%}"
    times = ""
    if found.ours_seconds is not None and found.best_seconds is not None:
        times = f"; seconds, ours / best tuning: {found.ours_seconds:.1f} / {found.best_seconds:.1f}"
    return [
        f"Gap closed by {found.ours} between {found.best} and {bound}: {closed} ({100 * found.lead:+.1f} points "
        f"against {found.best}); old lost, ours / best tuning: {found.ours_lost:.1f} / {found.best_lost:.1f}{times}."
    ]


def _studies(results: dict[str, Any]) -> list[str]:
    runs, ours = at_rest(results["runs"]), results["settings"]["ours"]
    titles = {
        "curve": "Size and accuracy",
        "localize": "Ways to localise, half the parameters, at the input",
        "ablation": "Ablations",
    }
    lines: list[str] = []
    for study, title in titles.items():
        own = [run for run in runs if run["study"] == study]
        if not own:
            continue
        if study != "localize":
            seeds = {run["seed"] for run in own}
            own += [
                run
                for run in runs
                if run["study"] == "main"
                and (run["setting"], run["fraction"]) == (own[0]["setting"], own[0]["fraction"])
                and run["seed"] in seeds
                and (run["method"] == ours or (study == "curve" and run["method"].startswith("netclone")))
            ]
        about = f"{own[0]['setting']}, clone set {amount(own[0]['fraction'])}"
        lines += ["", f"## {title} ({about})", "", *_table(rows(own), {ours})]
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
