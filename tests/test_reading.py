"""Pictures in folders, by timm's readers: labels in a network's label space, prepared as it wants them."""

import hashlib
import json
import tarfile

import pytest
import safetensors.torch
import timm
import torch
from pictures import COLOURS, folder
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from netclone import channel_groups, extract, load, load_model, localize
from netclone.cli import app
from netclone.errors import DataError
from netclone.graph.preparing import Converted, converted, preparation
from netclone.learning.data import gather
from netclone.models.reading import read
from netclone.workflows.surveying import survey


def network(classes, **cfg):
    model = timm.create_model("test_resnet", num_classes=classes).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": classes, **cfg}
    return model


def opened(where, batch_size=64):
    return read(where, preparation(network(3)).transform(), "train", "data", batch_size)


@pytest.mark.parametrize(
    ("model", "columns"),
    [
        (network(11), {"0": 0, "4": 4, "10": 10}),
        (network(3), {"ant": 0, "bee": 1, "cat": 2}),
        (network(3, label_names=["cat", "dog", "bee"]), {"bee": 2, "cat": 0}),
        (network(1000), {"n01440764": 0, "n01443537": 1}),
        (network(1000), {"goldfish": 1, "great_white_shark": 2, "tench": 0}),
    ],
    ids=["numbers of columns", "in order", "the network's labels", "synsets", "words"],
)
def test_folders_are_the_networks_classes(tmp_path, model, columns):
    pictures = opened(folder(tmp_path, columns)).labelled_for(model)
    assert dict(zip(pictures.names, pictures.columns, strict=True)) == columns
    images, labels = next(iter(pictures))
    assert images.shape == (3 * len(columns), 3, 160, 160)
    assert sorted(labels.tolist()) == sorted(3 * list(columns.values()))


def test_only_some_classes_are_read_and_a_tar_file_is_a_folder(tmp_path):
    folder(tmp_path / "a", ["red", "green", "blue"])
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "a", arcname=".")
    for where in (tmp_path / "a", tmp_path / "a.tar"):
        pictures = opened(str(where), batch_size=2).labelled_for(network(3))
        some = pictures.only([pictures.names.index("red")])
        assert len(some) == 3
        assert {int(label) for _, labels in some for label in labels} == {2}


def test_data_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(DataError, match="data: '.*none' cannot be read"):
        opened(str(tmp_path / "none"))
    pictures = opened(folder(tmp_path / "two", ["goldfish", "unicorn"]))
    with pytest.raises(DataError, match="class 'goldfish' of .* is not one of the network's 5"):
        pictures.labelled_for(network(5))
    with pytest.raises(DataError, match="the network's 3; did you mean 'hornbill'; name the folders after"):
        opened(folder(tmp_path / "typo", ["hornbil"])).labelled_for(network(3, label_names=["hornbill", "b", "c"]))
    pictures = opened(folder(tmp_path / "one", ["unicorn"]))
    with pytest.raises(DataError, match="class 'unicorn' of .* is not one of the network's 1000, such as"):
        pictures.labelled_for(network(1000))
    with pytest.raises(DataError, match="'09' and '9' in .* are the same class of the network, column 9; put"):
        opened(folder(tmp_path / "nine", ["9", "09", "1"])).labelled_for(network(10))
    with pytest.raises(DataError, match="'Gold-fish' and 'gold_fish' in .* are the same class"):
        given = network(3, label_names=["gold fish", "cat", "dog"])
        opened(folder(tmp_path / "fish", ["Gold-fish", "gold_fish"])).labelled_for(given)


def test_classes_of_no_column_are_left_out_with_a_line(tmp_path):
    lines = []
    where = folder(tmp_path, ["0", "2", "unicorn", "3"], count=2)
    transform = preparation(network(3)).transform()
    pictures = read(where, transform, "train", "target-data", note=lines.append).labelled_for(network(3))
    assert pictures.known == {"0": 0, "2": 2}
    kept = pictures.keeping(pictures.known.values())
    assert torch.cat([labels for _, labels in kept]).tolist() == [0, 0, 2, 2]
    assert lines == [f"target-data: 2 of the 4 classes in '{where}' are left out: 3, unicorn"]
    assert pictures.keeping([0, 2, -1]) is pictures


def test_an_order_that_image_folder_does_not_have_is_told(tmp_path):
    lines = []
    transform = preparation(network(3)).transform()
    where = folder(tmp_path, ["bird10", "bird9", "Cat"], count=1)
    pictures = read(where, transform, "train", "data", note=lines.append).labelled_for(network(3))
    assert pictures.known == {"bird9": 0, "bird10": 1, "Cat": 2}
    assert len(lines) == 1
    assert "timm's order, bird9, bird10, Cat. ImageFolder's order is Cat, bird10, bird9" in lines[0]


def broken(root):
    """Six pictures of red and of blue, and four broken ones."""
    folder(root, ["red", "blue"], count=6)
    whole = (root / "red" / "0.png").read_bytes()
    (root / "red" / "0.png").write_bytes(b"")
    (root / "red" / "1.png").write_bytes(b"no picture")
    (root / "red" / "2.png").write_bytes(whole[: len(whole) // 2])
    (root / "blue" / "3.png").unlink()
    (root / "blue" / "3.png").symlink_to(root / "gone.png")
    return root


def packed(root, file):
    with tarfile.open(file, "w") as tar:
        tar.add(root, arcname="pictures")
    return str(file)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_broken_picture_is_an_error_that_names_it(tmp_path, kind):
    root = broken(tmp_path / "all")
    (root / "blue" / "3.png").unlink()
    where = str(root) if kind == "folder" else packed(root, tmp_path / "all.tar")
    with pytest.raises(DataError, match=r"data: image '.*red/0.png' cannot be read: UnidentifiedImageError: .*--skip"):
        list(opened(where))


def test_broken_pictures_are_left_out_and_counted_and_never_replaced(tmp_path):
    lines = []
    transform = preparation(network(3)).transform()
    root = broken(tmp_path / "all")
    pictures = read(str(root), transform, "train", "data", 5, skip_broken=True, note=lines.append)
    for _ in range(2):
        assert torch.cat([labels for _, labels in pictures]).tolist() == 5 * [0] + 3 * [1]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("data: 4 of 12 images cannot be read and are skipped: ")
    assert "3.png (FileNotFoundError" in lines[0]
    assert "unclosed" not in lines[0]


def test_where_nothing_can_be_read_the_data_are_empty(tmp_path):
    folder(tmp_path, ["red"], count=3)
    for file in (tmp_path / "red").iterdir():
        file.write_bytes(b"broken")
    pictures = read(str(tmp_path), preparation(network(3)).transform(), "train", "data", 2, skip_broken=True)
    with pytest.raises(DataError, match="data: empty"):
        gather(pictures)


def test_a_picture_that_unpacks_to_more_than_is_sane_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"red/0.png' cannot be read: DecompressionBombError"):
        list(opened(folder(tmp_path, ["red"])))


def test_reading_moves_no_random_state(tmp_path):
    pictures = opened(folder(tmp_path, ["red"]))
    before = torch.get_rng_state()
    list(pictures)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_source_that_wants_other_images_converts_the_targets(tmp_path):
    target = network(3, input_size=(3, 96, 96), crop_pct=1.0, interpolation="bilinear")
    same_size = network(3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), input_size=(3, 96, 96), crop_pct=1.0)
    same_size.pretrained_cfg["interpolation"] = "bilinear"
    where = folder(tmp_path, ["red", "green", "blue"])
    given, own = preparation(target), preparation(same_size)
    theirs, ours = (next(iter(read(where, p.transform(), "train", "data")))[0] for p in (given, own))
    source = converted(same_size, given)
    with torch.no_grad():
        assert torch.allclose(source(theirs), same_size(ours), atol=1e-4)
    bigger = network(3, input_size=(3, 128, 128))
    with torch.no_grad():
        own_mode = preparation(bigger).interpolation
        sized = nn.functional.interpolate(theirs, (128, 128), mode=own_mode, align_corners=False, antialias=True)
        assert torch.allclose(converted(bigger, given)(theirs), bigger(sized), atol=1e-6)
        assert not torch.allclose(bigger(theirs), bigger(sized), atol=1e-5)
    assert converted(target, given) is target
    assert isinstance(converted(bigger, given), Converted)


def test_a_conversion_is_part_of_what_is_cut_out():
    source = converted(network(4, mean=(0.1, 0.2, 0.3), input_size=(3, 128, 128)), preparation(network(3)))
    source = source.double()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)).double()
    groups = channel_groups(source, images)
    module = extract(groups, localize(groups, method="magnitude", keep=0.5))
    assert module.certificate < 1e-9
    assert module.spec.input_shape == (3, 160, 160)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pictures, a source that knows all four colours, and a target that knows two."""
    root = tmp_path_factory.mktemp("colours")
    where = folder(root / "all", COLOURS, count=6)
    folder(root / "new", ["blue", "red"], count=6)
    folder(root / "old", ["green", "grey"], count=6)
    for name, classes, own in (("source", 4, "all"), ("target", 2, "old")):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=classes)
        images, labels = next(iter(read(str(root / own), preparation(model).transform(), "train", "data")))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        safetensors.torch.save_file(model.eval().state_dict(), root / f"{name}.safetensors")
    assert where
    return root


def arguments(root, out, **changes):
    given = {
        "classes": "red,blue",
        "data": root / "all",
        "target-data": root / "old",
        "out": out,
        "method": "magnitude",
        "at": "input",
        "epochs": 20,
        "distill-steps": 20,
        **changes,
    }
    models = [f"timm/test_resnet@{root / name}.safetensors" for name in ("source", "target")]
    return ["clone", *models, *(part for k, v in given.items() if v is not None for part in (f"--{k}", str(v)))]


def check_origin(origin, root, out):
    """A clone's file names its networks and images, by digest too, and neither folders above them nor an account."""
    source = f"timm/test_resnet@{root / 'source.safetensors'}"
    assert origin["source"] == "timm/test_resnet@source.safetensors"
    assert origin["source weights"] == survey(source).weights
    files = [root / "all" / name / f"{number}.png" for name in ("blue", "red") for number in range(6)]
    rows = [file.parent.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest() for file in files]
    assert (origin["data"], origin["data images"]) == ("all", "12")
    assert origin["data digest"] == f"sha256:{hashlib.sha256(b''.join(rows)).hexdigest()}"
    assert origin["target data images"] == "12" and len(origin["date"]) == len("2026-11-26") and "by" not in origin
    assert str(root).encode() not in out.read_bytes()


@pytest.mark.slow
def test_from_names_and_folders_to_a_grafted_network(trained, tmp_path):
    out, both = tmp_path / "colours.safetensors", tmp_path / "grafted.safetensors"
    result = CliRunner().invoke(app, [*arguments(trained, out), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["class_names"] == ["red", "blue"]
    assert facts["classes"] == [3, 0]
    assert load(out).spec.at == "input"
    check_origin(dict(facts["origin"]), trained, out)
    target = f"timm/test_resnet@{trained / 'target.safetensors'}"
    assert CliRunner().invoke(app, ["inject", target, str(out), "--out", str(both)]).exit_code == 0
    model = load_model(str(both))
    pictures = read(str(trained / "new"), preparation(load_model(target)).transform(), "train", "data")
    with torch.no_grad():
        predicted = torch.cat([model(images).argmax(1) for images, _ in pictures])
    labels = torch.cat([labels for _, labels in pictures])
    assert float((predicted == torch.tensor([3, 2])[labels]).float().mean()) > 0.8  # columns: green, grey, red, blue


@pytest.mark.long
def test_without_data_of_old_classes_there_is_a_warning_and_a_clone(trained, tmp_path):
    out = tmp_path / "colours.safetensors"
    result = CliRunner().invoke(app, arguments(trained, out, **{"target-data": None}))
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr
    assert "3 red, 0 blue" in result.stdout
    assert out.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"classes": "red,pink"}, "'pink' is not in"),
        ({"data": "nowhere"}, "data: 'nowhere' cannot be read"),
        ({"keep": "2"}, "keep"),
        ({"at": "layer9"}, "layer9"),
        ({"out": "none/x.safetensors"}, "there is no folder 'none'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_leaves_no_file(trained, tmp_path, changes, why):
    out = tmp_path / "colours.safetensors"
    result = CliRunner().invoke(app, arguments(trained, changes.pop("out", out), **changes))
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert why in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "word", "choices"), [("method", "guess", "taylor"), ("search", "some", "early")])
def test_a_word_that_is_no_choice_is_a_usage_error_that_lists_the_choices(tmp_path, option, word, choices):
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "colours.safetensors", **{option: word}))
    assert result.exit_code == 2
    assert f"'{word}' is not one of" in result.output and choices in result.output
    assert list(tmp_path.iterdir()) == []
