"""What each of several processes does in tests of netclone.runtime.sharing. All import it, so it imports little."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from netclone.errors import DataError, WorkerError
from netclone.runtime.sharing import share


def check_primitives():
    """Run in each of three processes."""
    with share(patience=60) as workers:
        number = workers.number
        assert workers.count == 3
        rows = torch.arange(12.0).view(6, 2)
        assert torch.equal(workers.joined(rows[workers.own(6)]), rows)
        ragged = torch.full((number, 2), float(number))
        assert workers.joined(ragged)[:, 0].tolist() == [1, 2, 2]
        assert workers.joined(torch.tensor([number])).tolist() == [0, 1, 2]
        one, two = torch.ones(2, 2), torch.tensor(float(number), dtype=torch.float64)
        workers.add([one, two])
        assert one.tolist() == [[3, 3], [3, 3]] and float(two) == 3
        assert workers.told([number]) == [[0], [1], [2]]
        workers.check_same([torch.ones(3), torch.tensor(True)], "data")
        for error, seen in ((DataError("torn\nand more"), DataError), (None, WorkerError)):
            if (error is not None) == (number == 1):
                text = "torn" if number == 1 else "worker 1 failed: DataError: torn;"
                with pytest.raises(seen, match=text), workers.agreed():
                    if error is not None:
                        raise error
        with pytest.raises(WorkerError, match="mask: worker 2 has different values from worker 0"):
            workers.check_same([torch.tensor(number // 2)], "mask")
        workers.check_same([torch.ones(1)], "still together")


def check_what_is_left():
    with pytest.raises(WorkerError, match="another worker is gone"), share(patience=60) as workers:
        if workers.main:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.told("anyone there?")


def check_signal():
    with pytest.raises(WorkerError, match="stopped by the launcher"), share(patience=60):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
