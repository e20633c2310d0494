"""Pictures in folders and tar files: which are listed, as what, and what is refused."""

import os
import tarfile
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from netclone.errors import DataError
from netclone.models.folders import listed, naturally


def files(root, *names):
    """Files that hold their own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def shown(listing):
    return {(os.path.basename(name), listing.classes[label]) for name, label in listing.pictures}


def test_a_folder_is_read_as_image_folder_reads_it(tmp_path):
    kinds = ("a.png", "b.JPG", "c.jpeg", "d.webp", "e.tif", "f.TIFF", "g.bmp", "h.ppm", "notes.txt")
    files(tmp_path, *(f"cat/{kind}" for kind in kinds), "dog/deep/er/x.png", "loose.png", "list.csv")
    listing = listed(tmp_path, "train", "data")
    theirs = ImageFolder(str(tmp_path))
    assert listing.classes == tuple(theirs.classes)
    assert set(listing.pictures) == set(theirs.samples)


def test_classes_and_pictures_are_in_timms_order(tmp_path):
    files(tmp_path, "10/b10.png", "10/b9.png", "9/1.png", "Ant/1.png")
    listing = listed(tmp_path, "train", "data")
    assert listing.classes == ("9", "10", "Ant")
    assert [Path(name).name for name, label in listing.pictures if label == 1] == ["b9.png", "b10.png"]
    assert sorted(["7", "07", "a10", "A9", ""], key=naturally) == ["", "07", "7", "A9", "a10"]


def test_what_is_hidden_is_passed_over(tmp_path):
    files(tmp_path, "cat/1.png", "cat/._1.png", "cat/.thumbs/2.png", ".git/x/3.png", "__MACOSX/cat/4.png", ".x.png")
    assert shown(listed(tmp_path, "train", "data")) == {("1.png", "cat")}


def test_links_are_followed_but_not_back(tmp_path):
    root = files(tmp_path / "in" / "root", "cat/1.png", "dog/2.png")
    files(tmp_path / "elsewhere", "3.png")
    files(tmp_path / "in" / "beside", "4.png")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    (root / "dog" / "above").symlink_to(tmp_path / "in")
    (root / "all").symlink_to(root)
    (root / "cat" / "self").symlink_to("self")
    assert shown(listed(root, "train", "data")) == {("1.png", "cat"), ("3.png", "cat"), ("2.png", "dog")}


@pytest.mark.parametrize(("name", "split"), [("train", "training"), ("val", "validation"), ("eval", "val"), ("b", "b")])
def test_a_split_is_a_folder_of_that_or_a_like_name(tmp_path, name, split):
    files(tmp_path, f"{name}/cat/1.png", "other/dog/2.png")
    assert shown(listed(tmp_path, split, "data")) == {("1.png", "cat")}


@pytest.mark.parametrize("top", ["", "./", "pictures/", "a/b/"])
def test_a_tar_file_is_a_folder(tmp_path, top):
    files(tmp_path / "x", "cat/1.png", "cat/deep/2.WEBP", "dog/3.tif", "dog/._3.tif")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "x", arcname=top or ".")
    listing = listed(tmp_path / "x.tar", "train", "data")
    assert shown(listing) == {("1.png", "cat"), ("2.WEBP", "cat"), ("3.tif", "dog")}
    contents = []
    for name, _ in listing.pictures:
        with listing.open(name) as file:
            contents.append(file.read())
    assert contents == [b"cat/1.png", b"cat/deep/2.WEBP", b"dog/3.tif"]


def test_what_holds_no_classes_is_refused_with_the_reason(tmp_path):
    files(tmp_path, "loose/1.png", "empty/cat/notes.txt", "part/cat/1.png", "part/dog/notes.txt", "text.tar")
    with tarfile.open(tmp_path / "none.tar", "w") as file:
        file.add(tmp_path / "text.tar", arcname="cat/1.txt")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as file:
        file.add(tmp_path / "part", arcname=".")
    for name, why in {
        "missing": "cannot be read: there is no such file or folder",
        "loose": "has no classes: it has images, but no subfolder per class",
        "empty": "has no classes: it has no images in subfolders; expected .*.webp",
        "part": "no image in 'dog', which counts as a class; add images .*, or remove the folder",
        "text.tar": "neither a folder nor a tar file",
        "none.tar": "has no classes",
        "packed.tar": "it is compressed; decompress it first",
    }.items():
        with pytest.raises(DataError, match=why):
            listed(tmp_path / name, "train", "data")


def test_a_pipe_is_no_picture_and_nobody_waits_for_it(tmp_path):
    files(tmp_path, "cat/1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    listing = listed(tmp_path, "train", "data")
    with pytest.raises(OSError, match="not a regular file"):
        listing.open(listing.pictures[1][0])
