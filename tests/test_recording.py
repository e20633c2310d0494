"""Recording gives the graph that torch.export gives, and leaves to it what depends on values or on the batch size."""

import re

import pytest
import timm
import torch
from architectures import CachingByKey, CountingInto, WritesLater, returned, untouched
from torch import fx, nn

from netclone.graph.capturing import FACTS, _captured, capture, fingerprint
from netclone.graph.exporting import export


def images(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


class Windows(nn.Module):
    """Attention in windows: sizes of several batches, a table that is looked up, views, and writing in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(7))
        self.register_buffer("index", torch.arange(16).remainder(7).reshape(4, 4), persistent=False)

    def forward(self, x):
        x = self.stem(x).relu_().permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        if height != width or batch == 0:
            raise ValueError(height)
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3).reshape(-1, 4, channels)
        windows, places, _ = x.size()
        q, k, v = self.qkv(x).reshape(windows, places, 3, channels).unbind(2)
        attention = q @ k.transpose(1, 2) + self.table[self.index].unsqueeze(0)
        x = (attention.softmax(-1) @ v).view(windows * places, channels)
        x = x.reshape(x.size(0) // 64, -1, channels)
        return self.head(x.mean(1) + torch.zeros(batch, channels, device=x.device))


class Deciding(nn.Module):
    """Does something else for a batch of 1009 or more images."""

    def __init__(self, decide):
        super().__init__()
        self.head, self.decide = nn.Linear(192, 3), decide

    def forward(self, x):
        y = self.head(x.flatten(1))
        return y * 2 if self.decide(x, y) else y


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rows = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = x.mean(1)
        x, _ = self.attention(x, x, x)
        return self.head(self.rows(x)[0].mean(1))


def text(graph_module):
    """A graph, but for the name of the symbol that stands for the batch size."""
    return re.sub(r"s\d+", "s", str(graph_module.graph)), graph_module.meta[FACTS]["positions"]


MODELS = {
    "windows": Windows,
    "in place": lambda: nn.Sequential(WritesLater(), nn.Flatten()),
    "attending": Attending,
    "tied": lambda: fx.symbolic_trace(tied()),
    **{name: lambda name=name: timm.create_model(name, num_classes=3) for name in ("test_resnet", "test_vit")},
}


def tied():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.Flatten())


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_that_of_torch_export_for_any_batch_size(name):
    model = MODELS[name]().eval()
    x = torch.randn(2, 3, 160, 160) if name.startswith("test_") else images()
    both = [export(model, (x,), {}, recorded) for recorded in (True, False)]
    assert [one.recorded for one in both] == [True, False]
    assert torch.equal(both[0].value, both[1].value)
    recorded, exported = (_captured(model, (x,), one) for one in both)
    assert [(n.op, n.target, len(n.all_input_nodes)) for n in recorded.graph.nodes] == [
        (n.op, n.target, len(n.all_input_nodes)) for n in exported.graph.nodes
    ]
    assert fingerprint(recorded) == fingerprint(exported)
    names = dict(zip((n.name for n in exported.graph.nodes), (n.name for n in recorded.graph.nodes), strict=True))
    positions = exported.meta[FACTS]["positions"]
    assert recorded.meta[FACTS]["positions"] == {path: names[node] for path, node in positions.items()}
    for count in (1, 3):
        more = torch.cat([x, x + 1])[:count]
        with torch.no_grad():
            assert torch.equal(recorded(more), exported(more))


DECISIONS = {
    "a value": lambda x, y: y.sum() > 1e9,
    "the batch size": lambda x, y: x.shape[0] > 1008,
    "one batch size": lambda x, y: len(x) == 4,
    "parts of a batch": lambda x, y: x.size(0) % 2,
    "elements": lambda x, y: y.numel() > 100,
    "a mask": lambda x, y: y[y > 0].shape[0] > 1,
    "numbers of the model": lambda x, y: torch.is_autocast_enabled("cpu"),
}


@pytest.mark.parametrize("why", list(DECISIONS)[:-1])
def test_decisions_are_left_to_torch_export(why):
    model = Deciding(DECISIONS[why]).eval()
    with untouched(model):
        try:
            exported = export(model, (images(),), {})
        except Exception as refused:
            assert type(refused).__name__ == "TraceError"
        else:
            assert not exported.recorded


def test_what_holds_for_every_batch_is_no_decision():
    model = Deciding(lambda x, y: x.shape[0] < 1 or x.shape[:2] != (y.shape[0], 3) or x.numel() == 7).eval()
    exported = export(model, (images(),), {})
    assert exported.recorded


class Counted(nn.Linear):
    """Counts its calls in a list, and answers otherwise from the second on."""

    def __init__(self):
        super().__init__(6, 3)
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x) * min(len(self.calls), 2)


@pytest.mark.parametrize("make", [CountingInto, CachingByKey, Counted])
def test_what_changes_with_every_call_is_captured_as_at_the_first(make):
    model, x = make().eval(), torch.randn(2, 6)
    with untouched(model):
        graph = capture(model, x)
    with torch.no_grad():
        assert torch.equal(graph(x), make.forward(model, x))


def test_a_tensor_that_is_kept_from_the_first_run_is_made_anew():
    class Caching(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.cache = {}

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return super().forward(x) + self.cache["bias"]

    model = Caching().eval()
    assert export(model, (torch.randn(2, 6),), {}).recorded
    assert not model.cache


def test_positions_are_those_of_the_modules():
    model, x = WritesLater().eval(), images()
    exported = export(model, (x,), {})
    assert exported.recorded
    assert exported.positions.keys() == returned(model, x).keys()
