"""``ImageFiles``: encoded images with labels, as a dataset for any loader."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from gpupipe.errors import InputError

Item = str | os.PathLike[str] | bytes | bytearray | memoryview
_BYTES = (bytes, bytearray, memoryview)


class _Packed(Sequence[Any]):
    """Encoded images that lie one after the other in one array."""

    def __init__(self, memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._memory = memory
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._memory[self._offsets[index] : self._offsets[index + 1]]


class ImageFiles(Dataset[Any]):
    """Images in files or in memory, encoded as JPEG, PNG or whatever Pillow reads.

    ``dataset[i]`` is what ``torchvision.datasets.ImageFolder`` gives: a PIL image, transformed,
    and its label; without labels the image alone.

    Args:
        items: paths; or encoded images as bytes; or all of them in one uint8 array or memmap [n].
        labels: one for each item; None: samples are images alone.
        offsets: int64 [N + 1]: item i is ``items[offsets[i]:offsets[i + 1]]`` of the one array.
        transform: applied to the PIL image.
        target_transform: applied to the label.
        mode: what images are converted to; None: as they are.

    Raises:
        InputError: items of another kind, offsets or labels that do not fit.

    Example:
        >>> dataset = ImageFiles(["a.jpg", "b.png"], labels=[0, 1])
    """

    def __init__(
        self,
        items: Sequence[Item] | NDArray[np.uint8],
        labels: Sequence[Any] | NDArray[Any] | None = None,
        *,
        offsets: Sequence[int] | NDArray[np.int64] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        mode: str | None = "RGB",
    ) -> None:
        self.items: Sequence[Any] = _checked(items, offsets)
        self.labels = labels
        self.transform = transform
        self.target_transform = target_transform
        self.mode = mode
        if labels is not None and len(labels) != len(self.items):
            raise InputError(
                f"labels must be one for each of {len(self.items)} items, got {len(labels)}; "
                "pass as many"
            )

    @property
    def holds_paths(self) -> bool:
        """Whether items are paths, not encoded images."""
        return len(self.items) > 0 and isinstance(self.items[0], (str, os.PathLike))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        """Return image ``index``, transformed, with its label if there are labels."""
        item = self.items[index]
        if isinstance(item, (str, os.PathLike)):
            with Path(item).open("rb") as file:
                image = self._opened(file)
        else:
            image = self._opened(io.BytesIO(item))
        if self.transform is not None:
            image = self.transform(image)
        if self.labels is None:
            return image
        label = self.labels[index]
        return image, label if self.target_transform is None else self.target_transform(label)

    def _opened(self, file: Any) -> Image.Image:
        image: Image.Image = Image.open(file)
        if self.mode is not None:
            return image.convert(self.mode)
        image.load()
        return image


def read_item(item: Any) -> NDArray[np.uint8]:
    """Return the encoded bytes of an item, uint8 [n]: a view of memory, or a file's contents.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(item, np.ndarray):
        return item
    if isinstance(item, _BYTES):
        return np.frombuffer(item, np.uint8)
    with open(item, "rb", buffering=0) as file:  # noqa: PTH123 # Path costs as much as the read
        data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        got, view = 0, data.data
        while got < len(data) and (more := file.readinto(view[got:])):
            got += more
        return data[:got]


def _checked(items: Any, offsets: Any) -> Sequence[Any]:
    """Refuse items that are no images before the first is read."""
    if isinstance(items, np.ndarray):
        return _packed(items, offsets)
    if offsets is not None:
        raise InputError(
            "offsets are for items in one uint8 array, got items of type "
            f"{type(items).__name__}; leave offsets out"
        )
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise InputError(
            f"items must be a sequence of paths or of bytes, got {type(items).__name__}; "
            "pass a list"
        )
    for kind in ((str, os.PathLike), _BYTES):
        if all(isinstance(item, kind) for item in items):
            return items
    number, other = (
        next((n, item) for n, item in enumerate(items) if type(item) is not type(items[0]))
        if len({type(item) for item in items}) > 1
        else (0, items[0])
    )
    raise InputError(
        f"items must all be paths, or all bytes, got {type(other).__name__} at {number}; "
        "pass one kind"
    )


def _packed(items: NDArray[Any], offsets: Any) -> _Packed:
    """Check one array of encoded images."""
    if items.dtype != np.uint8 or items.ndim != 1 or offsets is None:
        raise InputError(
            "items in one array must be uint8 [n] with offsets int64 [N + 1], got "
            f"{items.dtype} {items.shape} and offsets of type {type(offsets).__name__}; pass both"
        )
    where = np.asarray(offsets)
    if (
        where.ndim != 1
        or where.dtype.kind not in "iu"
        or not len(where)
        or where[0] < 0
        or where[-1] > len(items)
        or (np.diff(where.astype(np.int64)) < 0).any()
    ):
        raise InputError(
            f"offsets must be integers that do not fall, within 0..{len(items)}, got "
            f"{where.dtype} {where.shape}; item i is items[offsets[i]:offsets[i + 1]]"
        )
    return _Packed(items, where.astype(np.int64))
