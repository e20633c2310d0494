"""netclone and Torch-Pruning on the same networks.

    python examples/benchmarks/against_torch_pruning.py FILE.json [NAME...]

    pip install torch-pruning

Each library slims each network by half of its channels, by magnitude, in a process of its own. A network passes with
netclone if masked and slim are one function (1e-9, float64); with Torch-Pruning, which has nothing to compare with, if
the slim network runs on another batch size, returns finite logits of the right shape, and has fewer parameters. It is
told what its own timm example tells it: the classifier is not pruned, and how many heads attention has.

Where both pass, netclone slims once more, to the MACs that Torch-Pruning left, and the two are timed in turn.
Without names: the smallest network of each of timm's families.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import ratio
from torch import nn

import netclone
from netclone import zoo
from netclone.channels import channel_groups
from netclone.extracting import extract
from netclone.localizing import localize

RATIO, SECONDS, REPEATS = 0.5, 120.0, 9


def ours(name: str) -> dict[str, Any]:
    """netclone: groups, mask, slim network with its certificate."""
    network = prepared(name)
    images = network.images(2)
    started = time.perf_counter()
    groups = channel_groups(network.model, images)
    mask = localize(groups, method="magnitude", keep=1 - RATIO)
    module = extract(groups, mask)
    seconds = time.perf_counter() - started
    fresh = network.images(3, seed=2)
    with torch.no_grad():
        want, got = mask.apply(groups)(fresh.clone()), module(fresh.clone())
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= 1e-9:
        raise ValueError(f"masked and slim differ by {error:.1e}")
    return {"seconds": seconds, "error": error, **left(module, network)}


def theirs(name: str) -> dict[str, Any]:
    """Torch-Pruning, and where both pass the latency of the two at its MACs."""
    network = prepared(name)
    started = time.perf_counter()
    slim = pruned(network)
    seconds = time.perf_counter() - started
    fresh = network.images(3, seed=2)
    with torch.no_grad():
        want, got = network.model(fresh.clone()), slim(fresh.clone())
    if got.shape != want.shape or not bool(got.isfinite().all()):
        raise ValueError(f"the slim network returns {tuple(got.shape)}, finite: {bool(got.isfinite().all())}")
    facts = left(slim, network)
    if facts["parameters"] >= 1:
        raise ValueError("nothing was pruned")
    return {"seconds": seconds, **facts}


def both(name: str) -> dict[str, Any]:
    """Latency of the two slim networks with the same MACs, as a ratio, in float32."""
    network = prepared(name)
    network.model.float()
    image = network.images(1)
    slim = pruned(network)
    share = left(slim, network)["macs"]
    groups = channel_groups(network.model, network.images(2))
    module = extract(groups, localize(groups, method="magnitude", keep=share, budget="macs"))
    with torch.no_grad():
        latency = ratio(lambda: module(image.clone()), lambda: slim(image.clone()), REPEATS)
    return {"macs": share, "our_macs": left(module, network)["macs"], "latency": latency}


def prepared(name: str) -> zoo.Network:
    """The network in float64, with everything that starts as a constant made random."""
    network = zoo.build(name)
    zoo.randomised(network.model.double(), network.images(2, seed=1).double())
    return network


def pruned(network: zoo.Network) -> nn.Module:
    """A copy of the network, slimmed by Torch-Pruning."""
    import torch_pruning

    model = copy.deepcopy(network.model)
    heads = {
        module.qkv: module.num_heads
        for module in model.modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)
    }
    classifiers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        network.images(1),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=classifiers,
        num_heads=heads,
    )
    pruner.step()
    return model


def left(slim: nn.Module, network: zoo.Network) -> dict[str, float]:
    """Shares of the parameters and MACs that are left."""
    image = network.images(1)
    small, whole = (netclone.cost(model, image, repeats=1) for model in (slim, network.model))
    return {"parameters": small.parameters / whole.parameters, "macs": small.macs / max(1, whole.macs)}


def main() -> int:
    console = Console(width=110)
    chosen = [f"timm/{name}" if "/" not in name else name for name in sys.argv[2:]]
    if not chosen:
        chosen = list(zoo.smallest(zoo.names(["*"])))
    limits = zoo.Limits(seconds=SECONDS, memory_mb=8000)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "netclone": netclone.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torch-pruning": importlib.metadata.version("torch-pruning"),
        },
        "networks": {name: {} for name in chosen},
    }
    for title, task in (("netclone", ours), ("torch-pruning", theirs), ("both", both)):
        names = chosen
        if title == "both":
            done = record["networks"]
            names = [n for n in chosen if all(done[n][library]["passed"] for library in ("netclone", "torch-pruning"))]
        for outcome in track(zoo.each(task, names, limits), title, len(names), console=console):
            record["networks"][outcome.name][title] = {
                "passed": outcome.value is not None,
                "reason": outcome.reason[:300],
                "seconds_in_all": outcome.seconds,
                **(outcome.value or {}),
            }
    table = Table("", "passed", "worst, s", "median, s", title=f"{len(chosen)} networks", title_justify="left")
    for title in ("netclone", "torch-pruning"):
        results = [network[title] for network in record["networks"].values()]
        times = [result["seconds"] for result in results if result["passed"]]
        slow = sum("limit" in result["reason"] for result in results)
        worst = f"{max(times, default=0):.1f}" + f" ({slow} beyond {SECONDS:.0f})" * (slow > 0)
        table.add_row(title, f"{len(times)}", worst, f"{statistics.median(times or [0]):.1f}")
    console.print(table)
    ratios = [n["both"]["latency"] for n in record["networks"].values() if n.get("both", {}).get("passed")]
    if ratios:
        record["latency"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        console.print(
            f"Latency of netclone's slim network over Torch-Pruning's, same MACs, {len(ratios)} networks: median "
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
