"""The target of the suite vit with given weights: what it computes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from netclone import cli
from netclone.benchmarking import suite_named, with_weights
from netclone.benchmarking.pretrained import read_target
from netclone.benchmarking.suites import Dataset
from netclone.benchmarking.training import Networks
from netclone.errors import ArgumentError, LoadError

ROWS = (7, 3, 999, 0, 5)


def saved(folder: Path, name: str, **options: object) -> str:
    model = timm.create_model(name, num_classes=options.pop("classes", 1000), **options)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return f"timm/{name}@{folder / 'weights.safetensors'}"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_target_reads_what_its_weights_expect(name: str, tmp_path: Path) -> None:
    """Rows of its own logits, of images normalised with its own mean and deviation."""
    named = saved(tmp_path, name)
    model = read_target(named, ROWS)
    with torch.no_grad():
        whole = timm.create_model(name, num_classes=1000, checkpoint_path=tmp_path / "weights.safetensors")
        if hasattr(whole, "set_input_size"):
            whole.set_input_size(img_size=128)
        pixels = torch.rand(3, 3, 128, 128)
        mean, std = (torch.tensor(whole.pretrained_cfg[what]).view(3, 1, 1) for what in ("mean", "std"))
        torch.testing.assert_close(
            model((pixels - 0.5) / 0.5), whole.eval()((pixels - mean) / std)[:, ROWS], rtol=1e-4, atol=1e-5
        )


def test_the_target_of_the_suite_has_the_rows_of_its_old_classes(tmp_path: Path) -> None:
    suite = with_weights(suite_named("vit"), saved(tmp_path, "test_vit"))
    assert suite.target.name == "timm/test_vit@weights.safetensors"
    assert suite.target.name in suite.about and str(tmp_path) not in suite.about
    images, labels = torch.zeros(10, 3, 8, 8), torch.arange(10)
    data = Dataset(images, labels, images, labels, (*ROWS, 10, 11, 12, 13, 14))
    (tmp_path / str(suite.source.weights)).write_bytes(b"")
    networks = Networks(suite, data, tmp_path, tmp_path, lambda *_: None)
    before = networks.depend_on()
    pixels = torch.rand(2, 3, 128, 128)
    expected = read_target(f"timm/test_vit@{tmp_path / 'weights.safetensors'}", ROWS)(pixels)
    assert torch.equal(networks.target(0)(pixels), expected)
    assert networks.facts["target, seed 0"]["seconds"] is None
    saved(tmp_path, "test_vit")  # other numbers in a file of the same name
    again = Networks(suite, data, tmp_path, tmp_path, lambda *_: None).depend_on()
    assert [a == b for a, b in zip(before, again, strict=True)] == [True, True, True, True, False]


def test_weights_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    vit = suite_named("vit")
    with pytest.raises(ArgumentError, match="the target of the suite zoo is trained; only vit takes weights"):
        with_weights(suite_named("zoo"), "timm/test_vit")
    with pytest.raises(LoadError, match="weights"):
        with_weights(vit, f"timm/test_vit@{tmp_path / 'none.safetensors'}")
    with pytest.raises(ArgumentError, match="the 1000 classes of ImageNet-1k"):
        with_weights(vit, saved(tmp_path, "test_vit", classes=12))
    with pytest.raises(ArgumentError, match="pads images"):
        with_weights(vit, saved(tmp_path, "test_resnet"))
    asked = ["bench", "modules", "--weights", "timm/test_vit", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 1 and "only vit takes weights" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
