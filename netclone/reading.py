"""read(where, ...) -> Pictures: labelled pictures by timm's own readers, with labels in a network's label space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from netclone.errors import ArgumentError, DataError, first_line
from netclone.sharing import ALONE, Workers

READERS = ("hfds", "hfids", "tfds", "torch", "wds")  # prefixes of timm's names of data sets


@dataclass(frozen=True)
class Pictures:
    """A data set: its name, the names of its classes by label, and its samples ``(image, label)``.

    Iterated over, it gives batches ``(images (N, C, H, W), labels (N,))``; ``columns``, if set, are the labels to give
    instead of its own. Several ``workers`` read a part of each batch and hand it to the others: each opens only its own
    pictures, once, and gets all batches.
    """

    where: str
    names: tuple[str, ...]
    samples: Any
    batch_size: int = 64
    columns: tuple[int, ...] | None = None
    workers: Workers = ALONE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        table = None if self.columns is None else torch.tensor(self.columns)
        batches = DataLoader(self.samples, self.batch_size) if self.workers.count == 1 else self._shared()
        for images, labels in batches:
            yield images, labels if table is None else table[labels]

    def _shared(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [range(len(self))[i : i + self.batch_size] for i in range(0, len(self), self.batch_size)]
        own = [list(batch[self.workers.own(len(batch))]) for batch in batches]
        read = iter(DataLoader(self.samples, batch_sampler=[part for part in own if part]))
        for part in own:
            pair: Sequence[Tensor] = ()
            with self.workers.agreed():
                pair = next(read) if part else ()
            forms = self.workers.told([(tensor.shape[1:], tensor.dtype) for tensor in pair])
            if not part:  # of a last batch that is smaller than there are workers
                pair = [torch.empty(0, *shape, dtype=dtype) for shape, dtype in next(filter(None, forms))]
            images, labels = (self.workers.joined(tensor) for tensor in pair)
            yield images, labels

    def __len__(self) -> int:
        return len(self.samples)

    def labelled_for(self, network: nn.Module, what: str) -> Pictures:
        """The same with labels in the label space of a network, found by the names of the classes.

        A name is one of the network's own labels (as its configuration says them, or ImageNet's synsets and words), or
        the number of a column. Where no name is any of that and there are as many classes as columns, they are taken
        in order, as every training script does.

        Raises
        ------
        DataError
            If a class is none of the network's.
        """
        columns = _columns(self.names, network)
        missing = [name for name, column in zip(self.names, columns, strict=True) if column is None]
        count = getattr(network, "num_classes", None)
        if len(missing) == len(self.names) == count:
            return replace(self, columns=tuple(range(count)))
        if missing:
            known = ", ".join(list(_labels(network))[:3])
            raise DataError(
                f"{what}: class '{missing[0]}' of '{self.where}' is none of the {count} of the network"
                + (f", which are called {known}, ..." if known else "")
                + "; name the folders after its labels or after its columns (0, 1, ...), or have one folder for each"
            )
        return replace(self, columns=tuple(column for column in columns if column is not None))

    def only(self, labels: Sequence[int]) -> Pictures:
        """The samples of some of its own labels."""
        wanted = set(labels)
        found = [index for index, label in enumerate(_labels_of(self.samples)) if label in wanted]
        return replace(self, samples=Subset(self.samples, found))


def read(where: str, transform: Callable[[Any], Tensor], split: str, what: str, batch_size: int = 64) -> Pictures:
    """Open a folder of pictures (a folder for each class), a tar file of such, or a data set by timm's name for it.

    Parameters
    ----------
    where
        A path, or ``"hfds/..."``, ``"torch/cifar10"`` and so on, as for timm's ``create_dataset``.
    split
        Which part, where there are several: a folder of that name, or the data set's own.
    what
        The argument's name, for messages.

    Raises
    ------
    DataError
        If there is no such data, or it has no classes.
    """
    named = where.partition("/")[0] in READERS and not Path(where).exists()
    try:
        samples = create_dataset(where if named else "", root=None if named else where, split=split)
    except Exception as error:  # readers and downloads may raise anything
        raise DataError(
            f"{what}: '{where}' cannot be read: {type(error).__name__}: {first_line(error)}; expected a folder with a "
            "folder of images for each class, a tar file of such, or a name such as torch/cifar10 or hfds/..."
        ) from error
    samples.transform = transform
    reader = getattr(samples, "reader", None)
    ways = ((reader, "class_to_idx"), (reader, "class_name_to_idx"), (samples, "class_to_idx"))  # each reader its own
    indices: Mapping[str, int] = next((found for owner, way in ways if (found := getattr(owner, way, None))), {})
    if not indices or not len(samples):
        raise DataError(f"{what}: '{where}' says no classes: expected a folder of images for each")
    names = tuple(name for name, _ in sorted(indices.items(), key=lambda pair: pair[1]))
    return Pictures(where, names, samples, batch_size)


def chosen(classes: str, pictures: Pictures) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The columns and names of classes given as text, ``"heron,ibis"`` or ``"5,7"``, of labelled pictures.

    Raises
    ------
    ArgumentError
        If one is not among them (the closest are named).
    """
    assert pictures.columns is not None
    by_name = dict(zip(pictures.names, pictures.columns, strict=True))
    by_column = {str(column): column for column in pictures.columns}
    names = {column: name for name, column in by_name.items()}
    found = []
    for asked in filter(None, (part.strip() for part in classes.split(","))):
        column = by_name.get(asked, by_column.get(asked))
        if column is None:
            listed = ", ".join(f"{name} ({column})" for name, column in list(by_name.items())[:8])
            raise ArgumentError(f"classes: '{asked}' is not in '{pictures.where}', which has {listed}")
        found.append(column)
    if not found:
        raise ArgumentError("classes: none was given; name some, such as heron,ibis or 5,7")
    return tuple(found), tuple(names[column] for column in found)


def _columns(names: Sequence[str], network: nn.Module) -> list[int | None]:
    labels = _labels(network)
    if any(_plain(name) in labels for name in names):
        return [labels.get(_plain(name)) for name in names]
    count = getattr(network, "num_classes", 0)
    return [int(name) if name.isdigit() and int(name) < count else None for name in names]


def _labels(network: nn.Module) -> dict[str, int]:
    """What a network calls its columns, each in every way it may be called."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    given = cfg.get("label_names")
    if given and len(given) == getattr(network, "num_classes", None):
        return {_plain(name): column for column, name in enumerate(given)}
    subset = infer_imagenet_subset(network)
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    found: dict[str, int] = {}
    for column in range(info.num_classes()):
        found[info.index_to_label_name(column)] = column
        for word in info.index_to_description(column).split(","):
            found.setdefault(_plain(word), column)
    return found


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").replace("-", " ").lower()


def _labels_of(samples: Any) -> list[int]:
    """The label of every sample, without opening its picture where the reader knows it."""
    reader = getattr(samples, "reader", None)
    for listed in (getattr(reader, "targets", None), getattr(samples, "targets", None)):
        if listed is not None and len(listed) == len(samples):
            return [int(label) for label in listed]
    listed = getattr(reader, "samples", None)
    if listed is not None and len(listed) == len(samples):
        return [int(item[1]) for item in listed]
    return [int(label) for _, label in samples]
