"""wanted(classes, pictures, network): the classes that a user names, as columns of a network and folders of images.

Text such as ``"heron,ibis"`` or ``"5,7"`` names folders, or the network's columns. ``"ants=310,bees=bee"`` says
for each folder which of the network's classes its images show.
"""

from __future__ import annotations

from torch import nn

from netclone.errors import ArgumentError
from netclone.graph.describing import labels_of, plain
from netclone.models.reading import Pictures
from netclone.runtime.text import suggestion


def wanted(classes: str, pictures: Pictures, network: nn.Module) -> tuple[Pictures, tuple[int, ...], tuple[str, ...]]:
    """The images of some classes with a network's labels, the classes' columns, and what the classes are called.

    A class is called by its folder's name. Folders of other classes are left out, with a note.

    Raises
    ------
    ArgumentError
        If there is no such folder or class (close ones are suggested), or one is named twice.
    DataError
        As :meth:`netclone.models.reading.Pictures.labelled_for`.
    """
    asked = [part.partition("=") for part in classes.split(",") if part.strip()]
    if not asked:
        raise ArgumentError("classes: got none; name at least one, such as heron,ibis or 5,7 or ants=310")
    told = {_folder(name.strip(), pictures): _column(one.strip(), network) for name, mark, one in asked if mark}
    labelled = pictures.labelled_for(network, told)
    by_name = labelled.known
    by_column = {str(column): name for name, column in by_name.items()}
    found: dict[str, int] = {}
    for name, mark, _ in asked:
        name = name.strip()
        if not mark and name not in by_name:
            name = by_column.get(name, name)
        if name not in by_name:
            raise ArgumentError(_unknown(name, labelled))
        if name in found:
            raise ArgumentError(f"classes: '{name}' is named twice; name each class once")
        found[name] = by_name[name]
    return labelled.keeping(found.values()), tuple(found.values()), tuple(found)


def _folder(name: str, pictures: Pictures) -> str:
    if name not in pictures.names:
        raise ArgumentError(
            f"classes: there is no folder '{name}' in '{pictures.where}', which has {_some(pictures.names)}"
            f"{suggestion(name, pictures.names)}"
        )
    return name


def _column(one: str, network: nn.Module) -> int:
    """The column of a class, given by its number or by one of its names."""
    labels, count = labels_of(network), getattr(network, "num_classes", None)
    column = labels.get(plain(one))
    if column is None and one.isascii() and one.isdigit() and (count is None or int(one) < count):
        column = int(one)
    if column is None:
        numbers = "" if count is None else f", whose columns are 0 to {count - 1}"
        raise ArgumentError(f"classes: '{one}' is no class of the source{numbers}{suggestion(plain(one), labels)}")
    return column


def _unknown(name: str, pictures: Pictures) -> str:
    """What to say about a class that no folder has, or whose folder the network does not know."""
    known = pictures.known
    listed = _some([f"{other} ({column})" for other, column in known.items()])
    if name in pictures.names:
        return (
            f"classes: the source has no class called '{name}', as a folder of '{pictures.where}' is; say which of its "
            f"columns that is, such as {name}=310"
        )
    return f"classes: '{name}' is not in '{pictures.where}', which has {listed}{suggestion(name, known)}"


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
