"""What a gate saves and what it costs: python examples/benchmarks/gating.py OUT.json [options]

For each suite and seed: one clone at the input, and four ways to decide which images it sees. "router" is the gate of
clone(), "information gain" the same layer trained further by the loss of Conditional Information Gain Trellis (arXiv
2402.08345) with a price for each run, "softmax" and "energy" are thresholds on the target's logits. Finished runs are
kept in OUT.json: the same command goes on from there.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from pairs import Pair, Runs, arguments, networks_of
from torch import Tensor, fx

import netclone
from netclone.benchmarking.suites import Suite
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


def measured(suite: Suite, pair: Pair, seed: int, keep: float) -> dict[str, Any]:
    """The curves of one clone, and the time that its gate saves."""
    options = {name: value for name, value in suite.clone.items() if name != "search"}
    options |= {"augment": suite.augment, "at": "input", "gate": 0.5, "keep": keep, "seed": seed}
    module = pair.cloned(**options)
    grafted = netclone.inject(pair.target, module, name="clone")
    images, labels = pair.tested
    scores, logits = seen_whole(grafted, "clone", images)
    ways = {"router": scores, **thresholds(pair.reference), **trained(pair)}
    kinds = {"old": range(pair.old), "new": range(pair.old, pair.old + len(pair.classes))}
    curves = {name: skipping(score, logits, labels, **kinds) for name, score in ways.items()}
    found = netclone.evaluate(grafted, [pair.tested])
    return {
        "curves": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
        "mean, all seen": 100 * curves["router"][0].mean,
        "lost at half": {name: 100 * (curve[0].mean - curve[HALF].mean) for name, curve in curves.items()},
        "gate": {"sent_old": found.sent_old, "sent_new": found.sent_new, "old": found.old, "new": found.new},
        "ms": {
            "target": timed(netclone.remove(grafted), images),
            "all seen": timed(ungated(grafted), images),
            "gate": timed(grafted, images),
        },
    }


def thresholds(logits: Tensor) -> dict[str, Tensor]:
    """Scores from the target's logits alone: how unsure it is."""
    return {"softmax": -logits.softmax(1).amax(1), "energy": -logits.logsumexp(1)}


def trained(pair: Pair) -> dict[str, Tensor]:
    """Scores of routers that were trained for information gain, at each price."""
    traced = trace(pair.target, pair.images[:2]).eval()
    node = before_logits(traced).name
    rows, tested = (features_at(traced, part, [node], 64)[node].double() for part in (pair.images, pair.tested[0]))
    generator, index = torch.Generator().manual_seed(0), torch.arange(len(rows))
    router = fit_router([rows], pair.labels, index, old=pair.old, share=0.5, generator=generator).router
    is_new, found = (pair.labels >= pair.old).long(), {}
    for price in PRICES:
        numbers = by_information_gain(rows, is_new, router.weight, router.bias, price)
        found[f"information gain, price {price}"] = tested @ numbers[:-1] + numbers[-1]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="10%", help="samples of each class, or a share such as 10%%")
    parser.add_argument("--keep", type=float, default=0.5)
    asked = parser.parse_args()
    runs = Runs(asked.out, ("suite", "development", "seed", "size", "keep"))
    for name in asked.suites:
        networks = networks_of(name, asked)
        for seed in asked.seeds:
            about = (name, asked.development, seed, asked.size, asked.keep)
            if runs.done(*about):
                continue
            found = measured(networks.suite, Pair.of(networks.suite, networks, seed, asked.size), seed, asked.keep)
            runs.add(*about, **found)
            print(*about, found["lost at half"], found["ms"], flush=True)


if __name__ == "__main__":
    main()
