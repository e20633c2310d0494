"""The classes that a user names on the command line: folders, columns, and folders with the classes that they show."""

import pytest
import timm
import torch
from pictures import folder

from netclone.errors import ArgumentError
from netclone.graph.preparing import preparation
from netclone.models.classes import wanted
from netclone.models.reading import read


def network(classes, **cfg):
    model = timm.create_model("test_resnet", num_classes=classes).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": classes, **cfg}
    return model


def opened(where, lines=None):
    transform = preparation(network(3)).transform()
    return read(where, transform, "train", "data", note=[].append if lines is None else lines.append)


def test_a_class_is_named_by_folder_or_column(tmp_path):
    lines = []
    pictures, columns, names = wanted("red, 0", opened(folder(tmp_path, ["red", "green", "blue"]), lines), network(3))
    assert (columns, names) == ((2, 0), ("red", "blue"))
    assert sorted(torch.cat([labels for _, labels in pictures]).tolist()) == [0, 0, 0, 2, 2, 2]
    assert lines[-1].endswith("are left out: green")


@pytest.mark.parametrize("classes", ["ants=310,bees=309", "ants=ant, bees = Bee", "ants=n02219486,bees=309"])
def test_a_folder_of_any_name_shows_the_class_that_is_told(tmp_path, classes):
    pictures = opened(folder(tmp_path, ["ants", "bees", "dirt"], count=2))
    pictures, columns, names = wanted(classes, pictures, network(1000))
    assert (columns, names) == ((310, 309), ("ants", "bees"))
    assert torch.cat([labels for _, labels in pictures]).tolist() == [310, 310, 309, 309]


def test_some_classes_are_told_and_others_found_by_their_names(tmp_path):
    given = network(3, label_names=["heron", "ibis", "stork"])
    pictures = opened(folder(tmp_path, ["Heron", "long_legs", "stork"]))
    assert wanted("heron, long_legs=stork".replace("heron", "Heron"), pictures, given)[1:] == (
        (0, 2),
        ("Heron", "long_legs"),
    )


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ("red,pink", r"'pink' is not in '.*', which has blue \(0\), green \(1\), red \(2\)"),
        ("gren", r"'gren' is not in .*; did you mean 'green'\?"),
        ("gren=1", r"there is no folder 'gren' in .*, which has blue, green, red; did you mean 'green'\?"),
        ("green=7", "'7' is no class of the source, whose columns are 0 to 2"),
        ("green=-1", "'-1' is no class of the source"),
        ("green=", "'' is no class of the source"),
        ("green=1,blue", r"the source has no class called 'blue', as a folder .* is; .*such as blue=310"),
        ("green,green", "'green' is named twice"),
        (" , ", "got none; name at least one"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_closest_words(tmp_path, classes, why):
    pictures = opened(folder(tmp_path, ["red", "green", "blue"]))
    with pytest.raises(ArgumentError, match=why):
        wanted(classes, pictures, network(3))


def test_a_class_of_the_source_is_suggested(tmp_path):
    pictures = opened(folder(tmp_path, ["birds"]))
    with pytest.raises(ArgumentError, match="'herron' is no class of the source.*; did you mean 'heron'"):
        wanted("birds=herron", pictures, network(2, label_names=["heron", "ibis"]))


def test_two_folders_cannot_be_one_class(tmp_path):
    pictures = opened(folder(tmp_path, ["red", "green"]))
    with pytest.raises(ValueError, match="'green' and 'red' in .* are the same class of the network, column 1"):
        wanted("red=1,green=1", pictures, network(3))
