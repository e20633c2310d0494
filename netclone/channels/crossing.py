"""Dimensions of heads: units of a second labelling that cross those of the first.

In an attention of H heads with D dimensions each, a whole head is a unit, and so is one dimension of all heads. A row
of the weights belongs to a head and to a dimension. It stays if both stay, so what is left is still H' x D'. Each kind
comes from a labelling of its own. The first unites all that a product sums over, the second all that it repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from netclone.channels.labelling import Labelling
from netclone.channels.labels import compact

Units = tuple[int, ...]


def cross(
    labelling: Labelling, groups: Sequence[Units], dims: Labelling, found: Sequence[Units]
) -> tuple[Units | None, ...]:
    """Add, in place, groups of units of a second labelling of the same graph to the first.

    Returns the units that each of the groups ``found`` has in the first labelling, or None if it is not added. Only
    those are added that cross each of the ``groups`` they meet: in every tensor, each unit of the one meets each unit
    of the other equally often. Then any units of both can be removed. A group of channels that both labellings found
    meets itself, and is not added again.
    """
    ours, theirs = _Members(labelling, groups), _Members(dims, found)
    meetings = list(_meetings(labelling, dims, theirs))
    refused = {number for meeting in meetings for number in _refused(meeting, ours, theirs)}
    units = torch.zeros(len(dims.labels), dtype=torch.long)  # of the second labelling, in the first
    for number, group in enumerate(found):
        if number not in refused:
            units[list(group)] = labelling.labels.fresh(len(group))
    _write(labelling, dims, meetings, units)
    summed = [replace(each, labels=units[dims.labels.roots(each.labels)]) for each in dims.summed]
    labelling.summed = [each for each in summed if bool(each.labels.any())]
    labelling.by_dims = dims
    return tuple(None if i in refused else tuple(units[list(group)].tolist()) for i, group in enumerate(found))


class _Members:
    """Unit to the number of its group (-1: none) and its place in it, for the groups of a labelling."""

    def __init__(self, labelling: Labelling, groups: Sequence[Units]) -> None:
        self.sizes = [*map(len, groups), 1]
        self.group = torch.full((len(labelling.labels),), -1)
        self.place = torch.zeros(len(labelling.labels), dtype=torch.long)
        for number, group in enumerate(groups):
            self.group[list(group)] = number
            self.place[list(group)] = torch.arange(len(group))


@dataclass(frozen=True)
class _Meeting:
    """A tensor's labels in the first labelling and its units in both, without the axes along which neither varies."""

    kind: str
    key: Any
    shape: torch.Size
    labels: Tensor
    first: Tensor
    second: Tensor


def _meetings(labelling: Labelling, dims: Labelling, theirs: _Members) -> Iterator[_Meeting]:
    """Every tensor that has units of the second labelling's groups."""
    known = {(kind, key): labels for kind, key, labels in _labelled(labelling)}
    for kind, key, labels in _labelled(dims):
        second = dims.labels.roots(compact(labels))
        if bool((theirs.group[second] >= 0).any()):
            before = compact(known.get((kind, key), torch.zeros((), dtype=torch.long).expand(labels.shape)))
            before, second = (side.contiguous() for side in torch.broadcast_tensors(before, second))
            yield _Meeting(kind, key, labels.shape, before, labelling.labels.roots(before), second)


def _labelled(labelling: Labelling) -> Iterator[tuple[str, Any, Tensor]]:
    """All tensors of labels, by where they belong."""
    for node, value in labelling.values.items():
        for i, labels in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(labels, Tensor):
                yield "values", (node, i), labels
    for kind in ("slots", "constants", "norms"):
        for key, labels in getattr(labelling, kind).items():
            yield kind, key, labels


def _refused(meeting: _Meeting, ours: _Members, theirs: _Members) -> set[int]:
    """The second labelling's groups that do not cross what they meet in a tensor."""
    there = theirs.group[meeting.second] >= 0
    first, second = meeting.first[there], meeting.second[there]
    numbers = torch.stack([ours.group[first], theirs.group[second]])
    refused = set()
    for a, b in numbers.unique(dim=1).T.tolist():
        here = (numbers[0] == a) & (numbers[1] == b)
        place = ours.place[first[here]] * theirs.sizes[b] + theirs.place[second[here]]
        met = torch.bincount(place, minlength=ours.sizes[a] * theirs.sizes[b])
        if int(met.min()) != int(met.max()):
            refused.add(b)
    return refused


def _write(labelling: Labelling, dims: Labelling, meetings: Sequence[_Meeting], units: Tensor) -> None:
    """Label all that belongs to added units: by them or, where it belongs to a unit already, by pairs."""
    scale = 1 + int(units.max())
    keys = [meeting.first * scale + units[meeting.second] for meeting in meetings]
    paired = torch.cat([torch.empty(0, dtype=torch.long), *(key.flatten() for key in keys)]).unique()
    paired = paired[(paired >= scale) & (paired % scale != 0)]
    pairs = labelling.labels.pair(paired // scale, paired % scale)
    for meeting, key in zip(meetings, keys, strict=True):
        added = units[meeting.second]
        labels = torch.where(added == 0, meeting.labels, added)
        places = torch.searchsorted(paired, key)
        both = (meeting.first != 0) & (added != 0)
        labels[both] = pairs[places[both]]
        _put(labelling, dims, meeting, labels.expand(meeting.shape))


def _put(labelling: Labelling, dims: Labelling, meeting: _Meeting, labels: Tensor) -> None:
    if meeting.kind != "values":
        getattr(labelling, meeting.kind)[meeting.key] = labels
        if meeting.kind == "slots":
            labelling.roles.setdefault(meeting.key, dims.roles[meeting.key])
        return
    node, i = meeting.key
    value = labelling.values[node]
    labelling.values[node] = (*value[:i], labels, *value[i + 1 :]) if isinstance(value, tuple) else labels
