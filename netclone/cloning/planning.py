"""planned(problem, at, source_at): which positions to try, as far as shapes and operators allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from netclone.channels.grouping import ChannelGroups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import certify_slim, slim_down
from netclone.cloning.placing import Place, candidates, matching, passed_over, reason
from netclone.cloning.problem import Problem
from netclone.errors import ArchiveError, NetcloneError, PositionError
from netclone.files.graphdata import unsavable
from netclone.files.spec import Candidate
from netclone.graph.cutting import cut
from netclone.graph.tracing import INPUT, position, shape_of
from netclone.learning.adapting import grid_of


@dataclass(frozen=True)
class Planned:
    """A position to try and where the source is cut for it (None: at its input), or why it cannot work."""

    place: Place
    cut: str | None
    reason: str | None = None


def planned(problem: Problem, at: str, source_at: str | None) -> tuple[Planned, ...]:
    """The positions to try, in order; those that cannot work are ruled out before anything is learned.

    Raises
    ------
    PositionError, AdapterError, ArchiveError
        If the requested position cannot work, or none can.
    """
    if source_at is not None:
        _check_cut(problem.groups, source_at)
    source = problem.groups.graph_module
    cuts = candidates(source, most=64), passed_over(source)
    if at != "auto":
        place = _place(problem.target, at)
        return (Planned(place, _cut_for(problem, place, source_at, *cuts)),)
    found = [Planned(place, None, why) for place, why in passed_over(problem.target)]
    for place in candidates(problem.target) + ((_place(problem.target, INPUT),) if source_at is None else ()):
        try:
            found.append(Planned(place, _cut_for(problem, place, source_at, *cuts)))
        except NetcloneError as error:
            found.append(Planned(place, source_at, reason(error)))
    if all(one.reason for one in found):
        raise none_works([Candidate(p.place.at, p.cut, None, p.reason or "") for p in found])
    return tuple(found)


def _cut_for(
    problem: Problem,
    place: Place,
    source_at: str | None,
    cuts: Sequence[Place],
    unfit: Sequence[tuple[Place, str]],
) -> str | None:
    """Where to cut the source for a target position; raises if shapes or operators do not allow it."""
    if place.at == INPUT:
        _check_cut(problem.groups, None)
        return None
    grid_of(place.shape)
    at = source_at or matching(place, cuts, unfit).at
    _check_cut(problem.groups, at)
    return at


def _check_cut(groups: ChannelGroups, at: str | None) -> None:
    """Raise if no module can begin at a cut of the source: its operators cannot be saved, or some go round the cut."""
    part = groups.graph_module
    if at is not None:
        node = position(part, at)
        grid_of(shape_of(node) or ())
        part = cut(part, node.name)
    if faults := unsavable(part.graph):
        raise ArchiveError(f"source: a clone cut at {at or INPUT!r} cannot be saved: {'; '.join(faults)}")


def check_source(groups: ChannelGroups, classes: tuple[int, ...]) -> None:
    """Raise if the source cannot be certified at all, by trying it with every channel kept."""
    everything = ChannelMask.from_kept(groups, {group.name: [True] * group.size for group in groups.groups})
    certify_slim(slim_down(groups, everything, classes), None)


def none_works(tried: Sequence[Candidate]) -> PositionError:
    reasons = "; ".join(f"{c.at}: {c.reason}" for c in tried) or "the target has no position that all its paths pass"
    return PositionError(f"no target position works. {reasons}. Give at=... and source_at=...")


def _place(traced: fx.GraphModule, at: str) -> Place:
    node = position(traced, at)
    shape = shape_of(node)
    assert shape is not None
    order = [other.name for other in traced.graph.nodes]
    return Place(at, node.name, shape, order.index(node.name) / len(order))
