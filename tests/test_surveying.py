"""netclone inspect of a network: its input, its classes, where it can be cut, and what could not be saved."""

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

import netclone
from netclone.cli import app
from netclone.workflows import surveying
from netclone.workflows.surveying import is_network, survey

pytestmark = pytest.mark.slow  # captures networks


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})


def test_a_network_says_input_classes_and_positions():
    found = survey("timm/test_vit")
    assert found.config["input_size"] == [3, 160, 160]
    assert (len(found.classes), found.classes[1]) == (1000, "goldfish")
    assert found.parameters == sum(p.numel() for p in timm.create_model("test_vit").parameters())
    traced = netclone.trace(timm.create_model("test_vit"))
    for cut in found.positions:
        netclone.position(traced, cut.at)
    assert [cut.depth for cut in found.positions] == sorted((cut.depth for cut in found.positions), reverse=True)
    assert (found.unsavable, found.no_target, found.no_source) == ((), "", "")


def test_what_a_clone_of_it_could_not_hold_is_named(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)
            self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

        def forward(self, x):
            return self.fc(torch.linalg.qr(x)[0].mean((2, 3)))

    opened = surveying.open_model("timm/test_resnet", None)
    monkeypatch.setattr(surveying, "open_model", lambda *_: type(opened)(Network().eval(), "own/network"))
    (fault,) = survey("own").unsavable
    assert "linalg_qr" in fault and "not on the allow-list" in fault
    result = run("inspect", "own")
    assert "1 operators cannot be saved" in result.stdout and "linalg_qr" in result.stdout


def test_a_person_and_a_machine_are_told_the_same():
    result = run("inspect", "timm/test_resnet")
    assert result.exit_code == 0, result.output
    for part in ("469,688 parameters", "1000: tench, goldfish", "input_size [3, 160, 160]", "layer4", "(N, 96, 5, 5)"):
        assert part in result.stdout, result.stdout
    facts = json.loads(run("inspect", "timm/test_resnet", "--json").stdout)
    assert next(cut["at"] for cut in facts["positions"] if cut["tried"]) == "layer4"
    wrong = run("inspect", "timm/test_resnot")
    assert wrong.exit_code == 1 and "did you mean 'test_resnet" in wrong.stderr


def test_what_is_a_network_and_what_a_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "x.pth").write_bytes(b"")
    for name in (
        "timm/resnet18",
        "timm/resnet18@x.safetensors",
        f"local-dir:{tmp_path}",
        "resnet18",
        tmp_path / "x.pth",
    ):
        assert is_network(str(name)), name
    for name in ("x.safetensors", tmp_path / "x.safetensors", tmp_path):
        assert not is_network(str(name)), name
