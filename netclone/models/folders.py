"""listed(where) -> Listing: the images in a folder or tar file that has one subfolder per class.

A folder is read as torchvision's ImageFolder reads it: each subfolder is a class, with all images below it. Hidden
files are skipped, and so are links that lead back to a folder above.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO

from torchvision.datasets.folder import IMG_EXTENSIONS

from netclone.errors import DataError

_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_LEFT_BY_ZIP = "__MACOSX"


@dataclass(frozen=True)
class Listing:
    """Class names in timm's order, image names with their labels, and how to open an image by its name."""

    classes: tuple[str, ...]
    pictures: tuple[tuple[str, int], ...]
    open: Callable[[str], IO[bytes]]

    @classmethod
    def of(cls, found: dict[str, list[str]], opener: Callable[[str], IO[bytes]]) -> Listing:
        """From the names of images by class."""
        classes = tuple(sorted(found, key=naturally))
        pictures = [(name, label) for label, one in enumerate(classes) for name in sorted(found[one], key=naturally)]
        return cls(classes, tuple(pictures), opener)


def listed(where: Path, split: str, what: str) -> Listing:
    """List the images of a folder (of its subfolder for the split, if there is one) or of a tar file.

    Raises
    ------
    DataError
        If there is no such folder or file, it cannot be read, or a class has no image.

    Examples
    --------
    >>> listed(Path("nowhere"), "train", "data")
    Traceback (most recent call last):
        ...
    netclone.errors.DataError: data: 'nowhere' cannot be read: there is no such file or folder
    """
    try:
        if where.is_dir():
            return _of_folder(_part(where, split), what)
        if not where.exists():
            raise DataError(f"{what}: '{where}' cannot be read: there is no such file or folder")
        if where.is_file() and tarfile.is_tarfile(where):
            return _of_tar(where, what)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{what}: '{where}' cannot be read: {type(error).__name__}: {error}") from error
    raise DataError(
        f"{what}: '{where}' cannot be read: it is neither a folder nor a tar file; expected one with a subfolder of "
        "images per class"
    )


def pictures_in(where: Path, what: str) -> Listing:
    """All images in a folder and below it, or one image; each is a class of its own, called by its path.

    Raises
    ------
    DataError
        If there is no such folder or image, it cannot be read, or it holds no image.
    """
    try:
        if where.is_dir():
            paths = sorted(_below(where, set()), key=naturally)
        elif where.exists():
            paths = [str(where)] if _is_picture(where.name) else []
        else:
            raise DataError(f"{what}: '{where}' cannot be read: there is no such file or folder")
    except OSError as error:
        raise DataError(f"{what}: '{where}' cannot be read: {type(error).__name__}: {error}") from error
    if not paths:
        kind = "it has no images" if where.is_dir() else "it is no image"
        expected = f"expected a folder of images, or one ({', '.join(IMG_EXTENSIONS)})"
        raise DataError(f"{what}: '{where}' cannot be read: {kind}; {expected}")
    return Listing(tuple(paths), tuple((path, number) for number, path in enumerate(paths)), _opened)


def naturally(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key for timm's order: numbers by value, case ignored; independent of the order that names come in."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(1, int(part), "") if number % 2 else (0, 0, part) for number, part in enumerate(parts)], name


def _part(where: Path, split: str) -> Path:
    names = (split, *(name for synonyms in _SYNONYMS if split in synonyms for name in synonyms))
    return next((where / name for name in names if (where / name).is_dir()), where)


def _of_folder(root: Path, what: str) -> Listing:
    found: dict[str, list[str]] = {}
    loose, real = False, root.resolve()
    above = {real, *real.parents}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if _is_folder(entry):
            if not _passed_over(entry.name) and Path(entry.path).resolve() not in above:
                found[entry.name] = list(_below(Path(entry.path), set(above)))
        else:
            loose = loose or _is_picture(entry.name)
    _check_classes(found, f"{what}: '{root}'", loose)
    return Listing.of(found, _opened)


def _below(folder: Path, seen: set[Path]) -> Iterator[str]:
    """Images in a folder and below it; a folder that was seen already, or lies above, is not entered again."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in os.scandir(folder):
        if _passed_over(entry.name):
            continue
        if _is_folder(entry):
            yield from _below(Path(entry.path), seen)
        elif _is_picture(entry.name):
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _opened(name: str) -> IO[bytes]:
    if not stat.S_ISREG(os.stat(name).st_mode):  # reading a pipe would wait for ever
        raise OSError("not a regular file")
    return open(name, "rb")


def _of_tar(where: Path, what: str) -> Listing:
    """A member's class is its topmost folder, below those that all images share."""
    with tarfile.open(where) as file:  # compressed ones would be read from their beginning for each picture
        if not isinstance(file.fileobj, BufferedReader):
            raise DataError(f"{what}: '{where}' cannot be read: it is compressed; decompress it first")
        members = {m.name: m for m in file if (m.isreg() or m.islnk()) and _is_picture(m.name)}
    paths = {name: [part for part in name.split("/") if part not in ("", ".")] for name in members}
    paths = {name: parts for name, parts in paths.items() if not any(map(_passed_over, parts))}
    while paths and all(len(p) > 2 for p in paths.values()) and len({p[0] for p in paths.values()}) == 1:
        paths = {name: parts[1:] for name, parts in paths.items()}
    found: dict[str, list[str]] = {}
    for name, parts in paths.items():
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(name)
    _check_classes(found, f"{what}: '{where}'", loose=bool(paths))

    def opener(name: str) -> IO[bytes]:
        with tarfile.open(where, "r:") as file:
            content = file.extractfile(members[name])
            if content is None:
                raise OSError("not a regular file")
            return BytesIO(content.read())

    return Listing.of(found, opener)


def _check_classes(found: dict[str, list[str]], where: str, loose: bool) -> None:
    if not any(found.values()):
        found_there = "it has images, but no subfolder per class" if loose else "it has no images in subfolders"
        raise DataError(
            f"{where} has no classes: {found_there}; expected a subfolder of images ({', '.join(IMG_EXTENSIONS)}) per "
            "class"
        )
    if empty := [name for name, pictures in found.items() if not pictures]:
        listed = ", ".join(f"'{name}'" for name in empty[:5])
        raise DataError(
            f"{where}: there is no image in {listed}, which counts as a class; add images "
            f"({', '.join(IMG_EXTENSIONS)}), or remove the folder"
        )


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == _LEFT_BY_ZIP
