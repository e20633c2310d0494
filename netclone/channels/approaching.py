"""approached(choose, share, keep, refuse): what to ask a model of time for, so that a clock gives what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

NEAR = 0.95
"""A measured time of at least so much of what was asked for is near enough; nearer than that a clock does not say."""

TRIES, LEAST = 8, 1e-6
"""Slim networks that are timed to come near, and the least share of the time that the model is asked for."""


@dataclass(frozen=True)
class Try:
    """A share of the time that a model was asked for, the one that a clock gave, and the units that stayed."""

    asked: float
    share: float
    flags: list[Tensor]


def approached(
    choose: Callable[[float], list[Tensor]],
    share: Callable[[Sequence[Tensor]], float],
    keep: float,
    refuse: Callable[[float], None],
) -> tuple[int, list[Tensor]]:
    """The number of the try, and its flags, whose measured share is ``keep``, or less by as little as can be had.

    Parameters
    ----------
    choose
        From a share that is asked for: per group, the units that stay.
    share
        From these: the share that is measured.
    refuse
        Raises if even the least that was measured is too much; it is told when nothing is left to remove.
    """
    asked, tries, aim = keep, list[Try](), (1 + NEAR) / 2 * keep
    while True:
        flags = choose(asked)
        tries.append(Try(asked, share(flags), flags))
        best = max((one.share for one in tries if one.share <= keep), default=None)
        if best is not None and (best >= NEAR * keep or asked == 1 or len(tries) >= TRIES):
            number = [one.share for one in tries].index(best)
            return number, tries[number].flags
        if asked < LEAST or all(int(flag.sum()) <= 1 for flag in flags):
            refuse(min(one.share for one in tries))
        asked = min(following(tries, keep, aim) if len(tries) < TRIES else asked / 2, 1.0)


def following(tries: Sequence[Try], keep: float, aim: float) -> float:
    """What to ask for next so that the share is ``aim``, by a line through two tries.

    If ``keep`` lies between the shares of two tries, these are the two, and what follows is well between them: widths
    have steps, and the line may lead to one of the two again. Else it goes on from the last on the one side, at most
    by a factor of two: on the line through zero from a single try, and by a quarter where less made no difference.
    """
    over = min((one for one in tries if one.share > keep), key=lambda one: one.asked, default=None)
    within = [one for one in tries if one.share <= keep and (over is None or one.asked < over.asked)]
    under = max(within, key=lambda one: one.asked, default=None)
    if over is not None and under is not None:
        part = (aim - under.share) / (over.share - under.share)
        return under.asked + min(max(part, 0.25), 0.75) * (over.asked - under.asked)
    edge = over or under
    assert edge is not None
    if len(tries) == 1:
        slope = edge.share / edge.asked
    else:
        near = min((one for one in tries if one is not edge), key=lambda one: abs(one.asked - edge.asked))
        rise, run = edge.share - near.share, edge.asked - near.asked
        if rise * run <= 0:
            return edge.asked * (0.75 if edge is over else 1 / 0.75)
        slope = rise / run
    return min(max(edge.asked + (aim - edge.share) / slope, edge.asked / 2), 2 * edge.asked)
