"""What netclone clone names, opened: and where it comes from, as a clone's file says it."""

import pytest
import safetensors.torch
import timm
from pictures import folder

from netclone.models.loading import load_model, weights_digest
from netclone.workflows.tasks import opened_task


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Images of three classes and two networks, in the current folder."""
    folder(tmp_path / "images" / "train", ["blue", "green", "red"], count=2)
    for name, classes in (("source", 3), ("target", 1)):
        network = timm.create_model("test_resnet", num_classes=classes)
        safetensors.torch.save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(root, data, old=None):
    source, target = (f"timm/test_resnet@{root / name}.safetensors" for name in ("source", "target"))
    return opened_task(source, target, "red", str(data), old, split="train", batch_size=2)


def test_origin_names_networks_by_their_files_and_weights(root):
    origin = dict(opened(root, "images").origin())
    assert origin["source"] == "timm/test_resnet@source.safetensors"
    assert origin["target"] == "timm/test_resnet@target.safetensors"
    network = load_model("timm/test_resnet@source.safetensors")
    assert origin["source weights"] == f"sha256:{weights_digest(network)}" != origin["target weights"]


def test_a_folder_is_named_as_it_was_but_for_those_above_it(root):
    outside = f"../{root.name}/images"
    for data, told in (("images/train", "images/train"), (root / "images", "images"), (outside, "images")):
        assert dict(opened(root, data).origin())["data"] == told


def test_images_count_once_they_are_read_and_only_their_content_and_class(root):
    task = opened(root, "images")
    assert "data digest" not in dict(task.origin())
    list(task.new)
    told = dict(task.origin())
    assert told["data images"] == "2"
    red = root / "images" / "train" / "red"
    (red / "0.png").rename(red / "00.png")
    again = opened(root, "images")
    list(again.new)
    assert dict(again.origin())["data digest"] == told["data digest"]
    (red / "1.png").write_bytes((red / "00.png").read_bytes())
    other = opened(root, "images")
    list(other.new)
    assert dict(other.origin())["data digest"] != told["data digest"]


def test_classes_and_labels_are_the_networks(root):
    task = opened(root, "images", None)
    assert (task.classes, task.names, task.old) == ((2,), ("red",), None)
    assert sorted({int(label) for _, labels in task.new for label in labels}) == [2]
