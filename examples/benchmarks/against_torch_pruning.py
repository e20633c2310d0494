"""netclone and Torch-Pruning on the same networks.

    python examples/benchmarks/against_torch_pruning.py FILE.json [NAME...]

    pip install torch-pruning

Each library slims each network by half of its channels, by magnitude, in a process of its own. A network passes with
netclone if masked and slim are one function (1e-9, float64); with Torch-Pruning, which has nothing to compare with, if
the slim network runs on another batch size, returns finite logits of the right shape, and has fewer parameters. It is
given what its own timm example gives it: the classifier is not pruned, it is told how many heads attention has, traces
attention unfused, and the widths that attention keeps as numbers are set right afterwards.

Where both pass, netclone slims once more, to the MACs that Torch-Pruning left, and the two are timed in turn.
OMP_NUM_THREADS=1 times one core.
Without names: the smallest network of each of timm's families.
"""

from __future__ import annotations

import contextlib
import copy
import gc
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

RATIO, SECONDS, REPEATS = 0.5, 180.0, 9


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
    gc.collect()  # the masked copy: graphs are cycles
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
    module, through_norms = at_macs(share, network)
    with torch.no_grad():
        latency = ratio(lambda: module(image.clone()), lambda: slim(image.clone()), REPEATS)
    our_macs = left(module, network)["macs"]
    return {"macs": share, "our_macs": our_macs, "through_norms": through_norms, "latency": latency}


def at_macs(share: float, network: zoo.Network) -> tuple[nn.Module, bool]:
    """The network slimmed by netclone to a share of its MACs, and whether channels that norms read had to go for that.

    Torch-Pruning takes those always; netclone only if asked, since it makes another function of the network.
    """
    for through_norms in (False, True):
        groups = channel_groups(network.model, network.images(2), through_norms=through_norms)
        with contextlib.suppress(netclone.ArgumentError):
            return extract(groups, localize(groups, method="magnitude", keep=share, budget="macs")), through_norms
    raise ValueError(f"{share:.3f} of the MACs cannot be reached")


def prepared(name: str) -> zoo.Network:
    """The network in float64, with everything that starts as a constant made random."""
    network = zoo.build(name)
    zoo.randomised(network.model.double(), network.images(2, seed=1).double())
    return network


def pruned(network: zoo.Network) -> nn.Module:
    """A copy of the network, slimmed by Torch-Pruning, as its example prune_timm_models.py does it."""
    import torch_pruning

    model = copy.deepcopy(network.model)
    attentions = [m for m in model.modules() if hasattr(m, "num_heads") and isinstance(layer(m), nn.Module)]
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        network.images(1),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10],
        num_heads={layer(m): m.num_heads for m in attentions},
    )
    pruner.step()
    for module in attentions:
        out = layer(module)
        module.num_heads = pruner.num_heads[out]
        module.head_dim = getattr(out, "out_features", 0) // (3 * module.num_heads)
        if hasattr(module, "attn_dim"):  # newer than the example, which would fail on it
            module.attn_dim = module.num_heads * module.head_dim
    for module in fused:
        module.fused_attn = True
    return model


def layer(attention: nn.Module) -> Any:
    """What gives an attention's queries, keys and values, where that is one layer."""
    return getattr(attention, "qkv", None) or getattr(attention, "qkv_proj", None)


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
    limits = zoo.Limits(seconds=SECONDS, memory_mb=18000, processes=1)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "netclone": netclone.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torch-pruning": importlib.metadata.version("torch-pruning"),
        },
        "threads": torch.get_num_threads(),
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
