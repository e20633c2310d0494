"""ClassNames: a network's columns by the names of its classes, and what is said where a name is not clear."""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from netclone.errors import ArgumentError, NetcloneError
from netclone.graph.describing import columns_by_name, facts_about, named_columns, plain


@dataclass(frozen=True)
class ClassNames:
    """Columns by class name in normal form; ``whose`` network it is, as messages call it.

    Examples
    --------
    >>> names = ClassNames.given(["Grey Heron", "ibis"], "source")
    >>> names.column("grey_heron", "classes")
    0
    >>> names.column("ibiss", "classes")
    Traceback (most recent call last):
        ...
    netclone.errors.ArgumentError: classes: the source has no class 'ibiss'; did you mean 'ibis'?
    """

    columns: Mapping[str, tuple[int, ...]]
    whose: str

    @classmethod
    def of(cls, network: object, whose: str) -> ClassNames:
        """Those that a network records, or those of ImageNet if it has as many classes."""
        if not isinstance(network, nn.Module):
            return cls({}, whose)
        return cls(columns_by_name(facts_about(network), getattr(network, "num_classes", None)), whose)

    @classmethod
    def given(cls, names: Iterable[str], whose: str) -> ClassNames:
        """Those of a list, one for each column."""
        return cls(named_columns(names), whose)

    def column(self, name: str, what: str, error: type[NetcloneError] = ArgumentError) -> int:
        """The column of a name; ``what`` is the argument that it was given in.

        Raises
        ------
        NetcloneError
            Of the type ``error``: if there is no such name, it stands for several columns, or no names are known.
        """
        found = self.columns.get(plain(name), ())
        if len(found) == 1:
            return found[0]
        if found:
            raise error(
                f"{what}: {name!r} names {len(found)} classes of the {self.whose}, columns "
                f"{', '.join(map(str, found))}; give the column of the one that is meant"
            )
        if not self.columns:
            raise error(
                f"{what}: {name!r} is a name, and the {self.whose} records no class names; give columns, such as 0, "
                f"or pass the names of all of them{_way(self.whose)}"
            )
        near = difflib.get_close_matches(plain(name), self.columns, n=3) or [
            known for known in self.columns if plain(name) in known.split()
        ]
        hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"it has {_some(self.columns)}"
        raise error(f"{what}: the {self.whose} has no class {name!r}; {hint}")

    def resolved(self, classes: object, what: str = "classes") -> tuple[int, ...]:
        """The columns of classes: one of them or several, each as a name or as a column.

        Raises
        ------
        ArgumentError
            If one is neither, or as :meth:`column`.
        """
        listed: object = [classes] if isinstance(classes, str) else classes
        with contextlib.suppress(TypeError, ValueError):  # one column, perhaps numpy's or in a tensor
            listed = [operator.index(listed)]  # type: ignore[arg-type]
        try:
            return tuple(
                self.column(one, what) if isinstance(one, str) else operator.index(one)
                for one in listed  # type: ignore[attr-defined]  # any sequence
            )
        except TypeError as error:
            raise ArgumentError(
                f"{what}: got {classes!r}, expected class indices or names: one, or a sequence of them"
            ) from error


def check_listed(names: Sequence[str], count: int, what: str) -> None:
    """Raise unless names are texts, one for each of a network's columns.

    Raises
    ------
    ArgumentError
        If they are not.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"{what}: got {names!r}; expected a sequence of texts, one for each column")
    if len(names) not in (0, count):
        raise ArgumentError(f"{what}: {len(names)} names for {count} columns; give one for each")


def _way(whose: str) -> str:
    return f" as {whose}_names=[...] of netclone.clone" if whose in ("source", "target") else ""


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (", ..." if len(listed) > 5 else "")
