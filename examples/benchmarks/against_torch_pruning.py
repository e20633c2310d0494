"""netclone and another pruning library, Torch-Pruning or torch-kirigami, on the same networks.

    python examples/benchmarks/against_torch_pruning.py FILE.json [NAME...] [--tool torch-kirigami] [--time-only]

    pip install torch-pruning torch-kirigami

Each library slims each network by half of the channels that it takes, by magnitude, in a process of its own, which has
one thread, 180 s and 18 GB for all it does. As many run at a time as torch has threads (OMP_NUM_THREADS). A network
passes if the slim one runs on another batch size, returns finite logits of the right shape and has fewer parameters,
and with netclone if masked and slim are one function, too (1e-9, float64): the others have nothing to compare with.
The seconds are a processor's, of slimming alone. Either library has slimmed a small network before. netclone works in
float64 here, the others in float32.

Torch-Pruning is given what its example timm_models/prune_timm_models.py (4c2f113) gives it: the classifier is not
pruned, it is told how many heads attention has, traces attention unfused, and num_heads and head_dim of attention are
set after pruning. Beyond the example: so is attn_dim, which newer timm has; classifiers that are convolutions are told;
attention is fused again for timing; and networks without a classifier may return fewer columns.

torch-kirigami is asked as its tutorial does (docs/getting-started.md, 0.2.1): all candidates that it finds, half of the
channels of each axis, by magnitude. What the network returns stays, as it is by default.

Where both pass, netclone slims once more, to at most the MACs that the other left (through norms where these cannot be
reached otherwise: Torch-Pruning always takes such channels), and the two are timed in turn, in float32. --time-only
leaves that out.

Without names: the smallest network of each of timm's families. With the FILE.json of an earlier run in place of names:
the networks that both passed there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import ratio
from torch import Tensor, nn

import netclone
from netclone import zoo
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract
from netclone.learning.localizing import localize
from netclone.zoo.building import CLASSES

RATIO, SECONDS, MEGABYTES, REPEATS = 0.5, 180.0, 18000.0, 9
WITHIN = 0.05  # latencies are compared where the two networks' MACs are as near as this


def ours(name: str) -> dict[str, Any]:
    """netclone: groups, mask, slim network with its certificate."""
    slimmed(*small())
    network = prepared(name, torch.float64)
    started = time.process_time()
    groups, mask, module = slimmed(network.model, network.images(2))
    seconds = time.process_time() - started
    fresh = network.images(3, seed=2)
    with torch.no_grad():
        want, got = mask.apply(groups)(fresh.clone()), module(fresh.clone())
    facts = checked(module, got, want, network)
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= 1e-9:
        raise ValueError(f"masked and slim differ by {error:.1e}")
    return {"seconds": seconds, "error": error, **facts}


def theirs(name: str, *, tool: str) -> dict[str, Any]:
    """The other library."""
    pruned = TOOLS[tool]
    pruned(*small())
    network = prepared(name, torch.float32)
    started = time.process_time()
    slim = pruned(network.model, network.images(1))
    seconds = time.process_time() - started
    fresh = network.images(3, seed=2)
    with torch.no_grad():
        want, got = network.model(fresh.clone()), slim(fresh.clone())
    return {"seconds": seconds, **checked(slim, got, want, network)}


def both(name: str, *, tool: str) -> dict[str, Any]:
    """Latency of the two slim networks with the same MACs, as a ratio."""
    network = prepared(name, torch.float32)
    slim = TOOLS[tool](network.model, network.images(1))
    share = left(slim, network)["macs"]
    module, through_norms = at_macs(share, network)
    image = network.images(1)
    with torch.no_grad():
        latency = ratio(lambda: module(image.clone()), lambda: slim(image.clone()), REPEATS)
    our_macs = left(module, network)["macs"]
    return {"macs": share, "our_macs": our_macs, "through_norms": through_norms, "latency": latency}


def small() -> tuple[nn.Module, Tensor]:
    """What either library slims first, so that what it does once in a process is not counted."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, CLASSES)
    return nn.Sequential(*layers).eval(), torch.zeros(2, 3, 8, 8)


def prepared(name: str, dtype: torch.dtype) -> zoo.Network:
    """The network, with everything that starts as a constant made random."""
    network = zoo.build(name)
    zoo.randomised(network.model.to(dtype), network.images(2, seed=1).to(dtype))
    return network


def slimmed(model: nn.Module, images: Tensor) -> tuple[ChannelGroups, ChannelMask, nn.Module]:
    """A copy of the network, slimmed by netclone, and what of it was kept."""
    groups = channel_groups(model, images)
    mask = localize(groups, method="magnitude", keep=1 - RATIO)
    return groups, mask, extract(groups, mask)


def at_macs(share: float, network: zoo.Network) -> tuple[nn.Module, bool]:
    """The network slimmed by netclone to a share of its MACs, and whether it had to go through norms for that."""
    groups = channel_groups(network.model, network.images(2))
    try:
        return extract(groups, localize(groups, method="magnitude", keep=share, budget="macs")), False
    except netclone.ArgumentError:  # the budget cannot be reached
        groups = channel_groups(groups.graph_module, through_norms=True)
        return extract(groups, localize(groups, method="magnitude", keep=share, budget="macs")), True


def by_torch_pruning(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy of the network, slimmed by Torch-Pruning."""
    import torch_pruning

    model = copy.deepcopy(model)
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "num_heads") and isinstance(layer(m), nn.Module)]
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        image,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=classifiers(model),
        num_heads={layer(m): m.num_heads for m in attentions},
    )
    pruner.step()
    for module in attentions:
        out = layer(module)
        module.num_heads = pruner.num_heads[out]
        width = out.out_features if isinstance(out, nn.Linear) else getattr(out, "out_channels", None)
        if width is not None:
            module.head_dim = width // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.num_heads * module.head_dim
    for module in fused:
        module.fused_attn = True
    return model


def by_torch_kirigami(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy of the network, slimmed by torch-kirigami."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, Magnitude, Pruner

    model = copy.deepcopy(model)
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=(image,)))
    found = pruner.discover_candidates()
    pruner.prune(found, budget=ChannelRatio(RATIO), strategy=Greedy(Magnitude(p=2)))  # in place
    return model


TOOLS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "torch-pruning": by_torch_pruning,
    "torch-kirigami": by_torch_kirigami,
}


def layer(attention: nn.Module) -> Any:
    """What gives an attention's queries, keys and values, where that is one layer."""
    return getattr(attention, "qkv", None) or getattr(attention, "qkv_proj", None)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that give logits."""
    layers = list(model.modules())
    linear: list[nn.Module] = [one for one in layers if isinstance(one, nn.Linear) and one.out_features == CLASSES]
    return linear + [one for one in layers if isinstance(one, nn.Conv2d) and one.out_channels == CLASSES]


def checked(slim: nn.Module, got: Tensor, want: Tensor, network: zoo.Network) -> dict[str, float]:
    """What is left, of a slim network that returns what it should, as to shape."""
    right = len(got) == len(want) and (got.shape == want.shape or not classifiers(network.model))
    if not right or not bool(got.isfinite().all()):
        raise ValueError(f"the slim network returns {tuple(got.shape)}, finite: {bool(got.isfinite().all())}")
    gc.collect()  # graphs are cycles
    facts = left(slim, network)
    if facts["parameters"] >= 1:
        raise ValueError("nothing was pruned")
    return facts


def left(slim: nn.Module, network: zoo.Network) -> dict[str, float]:
    """Shares of the parameters and MACs that are left."""
    image = network.images(1)
    small, whole = (netclone.cost(model, image, repeats=1) for model in (slim, network.model))
    return {"parameters": small.parameters / whole.parameters, "macs": small.macs / max(1, whole.macs)}


def both_passed(file: str) -> list[str]:
    """The networks that both libraries slimmed in an earlier run."""
    networks = json.loads(Path(file).read_text(encoding="utf-8"))["networks"]
    return [
        name for name, found in networks.items() if all(one["passed"] for key, one in found.items() if key != "both")
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, median and ends of some figures."""
    return {"networks": len(values), "median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> int:
    console = Console(width=110)
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tool", choices=TOOLS, default="torch-pruning")
    parser.add_argument("--time-only", action="store_true", help="slim, but do not time the slim networks")
    asked = parser.parse_args()
    libraries = ("netclone", asked.tool)
    names = both_passed(asked.names[0]) if asked.names and asked.names[0].endswith(".json") else asked.names
    chosen = [f"timm/{name}" if "/" not in name else name for name in names]
    if not chosen:
        chosen = list(zoo.smallest(zoo.names(["*"])))
    limits = zoo.Limits(seconds=SECONDS, memory_mb=MEGABYTES, processes=torch.get_num_threads())
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "netclone": netclone.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            asked.tool: importlib.metadata.version(asked.tool),
        },
        "networks": {name: {} for name in chosen},
    }
    networks = record["networks"]
    tasks: dict[str, Callable[[str], dict[str, Any]]] = {
        "netclone": ours,
        asked.tool: partial(theirs, tool=asked.tool),
        "both": partial(both, tool=asked.tool),
    }
    if asked.time_only:
        del tasks["both"]
    for title, task in tasks.items():
        names = chosen
        if title == "both":
            names = [name for name in chosen if all(networks[name][library]["passed"] for library in libraries)]
        for outcome in track(zoo.each(task, names, limits), title, len(names), console=console):
            networks[outcome.name][title] = {
                "passed": outcome.value is not None,
                "reason": outcome.reason[:300],
                "seconds_in_all": outcome.seconds,
                **(outcome.value or {}),
            }
    table = Table("", "passed", "stopped", "worst, s", "median, s", title=f"{len(chosen)} networks")
    for title in libraries:
        results = [network[title] for network in networks.values()]
        times = [result["seconds"] for result in results if result["passed"]]
        stopped = sum(result["reason"].startswith("stopped: ") for result in results)
        table.add_row(
            title,
            f"{len(times)}",
            f"{stopped}",
            f"{max(times, default=0):.1f}",
            f"{statistics.median(times or [0]):.1f}",
        )
    console.print(table)
    pairs = [tuple(network[library] for library in libraries) for network in networks.values()]
    times = [own["seconds"] / other["seconds"] for own, other in pairs if own["passed"] and other["passed"]]
    if times:
        record["time"] = spread(times)
        console.print(
            f"Time of slimming, netclone's over {asked.tool}'s, {len(times)} networks: "
            f"median {statistics.median(times):.2f}, {min(times):.2f} to {max(times):.2f}"
        )
    measured = [network["both"] for network in networks.values() if network.get("both", {}).get("passed")]
    near = [one["latency"] for one in measured if one["our_macs"] >= (1 - WITHIN) * one["macs"]]
    if near:
        record["latency"] = {**spread(near), "further_apart": len(measured) - len(near)}
        console.print(
            f"Latency of netclone's slim network over {asked.tool}'s, MACs within {WITHIN:.0%}, {len(near)} networks: "
            f"median {statistics.median(near):.2f}, {min(near):.2f} to {max(near):.2f}"
        )
    asked.file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
