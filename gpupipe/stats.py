"""Mean and standard deviation per channel, from exact integer counts.

Every pixel of a uint8 image is one of 256 values, so a histogram [C, 256] of int64 counts holds all
that is needed: no sum can overflow, and nothing is rounded before the last step::

    n = sum counts[v],  s = sum v * counts[v],  q = sum v^2 * counts[v]     Python ints
    mean = s / (255 n),  std = sqrt((n q - s^2) / (255 n)^2)                one rounding, a root

Arrays are counted as they lie, block by block; a memmap stays on disk. Any other dataset is read
sample by sample.
"""

from __future__ import annotations

import math
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset

from gpupipe.errors import GpupipeError, InputError, SourceError
from gpupipe.images import ImageKind, kind_of, raw_bytes
from gpupipe.sources import ArraySource, resolve

if TYPE_CHECKING:
    from gpupipe.tables import Layout

BLOCK_BYTES = 2 << 20
"""Pixels that are counted at once; they and a copy of one channel are all the memory needed."""

PIECE = (32 << 10) - 1
"""Pixels for one call of ``torch.bincount``, which is faster than NumPy's. From 32768 on it starts
an OpenMP team for their minimum, and waits long for it where other processes keep the CPUs busy."""

BLOCK_SAMPLES = 256
"""Samples that are read before they are counted, so that a slow dataset's bar still moves."""

PATIENCE = 1.0
"""Seconds before a progress bar appears that nobody asked for."""

REFRESH = 0.1
"""Seconds between two pictures of it. It is drawn as images are counted, not by a thread."""

Planes = NDArray[np.uint8]
"""uint8 [C, ...]: pixels by channel; within a channel their order does not matter."""


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of all pixels of a dataset on the scale 0 to 1; ``str`` gives a line to paste.

    Attributes:
        mean: of each channel.
        std: of each channel; of the population, so the divisor is the number of pixels.
        pixels: how many there are in each channel.
        images: how many there are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: int
    images: int

    def __str__(self) -> str:
        """Return ``Normalize(mean=(0.2860,), std=(0.3530,))``."""
        return f"Normalize(mean={_tuple(self.mean)}, std={_tuple(self.std)})"


def _tuple(values: tuple[float, ...]) -> str:
    digits = ", ".join(f"{value:.4f}" for value in values)
    return f"({digits},)" if len(values) == 1 else f"({digits})"


def channel_stats(
    dataset: Any, *, batch_size: int | None = None, progress: bool | None = None
) -> ChannelStats:
    """Return the mean and std of each channel of all images of a dataset, from integer sums.

    Raw pixels are counted. Where they lie in an array (torchvision's MNIST family, CIFAR and SVHN,
    ``TensorDataset``, ``ArrayDataset``, also behind ``Subset`` and ``ConcatDataset``) the dataset's
    transform is not run. Any other dataset is read by ``dataset[i]``, or iterated over if it is an
    ``IterableDataset``; the image is the sample or the sample's first item. Sizes may differ.

    Args:
        dataset: of PIL images, uint8 arrays [H, W] or [H, W, C], or uint8 tensors [H, W] or
            [C, H, W]; or a uint8 array [N, H, W] or [N, H, W, C].
        batch_size: how many images are counted at once; default: 2 MiB, at most 256 samples.
        progress: whether to show a bar on stderr; default: on a terminal, after a second.

    Raises:
        SourceError: no images, images that are not uint8, images of several kinds, a sample that
            cannot be read.
        InputError: another argument that cannot be used.
        IndexRangeError: a ``Subset`` of indices that its dataset does not have.
    """
    size = None if batch_size is None else _block_size(batch_size)
    source = resolve(dataset)
    if isinstance(source, ArraySource):
        total: int | None = len(source)
        blocks = _array_blocks(source, size)
    else:
        total = _length(dataset)
        blocks = _sample_blocks(dataset, size)
    counts = np.zeros((1, 256), np.int64)
    images = 0
    with _bar(total, shown=progress) as move:
        for number, planes in blocks:
            counts = counts + _histograms(planes)  # [1, 256] becomes [C, 256] at the first block
            images += number
            move(images)
    return _stats(counts, images)


def _block_size(batch_size: Any) -> int:
    """Return ``batch_size`` as an int; any integer type will do, a bool will not."""
    try:
        size = 0 if isinstance(batch_size, bool) else operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1:
        raise InputError(f"batch_size must be a positive int or None, got {batch_size!r}")
    return size


def _histograms(planes: Planes) -> NDArray[np.int64]:
    """Return how often each value occurs, [C, 256]."""
    counts = np.zeros((len(planes), 256), np.int64)
    for channel, plane in enumerate(planes):
        # A copy even if the plane is contiguous: torch warns of read-only memory, such as a memmap.
        flat = torch.from_numpy(np.array(plane, order="C").reshape(-1))
        for begin in range(0, len(flat), PIECE):
            piece = flat[begin : begin + PIECE]
            counts[channel] += torch.bincount(piece, minlength=256).numpy()
    return counts


def _stats(counts: NDArray[np.int64], images: int) -> ChannelStats:
    rows: list[list[int]] = counts.tolist()
    pixels = sum(rows[0]) if rows else 0
    if not pixels:
        raise SourceError(
            f"dataset must hold at least one pixel, got {images} images and none; "
            "check the path and the split it was made from"
        )
    scale = 255 * pixels
    mean, std = [], []
    for row in rows:
        total = sum(value * count for value, count in enumerate(row))
        squares = sum(value * value * count for value, count in enumerate(row))
        mean.append(total / scale)
        std.append(math.sqrt((pixels * squares - total * total) / scale**2))
    return ChannelStats(tuple(mean), tuple(std), pixels, images)


def _channels_first(images: NDArray[np.uint8], layout: Layout) -> Planes:
    """Return images [N, ...] as planes [C, N, H, W], without a copy."""
    if layout == "NHW":
        return images[np.newaxis]
    return np.moveaxis(images, layout.index("C"), 0)


def _array_blocks(source: ArraySource, batch_size: int | None) -> Iterator[tuple[int, Planes]]:
    """Yield all images of a source, as views where they follow each other on disk or in memory."""
    shape, layout = source.first.images.shape[1:], source.first.layout
    size = batch_size or max(1, BLOCK_BYTES // max(1, math.prod(shape)))
    if source.rows is None:
        for part in source.parts:
            for begin in range(0, len(part.images), size):
                images = part.images[begin : begin + size]
                yield len(images), _channels_first(images, layout)
        return
    rows = np.sort(source.rows)  # a disk is read forwards
    for begin in range(0, len(rows), size):
        here = rows[begin : begin + size]
        gathered = np.empty((len(here), *shape), np.uint8)
        source.read_images(here, gathered)
        yield len(here), _channels_first(gathered, layout)


def _length(dataset: Any) -> int | None:
    """Return how many samples there are; None: iterate and see."""
    if isinstance(dataset, IterableDataset):
        return None
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(
            "dataset must have __getitem__ and __len__ or be an IterableDataset, "
            f"got {type(dataset).__name__}; of a loader, pass loader.dataset"
        )
    return len(dataset)


def _samples(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    for index in range(len(dataset)):
        with _naming(index):
            sample = dataset[index]
        yield sample


def _sample_blocks(dataset: Any, batch_size: int | None) -> Iterator[tuple[int, Planes]]:
    """Yield the images of any dataset; those of one block are laid end to end, sizes aside."""
    first: ImageKind | None = None
    block: list[Planes] = []
    held = 0
    for index, sample in enumerate(_samples(dataset)):
        image = _image_of(sample)
        kind = kind_of(image)
        if kind is None:
            raise SourceError(_refusal(index, image))
        first = first or kind
        if (kind.channels, kind.mode) != (first.channels, first.mode):
            raise SourceError(
                f"dataset[{index}] must be {first} as dataset[0] is, got {kind}; "
                "convert all images to one mode as they are loaded"
            )
        with _naming(index):
            pixels = _channels_first(raw_bytes(image)[np.newaxis], kind.layout)
            block.append(pixels.reshape(kind.channels, math.prod(pixels.shape[1:])))
        held += block[-1].nbytes
        full = held >= BLOCK_BYTES or len(block) == BLOCK_SAMPLES
        if len(block) == batch_size or (batch_size is None and full):
            yield len(block), np.concatenate(block, axis=1)
            block, held = [], 0
    if block:
        yield len(block), np.concatenate(block, axis=1)


def _image_of(sample: Any) -> Any:
    """Return the sample, or its first item where it is a tuple, list or mapping."""
    if isinstance(sample, Mapping):
        sample = list(sample.values())
    return sample[0] if isinstance(sample, (tuple, list)) and sample else sample


def _refusal(index: int, image: Any) -> str:
    """Say what came instead of a uint8 image, and what to do."""
    got = f"a {type(image).__name__}"
    advice = "return the image, or (image, label) with the image first"
    if isinstance(image, Image.Image):
        got = f"PIL {image.mode}"
        advice = "convert it as it is loaded, for example image.convert('RGB')"
    elif isinstance(image, (torch.Tensor, np.ndarray)):
        where = f" on {image.device}" if isinstance(image, torch.Tensor) else ""
        got = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}{where}"
        advice = "pass the dataset without its transform: the statistics are of the raw pixels"
    return (
        f"dataset[{index}] must be a PIL image of 8 bits a channel, or uint8 pixels [H, W], "
        f"[H, W, C] or as a CPU tensor [C, H, W], got {got}; {advice}"
    )


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Name the sample in whatever its dataset raises."""
    try:
        yield
    except GpupipeError:
        raise
    except Exception as error:
        raise SourceError(
            f"dataset[{index}] must give an image, got {type(error).__name__}: {error}; "
            "mend that sample, or leave it out with a Subset"
        ) from error


@contextmanager
def _bar(total: int | None, *, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a bar on stderr; without ``shown``, see ``PATIENCE``."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("Counting images", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    task = bar.add_task("", total=total)
    due = time.monotonic() + (0.0 if shown else PATIENCE)

    def move(images: int) -> None:
        nonlocal due
        bar.update(task, completed=images)
        if time.monotonic() >= due:
            due = time.monotonic() + REFRESH
            bar.start()  # does nothing the second time
            bar.refresh()

    try:
        move(0)
        yield move
    finally:
        if bar.live.is_started:
            bar.stop()
