"""netclone predict: the class of every image in a folder, for people, for machines and as CSV."""

import csv
import io
import json

import pytest
import safetensors.torch
import timm
import torch
from pictures import folder
from typer.testing import CliRunner

import netclone
from netclone.cli import app
from netclone.errors import DataError
from netclone.graph.preparing import preparation
from netclone.models.reading import read
from netclone.workflows.predicting import predict

pytestmark = pytest.mark.slow  # all of it rests on networks


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A grafted network that takes every image for its clone's class; images, one of them broken."""
    root = tmp_path_factory.mktemp("photos")
    torch.manual_seed(1)
    target = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"label_names": ["heron", "ibis"]})
    source = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        source.fc.bias[3] = 9.0
    mask = netclone.localize(source, method="magnitude")
    module = netclone.extract(source, mask, classes=[3], class_names=["stork"])
    grafted = netclone.inject(target, module, at="input", name="storks")
    netclone.save_grafted(grafted, root / "grafted.safetensors")
    folder(root / "photos", ["a", "b, c/10", "b, c/9"], count=2)
    (root / "photos" / "b, c" / "broken.png").write_bytes(b"none")
    (root / "photos" / "notes.txt").write_text("no image")
    return root


def test_every_image_has_a_label_a_probability_and_its_clone(root):
    steps = []
    found = predict(
        str(root / "grafted.safetensors"), str(root / "photos"), batch_size=4, progress=lambda *s: steps.append(s)
    )
    names = [one.path.removeprefix(f"{root}/photos/") for one in found.images]
    assert names == ["a/0.png", "a/1.png", "b, c/9/0.png", "b, c/9/1.png", "b, c/10/0.png", "b, c/10/1.png"]
    assert {(one.label, one.column, one.clone) for one in found.images} == {("stork", 2, "storks")}
    assert [path for path, _ in found.broken] == [f"{root}/photos/b, c/broken.png"]
    assert steps[-1] == ("images", 6, 7)
    network = netclone.load_model(str(root / "grafted.safetensors"))
    images, _ = next(iter(read(str(root / "photos"), preparation(network).transform(), "", "data", skip_broken=True)))
    with torch.no_grad():
        want = network(images).double().softmax(1).amax(1)
    assert [one.probability for one in found.images] == pytest.approx(want.tolist())


def test_a_machine_gets_csv_or_json_and_a_person_the_answer_first(root):
    words = ["predict", root / "grafted.safetensors", root / "photos"]
    result = run(*words, "--csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == ["path", "label", "column", "probability", "clone", "error"]
    assert [row["clone"] for row in rows] == 6 * ["storks"] + [""]
    assert rows[-1]["path"].endswith("broken.png") and "UnidentifiedImageError" in rows[-1]["error"]
    assert "broken.png' cannot be read: UnidentifiedImageError: cannot identify image file\n" in result.stderr
    facts = json.loads(run(*words, "--json").stdout)
    assert [one["path"] for one in facts["images"]] == [row["path"] for row in rows[:-1]]
    assert [one["path"] for one in facts["broken"]] == [rows[-1]["path"]]
    assert run(*words).stdout.startswith("6 images, 6 of them in a clone's class: 6 stork\n")


def test_one_image_and_a_network_without_clones_or_names(root, tmp_path):
    target = timm.create_model("test_resnet", num_classes=2)
    safetensors.torch.save_file(target.state_dict(), tmp_path / "target.safetensors")
    found = predict(f"timm/test_resnet@{tmp_path / 'target.safetensors'}", str(root / "photos" / "a" / "1.png"))
    assert [(one.label, one.clone) for one in found.images] == [(str(found.images[0].column), None)]


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("none", "there is no such file or folder"),
        ("photos/notes.txt", "it is no image; expected a folder of images, or one"),
        ("empty", "it has no images"),
        ("broken", "none of the 1 in '.*' can be read: '.*0.png': UnidentifiedImageError"),
    ],
)
def test_where_nothing_can_be_predicted_it_is_an_error(root, where, why):
    (root / "empty").mkdir(exist_ok=True)
    (root / "broken").mkdir(exist_ok=True)
    (root / "broken" / "0.png").write_bytes(b"none")
    with pytest.raises(DataError, match=why):
        predict(str(root / "grafted.safetensors"), str(root / where))
