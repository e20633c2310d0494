"""BatchSize: computes and decides what holds for every batch of two or more, and raises for the rest."""

import math

import pytest
import torch

from netclone.graph.sizes import BatchSize, SizesRead, Undecided

SIZE = BatchSize(6, 1009)

COMPUTED = {
    "6 N * 2": (SIZE * 2, 12),
    "2 * 6 N": (2 * SIZE, 12),
    "6 N // 3": (SIZE // 3, 2),
    "6 N + 3 N": (SIZE + BatchSize(3, 1009), 9),
    "sum": (sum([SIZE, SIZE]), 12),
    "product": (math.prod([2, SIZE]), 12),
    "divmod": (divmod(SIZE, 3)[0], 2),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_multiples_stay_multiples(what):
    found, times = COMPUTED[what]
    assert (found.times, int.__int__(found)) == (times, times * 1009)


DECIDED = [
    (SIZE == 7, False),  # not a multiple
    (SIZE == 6, False),  # a batch of one
    (SIZE.__eq__(BatchSize(6, 1009)), True),
    (SIZE.__ne__(BatchSize(5, 1009)), True),
    (SIZE > 11, True),
    (SIZE >= 12, True),
    (SIZE < 12, False),
    (SIZE <= 11, False),
    (SIZE.__gt__(BatchSize(5, 1009)), True),
    (SIZE.__gt__(BatchSize(6, 1009)), False),
    (SIZE.__ge__(BatchSize(6, 1009)), True),
    (SIZE.__lt__(BatchSize(7, 1009)), True),
    (SIZE % 3, 0),
    (SIZE // BatchSize(3, 1009), 2),
    (bool(SIZE), True),
]


@pytest.mark.parametrize(("found", "expected"), DECIDED)
def test_what_holds_for_every_batch_is_decided(found, expected):
    assert found == expected


UNDECIDED = [
    lambda: SIZE == 12,
    lambda: SIZE != 60,
    lambda: SIZE > 12,
    lambda: SIZE >= 13,
    lambda: SIZE < 13,
    lambda: SIZE <= 12,
    lambda: SIZE // 4,
    lambda: SIZE % 4,
    lambda: SIZE + 1,
    lambda: SIZE - 1,
    lambda: SIZE / 2,
    lambda: 1 / SIZE,
    lambda: SIZE * SIZE,
    lambda: SIZE * 0.5,
    lambda: [0] * SIZE,
    lambda: int(SIZE),
    lambda: float(SIZE),
    lambda: SIZE**2,
    lambda: -SIZE,
    lambda: min(SIZE, 100),
    lambda: BatchSize(4, 1009) // BatchSize(3, 1009),
]


@pytest.mark.parametrize("ask", UNDECIDED)
def test_anything_else_is_undecided(ask):
    with pytest.raises(Undecided):
        ask()


def test_sizes_and_device_are_read_from_tensors():
    x = torch.empty(1009, 5, 2018, device="meta")
    with SizesRead(1009, torch.device("cpu")):
        shape, first, count, device, meta = x.shape, x.size(0), x.numel(), x.device, x.is_meta
        with pytest.raises(Undecided):
            len(x)
        assert len(x[0]) == 5
    assert [getattr(size, "times", size) for size in shape] == [1, 5, 2]
    assert (first.times, device, meta) == (1, torch.device("cpu"), False)
    assert isinstance(count, BatchSize)
    assert [getattr(size, "times", size) for size in shape[1:]] == [5, 2]
