"""Where raw uint8 pixels already lie in an array, and how a batch of them is gathered.

Recognised are datasets whose ``__getitem__`` is, as a function, one of those listed in
``_READERS``, seen through ``Subset``, ``ConcatDataset`` and ``random_split``. A class that
overrides ``__getitem__`` or ``__getitems__`` is never short-cut. Nothing is copied that can be
viewed: a memmap stays on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate
from torchvision import datasets

from gpupipe.errors import IndexRangeError, SourceError
from gpupipe.images import ImageKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpupipe.tables import Layout
from gpupipe.threads import split

Transform = Callable[[Any], Any]

THREAD_BYTES = 1 << 20
"""A copy of at least this size is shared among threads."""


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


class ArrayDataset(Dataset[Any]):
    """Images in a NumPy array or a ``.npy`` file, with labels: a dataset for any loader.

    ``[i]`` is ``(transform(images[i]), target_transform(labels[i]))``, or the image alone where
    there are no labels. A ``.npy`` file is memory-mapped and stays on disk.

    Args:
        images: uint8 [N, H, W, C] or [N, H, W], or the path of such a ``.npy`` file.
        labels: [N, ...] or None, or the path of a ``.npy`` file.
        transform: takes an image, a uint8 ndarray [H, W, C] or [H, W].
        target_transform: takes a label.

    Raises:
        SourceError: another dtype or shape, labels of another length, a damaged or pickled file.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | str | PathLike[str],
        labels: NDArray[Any] | Sequence[Any] | str | PathLike[str] | None = None,
        *,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.images = _open(images, "images")
        self.labels = None if labels is None else _open(labels, "labels")
        self.transform = transform
        self.target_transform = target_transform
        check_images(self.images, "images")
        if self.labels is not None and self.labels.shape[:1] != (len(self.images),):
            raise SourceError(
                f"labels must be as many as images, got labels of shape {self.labels.shape} for "
                f"{len(self.images)} images; check that both belong together"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.labels is None:
            return image
        label = self.labels[index]
        return image, label if self.target_transform is None else self.target_transform(label)


def _open(array: Any, name: str) -> NDArray[Any]:
    if not isinstance(array, (str, PathLike)):
        return np.asanyarray(array)
    try:
        mapped: NDArray[Any] = np.lib.format.open_memmap(array, mode="r")
    except (ValueError, EOFError) as error:
        raise SourceError(
            f"{name} must be a whole .npy file of plain numbers, got {array}: {error}; "
            "save it again with np.save"
        ) from error
    return mapped


def check_images(images: NDArray[Any] | torch.Tensor, name: str) -> None:
    """Check raw images: uint8 with 3 or 4 axes.

    Raises:
        SourceError: anything else.
    """
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(images.shape) not in (3, 4):
        raise SourceError(
            f"{name} must be uint8 [N, H, W, C] or [N, H, W], got {dtype} {tuple(images.shape)}; "
            "pass the raw pixels, before any scaling"
        )


def _array(values: Any) -> NDArray[Any] | None:
    """Return values as an array if they all have one type and shape, or None."""
    if isinstance(values, (list, tuple)) and len(set(map(type, values))) > 1:
        return None  # default_collate goes by the first of a batch, NumPy by all of them
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _label_column(values: Any) -> NDArray[Any] | None:
    """Return labels as default_collate would type them after ``int()``, or None."""
    array = _array(values)
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    return array.astype(np.int64, copy=False)


def _number_column(values: Any) -> NDArray[Any] | None:
    """Return a sequence of numbers with the dtype that default_collate gives them, or None."""
    array = _array(values)
    if array is None or array.dtype.kind not in "biuf" or not array.ndim or not len(array):
        return None
    try:
        batch = default_collate([values[0]])
    except (TypeError, ValueError, RuntimeError):  # float128, foreign byte order, too large
        return None
    if not isinstance(batch, torch.Tensor) or batch.shape[1:] != array.shape[1:]:
        return None  # a list of lists is collated item by item
    return array.astype(batch.numpy().dtype, copy=False)


def _pil_part(
    dataset: Any, images: Any, labels: NDArray[Any] | None, mode: str, label: Callable[[int], Any]
) -> Part | str:
    layout: Layout = "NHW" if mode == "L" else "NHWC"
    if labels is None:
        return "its labels are not plain numbers of one type"
    if str(images.dtype).removeprefix("torch.") != "uint8" or images.ndim != len(layout):
        return f"its data is {images.dtype} {tuple(images.shape)}, not uint8 [{', '.join(layout)}]"
    array = images.numpy() if isinstance(images, torch.Tensor) else images
    kind = ImageKind("PIL", 1 if mode == "L" else 3, layout, mode)
    transforms = (dataset.transform, dataset.target_transform)
    return Part(array, layout, kind, (labels,), 0, *transforms, label)


def _mnist(dataset: Any) -> Part | str:
    targets = dataset.targets
    labels = _label_column(targets)
    return _pil_part(dataset, dataset.data, labels, "L", lambda row: int(targets[row]))


def _qmnist(dataset: Any) -> Part | str:
    if not dataset.compat:
        return "its extended targets are tensors"
    targets = dataset.targets[:, 0]
    labels = _label_column(targets)
    return _pil_part(dataset, dataset.data, labels, "L", lambda row: int(targets[row]))


def _cifar(dataset: Any) -> Part | str:
    if dataset.data.ndim == 4 and dataset.data.shape[3] != 3:  # noqa: PLR2004 # RGB
        return f"its data has shape {dataset.data.shape}, not [N, H, W, 3]"
    targets = dataset.targets
    return _pil_part(dataset, dataset.data, _number_column(targets), "RGB", targets.__getitem__)


def _svhn(dataset: Any) -> Part | str:
    images, labels = dataset.data, dataset.labels
    if images.ndim == 4 and images.shape[1] != 3:  # noqa: PLR2004 # RGB
        return f"its data has shape {images.shape}, not [N, 3, H, W]"
    # Each image is transposed to [H, W, 3] before it becomes a PIL image.
    pixels = images.transpose(0, 2, 3, 1) if images.ndim == 4 else images  # noqa: PLR2004 # [N, C, H, W]
    return _pil_part(dataset, pixels, _label_column(labels), "RGB", lambda row: int(labels[row]))


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
    images = dataset.images
    check_images(images, "images")
    labels = dataset.labels
    transforms = (dataset.transform, dataset.target_transform)
    if labels is None:
        return Part(*_bare(images), (), None, *transforms)
    column = _number_column(labels)
    if column is None:
        return f"its labels are {labels.dtype}, not numbers"
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
    found = _resolve(dataset)
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


def _resolve(  # one return a refusal
    dataset: Any,
) -> tuple[list[Part], NDArray[np.int64] | None] | str:
    kind = type(dataset)
    if kind is Subset:
        return _subset(dataset)
    if kind is ConcatDataset:
        return _concat(dataset)
    if kind in (np.ndarray, np.memmap):
        check_images(dataset, "dataset")
        return [Part(*_bare(dataset), (), None)], None
    reader = _READERS.get(getattr(kind, "__getitem__", None))
    if reader is None or hasattr(dataset, "__getitems__"):
        return f"{kind.__name__} has its own __getitem__"
    part = reader(dataset)
    if isinstance(part, str):
        return f"{kind.__name__}: {part}"
    count = len(part.images)
    if len(dataset) != count or any(len(column) < count for column in part.columns):
        return f"{kind.__name__} has another length than its images or labels"
    return [part], None


def _subset(dataset: Subset[Any]) -> tuple[list[Part], NDArray[np.int64] | None] | str:
    inner = _resolve(dataset.dataset)
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


def _concat(dataset: ConcatDataset[Any]) -> tuple[list[Part], NDArray[np.int64] | None] | str:
    parts: list[Part] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for member in dataset.datasets:
        inner = _resolve(member)
        if isinstance(inner, str):
            return inner
        count = sum(len(part.images) for part in inner[0])
        rows.append((np.arange(count) if inner[1] is None else inner[1]) + start)
        start += count
        parts.extend(inner[0])
    ordered = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return parts, None if np.array_equal(ordered, np.arange(start)) else ordered
