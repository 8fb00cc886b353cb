"""Where raw uint8 pixels already lie in an array, and how a batch of them is gathered.

Recognised are datasets whose ``__getitem__`` is, as a function, one of those listed in
``_READERS``, seen through ``Subset``, ``ConcatDataset`` and ``random_split``. A class that
overrides ``__getitem__`` or ``__getitems__`` is never short-cut. Nothing is copied that can be
viewed: a memmap stays on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from mmap import mmap
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import datasets

from gpupipe.array_dataset import ArrayDataset, Transform, check_images
from gpupipe.columns import NO_COLUMN, label_column, number_column
from gpupipe.errors import IndexRangeError
from gpupipe.images import ImageKind
from gpupipe.tables import Layout
from gpupipe.threads import split

THREAD_BYTES = 1 << 20
"""A copy of at least this size is shared among threads."""


class Images(Protocol):
    """What a part of a dataset has, whatever its images are."""

    @property
    def images(self) -> Any:
        """As many as the part has samples."""


P = TypeVar("P", bound=Images)


@dataclass(frozen=True)
class Part:
    """The raw arrays of one dataset.

    Attributes:
        images: uint8 [M, H, W, C], [M, C, H, W] or [M, H, W].
        layout: of ``images``.
        kind: how one image reaches the transform.
        columns: the other items of a sample, each [M, ...], in their order.
        position: where in the sample's tuple the image stands; None: the sample is the image.
        transform: what the dataset applies to the image, or None.
        target_transform: what it applies to the only column, or None.
        label: the value of a row that ``target_transform`` gets; given where that is.
    """

    images: NDArray[np.uint8]
    layout: Layout
    kind: ImageKind
    columns: tuple[NDArray[Any], ...]
    position: int | None
    transform: Transform | None = None
    target_transform: Transform | None = None
    label: Callable[[int], Any] | None = None


class ArraySource:
    """Raw images that a kernel or a native copy can gather by index.

    Attributes:
        parts: one, or several behind a ``ConcatDataset``; all of one image shape.
        rows: int64 [length]: which image of the parts, counted through, each index is; None: all.
    """

    def __init__(self, parts: Sequence[Part], rows: NDArray[np.int64] | None) -> None:
        self.parts = tuple(parts)
        self.rows = rows
        self._starts = np.cumsum([0, *(len(part.images) for part in parts)])

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._starts[-1]) if self.rows is None else len(self.rows)

    @property
    def first(self) -> Part:
        """The first part; shapes, layout and kind are the same for all."""
        return self.parts[0]

    @property
    def in_place(self) -> bool:
        """Whether a kernel can read the images where they lie: in one contiguous array."""
        return len(self.parts) == 1 and bool(self.first.images.flags.c_contiguous)

    @property
    def place(self) -> str:
        """Where the images lie, for people: "in memory", or "on disk (memmap)" if any part does."""
        mapped = any(_is_mapped(part.images) for part in self.parts)
        return "on disk (memmap)" if mapped else "in memory"

    def locate(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows, counted through the parts, of indices that ``sampling`` has checked."""
        return indices if self.rows is None else self.rows[indices]

    def read_images(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy the images of ``rows`` into ``out`` [len(rows), ...image shape]."""
        self._read([part.images for part in self.parts], rows, out)

    def read_column(self, column: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the values [len(rows), ...] of one column."""
        arrays = [part.columns[column] for part in self.parts]
        if len(arrays) == 1:
            return arrays[0][rows]
        out = np.empty((len(rows), *arrays[0].shape[1:]), np.result_type(*arrays))
        self._read(arrays, rows, out)
        return out

    def targets(self, indices: NDArray[np.int64]) -> list[Any]:
        """Return the only column's values as ``dataset[i]`` would, ``target_transform`` and all."""
        rows = self.locate(indices)
        which = np.searchsorted(self._starts, rows, side="right") - 1
        values = []
        for number, row in zip(which.tolist(), rows.tolist(), strict=True):
            part = self.parts[number]
            label = part.columns[0].__getitem__ if part.label is None else part.label
            value = label(row - int(self._starts[number]))
            values.append(value if part.target_transform is None else part.target_transform(value))
        return values

    def _read(
        self, arrays: Sequence[NDArray[Any]], rows: NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        if len(arrays) == 1:
            array = arrays[0]
            if not array.flags.c_contiguous:  # take would first copy the whole array
                out[...] = array[rows]
                return

            def run(begin: int, end: int) -> None:
                # "clip" writes into out; "raise" would make a copy. The rows have been checked.
                np.take(array, rows[begin:end], axis=0, out=out[begin:end], mode="clip")

            split(run, len(rows), None if out.nbytes >= THREAD_BYTES else 1)
            return
        which = np.searchsorted(self._starts, rows, side="right") - 1
        for number, array in enumerate(arrays):
            here = np.flatnonzero(which == number)
            if here.size:
                out[here] = array[rows[here] - self._starts[number]]


def _is_mapped(array: Any) -> bool:
    """Return whether an array is a file's memory, or a view of such an array."""
    while isinstance(array, np.ndarray):
        base: Any = array.base
        if isinstance(array, np.memmap) and isinstance(base, mmap):
            return True  # a memmap's copy is a memmap, too, but has no base
        array = base
    return False


def _misfit(data: Any, holder: type[Any], axes: tuple[str | int, ...]) -> str | None:
    """Say why ``data`` is no ``holder`` of uint8 with such axes (a number: a size), or None."""
    if not isinstance(data, holder):
        return f"its data is of type {type(data).__name__}, not {holder.__name__}"
    dtype, shape = str(data.dtype).removeprefix("torch."), tuple(data.shape)
    sizes = zip(axes, shape, strict=False)
    fits = len(shape) == len(axes) and all(isinstance(a, str) or a == size for a, size in sizes)
    if dtype == "uint8" and fits and str(data.device) == "cpu":
        return None
    expected = ", ".join(map(str, axes))
    return f"its data is {dtype} {shape} on {data.device}, not uint8 [{expected}] on cpu"


def _pil_part(
    dataset: Any,
    images: NDArray[np.uint8],
    labels: NDArray[Any] | None,
    mode: str,
    label: Callable[[int], Any],
) -> Part | str:
    layout: Layout = "NHW" if mode == "L" else "NHWC"
    if labels is None:
        return NO_COLUMN
    kind = ImageKind("PIL", 1 if mode == "L" else 3, layout, mode)
    transforms = (dataset.transform, dataset.target_transform)
    return Part(images, layout, kind, (labels,), 0, *transforms, label)


def _grey(dataset: Any, targets: Any) -> Part | str:
    images, labels = dataset.data, label_column(targets)
    return _misfit(images, torch.Tensor, ("N", "H", "W")) or _pil_part(
        dataset, images.numpy(), labels, "L", lambda row: int(targets[row])
    )


def _mnist(dataset: Any) -> Part | str:
    return _grey(dataset, dataset.targets)


def _qmnist(dataset: Any) -> Part | str:
    if not dataset.compat:
        return "its extended targets are tensors"
    targets = dataset.targets
    if not isinstance(targets, torch.Tensor) or targets.ndim != 2:  # noqa: PLR2004 # [N, 8]
        return NO_COLUMN
    return _grey(dataset, targets[:, 0])


def _cifar(dataset: Any) -> Part | str:
    images, targets = dataset.data, dataset.targets
    return _misfit(images, np.ndarray, ("N", "H", "W", 3)) or _pil_part(
        dataset, images, number_column(targets), "RGB", lambda row: targets[row]
    )


def _svhn(dataset: Any) -> Part | str:
    images, labels = dataset.data, dataset.labels
    if wrong := _misfit(images, np.ndarray, ("N", 3, "H", "W")):
        return wrong
    # Each image is transposed to [H, W, 3] before it becomes a PIL image.
    pixels, column = images.transpose(0, 2, 3, 1), label_column(labels)
    return _pil_part(dataset, pixels, column, "RGB", lambda row: int(labels[row]))


def _tensors(dataset: Any) -> Part | str:
    if any(type(tensor) is not torch.Tensor for tensor in dataset.tensors):
        return "it holds tensors of a class of their own"
    images = dataset.tensors[0]
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.device.type != "cpu":
        return f"its first tensor is {images.dtype} {tuple(images.shape)}, no uint8 images"
    try:
        array, *columns = (tensor.numpy() for tensor in dataset.tensors)
    except (TypeError, RuntimeError):  # sparse, bfloat16, on a device, with a gradient
        return "it holds tensors that NumPy cannot view"
    layout: Layout = "NHW" if images.ndim == 3 else "NCHW"  # noqa: PLR2004 # [N, H, W]
    channels = 1 if layout == "NHW" else int(images.shape[1])
    return Part(array, layout, ImageKind("tensor", channels, layout), tuple(columns), 0)


def _arrays(dataset: Any) -> Part | str:
    images, labels = dataset.images, dataset.labels
    if not isinstance(images, np.ndarray):
        return f"its images are of type {type(images).__name__}, not ndarray"
    check_images(images, "images")
    if labels is None:  # its target_transform is never called
        return Part(*_bare(images), (), None, dataset.transform)
    column = number_column(labels)
    if column is None:
        return NO_COLUMN
    transforms = (dataset.transform, dataset.target_transform)
    return Part(*_bare(images), (column,), 0, *transforms, labels.__getitem__)


def _bare(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Layout, ImageKind]:
    layout: Layout = "NHW" if images.ndim == 3 else "NHWC"  # noqa: PLR2004 # [N, H, W]
    channels = 1 if layout == "NHW" else images.shape[3]
    return images, layout, ImageKind("ndarray", channels, layout)


_READERS: dict[Any, Callable[[Any], Part | str]] = {
    datasets.MNIST.__getitem__: _mnist,
    datasets.QMNIST.__getitem__: _qmnist,
    datasets.CIFAR10.__getitem__: _cifar,
    datasets.SVHN.__getitem__: _svhn,
    TensorDataset.__getitem__: _tensors,
    ArrayDataset.__getitem__: _arrays,
}


def resolve(dataset: Any) -> ArraySource | str:
    """Return the raw arrays behind a dataset, or a sentence that says why there are none.

    Raises:
        SourceError: a gpupipe ``ArrayDataset`` or NumPy array that is no uint8 image data.
    """
    found = find_parts(dataset, _array_part)
    if isinstance(found, str):
        return found
    parts, rows = found
    views = [_contiguous(part) for part in parts]
    parts = views if len({part.layout for part in views}) == 1 else parts
    first = parts[0]
    for part in parts:
        if (part.images.shape[1:], part.layout, part.kind, part.position) != (
            (first.images.shape[1:], first.layout, first.kind, first.position)
        ) or [c.shape[1:] for c in part.columns] != [c.shape[1:] for c in first.columns]:
            return "its parts hold images or labels of different shapes"
        if [c.dtype for c in part.columns] != [c.dtype for c in first.columns]:
            return "its parts hold labels of different types"
    if 0 in first.images.shape[1:]:
        return "its images have no pixels"
    return ArraySource(parts, rows)


def _contiguous(part: Part) -> Part:
    """Return the part with its images in the order in which they lie in memory, if it has a name.

    CIFAR10's [N, H, W, C] is a view of [N, C, H, W].
    """
    images, layout = part.images, part.layout
    if images.flags.c_contiguous or layout == "NHW":
        return part
    planar = layout == "NCHW"
    view = images.transpose((0, 2, 3, 1) if planar else (0, 3, 1, 2))
    if not view.flags.c_contiguous:
        return part
    return replace(part, images=view, layout="NHWC" if planar else "NCHW")


def find_parts(
    dataset: Any, leaf: Callable[[Any], P | str]
) -> tuple[list[P], NDArray[np.int64] | None] | str:
    """See through ``Subset`` and ``ConcatDataset``; return the parts behind them, and the rows."""
    kind = type(dataset)
    if kind is Subset:
        return _subset(dataset, leaf)
    if kind is ConcatDataset:
        return _concat(dataset, leaf)
    part = leaf(dataset)
    return part if isinstance(part, str) else ([part], None)


def _array_part(dataset: Any) -> Part | str:
    kind = type(dataset)
    if kind in (np.ndarray, np.memmap):
        check_images(dataset, "dataset")
        return Part(*_bare(dataset), (), None)
    reader = _READERS.get(getattr(kind, "__getitem__", None))
    if reader is None or hasattr(dataset, "__getitems__"):
        return f"{kind.__name__} has its own __getitem__"
    part = reader(dataset)
    if isinstance(part, str):
        return f"{kind.__name__}: {part}"
    count = len(part.images)
    if len(dataset) != count or any(len(column) < count for column in part.columns):
        return f"{kind.__name__} has another length than its images or labels"
    return part


def _subset(
    dataset: Subset[Any], leaf: Callable[[Any], P | str]
) -> tuple[list[P], NDArray[np.int64] | None] | str:
    inner = find_parts(dataset.dataset, leaf)
    if isinstance(inner, str):
        return inner
    parts, rows = inner
    length = sum(len(part.images) for part in parts) if rows is None else len(rows)
    indices = np.asarray(dataset.indices)
    if indices.size == 0:
        indices = indices.astype(np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        return f"its Subset has indices of type {indices.dtype}"
    indices = indices.astype(np.int64, copy=False)
    if indices.size and (indices.min() < -length or indices.max() >= length):
        bad = int(indices.min()) if indices.min() < -length else int(indices.max())
        raise IndexRangeError(
            f"Subset has index {bad}, but its dataset has {length} samples; make the subset again"
        )
    indices = np.where(indices < 0, indices + length, indices)
    return parts, indices if rows is None else rows[indices]


def _concat(
    dataset: ConcatDataset[Any], leaf: Callable[[Any], P | str]
) -> tuple[list[P], NDArray[np.int64] | None] | str:
    parts: list[P] = []
    rows: list[NDArray[np.int64]] = []
    start = 0  # of the member's images among all
    for member in dataset.datasets:
        inner = find_parts(member, leaf)
        if isinstance(inner, str):
            return inner
        count = sum(len(part.images) for part in inner[0])
        rows.append((np.arange(count) if inner[1] is None else inner[1]) + start)
        start += count
        parts.extend(inner[0])
    if list(accumulate(map(len, rows))) != dataset.cumulative_sizes:
        return "its ConcatDataset was made when its members had other lengths"
    ordered = np.concatenate(rows)
    return parts, None if np.array_equal(ordered, np.arange(start)) else ordered
