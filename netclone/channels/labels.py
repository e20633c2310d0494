"""Labels: integers on tensor elements; elements that must be kept or removed together have united labels.

Label 0 means: always kept. A tensor of labels has the shape of its activation at batch size one. Axes along which
nothing varies are expanded views of size one, so that it stays small.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Labelled: TypeAlias = Tensor | tuple[Tensor, ...] | float
"""What is known of a node: labels of its tensor or of each of its tensors, or its number."""


@dataclass(frozen=True)
class Event:
    """Why labels were fixed or joined: the node, and what it does."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"node '{self.node}': {self.why}" if self.node else self.why


class Labels:
    """Union-find over integer labels, vectorised, that remembers why labels were fixed or joined.

    Examples
    --------
    >>> labels = Labels()
    >>> a, b = labels.fresh(3), labels.fresh(3)
    >>> labels.unite(a, b)
    >>> labels.fix(a[:1], Event("relu", "an example"))
    >>> labels.roots(b).tolist()
    [0, 2, 3]
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._fixed_by = np.full(1024, -1, dtype=np.int64)
        self._joined_by = np.full(1024, -1, dtype=np.int64)
        self._count = 1
        self._starts = [0]
        self._events: list[Event] = [Event("", "never labelled")]
        self._fixed_by[0] = 0
        self._met: list[tuple[np.ndarray, np.ndarray, int]] = []  # labels, their partners (0: fixed), the event
        self._crossed = torch.empty(3, 0, dtype=torch.long)  # labels of pairs, the first units and the second units

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels, each its own unit."""
        start, self._count = self._count, self._count + count
        self._starts.append(start)
        if self._count > len(self._parent):
            size = max(2 * len(self._parent), self._count)
            self._parent = np.resize(self._parent, size)
            for array in ("_fixed_by", "_joined_by"):
                grown = np.full(size, -1, dtype=np.int64)
                grown[:start] = getattr(self, array)[:start]
                setattr(self, array, grown)
        self._parent[start : self._count] = np.arange(start, self._count)
        return torch.arange(start, self._count)

    def roots(self, labels: Tensor) -> Tensor:
        """The unit that every element belongs to (0: always kept), in the same expanded shape."""
        small = compact(labels)
        return torch.from_numpy(self._kept_as_zero(small.numpy())).reshape(small.shape).expand(labels.shape)

    def joined(self, labels: Tensor) -> Tensor:
        """As ``roots``, but units that are always kept can be told apart."""
        return torch.from_numpy(self._find(labels.reshape(-1).numpy())).reshape(labels.shape)

    def marked(self, units: Tensor) -> Tensor:
        """One flag per label, True for those in ``units`` and for pairs with one of them.

        Index it with the result of ``roots``.
        """
        flags = torch.zeros(self._count, dtype=torch.bool).index_fill_(0, units, True)
        pairs, first, second = self._crossed
        flags[pairs] = flags[first] | flags[second]
        return flags

    def pair(self, first: Tensor, second: Tensor) -> Tensor:
        """A label for each pair of units: what it labels goes with either of them. Called once, in the end."""
        pairs = self.fresh(len(first))
        self._crossed = torch.stack([pairs, first, second])
        return pairs

    def parts(self, units: Tensor) -> Tensor:
        """The units that roots stand for, ``(2, ...)``: both of a pair; else the unit itself, and 0."""
        table = torch.stack([torch.arange(self._count), torch.zeros(self._count, dtype=torch.long)])
        pairs, first, second = self._crossed
        table[0, pairs], table[1, pairs] = first, second
        return table[:, units]

    def removable(self, labels: Tensor) -> Tensor:
        """As ``roots``, but also 0 for a unit that holds all labels of one call of ``fresh``.

        Removing it would leave a parameter empty.
        """
        units = self.roots(compact(labels))
        for unit in torch.unique(units).tolist():
            block = bisect.bisect_right(self._starts, unit)
            end = self._starts[block] if block < len(self._starts) else self._count
            if unit and (self._find(np.arange(self._starts[block - 1], end)) == unit).all():
                units = units.where(units != unit, 0)
        return units.expand(labels.shape)

    def unite(self, a: Tensor, b: Tensor, event: Event | None = None) -> None:
        """Join the units of two label tensors element by element; label 0 fixes the other side."""
        a, b = torch.broadcast_tensors(a, b)
        narrow = [axis for axis in range(a.dim()) if (a.stride(axis) == 0 and b.stride(axis) == 0) or a.size(axis) == 1]
        for axis in narrow:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()])
        if pairs.shape[1] > 256:
            pairs = np.unique(pairs, axis=1)
        number = self._number(event) if event else -1
        met = pairs
        while True:
            x, y = self._find(pairs[0]), self._find(pairs[1])
            differ = x != y
            if met is pairs and differ.any():
                self._met.append((met[0][differ], met[1][differ], number))
            pairs = np.stack([np.minimum(x, y)[differ], np.maximum(x, y)[differ]])
            if not pairs.size:
                return
            low, high = pairs
            to_zero = low == 0
            if to_zero.any():
                self._mark(self._fixed_by, high[to_zero], number if number >= 0 else 0)
                pairs = pairs[:, ~to_zero]
                low, high = pairs
            if number >= 0:
                self._mark(self._joined_by, low, number)
            np.minimum.at(self._parent, high, low)  # the least neighbour: a star is joined in two rounds
            touched = np.concatenate([low, high])
            roots = self._find(touched)
            for array in (self._fixed_by, self._joined_by):
                self._mark(array, roots, array[touched])

    def fix(self, labels: Tensor, event: Event) -> None:
        """Make every unit in ``labels`` always kept."""
        asked = np.unique(compact(labels).numpy())
        units, number = self._find(asked), self._number(event)
        fresh = asked[self._fixed_by[units] < 0]
        self._met.append((fresh, np.zeros_like(fresh), number))
        self._mark(self._fixed_by, units, number)

    def why_fixed(self, label: int) -> Event | None:
        """The event that fixed the unit of a label, or None if it is free."""
        return self._event(self._fixed_by, label)

    def why_joined(self, label: int) -> Event | None:
        """The first event that joined several units into the unit of a label."""
        return self._event(self._joined_by, label)

    def chain(self, label: int) -> tuple[Event, ...]:
        """The events that fixed the unit of a label, from the label's own to the one that fixed the last of them.

        For a free unit: every event that joined labels into it, in order. Labels that were joined without an event
        count as one.
        """
        unit = int(self._find(np.array([label]))[0])
        fixed = self._fixed_by[unit] >= 0
        links: dict[int, list[tuple[int, int]]] = {}
        joined: dict[int, None] = {}
        for ones, others, number in self._met:
            inside = self._find(ones) == unit
            inside |= self._find(others) == unit
            if inside.any():
                joined[number] = None
            for one, other in zip(ones[inside].tolist(), others[inside].tolist(), strict=True) if fixed else ():
                links.setdefault(one, []).append((other, number))
                links.setdefault(other, []).append((one, number))
        numbers = _path(links, label) if fixed else sorted(joined)
        return tuple(dict.fromkeys(self._events[number] for number in numbers if number >= 0))

    def varies(self, labels: Tensor, axis: int) -> bool:
        """Whether the units change along an axis."""
        return labels.stride(axis) != 0 and varies(self.roots(labels), axis)

    def _find(self, labels: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._parent[labels]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[labels] = found
                return found
            found = above

    def _kept_as_zero(self, labels: np.ndarray) -> np.ndarray:
        units = self._find(labels)
        return np.where(self._fixed_by[units] >= 0, 0, units)

    def _event(self, array: np.ndarray, label: int) -> Event | None:
        number = int(array[self._find(np.array([label]))[0]])
        return self._events[number] if number >= 0 else None

    def _number(self, event: Event) -> int:
        if self._events[-1] != event:
            self._events.append(event)
        return len(self._events) - 1

    @staticmethod
    def _mark(array: np.ndarray, units: np.ndarray, number: int | np.ndarray) -> None:
        """Write event numbers, keeping the earliest; units may occur several times."""
        numbers = np.broadcast_to(number, units.shape)
        units, numbers = units[numbers >= 0], numbers[numbers >= 0]
        largest = np.iinfo(array.dtype).max
        array[units] = np.where(array[units] < 0, largest, array[units])
        np.minimum.at(array, units, numbers)


def _path(links: dict[int, list[tuple[int, int]]], start: int) -> list[int]:
    """The events on the shortest way from a label to 0."""
    before: dict[int, tuple[int, int]] = {start: (start, -1)}
    waiting = deque([start])
    while waiting and 0 not in before:
        here = waiting.popleft()
        for there, number in links.get(here, ()):
            if there not in before:
                before[there] = here, number
                waiting.append(there)
    numbers, here = [], 0
    while here in before and here != start:
        here, number = before[here]
        numbers.append(number)
    return numbers[::-1]


def varies(units: Tensor, axis: int) -> bool:
    """Whether units change along an axis."""
    return units.size(axis) > 1 and bool((units != units.narrow(axis, 0, 1)).any())


def place(labels: Tensor) -> tuple[object, ...]:
    """Where labels lie in memory: the same for tensors that hold the same labels, as long as one of them is held.

    Examples
    --------
    >>> labels = torch.arange(3)
    >>> place(labels.expand(2, 3)) == place(labels.expand(2, 3)), place(labels) == place(labels.clone())
    (True, False)
    """
    return labels.data_ptr(), labels.shape, labels.stride()


def compact(labels: Tensor) -> Tensor:
    """A view with size one along every axis that is only expanded."""
    for axis in range(labels.dim()):
        if labels.size(axis) > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def expanded(labels: Tensor) -> Tensor:
    """The same labels, with axes along which no label changes turned into expanded views."""
    shape = labels.shape
    for axis in range(labels.dim()):
        if labels.size(axis) > 1 and labels.stride(axis) != 0:
            first = labels.narrow(axis, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels.expand(shape)
