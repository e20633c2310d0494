"""netclone verify: a file against the target it should hold."""

import json

import pictures
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import netclone
from netclone.cli import app
from netclone.graph import modes
from netclone.zoo.building import randomised

run = CliRunner().invoke
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves pictures open


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target's checkpoint, another one's, a clone, pictures, and the clone grafted onto the first."""
    where = tmp_path_factory.mktemp("verify")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for number, name in enumerate(("birds", "others")):
            target = timm.create_model("test_resnet", num_classes=4).eval()
            save_file(randomised(target, torch.randn(4, 3, 64, 64), number).state_dict(), where / f"{name}.safetensors")
        source = timm.create_model("test_resnet", num_classes=6).eval()
    mask = netclone.localize(source, method="magnitude", keep=0.5)
    module = netclone.extract(source, mask, classes=[4, 5]).with_spec(at="input")
    netclone.save(module, where / "herons.safetensors")
    pictures.folder(where / "pictures", ["red", "grey"])
    files = [f"timm/test_resnet@{where / 'birds.safetensors'}", where / "herons.safetensors"]
    result = run(app, ["inject", *map(str, files), "--out", str(where / "grafted.safetensors")])
    assert result.exit_code == 0, result.output
    return where


@pytest.fixture
def few(monkeypatch):
    """Fewer modes than the command has: what they are is tested elsewhere."""
    monkeypatch.setattr("netclone.cloning.verifying.COVERING", modes.QUICK)


def verify(folder, target, *more):
    target = f"timm/test_resnet@{folder / target}.safetensors"
    return run(app, ["verify", str(folder / "grafted.safetensors"), "--target", target, *more])


@pytest.mark.parametrize("data", [False, True])
def test_the_right_target_passes(folder, few, data):
    result = verify(folder, "birds", *(["--data", str(folder / "pictures"), "--device", "cpu"] if data else []))
    assert result.exit_code == 0, result.output
    assert "Old logits are the target's bits in 6 of 6 modes." in result.output


def test_without_a_target_it_is_the_one_in_the_file(folder, few):
    result = run(app, ["verify", str(folder / "grafted.safetensors")])
    assert result.exit_code == 0 and result.stdout.startswith("Old logits are the target's bits in 6 of 6 modes.\n")
    result = run(app, ["verify", f"timm/test_resnet@{folder / 'birds.safetensors'}"])
    assert result.exit_code == 1 and "name its target with --target" in result.stderr


def test_another_target_fails_and_the_node_is_named(folder, few):
    result = verify(folder, "others")
    assert result.exit_code == 1
    assert "conv1_0" in result.output and "inference_mode" in result.output
    assert "in 0 of 6 modes" in result.output


def test_as_json(folder, few):
    result = verify(folder, "others", "--json")
    facts = json.loads(result.output)
    assert result.exit_code == 1 and facts["passed"] is False and facts["equal"] == []
    assert facts["different"][0]["mode"]["gradients"] == "plain"
    assert facts["different"][0]["node"] == "conv1_0"


def test_what_is_no_model_is_one_line(folder):
    result = run(app, ["verify", str(folder / "grafted.safetensors"), "--target", "timm/test_resnot"])
    assert result.exit_code == 1 and "did you mean 'test_resnet" in result.output
