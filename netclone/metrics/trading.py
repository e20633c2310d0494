"""trade_off(grafted, data) -> TradeOff: accuracy on old and new classes against one bias on the logits of a clone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from netclone.arguments import check_finite, check_number
from netclone.cloning.grafted import columns, modules_of, present, record_of
from netclone.errors import ArgumentError, CloneNameError, DataError
from netclone.learning.data import Batches, streamed
from netclone.metrics.evaluating import predict
from netclone.runtime.entering import entered


@dataclass(frozen=True)
class Trade:
    """What a clone with some ``bias`` does; all others are shares in [0, 1].

    ``old`` and ``new`` are the accuracies on images of all other classes and on those of the clone. ``mistaken`` is the
    share of the former that are taken for the clone's, and ``missed`` that of the latter that are not.
    """

    bias: float
    old: float
    new: float
    mistaken: float
    missed: float


@dataclass(frozen=True)
class TradeOff:
    """The result of :func:`trade_off`: ``points`` from the lowest bias to the highest, and the ``present`` one.

    On these images nothing changes between two points but at one bias, halfway. ``share`` is that of the clone's
    classes among the images.
    """

    present: Trade
    points: tuple[Trade, ...]
    share: float

    def thinned(self, most: int = 200) -> tuple[Trade, ...]:
        """At most so many of the points, evenly spaced, with the first and the last."""
        if len(self.points) <= most:
            return self.points
        return tuple(self.points[round(step / (most - 1) * (len(self.points) - 1))] for step in range(most))

    def cheapest(self, cost: float, share: float | None = None) -> Trade:
        """The point where mistakes cost least.

        Of several, it is the one nearest to the present bias.

        Parameters
        ----------
        cost
            What an image of another class taken for the clone's costs, if one of the clone's that is missed costs 1.
        share
            The share of images of the clone's classes that is expected in use, in [0, 1]. None: as in the data.

        Raises
        ------
        ArgumentError
            If ``cost`` is negative or not finite, or ``share`` is not in [0, 1].

        Examples
        --------
        >>> points = Trade(-1.0, 1.0, 0.0, 0.0, 1.0), Trade(0.0, 0.9, 0.8, 0.1, 0.2), Trade(1.0, 0.5, 1.0, 0.5, 0.0)
        >>> curve = TradeOff(points[1], points, share=0.5)
        >>> [curve.cheapest(cost).bias for cost in (0.1, 1, 100)]
        [1.0, 0.0, -1.0]
        """
        if check_finite(cost, "cost") < 0:
            raise ArgumentError(f"cost: got {cost}, expected a number of 0 or more")
        share = self.share if share is None else check_finite(share, "share")
        if not 0 <= share <= 1:
            raise ArgumentError(f"share: got {share}, expected a number from 0 to 1")

        def price(point: Trade) -> tuple[float, float]:
            paid = share * point.missed + (1 - share) * cost * point.mistaken
            return round(paid, 12), abs(point.bias - self.present.bias)

        return min(self.points, key=price)


@entered()
def trade_off(grafted: fx.GraphModule, data: Batches, name: str | None = None, *, batch_size: int = 64) -> TradeOff:
    """How accuracy on old and new classes changes with the bias of a clone, on given images; nothing is fitted.

    Take images that the clone was not fitted to. ``module.with_bias(...)`` then gives the clone with the bias that you
    choose, and :func:`replace` swaps it in.

    Parameters
    ----------
    grafted
        A grafted model; it is not changed.
    data
        As for :func:`evaluate`: labels are columns of ``grafted``.
    name
        The clone. May be left out if there is only one.
    batch_size
        Images at a time.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones, or the clone is off.
    CloneNameError
        If there is no clone of that name, or there are several and no name was given.
    DataError
        If the data cannot be used, or have no image of the clone's classes, or of others.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4)
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> curve = netclone.trade_off(grafted, (torch.randn(6, 3, 64, 64), torch.arange(6)))
    >>> curve.points[0].missed, curve.points[-1].mistaken, curve.present.bias
    (1.0, 1.0, 0.0)
    >>> chosen = curve.cheapest(cost=5)  # an old image taken for a shirt is five times as bad as a missed shirt
    >>> former = netclone.replace(grafted, "shirts", module.with_bias(chosen.bias))
    """
    check_number(batch_size, "batch_size", 1)
    record = record_of(grafted)
    if name is None and len(record.names) > 1:
        raise CloneNameError(f"name: the graph holds the clones {', '.join(record.names)}; say which one to look at")
    name = record.names[0] if name is None else present(record, name)
    clone = modules_of(grafted)[name]
    if clone.slot is not None and clone.slot.is_off:
        raise ArgumentError(f"grafted: clone '{name}' is off; switch it on with netclone.enable(grafted, '{name}')")
    logits, labels, seen = [], [], 0
    for samples in streamed(data, batch_size):
        logits.append(predict(grafted, samples.images, batch_size, first=seen).cpu())
        labels.append(samples.labels.cpu())
        seen += len(samples)
    return trades(torch.cat(logits), torch.cat(labels), columns(grafted)[name], clone.spec.bias)


def trades(logits: Tensor, labels: Tensor, own: Sequence[int], bias: float) -> TradeOff:
    """The curve from logits ``(N, columns)`` and labels ``(N,)``: ``own`` are a clone's columns, with this bias.

    Raises
    ------
    DataError
        If no image is of the clone's classes, or none is of others.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    >>> [(point.bias, point.old, point.new) for point in trades(logits, torch.tensor([0, 0, 1]), [1], 0.0).points]
    [(-4.0, 1.0, 0.0), (-2.0, 1.0, 1.0), (0.0, 0.5, 1.0), (2.0, 0.0, 1.0)]
    """
    of_clone = torch.zeros(logits.shape[1], dtype=torch.bool)
    of_clone[list(own)] = True
    is_new = torch.isin(labels, torch.tensor(list(own)))
    if bool(is_new.all()) or not bool(is_new.any()):
        kind = "other" if bool(is_new.all()) else "the clone's"
        raise DataError(f"data: no image of {kind} classes; a trade-off needs images of the clone's classes and others")
    wide = logits.double()
    new, old = (wide.masked_fill(hidden, -torch.inf) for hidden in (~of_clone, of_clone))
    gaps = old.amax(1) - (new.amax(1) - bias)  # the bias above which an image is taken for one of the clone's
    right_old, right_new = ((part.argmax(1) == labels) for part in (old, new))

    def trade(at: float, taken: Tensor) -> Trade:
        right = torch.where(taken, right_new, right_old)
        shares = (right[~is_new], right[is_new], taken[~is_new], ~taken[is_new])
        return Trade(at, *(float(flags.double().mean()) for flags in shares))

    steps = gaps[gaps.isfinite()].unique()
    between = [bias] if not len(steps) else [steps[0] - 1, *((steps[1:] + steps[:-1]) / 2), steps[-1] + 1]
    points = tuple(trade(at, gaps < at) for at in map(float, between))
    return TradeOff(trade(bias, of_clone[logits.argmax(1)]), points, float(is_new.double().mean()))
