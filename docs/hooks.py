"""What mkdocs and griffe are told of netclone: pages from the program and the committed results, and reST roles.

``<!-- netclone: cli -->`` and the like on a page are replaced by what a function of this file writes, so nothing that
the program or a committed file says is written down a second time.
"""

from __future__ import annotations

import ast
import configparser
import html
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DECISIONS = ROOT / "docs" / "adr"
CONTRACT = "importlinter:contract:rooms"
SUITES = ("fashion", "cifar10", "zoo")

_PLACE = re.compile(r"^<!-- netclone: (?P<what>[a-z-]+) -->$", re.MULTILINE)
_HIDDEN = re.compile(r"<!---? *(?:invisible-code-block|clear-namespace).*?-->\n?", re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|data|attr|exc|mod):`~?(?P<path>[\w.]+)`")
_REFERENCE = re.compile(r"\n\nReference: (?P<text>.+?)\s*\Z", re.DOTALL)
_SECTION = re.compile(r"\n\n\w[\w ]*\n---+\n")
_RETURNS = re.compile(r"(?P<title>Returns\n-------\n)(?P<text>\S.*?)(?=\n\n\S|\Z)", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write what a page asks for; leave out what only the tests run."""
    return _PLACE.sub(lambda match: MAKERS[match["what"]](), _HIDDEN.sub("", markdown))


def commands() -> str:
    """The reference of the command line, as typer writes it of the app; the list of commands in full, as links."""
    command = [sys.executable, "-m", "typer", "netclone.cli", "utils", "docs", "--name", "netclone"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    made = html.unescape(made.replace("```console\n$ ", "```console\n"))
    claims = dict(re.findall(r"^## `netclone ([\w-]+)`\n\n(.+)$", made, re.MULTILINE))
    made = re.sub(r"^\* `([\w-]+)`: .*$", lambda match: _listed(match, claims), made, flags=re.MULTILINE)
    made = re.sub(r"^Example: (.+?)$", "**Example**:\n\n```bash\n\\1\n```", made, flags=re.MULTILINE)
    return re.sub(r"\A# .*\n", "", made)


def _listed(match: re.Match[str], claims: dict[str, str]) -> str:
    name = match[1]
    return f"* [`netclone {name}`](#netclone-{name}): {claims[name]}" if name in claims else match[0]


def zoo() -> str:
    """The committed table of the zoo, its long command folded; that of all targets is too long."""
    text = (ROOT / "docs" / "zoo" / "zoo.md").read_text(encoding="utf-8")
    _, written, rest = text.split("\n\n", 2)
    command, _, when = written.rpartition("`, ")
    folded = f'??? note "The command"\n\n    {command}`'
    said, heading, table = rest.rpartition("| network |")
    return (
        f"# The zoo\n\nWritten on {when}\n\n{folded}\n\n{said}MACs are without those of fused attention, which later "
        "code counts. \N{CHECK MARK} is passed, \N{BALLOT X} failed. The last column has the number of reasons, and "
        f'opens to show them.\n\n<div class="wide" markdown>\n\n{heading}{table}\n</div>'
    )


def overview() -> str:
    """Every method on every suite, from the committed results."""
    from netclone.benchmarking.reporting import overview as written

    return written([json.loads((RESULTS / suite / "results.json").read_text(encoding="utf-8")) for suite in SUITES])


def demo() -> str:
    """What ``netclone demo`` measured, from its committed results."""
    found = json.loads((RESULTS / "demo" / "results.json").read_text(encoding="utf-8"))
    titles = {"target": "target before", "grafted": "target with the clone", "removed": "target, clone removed"}
    lines = ["| test images | old: 0-6 | new: 7-9 | all ten |", "|---|---|---|---|"]
    for name, title in {**titles, "source": "source"}.items():
        scores = found["scores"][name]
        lines.append(f"| {title} | " + " | ".join(f"{scores[kind]:.1%}" for kind in ("old", "new", "all")) + " |")
    module, source = found["costs"]["module"], found["costs"]["source"]
    lines += [
        "",
        f"The module has {module['parameters'] / source['parameters']:.1%} of the source's parameters and "
        f"{module['macs'] / source['macs']:.1%} of its MACs. The command was `{found['command']}`.",
    ]
    return "\n".join(lines)


KEPT = {"latency": "time", "macs": "MACs", "params": "parameters"}
FIGURES = ("mean", "old_lost", "params", "macs", "time", "seconds")


def demo_cost() -> str:
    """What the networks of ``netclone demo`` cost, from its committed results."""
    costs = json.loads((RESULTS / "demo" / "results.json").read_text(encoding="utf-8"))["costs"]
    networks = ("target", "module", "grafted", "source")
    lines = [f"| | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for what, kind, shown in (
        ("parameters", "parameters", "{:,}"),
        ("MACs", "macs", "{:,}"),
        ("latency, ms", "latency_ms", "{:.1f}"),
    ):
        lines.append(f"| {what} | " + " | ".join(shown.format(costs[name][kind]) for name in networks) + " |")
    return "\n".join(lines)


def surgery() -> str:
    """What the cuts and grafts cost, from the committed measurements."""
    return _measured("surgery.json")


def learning() -> str:
    """What learning costs, from the committed measurements."""
    return _measured("learning.json")


def fitting() -> str:
    """What the fit of the classifier gains and loses, from the committed measurements."""
    found = json.loads((RESULTS / "fitting.json").read_text(encoding="utf-8"))
    lines = ["| suite | kept | images a class | no fit | Adam | `clone()` |", "|---|---|---|---|---|---|"]
    for run in found["runs"]:
        suite = f"`{run['suite']}`" + ", development" * run["development"] + f", seed {run['seed']}"
        size = run["size"] + ("" if run["old samples"] else ", none of old classes")
        figures = [f"{100 * fit['mean']:.1f}, {fit['old_lost']:.1f}" for fit in run["fits"].values()]
        lines.append(f"| {suite} | {run['keep']:.0%} | {size} | {' | '.join(figures)} |")
    return "\n".join(lines)


def effort() -> str:
    """What clones are worth by effort and size, from the committed measurements: means over seeds."""
    runs = json.loads((RESULTS / "effort.json").read_text(encoding="utf-8"))["runs"]
    groups: dict[tuple[str, bool, str, str, float], list[dict[str, float]]] = {}
    for run in runs:
        key = run["suite"], run["development"], run["effort"], run["budget"], run["keep"]
        groups.setdefault(key, []).append(run)
    lines = [
        "| suite | effort | kept | mean (lost) | params | MACs | time | made | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (suite, development, name, budget, keep), found in groups.items():
        means = {what: statistics.mean(run[what] for run in found) for what in found[0] if what in FIGURES}
        kept = "all" if name == "whole" else f"{keep:.0%}&nbsp;{KEPT[budget]}"
        lines.append(
            f"| `{suite}`{', development' * development} | {name} | {kept} | {100 * means['mean']:.1f} "
            f"({means['old_lost']:.1f}) | {means['params']:.2f} | {means['macs']:.2f} | {means['time']:.2f} | "
            f"{means['seconds']:.0f}&nbsp;s | {len(found)} |"
        )
    return "\n".join(lines)


def deployment() -> str:
    """Where grafted networks go, from the committed measurements."""
    return _measured("deployment.json")


def serving() -> str:
    """What a server answers while its clone is swapped, from the committed measurements."""
    return _measured("serving.json")


def _measured(file: str) -> str:
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    lines = [
        f"Measured with torch {found['torch']} and timm {found['timm']}.",
        "",
        "| | measured | bar |",
        "|---|---|---|",
    ]
    for what, value, bar in found["rows"]:
        shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        lines.append(f"| {what} | {shown} | {'' if bar is None else f'{bar:g}'} |")
    return "\n".join(lines)


def pruning() -> str:
    """netclone and Torch-Pruning on the same networks, from the committed measurements."""
    found = json.loads((RESULTS / "against-torch-pruning.json").read_text(encoding="utf-8"))
    networks, latency = found["networks"], found["latency"]
    lines = [
        "Measured with " + ", ".join(f"{library} {version}" for library, version in found["versions"].items()) + ".",
        "",
        f"| {len(networks)} networks | passed | stopped at a limit | parameters left, median | s, median | s, worst |",
        "|---|---|---|---|---|---|",
    ]
    for library in ("netclone", "torch-pruning"):
        results = [network[library] for network in networks.values()]
        passed = [one for one in results if one["passed"]]
        stopped = sum(one["reason"].startswith("stopped: ") for one in results)
        left, times = ([one[what] for one in passed] for what in ("parameters", "seconds"))
        middle = f"{statistics.median(left):.0%} | {statistics.median(times):.1f}"
        lines.append(f"| {library} | {len(passed)} | {stopped} | {middle} | {max(times):.1f} |")
    both = [network["both"] for network in networks.values() if network.get("both", {}).get("passed")]
    lines += [
        "",
        f"Latency at the MACs that Torch-Pruning left, over {latency['networks']} networks: median "
        f"{latency['median']:.2f}, {latency['least']:.2f} to {latency['most']:.2f} of Torch-Pruning's. In "
        f"{sum(one['through_norms'] for one in both)} of {len(both)} networks netclone went through norms to reach "
        f"these. Left out: {latency['further_apart']}, where it ended more than 5% below.",
        "",
        '??? note "Every network"',
        "",
        "    | network | netclone | Torch-Pruning | latency |",
        "    |---|---|---|---|",
    ]
    for name, network in networks.items():
        told = [_told(network[library], "{seconds:.1f} s") for library in ("netclone", "torch-pruning")]
        told.append(_told(network["both"], "{latency:.2f}") if "both" in network else "")
        lines.append(f"    | `{name}` | " + " | ".join(told) + " |")
    return "\n".join(lines)


def _told(one: dict[str, Any], figure: str) -> str:
    """A figure of a network that passed, or why it did not, for a cell of a table."""
    return figure.format(**one) if one["passed"] else html.escape(one["reason"]).replace("|", "&#124;")


def operators() -> str:
    """The operators that a graph in an archive may call."""
    from netclone.graph.operators import OPERATORS

    names = "\n".join(sorted(OPERATORS))
    return f'??? note "The {len(OPERATORS)} operators"\n\n    ```text\n' + names.replace("\n", "\n    ").join(
        ("    ", "\n    ```")
    )


def names() -> str:
    """Every public name with the first line of its docstring."""
    import netclone

    package = griffe.load("netclone", search_paths=[str(ROOT)])
    lines = ["| name | what it is |", "|---|---|"]
    for name in netclone.__all__:
        docstring = package[name].docstring
        claim = linked(docstring.value.split("\n\n")[0].replace("\n", " ")) if docstring else ""
        lines.append(f"| [`{name}`][netclone.{name}] | {claim.replace('|', '&#124;')} |")
    return "\n".join(lines)


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top down, as the contract in setup.cfg has them."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg", encoding="utf-8")
    return [re.findall(r"\w+", line) for line in contract[CONTRACT]["layers"].split("\n") if line]


def claim(file: Path) -> str:
    """The first paragraph of a module's docstring, as HTML."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    text = html.escape(_ROLE.sub(r"``\g<path>``", docstring).split("\n\n")[0].replace("\n", " "))
    return re.sub(r"`+(.+?)`+", r"<code>\1</code>", text)


def rooms() -> str:
    """The map: a row for each floor, a box for each room with what it says of itself."""
    rows = []
    for names in floors():
        boxes = [
            f'<div class="room"><a href="#{name.strip("_")}"><code>{name}</code></a> {claim(_file(name))}</div>'
            for name in names
        ]
        rows.append('<div class="floor">' + "".join(boxes) + "</div>")
    return '<div class="house">\n' + "\n".join(rows) + "\n</div>"


def modules() -> str:
    """Every room with its modules, from the ground up, and what each says of itself."""
    lines = []
    for name in (name for names in reversed(floors()) for name in names):
        lines += [f"### `{name}` {{ #{name.strip('_')} }}", "", claim(_file(name)), ""]
        inside = sorted((ROOT / "netclone" / name).glob("[a-z]*.py"))
        if inside:
            lines += ["| module | what is in it |", "|---|---|"]
            lines += [f"| `{file.stem}` | {claim(file).replace('|', '&#124;')} |" for file in inside]
            lines.append("")
    return "\n".join(lines)


def _file(room: str) -> Path:
    package = ROOT / "netclone" / room / "__init__.py"
    return package if package.exists() else ROOT / "netclone" / f"{room}.py"


def decisions() -> str:
    """Every decision, by its title."""
    titles = {
        file.name: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for file in sorted(DECISIONS.glob("[0-9]*.md"))
    }
    return "\n".join(f"- [{title}]({name})" for name, title in titles.items())


MAKERS: dict[str, Callable[[], str]] = {
    "cli": commands,
    "overview": overview,
    "demo": demo,
    "demo-cost": demo_cost,
    "surgery": surgery,
    "deployment": deployment,
    "effort": effort,
    "fitting": fitting,
    "learning": learning,
    "pruning": pruning,
    "serving": serving,
    "operators": operators,
    "names": names,
    "zoo": zoo,
    "rooms": rooms,
    "modules": modules,
    "decisions": decisions,
}


def linked(text: str) -> str:
    """A docstring's text with its reST roles as links, or as code where they name nothing public."""
    import netclone

    def link(match: re.Match[str]) -> str:
        name = match["path"].rpartition(".")[2]
        public = name in netclone.__all__ and match["path"].split(".")[0] in ("netclone", name)
        return f"[`{name}`][netclone.{name}]" if public else f"`{name}`"

    return _ROLE.sub(link, text)


class Docstrings(griffe.Extension):
    """Docstrings as mkdocstrings wants them: roles as links, and what is returned under the type that is annotated."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        text = _with_reference_first(linked(obj.docstring.value))
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            returns = str(obj.returns)
            text = _RETURNS.sub(
                lambda match: f"{match['title']}{returns}\n    " + match["text"].replace("\n", "\n    "), text
            )
        obj.docstring.value = text


def _with_reference_first(text: str) -> str:
    """The same with the paper it refers to before the parameters, not within the last section."""
    match = _REFERENCE.search(text)
    if match is None:
        return text
    text, reference = text[: match.start()], match["text"].strip(" .")
    section = _SECTION.search(text)
    cut = section.start() if section else len(text)
    return text[:cut] + f"\n\nReference: {reference}." + text[cut:]
