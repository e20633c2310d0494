"""listed(where) -> Listing: the pictures in a folder or tar file, which has a folder for each class.

A folder is read as torchvision's ImageFolder reads it: its own folders are the classes, with all pictures below them.
What is hidden is passed over, and a link back to where it lies is not followed.
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
    """Names of classes, in timm's order; of pictures, with their labels; and how to open one by its name."""

    classes: tuple[str, ...]
    pictures: tuple[tuple[str, int], ...]
    open: Callable[[str], IO[bytes]]

    @classmethod
    def of(cls, found: dict[str, list[str]], opener: Callable[[str], IO[bytes]]) -> Listing:
        """From the names of pictures by class."""
        classes = tuple(sorted(found, key=naturally))
        pictures = [(name, label) for label, one in enumerate(classes) for name in sorted(found[one], key=naturally)]
        return cls(classes, tuple(pictures), opener)


def listed(where: Path, split: str, what: str) -> Listing:
    """List the pictures of a folder (of its part for a split, where it has some) or of a tar file.

    Raises
    ------
    DataError
        If there is no such place, it cannot be read, or a class has no picture.

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
        f"{what}: '{where}' cannot be read: it is neither a folder nor a tar file; give one with a folder of pictures "
        "for each class"
    )


def naturally(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key that sorts as timm does: numbers by value, whatever the case; the same names in any order alike."""
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
    """Pictures in a folder and those below it; where a folder was seen, or lies above, a link leads back."""
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
    """A member's class is the folder at the top, below those that all pictures share."""
    with tarfile.open(where) as file:  # compressed ones would be read from their beginning for each picture
        if not isinstance(file.fileobj, BufferedReader):
            raise DataError(f"{what}: '{where}' cannot be read: it is compressed; unpack it first")
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
        beside = "pictures, but no folder for each class" if loose else "no pictures in folders"
        raise DataError(
            f"{where} cannot be read: it says no classes: there are {beside}; expected a folder of pictures "
            f"({', '.join(IMG_EXTENSIONS)}) for each class"
        )
    if empty := [name for name, pictures in found.items() if not pictures]:
        listed = ", ".join(f"'{name}'" for name in empty[:5])
        raise DataError(
            f"{where}: no picture in {listed}, which would be a class; put pictures "
            f"({', '.join(IMG_EXTENSIONS)}) there, or remove it"
        )


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == _LEFT_BY_ZIP
