"""What a gate saves and what it costs: python examples/benchmarks/gating.py OUT.json [options]

For each suite and seed: one clone at the input, and four ways to decide which images it sees. "router" is the gate of
clone(), "information gain" the same layer trained further by the loss of Conditional Information Gain Trellis (arXiv
2402.08345) with a price for each run, "softmax" and "energy" are thresholds on the target's logits. Finished runs are
kept in OUT.json: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fitting import chosen
from torch import Tensor, fx

import netclone
from netclone.benchmarking.suites import Suite, in_development, suite_named
from netclone.benchmarking.training import Networks, find, renamed
from netclone.cloning.gating import before_logits
from netclone.cloning.placing import features_at
from netclone.graph.tracing import trace
from netclone.learning.routing import fit_router
from netclone.metrics.evaluating import predict
from netclone.metrics.skipping import seen_whole, skipping, ungated

PRICES = (0.0, 0.1, 0.3)  # of sending an image, in nats
BALANCE = 1.0  # the weight of the entropy of the routes
HALF = 10  # the point of a curve at which half of the old images are skipped


def entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp_min(1e-12).log()).sum()


def by_information_gain(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, price: float) -> Tensor:
    """The layer ``(F + 1,)`` trained from a start: what the route says of the class, less a price of sending."""
    numbers = torch.cat([weight, bias.reshape(1)]).double().requires_grad_()
    hot = torch.nn.functional.one_hot(labels).double() / len(labels)
    optimizer = torch.optim.LBFGS([numbers], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        send = (rows @ numbers[:-1] + numbers[-1]).sigmoid()
        routes = torch.stack([send, 1 - send], 1)
        joint = hot.T @ routes
        gain = BALANCE * entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
        value = price * send.mean() - gain + 1e-3 * (numbers[:-1] - weight).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return numbers.detach()


def timed(model: fx.GraphModule, images: Tensor) -> float:
    """The least time for an image in three runs over all, in batches of 64, in ms."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        predict(model, images)
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / len(images)


def measured(suite: Suite, networks: Networks, seed: int, size: str, keep: float) -> dict[str, Any]:
    """The curves of one clone, and the time that its gate saves."""
    data, setting = networks.dataset, suite.settings[0]
    known, old = (*suite.old, *setting.new), len(suite.old)
    images, labels = chosen(networks, known, size, seed)
    new = labels >= old
    classes = tuple(data.columns[label] for label in setting.new)
    source, target = networks.source(seed), networks.target(seed)
    options = {name: value for name, value in suite.clone.items() if name != "search"}
    options |= {"method": "magnitude"} if keep == 1 else {}
    options |= {"target_data": [(images[~new], labels[~new])], "augment": suite.augment, "at": "input", "gate": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", netclone.NetcloneWarning)
        named = torch.tensor(classes)[labels[new] - old]
        module = netclone.clone(
            source, target, [(images[new], named)], classes=classes, keep=keep, seed=seed, **options
        )
    grafted = netclone.inject(target, module, name="clone")
    test = find(data.test_labels, known)
    shown, answers = data.test_images[test], renamed(data.test_labels[test], known)
    scores, logits = seen_whole(grafted, "clone", shown)
    ways = {"router": scores, **thresholds(logits[:, :old]), **trained(target, (images, labels), shown, old)}
    curves = {
        name: skipping(score, logits, answers, old=range(old), new=range(old, len(known)))
        for name, score in ways.items()
    }
    found = netclone.evaluate(grafted, [(shown, answers)], old=range(old), new=range(old, len(known)))
    return {
        "curves": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
        "mean, all seen": 100 * curves["router"][0].mean,
        "lost at half": {name: 100 * (curve[0].mean - curve[HALF].mean) for name, curve in curves.items()},
        "gate": {"sent_old": found.sent_old, "sent_new": found.sent_new, "old": found.old, "new": found.new},
        "ms": {
            "target": timed(netclone.remove(grafted), shown),
            "all seen": timed(ungated(grafted), shown),
            "gate": timed(grafted, shown),
        },
    }


def thresholds(logits: Tensor) -> dict[str, Tensor]:
    """Scores from the target's logits alone: how unsure it is."""
    return {"softmax": -logits.softmax(1).amax(1), "energy": -logits.logsumexp(1)}


def trained(target: torch.nn.Module, data: tuple[Tensor, Tensor], shown: Tensor, old: int) -> dict[str, Tensor]:
    """Scores of routers that were trained for information gain, at each price."""
    images, labels = data
    traced = trace(target, images[:2]).eval()
    node = before_logits(traced).name
    rows, tested = (features_at(traced, part, [node], 64)[node].double() for part in (images, shown))
    generator, index = torch.Generator().manual_seed(0), torch.arange(len(labels))
    router = fit_router([rows], labels, index, old=old, share=0.5, generator=generator).router
    found = {}
    for price in PRICES:
        numbers = by_information_gain(rows, (labels >= old).long(), router.weight, router.bias, price)
        found[f"information gain, price {price}"] = tested @ numbers[:-1] + numbers[-1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--suites", nargs="+", default=["zoo", "cifar10", "fashion"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--size", default="10%", help="samples of each class, or a share such as 10%%")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--development", action="store_true", help="look at held-out training images instead")
    asked = parser.parse_args()
    runs = json.loads(asked.out.read_text(encoding="utf-8"))["runs"] if asked.out.is_file() else []
    keys = ("suite", "development", "seed", "size", "keep")
    done = {tuple(run[key] for key in keys) for run in runs}
    asked.cache.mkdir(parents=True, exist_ok=True)
    for name in asked.suites:
        suite = in_development(suite_named(name)) if asked.development else suite_named(name)
        networks = Networks(suite, suite.load(asked.data), asked.data, asked.cache, lambda *_: None)
        for seed in asked.seeds:
            about = (name, asked.development, seed, asked.size, asked.keep)
            if about in done:
                continue
            found = measured(suite, networks, seed, asked.size, asked.keep)
            runs.append({**dict(zip(keys, about, strict=True)), **found})
            facts = {"netclone": netclone.__version__, "torch": torch.__version__, "runs": runs}
            asked.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            print(*about, found["lost at half"], found["ms"], flush=True)


if __name__ == "__main__":
    main()
