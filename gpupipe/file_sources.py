"""Where encoded images lie: files, or bytes in memory, and how one of them is read.

Recognised are datasets whose ``__getitem__`` is, as a function, one of torchvision's that opens a
path with Pillow and converts to RGB, ``ImageFiles``, and a plain list of paths or of bytes; seen
through ``Subset``, ``ConcatDataset`` and ``random_split``. A class that overrides ``__getitem__``
or uses a loader of its own is never short-cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray
from torchvision import datasets
from torchvision.datasets import folder

from gpupipe.array_dataset import Transform
from gpupipe.columns import NO_COLUMN, number_column
from gpupipe.image_files import ImageFiles, read_item
from gpupipe.sources import find_parts

_LOADERS = (folder.default_loader, folder.pil_loader)

_SAMPLES = {  # lists of (path, target)
    "DatasetFolder": "samples",
    "GTSRB": "_samples",
    "Imagenette": "_samples",
    "Places365": "imgs",
    "RenderedSST2": "_samples",
    "StanfordCars": "_samples",
}
_PAIRED = {  # a list of paths, and one of targets
    "CLEVRClassification": ("_image_files", "_labels"),
    "DTD": ("_image_files", "_labels"),
    "FGVCAircraft": ("_image_files", "_labels"),
    "Flowers102": ("_image_files", "_labels"),
    "Food101": ("_image_files", "_labels"),
    "SUN397": ("_image_files", "_labels"),
}
_GETTERS: dict[Any, str] = {
    getattr(datasets, name).__getitem__: name
    for name in (*_SAMPLES, *_PAIRED)
    if hasattr(datasets, name)
}


@dataclass(frozen=True)
class FilePart:
    """The encoded images of one dataset.

    Attributes:
        images: paths or bytes; indexed by row.
        columns: the other items of a sample, each [M, ...].
        position: where in the sample's tuple the image stands; None: the sample is the image.
        mode: what the dataset converts images to; None: nothing.
        transform: what the dataset applies to the image, or None.
        target_transform: what it applies to the target, or None.
        label: the target of a row as the dataset has it.
        description: what the items are, for people.
    """

    images: Any
    columns: tuple[NDArray[Any], ...]
    position: int | None
    mode: str | None
    transform: Transform | None = None
    target_transform: Transform | None = None
    label: Callable[[int], Any] | None = None
    description: str = "files"


class FileSource:
    """Encoded images that threads can read by row.

    Attributes:
        parts: one, or several behind a ``ConcatDataset``; alike but for their images and targets.
        rows: int64 [length]: which image of the parts, counted through, each index is; None: all.
    """

    def __init__(self, parts: Sequence[FilePart], rows: NDArray[np.int64] | None) -> None:
        self.parts = tuple(parts)
        self.rows = rows
        self._starts = np.cumsum([0, *(len(part.images) for part in parts)])
        width = len(self.first.columns)
        self._columns = [np.concatenate([part.columns[c] for part in parts]) for c in range(width)]

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._starts[-1]) if self.rows is None else len(self.rows)

    @property
    def first(self) -> FilePart:
        """The first part."""
        return self.parts[0]

    @property
    def mode(self) -> str | None:
        """What images are converted to."""
        return self.first.mode

    @property
    def transform(self) -> Transform | None:
        """What the dataset applies to the image."""
        return self.first.transform

    @property
    def target_transform(self) -> Transform | None:
        """What the dataset applies to the target, if any part does."""
        return next((p.target_transform for p in self.parts if p.target_transform), None)

    @property
    def description(self) -> str:
        """What the items are, for people."""
        return self.first.description

    def locate(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows, counted through the parts, of checked indices."""
        return indices if self.rows is None else self.rows[indices]

    def read(self, row: int) -> NDArray[np.uint8]:
        """Return the encoded bytes of one image, uint8 [n]; any thread.

        Raises:
            OSError: the file cannot be read.
        """
        part, own = self._at(row)
        return read_item(part.images[own])

    def name(self, row: int) -> str:
        """Return the path of an image, or where in memory it lies."""
        part, own = self._at(row)
        item = part.images[own]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else f"item {own}"

    def read_column(self, column: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the values [len(rows), ...] of one column."""
        return self._columns[column][rows]

    def targets(self, indices: NDArray[np.int64]) -> list[Any]:
        """Return the targets as ``dataset[i]`` would, ``target_transform`` and all."""
        values = []
        for row in self.locate(indices).tolist():
            part, own = self._at(row)
            value = part.columns[0][own] if part.label is None else part.label(own)
            values.append(value if part.target_transform is None else part.target_transform(value))
        return values

    def _at(self, row: int) -> tuple[FilePart, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[number], row - int(self._starts[number])


def resolve(dataset: Any) -> FileSource | str:
    """Return the encoded images behind a dataset, or a sentence that says why there are none."""
    found = find_parts(dataset, _part)
    if isinstance(found, str):
        return found
    parts, rows = found
    first = parts[0]
    for part in parts:
        alike = (part.position, part.mode, part.transform) == (
            (first.position, first.mode, first.transform)
        )
        if not alike or [c.dtype for c in part.columns] != [c.dtype for c in first.columns]:
            return "its parts hold images or targets of different kinds"
    return FileSource(parts, rows)


def as_dataset(dataset: Any) -> Any:
    """Return a plain list of paths or of encoded images as a dataset that opens them."""
    plain = type(dataset) in (list, tuple) and not isinstance(_plain(dataset), str)
    return ImageFiles(dataset) if plain else dataset


def _part(dataset: Any) -> FilePart | str:  # noqa: C901 # one branch a refusal
    kind = type(dataset)
    if kind in (list, tuple):
        return _plain(dataset)
    if hasattr(dataset, "__getitems__"):
        return f"{kind.__name__} has its own __getitems__"
    getter = getattr(kind, "__getitem__", None)
    if getter is ImageFiles.__getitem__:
        return _image_files(dataset)
    name = _GETTERS.get(getter)
    if name is None:
        return f"{kind.__name__} has its own __getitem__"
    if torchvision.get_image_backend() != "PIL":
        return f"torchvision's image backend is {torchvision.get_image_backend()}"
    loader = getattr(dataset, "loader", folder.default_loader)
    if loader not in _LOADERS:
        return f"{kind.__name__} has a loader of its own"
    try:
        if name in _SAMPLES:
            samples = getattr(dataset, _SAMPLES[name])
            paths, targets = [s[0] for s in samples], [s[1] for s in samples]
        else:
            paths, targets = (getattr(dataset, attribute) for attribute in _PAIRED[name])
        transforms = dataset.transform, dataset.target_transform
    except (AttributeError, TypeError, IndexError) as error:
        return f"{kind.__name__} does not keep its files as torchvision's {name} does: {error}"
    joint = getattr(dataset, "transforms", None)
    if joint is not None and type(joint) is not datasets.vision.StandardTransform:
        return f"{kind.__name__} has a joint transform"
    column = number_column(targets)
    if column is None or len(column) != len(paths) or len(dataset) != len(paths):
        return f"{kind.__name__}: {NO_COLUMN}"
    return FilePart(paths, (column,), 0, "RGB", *transforms, targets.__getitem__)


def _plain(items: Sequence[Any]) -> FilePart | str:
    """Return a list of paths or of encoded images as a part."""
    kinds = (str, os.PathLike), (bytes, bytearray, memoryview)
    for number, kind in enumerate(kinds):
        if items and all(isinstance(item, kind) for item in items):
            what = "encoded images" if number else "files"
            return FilePart(items, (), None, "RGB", description=what)
    return f"{type(items).__name__} has its own __getitem__"


def _image_files(dataset: ImageFiles) -> FilePart | str:
    what = "files" if dataset.holds_paths else "encoded images"
    transforms = dataset.transform, dataset.target_transform
    if dataset.labels is None:  # its target_transform is never called
        return FilePart(dataset.items, (), None, dataset.mode, dataset.transform, description=what)
    column = number_column(dataset.labels)
    if column is None:
        return f"ImageFiles: {NO_COLUMN}"
    label = dataset.labels.__getitem__
    return FilePart(dataset.items, (column,), 0, dataset.mode, *transforms, label, what)
