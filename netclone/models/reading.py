"""read(where, ...) -> Pictures: labelled images by timm's own readers, with labels in a network's label space."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from netclone.errors import DataError, first_line
from netclone.graph.describing import labels_of, plain
from netclone.models.folders import Listing, listed, pictures_in
from netclone.models.loading import Note, silent
from netclone.runtime.sharing import ALONE, Workers
from netclone.runtime.text import suggestion

READERS = ("hfds", "hfids", "tfds", "torch", "wds")  # prefixes of timm's names of data sets
_OPENED = re.compile(r" <_io\.[^>]*>")  # what Pillow calls an open file: the path stands before it already


@dataclass(frozen=True)
class Pictures:
    """A dataset: where it is, its class names by label, and its samples ``(image, label)``.

    Iterating gives batches ``(images (N, C, H, W), labels (N,))``; ``columns``, if set, are the labels to give instead
    of the dataset's own. Several ``workers`` each read a part of every batch and hand it to the others: each opens only
    its own images, once, and gets all batches.
    """

    where: str
    names: tuple[str, ...]
    samples: Any
    batch_size: int = 64
    columns: tuple[int, ...] | None = None
    workers: Workers = ALONE
    what: str = "data"
    note: Note = silent
    broken: dict[str, str] = field(default_factory=dict)
    seen: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        table = None if self.columns is None else torch.tensor(self.columns)
        self.broken.clear()
        self.seen.clear()
        indices = [list(range(len(self))[i : i + self.batch_size]) for i in range(0, len(self), self.batch_size)]
        if isinstance(self.samples, IterableDataset):
            generator = torch.Generator().manual_seed(0)
            batches: Iterator[Any] = iter(DataLoader(self.samples, self.batch_size, generator=generator))
        else:
            batches = self._loaded(indices) if self.workers.count == 1 else self._shared(indices)
        for images, labels in filter(None, batches):
            yield images, labels if table is None else table[labels]
        for part in self.workers.told(dict(self.seen)):
            self.seen.update(part)
        broken = {name: why for part in self.workers.told(dict(self.broken)) for name, why in part.items()}
        if broken:
            some = "; ".join(f"{name} ({why})" for name, why in list(broken.items())[:3])
            more = ", ..." if len(broken) > 3 else ""
            self.note(f"{self.what}: {len(broken)} of {len(self)} images cannot be read and are skipped: {some}{more}")

    def _loaded(self, batches: list[list[int]]) -> Iterator[Any]:
        """Batches of samples, or None for a batch without readable images; random states stay as they are."""
        generator = torch.Generator().manual_seed(0)
        return iter(DataLoader(self.samples, batch_sampler=batches, collate_fn=_collated, generator=generator))

    def _shared(self, batches: list[list[int]]) -> Iterator[Any]:
        own = [list(batch[self.workers.own(len(batch))]) for batch in batches]
        read = self._loaded([part for part in own if part])
        for part in own:
            pair: Sequence[Tensor] | None = None
            with self.workers.agreed():
                pair = next(read) if part else None
            forms = self.workers.told([(tensor.shape[1:], tensor.dtype) for tensor in pair or ()])
            form = next(filter(None, forms), None)
            if form is None:
                continue
            if not pair:  # of a last batch that is smaller than there are workers, or of broken pictures alone
                pair = [torch.empty(0, *shape, dtype=dtype) for shape, dtype in form]
            images, labels = (self.workers.joined(tensor) for tensor in pair)
            yield images, labels

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str | None:
        """SHA-256 of the images as they were last read, in their order, and of their classes' names; None if unknown.

        Of an image its file counts, byte for byte, or its pixels where a dataset has no files. Its name does not.
        """
        if not self.seen:
            return None
        digest = hashlib.sha256()
        for _, (label, content) in sorted(self.seen.items()):
            digest.update(f"{self.names[label]}\0".encode() + content)
        return digest.hexdigest()

    def labelled_for(self, network: nn.Module, told: Mapping[str, int] | None = None) -> Pictures:
        """The same images with a network's labels, found by the names of the classes, or as ``told`` for some.

        A name may be one of the network's labels (as its config lists them, or ImageNet's synsets and words), or the
        number of a column. If no name is either, and there are as many classes as columns, classes are taken in timm's
        order, as its training script does. A class that the network does not have gets the label -1.

        Raises
        ------
        DataError
            If the network has none of the classes, or two of them are the same one.
        """
        told = told or {}
        columns = [
            told.get(name, None if column in told.values() else column)
            for name, column in zip(self.names, _columns(self.names, network), strict=True)
        ]
        known = [column for column in columns if column is not None]
        count = getattr(network, "num_classes", None)
        if not known and len(self.names) == count:
            if list(self.names) != sorted(self.names):
                self.note(
                    f"{self.what}: classes are taken in timm's order, {_some(self.names)}. ImageFolder's order is "
                    f"{_some(sorted(self.names))}; if the network was trained with that, name the folders 0, 1, ..."
                )
            return replace(self, columns=tuple(range(count)))
        if not known:
            labels = labels_of(network)
            near = suggestion(plain(self.names[0]), labels)
            called = "" if near else ", ".join(list(labels)[:3])
            raise DataError(
                f"{self.what}: class '{self.names[0]}' of '{self.where}' is not one of the network's {count}"
                + (f", such as {called}" if called else near.removesuffix("?"))
                + "; name the folders after its labels or its columns (0, 1, ...), or give one folder for each column"
            )
        for column in known:
            if known.count(column) > 1:
                same = [name for name, other in zip(self.names, columns, strict=True) if other == column]
                raise DataError(
                    f"{self.what}: {' and '.join(map(repr, same))} in '{self.where}' are the same class of the "
                    f"network, column {column}; put their images into one folder, or rename one"
                )
        return replace(self, columns=tuple(-1 if column is None else column for column in columns))

    @property
    def known(self) -> dict[str, int]:
        """The labels of its classes by name, without those that the network does not have."""
        assert self.columns is not None
        return {name: column for name, column in zip(self.names, self.columns, strict=True) if column >= 0}

    def keeping(self, columns: Collection[int]) -> Pictures:
        """The samples with these columns as labels; a note says which classes are left out."""
        assert self.columns is not None
        kept = [label for label, column in enumerate(self.columns) if column in columns]
        if out := [name for label, name in enumerate(self.names) if label not in kept]:
            self.note(
                f"{self.what}: {len(out)} of the {len(self.names)} classes in '{self.where}' are left out: {_some(out)}"
            )
            return self.only(kept)
        return self

    def only(self, labels: Sequence[int]) -> Pictures:
        """The samples of some of its own labels."""
        wanted = set(labels)
        return self.at([index for index, label in enumerate(self.labels) if label in wanted])

    def at(self, numbers: Sequence[int]) -> Pictures:
        """The samples of these numbers."""
        return replace(self, samples=Subset(self.samples, numbers))

    @property
    def labels(self) -> Sequence[int]:
        """Its own label of every sample."""
        return _labels_of(self.samples)


class _Decoded(Dataset[tuple[Tensor, int] | None]):
    """Images, decoded and preprocessed; one that cannot be read is an error, or None and recorded in ``broken``."""

    def __init__(
        self,
        count: int,
        picture: Callable[[int], tuple[Image.Image, int, bytes]],
        name: Callable[[int], str],
        transform: Callable[[Any], Tensor],
        what: str,
        broken: dict[str, str] | None,
    ) -> None:
        self.count, self.picture, self.name, self.transform = count, picture, name, transform
        self.what, self.broken = what, broken
        self.seen: dict[int, tuple[int, bytes]] = {}
        self.targets: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            picture, label, content = self.picture(index)
        except MemoryError:
            raise
        except Exception as error:  # decoders of pictures raise anything
            why = _OPENED.sub("", f"{type(error).__name__}: {first_line(error)}")
            if self.broken is not None:
                self.broken[self.name(index)] = why
                return None
            raise DataError(
                f"{self.what}: image '{self.name(index)}' cannot be read: {why}; replace or remove it, or pass "
                "--skip-broken"
            ) from error
        self.seen[index] = label, content
        return self.transform(picture), label


def read(
    where: str,
    transform: Callable[[Any], Tensor],
    split: str,
    what: str,
    batch_size: int = 64,
    *,
    skip_broken: bool = False,
    note: Note = silent,
) -> Pictures:
    """Open a folder with one subfolder of images per class, a tar file of such a folder, or a dataset of timm's.

    Parameters
    ----------
    where
        A path, or a name for timm's ``create_dataset``: ``"torch/cifar10"``, ``"hfds/..."`` and so on.
    split
        Which part to use, if there are several: a subfolder of that name, or a split of the dataset.
    what
        The argument's name, for messages.
    skip_broken
        Whether to skip and count images that cannot be read, instead of raising.
    note
        Called with one line for the user when something is left out.

    Raises
    ------
    DataError
        If there is no such data, or it has no classes; while iterating, if an image cannot be read.
    """
    broken: dict[str, str] = {}
    noted = broken if skip_broken else None
    if where.partition("/")[0] not in READERS or os.path.exists(where):
        listing = listed(Path(where), split, what)
        names, samples = listing.classes, _of_listing(listing, transform, what, noted)
    else:
        names, samples = _of_name(where, split, transform, what, noted)
    seen = getattr(samples, "seen", {})  # a stream of samples has none
    return Pictures(where, names, samples, batch_size, what=what, note=note, broken=broken, seen=seen)


def read_unlabelled(
    where: str, transform: Callable[[Any], Tensor], what: str, batch_size: int = 64, note: Note = silent
) -> Pictures:
    """Open all images in a folder and below it, or one image; what cannot be read is skipped, and in ``broken``.

    Labels are the numbers of the images; ``names`` are their paths.

    Raises
    ------
    DataError
        As :func:`netclone.models.folders.pictures_in`.
    """
    broken: dict[str, str] = {}
    listing = pictures_in(Path(where), what)
    samples = _of_listing(listing, transform, what, broken)
    return Pictures(where, listing.classes, samples, batch_size, what=what, note=note, broken=broken)


def _of_listing(
    listing: Listing, transform: Callable[[Any], Tensor], what: str, broken: dict[str, str] | None
) -> _Decoded:
    def picture(index: int) -> tuple[Image.Image, int, bytes]:
        name, label = listing.pictures[index]
        opened, content = _picture(listing.open(name))
        return opened, label, content

    pictures = listing.pictures
    decoded = _Decoded(len(pictures), picture, lambda index: pictures[index][0], transform, what, broken)
    decoded.targets = [label for _, label in pictures]
    return decoded


def _of_name(
    where: str, split: str, transform: Callable[[Any], Tensor], what: str, broken: dict[str, str] | None
) -> tuple[tuple[str, ...], Any]:
    """A dataset by timm's name for it: its class names and its samples."""
    try:
        samples: Any = create_dataset(where, root=None, split=split)
    except Exception as error:  # readers and downloads may raise anything
        raise DataError(
            f"{what}: '{where}' cannot be read: {type(error).__name__}: {first_line(error)}; expected a folder with a "
            "subfolder of images per class, a tar file of one, or a name such as torch/cifar10 or hfds/..."
        ) from error
    reader = getattr(samples, "reader", None)
    ways = ((reader, "class_to_idx"), (reader, "class_name_to_idx"), (samples, "class_to_idx"))  # each reader its own
    indices: Mapping[str, int] = next((found for owner, way in ways if (found := getattr(owner, way, None))), {})
    if not indices or not len(samples):
        raise DataError(f"{what}: '{where}' has no classes; expected a dataset with class names and images")
    names = tuple(name for name, _ in sorted(indices.items(), key=lambda pair: pair[1]))
    if isinstance(samples, IterableDataset):
        samples.transform = transform  # type: ignore[attr-defined]
        return names, samples

    def picture(index: int) -> tuple[Image.Image, int, bytes]:
        if reader is None:
            found, label = samples[index]
            return found, int(label), hashlib.sha256(found.tobytes()).digest()
        opened, label = reader[index]  # timm's own data set would give the next sample for one that is broken
        found, content = _picture(opened)
        return found, int(label), content

    decoded = _Decoded(len(samples), picture, lambda index: f"number {index} of {where}", transform, what, broken)
    decoded.targets = _targets(samples)
    return names, decoded


def _picture(file: IO[bytes]) -> tuple[Image.Image, bytes]:
    """An image, decoded in full, and the SHA-256 of its file."""
    with contextlib.closing(file):
        content = file.read()
    with Image.open(BytesIO(content)) as opened:
        picture: Image.Image = opened.convert("RGB")
        return picture, hashlib.sha256(content).digest()


def _collated(samples: Sequence[tuple[Tensor, int] | None]) -> Any:
    given = [sample for sample in samples if sample is not None]
    return default_collate(given) if given else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _columns(names: Sequence[str], network: nn.Module) -> list[int | None]:
    labels = labels_of(network)
    if any(plain(name) in labels for name in names):
        return [labels.get(plain(name)) for name in names]
    count = getattr(network, "num_classes", 0)
    return [int(name) if name.isascii() and name.isdigit() and int(name) < count else None for name in names]


def _labels_of(samples: Any) -> Sequence[int]:
    """The label of every sample; images are opened only if labels are not known otherwise."""
    if isinstance(samples, Subset):
        known = _labels_of(samples.dataset)
        return [known[index] for index in samples.indices]
    listed: Sequence[int] | None = getattr(samples, "targets", None)
    if listed is not None:
        return listed
    return [-1 if (sample := samples[index]) is None else int(sample[1]) for index in range(len(samples))]


def _targets(samples: Any) -> Sequence[int] | None:
    """The labels that a dataset of timm's or torchvision's knows; None if it does not list them."""
    reader: Any = getattr(samples, "reader", None)
    if hasattr(reader, "iter_targets"):
        return [int(label) for label in reader.iter_targets()]
    listed = getattr(samples, "targets", None)
    return None if listed is None or len(listed) != len(samples) else [int(label) for label in listed]
