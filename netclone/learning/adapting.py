"""Adapter and classifier of a clone: their closed-form start, and the short fit on cached features."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.errors import AdapterError
from netclone.learning.data import OLD_WEIGHT, balance
from netclone.learning.stepping import Loop, step
from netclone.runtime.sharing import ALONE, Workers

RIDGE = 1e-3  # of the mean square of the inputs
DECAY = 1e-2  # weight of the classifier's squared weights, over standardised features, in the loss
MOST_PREFIX_TOKENS = 5


@dataclass(frozen=True)
class Grid:
    """How features are laid out: ``"NCHW"``, ``"NHWC"``, ``"NC"``, or tokens ``"NLC"`` (``prefix`` before the grid)."""

    layout: str
    channels: int
    height: int = 1
    width: int = 1
    prefix: int = 0


def grid_of(shape: tuple[int, ...]) -> Grid:
    """Read a feature shape (without batch) as a grid of channels.

    Tokens form a square grid after up to five prefix tokens (class, distillation, registers), or else a row.

    Raises
    ------
    AdapterError
        If the features have no axis of channels.

    Examples
    --------
    >>> grid_of((64, 8, 8))
    Grid(layout='NCHW', channels=64, height=8, width=8, prefix=0)
    >>> grid_of((197, 192))
    Grid(layout='NLC', channels=192, height=14, width=14, prefix=1)
    """
    if len(shape) == 1:
        return Grid("NC", shape[0])
    if len(shape) == 2:
        side = math.isqrt(shape[0])
        prefix = shape[0] - side * side
        if prefix <= MOST_PREFIX_TOKENS and side > 1:
            return Grid("NLC", shape[1], side, side, prefix)
        return Grid("NLC", shape[1], 1, shape[0])
    if len(shape) == 3:
        if shape[0] == shape[1] != shape[2]:
            return Grid("NHWC", shape[2], shape[0], shape[1])
        return Grid("NCHW", shape[0], shape[1], shape[2])
    sizes = ", ".join(map(str, shape))
    what = "volumes" if len(shape) == 4 else "features of that rank"
    raise AdapterError(
        f"features of shape (N, {sizes}): there is no adapter for {what}, only for maps (N, C, H, W), tokens (N, L, C) "
        "and vectors (N, C); choose another position, or at='input'"
    )


class Adapter(nn.Module):
    """Map features of one grid to another: resize, then a 1x1 convolution. Prefix tokens come from the mean.

    ``(N, *source shape)`` in, ``(N, *destination shape)`` out. Both may be maps, tokens or vectors.
    """

    def __init__(self, source: Grid, destination: Grid) -> None:
        super().__init__()
        self.source, self.destination = source, destination
        self.map = nn.Conv2d(source.channels, destination.channels, 1)
        self.prefix = (
            nn.Linear(source.channels, destination.prefix * destination.channels) if destination.prefix else None
        )

    def grid(self, features: Tensor) -> Tensor:
        """The features as a map ``(N, C, H, W)`` of the destination's height and width."""
        s, d = self.source, self.destination
        if s.layout == "NHWC":
            features = features.permute(0, 3, 1, 2).contiguous()  # see graph/quickening.py
        elif s.layout == "NLC":
            features = features[:, s.prefix :].transpose(1, 2).reshape(-1, s.channels, s.height, s.width).contiguous()
        elif s.layout == "NC":
            features = features[:, :, None, None]
        if (s.height, s.width) == (d.height, d.width):
            return features
        if d.height <= s.height and d.width <= s.width:
            return F.adaptive_avg_pool2d(features, (d.height, d.width))
        return F.interpolate(features, size=(d.height, d.width), mode="bilinear", align_corners=False)

    def forward(self, features: Tensor) -> Tensor:
        d = self.destination
        grid = self.grid(features)
        mapped: Tensor = self.map(grid)
        if d.layout == "NCHW":
            return mapped
        if d.layout == "NHWC":
            return mapped.permute(0, 2, 3, 1).contiguous()
        if d.layout == "NC":
            return mapped.flatten(1)
        tokens = mapped.flatten(2).transpose(1, 2)
        if self.prefix is None:
            return tokens
        first = self.prefix(grid.mean((2, 3))).reshape(-1, d.prefix, d.channels)
        return torch.cat([first, tokens], 1)

    def solve(self, features: Tensor, wanted: Tensor) -> None:
        """Set the weights to the ridge solution that maps ``features`` to ``wanted``, in float64."""
        d = self.destination
        with torch.no_grad():
            grid = self.grid(features)
            if d.layout == "NHWC":
                wanted = wanted.permute(0, 3, 1, 2)
            elif d.layout == "NC":
                wanted = wanted[:, :, None, None]
            elif d.layout == "NLC":
                first = wanted[:, : d.prefix].flatten(1)
                wanted = wanted[:, d.prefix :].transpose(1, 2).reshape(-1, d.channels, d.height, d.width)
                if self.prefix is not None:
                    _solve_affine(self.prefix.weight, self.prefix.bias, grid.mean((2, 3)), first)
            rows = grid.permute(0, 2, 3, 1).flatten(0, 2), wanted.permute(0, 2, 3, 1).flatten(0, 2)
            assert self.map.bias is not None
            _solve_affine(self.map.weight, self.map.bias, *rows)


class Classifier(nn.Module):
    """New-class logits ``(N, classes)`` from both streams: the module's features and the target's logits.

    The source tells new classes from old ones, and the target tells old classes from each other. Let ``s`` be the
    source's own logits (its classifier's rows over the module's features), and ``z`` the target's. A new class ``c``
    gets

        scale * (s_c - logsumexp(s_rest)) + logsumexp(z) + linear(both streams, standardised)

    where ``linear`` reads the module's stream alone if ``both=False``. Before anything is fitted, scale is 1 and
    ``linear`` is constant, so the odds of the new classes are the source's, divided by the weight of a mistake on an
    old class. Without rows for the rest, the first two terms are just ``scale * s_c``. Without any rows, the module
    itself gives ``s``.
    """

    mean: Tensor
    std: Tensor
    linear: nn.Linear

    def __init__(self, module_features: int, target_logits: int, classes: int, both: bool = True) -> None:
        super().__init__()
        size = module_features + both * target_logits
        self.classes, self.both = classes, both
        self.gated = False
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.source: nn.Linear | None = None
        self.scale = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(size, classes)

    def forward(self, module_features: Tensor, target_logits: Tensor) -> Tensor:
        own, given, seen = self.terms(module_features, target_logits)
        new = self.scale * own
        if given is not None:
            new = new + given
        learned: Tensor = self.linear(seen)
        return new + learned

    def terms(self, module_features: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the new logits are made of: ``scale * own + given + linear(seen)``; ``given``: None where not gated."""
        seen = (self._seen(module_features, target_logits) - self.mean) / self.std
        own = module_features if self.source is None else self.source(module_features)
        new = own[:, : self.classes]
        if not self.gated:
            return new, None, seen
        rest = torch.logsumexp(own[:, self.classes :], 1, keepdim=True)
        return new - rest, torch.logsumexp(target_logits, 1, keepdim=True), seen

    def _seen(self, module_features: Tensor, target_logits: Tensor) -> Tensor:
        return torch.cat([module_features, target_logits], 1) if self.both else module_features

    def start(self, module_features: Tensor, target_logits: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Standardise by these features, and start from the source's rows ``(classes + rest, F)``, new ones first."""
        with torch.no_grad():
            seen = self._seen(module_features, target_logits)
            self.mean.copy_(seen.mean(0))
            self.std.copy_(seen.std(0, unbiased=False).clamp_min(1e-4 * seen.std().clamp_min(1e-6)))
            self.linear.weight.zero_()
            self.linear.bias.zero_()
            if weight is not None:
                self.source = frozen_linear(weight, bias).to(seen)
                self.gated = len(weight) > self.classes
                if self.gated:
                    self.linear.bias.fill_(-math.log(OLD_WEIGHT))


class Branch(nn.Module):
    """Adapter (or ``nn.Identity``), frozen body and classifier in one module, which becomes the clone's graph."""

    adapter: nn.Module
    classifier: Classifier

    def __init__(self, adapter: nn.Module, body: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.adapter, self.body, self.classifier = adapter, body, classifier

    def forward(self, features: Tensor, target_logits: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.body(self.adapter(features)), target_logits)
        return out


@dataclass(frozen=True)
class Cached:
    """The features of some samples at the position, and the target's logits.

    ``labels`` index the columns of the grafted model: old classes first, then new ones.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Cached:
        return Cached(self.features[index], self.logits[index], self.labels[index])

    def over_kinds(self, values: Tensor) -> float:
        """The mean of the means of ``values (N,)`` over old and over new samples; of the one kind where it is alone."""
        return float(torch.stack([mean for mean in self.by_kind(values) if mean is not None]).mean())

    def by_kind(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The means of ``values (N,)`` over old and over new samples; None where there is none of the kind."""
        is_old = self.labels < self.logits.shape[1]
        old, new = (values[kind].mean() if bool(kind.any()) else None for kind in (is_old, ~is_old))
        return old, new


def fit(
    branch: Branch,
    train: Cached,
    validation: Cached,
    *,
    epochs: int,
    loop: Loop,
    calibrate: bool = True,
) -> float:
    """Train adapter and classifier on cached features, and keep the epoch that is best on validation.

    The loss is the cross entropy over old and new logits together, which calibrates them against each other. Without
    old-class samples it is the cross entropy among the new classes alone. The classifier then stays at its start if it
    knows the source's other classes; if not, it is fitted and gets a threshold afterwards. Without calibration the loss
    is again that among the new classes, old-class samples are not used, and there is no threshold.

    Returns
    -------
    float
        Balanced validation accuracy: the mean of old-class and new-class accuracy, or the latter alone if there are no
        old-class samples.

    Raises
    ------
    FitError
        If the loss is not finite.
    """
    batch_size, workers = loop.batch_size, loop.workers
    old = train.logits.shape[1]
    if not calibrate:
        train = train[(train.labels >= old).nonzero().flatten()]
    joint = bool((train.labels < old).any())
    branch.body.requires_grad_(False)
    groups: list[dict[str, Any]] = [{"params": list(branch.adapter.parameters()), "lr": 1e-3}]
    if joint or not branch.classifier.gated:  # otherwise the source's own odds stay: nothing here could improve them
        groups.append({"params": [p for p in branch.classifier.parameters() if p.requires_grad], "lr": 1e-2})
    if not any(group["params"] for group in groups):
        return validated(branch, validation, batch_size, workers)[0]
    optimizer = torch.optim.Adam(groups)
    steps = epochs * max(1, math.ceil(len(train) / batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=max(steps, 10), pct_start=0.2
    )
    weights = balance(train.labels, old, OLD_WEIGHT)

    def loss_of(features: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        new_logits = branch(features, logits).to(logits.dtype)
        if joint:
            losses = F.cross_entropy(torch.cat([logits, new_logits], 1), labels, reduction="none") * weights
        else:
            losses = F.cross_entropy(new_logits, labels - old, reduction="none")
        return losses.mean() + DECAY * branch.classifier.linear.weight.square().sum()

    best, best_state = (-1.0, 0.0), None
    for epoch in range(epochs + 1):
        score = validated(branch, validation, batch_size, workers)
        if score > best:
            best, best_state = score, copy.deepcopy({k: v.state_dict() for k, v in _trained(branch).items()})
        if epoch == epochs:
            break
        order = torch.randperm(len(train), generator=loop.generator)
        for start in range(0, len(train), batch_size):
            chosen = order[start : start + batch_size].to(train.labels.device)
            batch = train[chosen]
            rows = batch.features, batch.logits, batch.labels, weights[chosen]
            step(optimizer, loss_of, rows, f"fitting adapter and classifier, epoch {epoch}", workers, loop.precision)
            schedule.step()
        loop.tell(epoch + 1, epochs)
    assert best_state is not None
    for name, module in _trained(branch).items():
        module.load_state_dict(best_state[name])
    if calibrate and not joint and not branch.classifier.gated:
        set_threshold(branch, train, batch_size, workers)
    return validated(branch, validation, batch_size, workers)[0]


def set_threshold(branch: Branch, train: Cached, batch_size: int, workers: Workers = ALONE, share: float = 0.9) -> None:
    """Shift the new logits so that they win on ``share`` of the new-class samples, for want of old ones."""
    with torch.no_grad():
        new = outputs(branch, train, batch_size, workers).amax(1)
        margin = new - train.logits.amax(1)
        branch.classifier.linear.bias.data -= torch.quantile(margin, 1 - share)


def outputs(branch: Branch, cached: Cached, batch_size: int, workers: Workers = ALONE) -> Tensor:
    """New-class logits of all cached samples; several workers take whole batches."""
    starts = range(0, len(cached), batch_size)
    team = workers.team(len(starts))
    with torch.no_grad():
        parts = [
            branch(cached.features[i : i + batch_size], cached.logits[i : i + batch_size])
            for i in starts[team.own(len(starts))]
        ]
    return team.joined(torch.cat(parts))


def validated(branch: Branch, cached: Cached, batch_size: int, workers: Workers = ALONE) -> tuple[float, float]:
    """Mean of old-class and new-class accuracy over all columns, and the negative cross entropy to break ties."""
    logits = torch.cat([cached.logits, outputs(branch, cached, batch_size, workers)], 1)
    right = (logits.argmax(1) == cached.labels).double()
    losses = F.cross_entropy(logits, cached.labels, reduction="none").double()
    return cached.over_kinds(right), cached.over_kinds(-losses)


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer of these numbers."""
    linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None).to(weight)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _trained(branch: Branch) -> dict[str, nn.Module]:
    return {"adapter": branch.adapter, "classifier": branch.classifier}


def _solve_affine(weight: Tensor, bias: Tensor, inputs: Tensor, outputs: Tensor) -> None:
    """Ridge regression of ``outputs (M, b)`` on ``inputs (M, a)`` into ``weight (b, a, ...)`` and ``bias (b,)``."""
    x, y = inputs.double(), outputs.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=x.dtype, device=x.device), x.T @ y)
    weight.copy_(solution.T.reshape(weight.shape))
    bias.copy_(mean_y - mean_x @ solution)
