"""batches(data) -> (images, labels), one after another: any form of data, checked and copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from netclone.errors import DataError, NetcloneError, first_line
from netclone.graph.class_names import ClassNames
from netclone.graph.images import images_fault, not_finite, tensor_fault

Data: TypeAlias = "Iterable[Any] | Dataset[Any]"

IMAGE_KEYS = ("pixel_values", "images", "image")
LABEL_KEYS = ("labels", "label")
TOGETHER = 64  # single samples in a batch
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def batches(data: Data, what: str = "data", names: ClassNames | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images ``(N, ...)`` and class indices ``(N,)``, batch by batch, copied to memory of their own.

    Every function that takes data reads them here, once and in order. A generator works too, but it has to end.

    Parameters
    ----------
    data
        A map-style ``Dataset`` of samples ``(image, label)``. Or an iterable (a ``DataLoader``, a list, a generator, an
        ``IterableDataset``) of such samples or of batches ``(images, labels)``. Or one batch. A batch or sample may be
        a mapping with ``"pixel_values"``, ``"images"`` or ``"image"``, and ``"labels"`` or ``"label"``. Images are
        tensors or numpy arrays, or a list of them. Labels are integers of any kind, one-hot rows, or names.
    what
        The argument's name, for messages.
    names
        The class names that labels may be. None: none are known.

    Raises
    ------
    DataError
        At the first invalid batch, or if there is no sample at all.

    Examples
    --------
    >>> images, labels = np.zeros((3, 1, 8, 8), np.float32), np.eye(3)
    >>> [(tuple(i.shape), l.tolist()) for i, l in batches((images, labels))]
    [((3, 1, 8, 8), [0, 1, 2])]
    """
    first, noun, empty = "", "", True
    singles: list[tuple[Tensor, Tensor]] = []
    single = _is_map_style(data)
    for number, item in enumerate(_items(data, what)):
        where = f"sample {number}" if single else f"batch {number}"
        given, known = _pair(item, what, where)
        label = _tensor(
            _numbered(known, names, f"{what}: labels of {where}"), f"{what}: labels of {where} are", "class indices"
        )
        alone = single or label.dim() == 0
        where = f"sample {number}" if alone else where
        image = _tensor(_stacked(given), f"{what}: images of {where} are", "a tensor or a numpy array")
        images, labels = (image.unsqueeze(0), label.unsqueeze(0)) if alone else (image, label)
        images, labels = _images(images, labels, what, where), _indices(images, labels, what, where)
        if not len(images):
            continue
        first, noun, empty = first or format_of(images), noun or where, False
        if format_of(images) != first:
            raise DataError(
                f"{what}: {where} has images {format_of(images)}, {noun} has {first}; give all in one size and dtype, "
                "on one device"
            )
        if singles and (not alone or len(singles) == TOGETHER):
            yield _joined(singles)
            singles = []
        if alone:
            singles.append((images, labels))
        else:
            yield images, labels
    if singles:
        yield _joined(singles)
    if empty:
        raise DataError(
            f"{what}: empty; expected at least one batch of (images, labels), and a generator gives its batches once"
        )


def format_of(images: Tensor) -> str:
    """Shape of an image, dtype and device, in words."""
    return f"{tuple(images.shape[1:])} {images.dtype} on {images.device}"


def _joined(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.cat(images), torch.cat(labels)


def _is_map_style(data: Data) -> TypeGuard[Dataset[Any]]:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def _items(data: Data, what: str) -> Iterator[Any]:
    """The batches or samples as they come; an error while reading says which one could not be read."""
    number = 0
    try:
        for item in _parts(data, what):
            yield item
            number += 1
    except (NetcloneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a caller's data may raise anything
        raise DataError(
            f"{what}: reading batch or sample {number} raised {type(error).__name__}: {first_line(error)}; see that "
            "the data can be read to their end"
        ) from error


def _parts(data: Data, what: str) -> Iterator[Any]:
    if isinstance(data, Mapping) or _is_one_batch(data):
        return iter([data])
    if isinstance(data, (str, bytes, Tensor, np.ndarray)):
        way = "files are read by the command line alone" if isinstance(data, (str, bytes)) else "labels are missing"
        raise DataError(f"{what}: got {type(data).__name__}; expected batches (images, labels): {way}")
    if _is_map_style(data):
        return (data[index] for index in range(len(cast("Sized", data))))
    if not isinstance(data, Iterable):
        raise DataError(
            f"{what}: got {type(data).__name__}; expected an iterable of batches (images, labels), or a Dataset"
        )
    return iter(data)


def _is_one_batch(data: Data) -> bool:
    """Whether this is one pair ``(images, labels)`` rather than a list of pairs."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray))


def _pair(item: Any, what: str, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        found = [next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if all(key in item for key in LABEL_KEYS):
            raise DataError(f"{what}: {where} has both 'labels' and 'label'; leave out the one that is not meant")
        if None in found:
            raise DataError(
                f"{what}: {where} has the keys {', '.join(map(repr, item))}; expected one of {', '.join(IMAGE_KEYS)} "
                f"and one of {', '.join(LABEL_KEYS)}"
            )
        return item[found[0]], item[found[1]]
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        many = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(
            f"{what}: {where} is {type(item).__name__}{many}; expected a pair (images, labels), or a dictionary with "
            "pixel_values and labels"
        )
    return item[0], item[1]


def _numbered(labels: Any, names: ClassNames | None, what: str) -> Any:
    """Labels that are names as columns; any others as they are."""
    listed = labels.tolist() if isinstance(labels, np.ndarray) and labels.dtype.kind in "OU" else labels
    several = isinstance(listed, (list, tuple))
    named = [isinstance(label, str) for label in (listed if several else [listed])]
    if not any(named):
        return labels
    if not all(named):
        raise DataError(f"{what}: some are names and others are not; give names alone, or class indices alone")
    known = names or ClassNames({}, "network")
    return (
        [known.column(name, what, DataError) for name in listed] if several else known.column(listed, what, DataError)
    )


def _stacked(images: Any) -> Any:
    """A list of images of one size as one batch; anything else as it is."""
    if (
        isinstance(images, (list, tuple))
        and images
        and all(isinstance(image, (Tensor, np.ndarray)) for image in images)
    ):
        tensors = [image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)) for image in images]
        return torch.stack(tensors) if len({(one.shape, one.dtype, one.device) for one in tensors}) == 1 else images
    return images


def _tensor(value: Any, found: str, expected: str) -> Tensor:
    """The given values as a tensor; arrays are copied, and lists are allowed for labels only."""
    if isinstance(value, Tensor):
        if fault := tensor_fault(value):
            raise DataError(f"{found} {fault}")
        return value.detach()
    plain = isinstance(value, (int, list, tuple, range)) and "labels" in found
    if not plain and not isinstance(value, (np.ndarray, np.generic)):
        raise DataError(f"{found} {type(value).__name__}; expected {expected}{_way_out(value)}")
    try:
        return torch.tensor(value) if plain else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{found} {kind}; expected integer class indices, or values of a number type") from error


def _way_out(value: Any) -> str:
    return "; give the Dataset a transform that turns images into tensors" if hasattr(value, "getbbox") else ""


def _images(images: Tensor, labels: Tensor, what: str, where: str) -> Tensor:
    """The images, checked and copied, since loaders may write the next batch into the same memory."""
    if images.dim() < 2 or not 1 <= labels.dim() <= 2 or len(images) != len(labels):
        raise _of_shapes(images, labels, what, where)
    if fault := images_fault(images):
        raise DataError(f"{what}: images of {where} are {fault}")
    if broken := not_finite(images):
        raise DataError(f"{what}: {where} {broken}")
    return images.clone()


def _indices(images: Tensor, labels: Tensor, what: str, where: str) -> Tensor:
    """Class indices on the images' device, from indices or one-hot rows."""
    if labels.is_meta:
        raise DataError(f"{what}: labels of {where} are on the meta device, without values")
    if labels.dim() == 2 and labels.shape[1] > 1 and not labels.is_complex():
        hot = labels == 1
        if not bool((hot.sum(1) == 1).all() and (hot | (labels == 0)).all()):
            raise DataError(
                f"{what}: labels of {where} are {tuple(labels.shape)} and not one-hot; expected one class for each "
                "image: class indices (N,), or rows with a single one"
            )
        labels = hot.long().argmax(1)
    if labels.dim() != 1:
        raise _of_shapes(images, labels, what, where)
    if labels.dtype not in _INTEGERS:
        raise DataError(f"{what}: labels of {where} are {labels.dtype}; expected integer class indices")
    return labels.to(images.device, torch.long, copy=True)


def _of_shapes(images: Tensor, labels: Tensor, what: str, where: str) -> DataError:
    return DataError(
        f"{what}: {where} has images {tuple(images.shape)} and labels {tuple(labels.shape)}; expected (N, ...) and (N,)"
    )
