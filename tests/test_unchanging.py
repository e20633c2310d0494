"""unchanged: a model is left as it was, whatever its forward() writes, by all that runs it."""

import collections

import pytest
import torch
from torch import nn

import netclone
from netclone.graph.measuring import measure

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.plain = torch.zeros(2)
        self.count = 0
        self.history = []
        self.known = collections.OrderedDict()

    def forward(self, x):
        self.write(x)
        return self.head(x.mean((2, 3)))


WRITES = {
    "in place": lambda self, x: self.seen.add_(1),
    "through data": lambda self, x: self.seen.data.add_(1),
    "not persistent": lambda self, x: self.hidden.add_(1),
    "assigned": lambda self, x: setattr(self, "seen", self.seen + 1),
    "of another size": lambda self, x: setattr(self, "seen", x.mean((0, 2, 3))),
    "resized": lambda self, x: self.seen.resize_(5),
    "plain tensor": lambda self, x: self.plain.add_(1),
    "counter": lambda self, x: setattr(self, "count", self.count + 1),
    "new attribute": lambda self, x: setattr(self, "fresh", x),
    "list": lambda self, x: self.history.append(x),
    "dictionary": lambda self, x: self.known.update(x=x),
    "new buffer": lambda self, x: self._buffers.setdefault("made", x),
    "batch statistics": lambda self, x: nn.functional.batch_norm(
        x[:, :2], self.seen, self.hidden, training=True, momentum=0.5
    ),
}
RUNS = {
    "evaluate": lambda model: netclone.evaluate(model, [(IMAGES, torch.arange(4))], batch_size=2),
    "cost": lambda model: netclone.cost(model, IMAGES, repeats=2),
}


def state(model):
    return {
        "tensors": {
            name: getattr(model, name).tolist() for name in ("seen", "hidden", "plain") if getattr(model, name).numel()
        },
        "attributes": sorted(model.__dict__),
        "buffers": sorted(model._buffers),
        "count": model.count,
        "history": len(model.history),
        "known": list(model.known),
        "modes": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_that_writes_is_left_alone(write, run, training):
    model = type("Writing", (Base,), {"write": WRITES[write]})().train(training)
    before, identities = state(model), {name: id(buffer) for name, buffer in model._buffers.items()}
    RUNS[run](model)
    assert state(model) == before
    assert {name: id(buffer) for name, buffer in model._buffers.items()} == identities
    model(IMAGES)
    assert state(model) != before  # it does write


def test_what_cannot_be_run_is_left_alone_too():
    class Failing(Base):
        def write(self, x):
            self.seen += 1
            raise RuntimeError("no forward")

    model = Failing()
    with pytest.raises(RuntimeError, match="no forward"):
        netclone.cost(model, IMAGES)
    assert state(model) == state(Failing())


def test_a_graph_is_left_alone_when_it_is_measured():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.5)).train()
    measure(torch.fx.symbolic_trace(model), IMAGES)
    assert int(model[0].num_batches_tracked) == 0
