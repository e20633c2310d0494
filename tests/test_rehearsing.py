"""netclone clone --dry-run: all of a clone on a few images, and about what the whole takes."""

import json

import pytest
import safetensors.torch
import timm
import torch
from pictures import folder
from typer.testing import CliRunner

from netclone.cli import app
from netclone.errors import PositionError
from netclone.workflows.rehearsing import rehearse

pytestmark = pytest.mark.slow  # clones


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images of four classes, of which a target knows two and a source all; neither is trained."""
    root = tmp_path_factory.mktemp("colours")
    folder(root / "new", ["blue", "red"], count=20)
    folder(root / "old", ["green", "grey"], count=6)
    for name, classes in (("source", 4), ("target", 2)):
        torch.manual_seed(classes)
        network = timm.create_model("test_resnet", num_classes=classes)
        safetensors.torch.save_file(network.state_dict(), root / f"{name}.safetensors")
    return root


def named(root):
    return [f"timm/test_resnet@{root / name}.safetensors" for name in ("source", "target")]


OPTIONS = {"img-size": 32, "method": "magnitude", "at": "layer3", "distill-steps": 50}


def run(root, out, **changes):
    words = ["clone", *named(root), "--classes", "red=3,blue=0", "--data", root / "new", "--target-data", root / "old"]
    words += [part for name, value in {**OPTIONS, **changes, "out": out}.items() for part in (f"--{name}", value)]
    return CliRunner().invoke(app, [*map(str, words), "--dry-run", "--json"])


@pytest.fixture(scope="module")
def rehearsed(root, tmp_path_factory):
    """What a rehearsal says, and the folder that it was told to write to."""
    folder = tmp_path_factory.mktemp("rehearsed")
    result = run(root, folder / "out.safetensors")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder


def test_it_says_what_would_be_done_and_writes_nothing(rehearsed):
    facts, folder = rehearsed
    assert facts["classes"] == [[3, "red"], [0, "blue"]]
    assert (facts["images"], facts["old_images"], facts["steps"]) == (40, 12, 50)
    assert [position["at"] for position in facts["positions"]] == ["layer3"]
    assert facts["seconds"].keys() >= {"read the images", "distil, 50 steps"} and min(facts["seconds"].values()) > 0
    assert facts["memory"] > 52 * 3 * 32 * 32 * 4
    assert list(folder.iterdir()) == []


def test_what_would_fail_fails_now(root, tmp_path):
    for changes, why in (({"at": "layer9"}, "layer9"), ({"out": tmp_path / "none" / "x.safetensors"}, "no folder")):
        out = changes.pop("out", tmp_path / "out.safetensors")
        result = run(root, out, **changes)
        assert result.exit_code == 1 and why in result.stderr
    with pytest.raises(PositionError, match="layer9"):
        rehearse(*named(root), "red=3", str(root / "new"), target_data=str(root / "old"), at="layer9")
    assert list(tmp_path.iterdir()) == []


def test_more_steps_are_said_to_take_longer(root, rehearsed, tmp_path):
    many = json.loads(run(root, tmp_path / "x", **{"distill-steps": 50_000}).stdout)
    assert many["seconds"]["distil, 50000 steps"] > 50 * rehearsed[0]["seconds"]["distil, 50 steps"]
