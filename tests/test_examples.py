"""The examples run, from an empty folder, and what they claim in their asserts is true."""

import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

pytestmark = pytest.mark.slow  # all of it rests on whole runs

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9]*.py"))
DEFAULT = ("05_shrink",)  # the others are run in the long tier; the demo does what the first does, and checks more


def run(path, monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in DEFAULT else pytest.mark.long, id=path.stem) for path in NUMBERED],
)
def test_an_example_runs_and_says_what_it_did(path, monkeypatch, tmp_path, capsys):
    run(path, monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert "%" in out and "Traceback" not in out
    if path.stem == "06_failed_position":
        for told in (
            "did you mean",
            "fit an adapter with netclone.clone",
            "also reads earlier features",
            "AdapterError",
        ):
            assert told in out


def test_there_are_seven_and_each_says_how_to_run_it():
    assert [path.stem[:2] for path in NUMBERED] == ["01", "02", "03", "04", "05", "06", "07"]
    for path in NUMBERED:
        assert f"python examples/{path.name}" in path.read_text()


@pytest.mark.long
def test_real_weights_by_path_and_folders_of_images(monkeypatch, tmp_path, capsys):
    """Networks with other normalisations than each other, images of any size, one class."""
    torch.manual_seed(0)
    for name, classes in (("test_efficientnet", 6), ("test_resnet", 4)):
        model = timm.create_model(name, num_classes=classes)
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(0)
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
        for number in range(12):
            pixels = torch.randint(256, (70, 90, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    arguments = {"source": "timm/test_efficientnet", "target": "timm/test_resnet"}
    names = run(
        EXAMPLES / "02_imagenet.py",
        monkeypatch,
        tmp_path,
        *(f"--{role}={name}@{name.removeprefix('timm/')}.safetensors" for role, name in arguments.items()),
        *("--new", "new", "--old", "old", "--label", 5, "--size", 64, "--out", "clone.safetensors"),
    )
    assert names["new_images"].shape == (12, 3, 64, 64)
    assert names["module"].classes == (5,)
    assert (tmp_path / "clone.safetensors").exists()
    assert "The new class is column 4" in capsys.readouterr().out
