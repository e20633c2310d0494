"""A graph before and after each pass of its capture, as text in a folder that the environment names."""

import torch
from torch import nn

from netclone.graph.capturing import capture
from netclone.graph.dumping import VARIABLE


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(nn.functional.dropout(x, training=self.training)).relu_() * torch.arange(4)


def test_each_pass_of_a_capture_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    graph = capture(Net(), torch.zeros(2, 6)).graph
    capture(Net(), torch.zeros(2, 6))
    first, second = sorted((tmp_path / "graphs").iterdir())
    assert (first.name, second.name) == ("01-Net", "02-Net")
    passes = sorted(first.iterdir())
    assert [path.name for path in passes] == [
        "0-exported.txt",
        "1-made-functional.txt",
        "2-spelled.txt",
        "3-without-bookkeeping.txt",
        "4-folded.txt",
    ]
    exported, functional, *_, bare, folded = (path.read_text() for path in passes)
    assert "relu_" in exported and "dropout" in exported
    assert "relu.default" in functional and "relu_.default" not in functional
    assert "dropout" not in bare and "arange" in bare
    assert "arange.default" not in folded
    assert folded == f"{graph}\n"


def test_nothing_is_written_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    capture(Net(), torch.zeros(2, 6))
    assert list(tmp_path.iterdir()) == []
