"""Pillow's resampling arithmetic on the host: weights, and the order of the two passes.

An output pixel is a weighted sum of the input pixels under a filter that is stretched by the scale
when an image shrinks. Pillow computes the weights in float64, divides them by their sum, and rounds
them to fixed point with 22 bits; sums are integers, rounded to uint8 after each of the two passes
(``Resample.c``). Only the weights need floating point, so they are made here, for all kernels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PRECISION_BITS = 32 - 8 - 2
"""Fraction of a weight: a product with a pixel and a sum of some fit in 32 bits."""

_VERSION = (int(PIL.__version__.split(".")[0]), int(PIL.__version__.split(".")[1]))


class Filter(IntEnum):
    """Pillow's resampling filters, by Pillow's numbers."""

    NEAREST = 0
    LANCZOS = 1
    BILINEAR = 2
    BICUBIC = 3
    BOX = 4
    HAMMING = 5


def vertical_first(
    in_h: Ints, in_w: Ints, out_h: Ints, out_w: Ints, *, version: tuple[int, int] = _VERSION
) -> NDArray[np.bool_]:
    """Return whether Pillow runs the vertical pass first; bits depend on it.

    Args:
        in_h: sizes of the image that is resized, arrays or numbers, and so the others.
        in_w: see ``in_h``.
        out_h: see ``in_h``.
        out_w: see ``in_h``.
        version: Pillow's, major and minor.
    """
    if version >= (13, 0):
        shrink_h, shrink_w = np.subtract(in_h, out_h), np.subtract(in_w, out_w)
        result: NDArray[np.bool_] = (shrink_h > 0) & (shrink_h > 2 * shrink_w)
        return result
    if version >= (12, 2):
        return (np.asarray(in_h) > 100 * np.asarray(in_w)) & np.less(out_h, in_h)
    return np.zeros(np.shape(in_h), bool)


def _box(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)  # noqa: PLR2004 # its support


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))  # noqa: PLR2004 # its support


def _elementwise(function: Callable[[float], float]) -> Any:
    """Apply a function of the C library, which Pillow calls; NumPy's own sin and cos differ."""
    return np.frompyfunc(function, 1, 1)


def _hamming_at(x: float) -> float:
    x = abs(x)
    if x == 0.0:
        return 1.0
    if x >= 1.0:
        return 0.0
    x = x * math.pi
    # The constants are float32 in C.
    return math.sin(x) / x * (float(np.float32(0.54)) + float(np.float32(0.46)) * math.cos(x))


def _sinc(x: float) -> float:
    if x == 0.0:
        return 1.0
    x = x * math.pi
    return math.sin(x) / x


def _lanczos_at(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0  # noqa: PLR2004 # its support


_FILTERS: dict[Filter, tuple[Callable[[NDArray[np.float64]], Any], float]] = {
    Filter.BOX: (_box, 0.5),
    Filter.BILINEAR: (_bilinear, 1.0),
    Filter.HAMMING: (_elementwise(_hamming_at), 1.0),
    Filter.BICUBIC: (_bicubic, 2.0),
    Filter.LANCZOS: (_elementwise(_lanczos_at), 3.0),
}


def coefficients(
    in_size: int, out_size: int, kind: Filter
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return where each output pixel's taps begin, and their weights.

    Args:
        in_size: pixels along the axis, before.
        out_size: likewise, after.
        kind: of filter.

    Returns:
        int32 [out], and int32 [out, taps] with 22 bits of fraction. Every tap lies in the image;
        unused ones have weight 0.
    """
    if kind is Filter.NEAREST:
        return _nearest(in_size, out_size), np.full((out_size, 1), 1 << PRECISION_BITS, np.int32)
    function, support = _FILTERS[kind]
    scale = in_size / out_size
    filterscale = max(scale, 1.0)
    support = support * filterscale
    center = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)  # truncated, as C does
    last = np.minimum((center + support + 0.5).astype(np.int64), in_size)
    count = last - first
    taps = int(count.max())
    k = np.arange(taps)
    x = (k + first[:, None] - center[:, None] + 0.5) * (1.0 / filterscale)
    weight = np.where(k < count[:, None], function(x).astype(np.float64), 0.0)
    total = np.zeros(out_size)
    for column in range(taps):  # in C's order
        total = total + weight[:, column]
    weight = np.where(total[:, None] != 0.0, weight * (1.0 / total)[:, None], weight)
    fixed = weight * (1 << PRECISION_BITS)
    rounded = np.where(fixed < 0, fixed - 0.5, fixed + 0.5).astype(np.int32)
    return _inside(first, rounded, in_size)


def _inside(
    first: Ints, weights: NDArray[np.int32], in_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Move starts back so that all taps lie in the image; unused ones get weight 0."""
    taps = weights.shape[1]
    start = np.minimum(first, in_size - taps)
    shift = first - start
    moved = np.zeros_like(weights)
    rows, columns = np.nonzero(weights)
    moved[rows, columns + shift[rows]] = weights[rows, columns]
    return start.astype(np.int32), moved


def _nearest(in_size: int, out_size: int) -> NDArray[np.int32]:
    """Return Pillow's nearest input pixels; ``ImagingScaleAffine`` adds the step up."""
    step = in_size / out_size
    places = np.full(out_size, step)
    places[0] = step * 0.5
    return np.minimum(np.add.accumulate(places).astype(np.int32), in_size - 1)


class Weights:
    """All resize weights made so far, in one array that only grows; thread-safe.

    An entry at offset ``o``: ``data[o]`` taps, ``data[o + 1]`` outputs, then a start for every
    output, then its weights. ``data[0]`` says how much of the array is used.

    Args:
        limit: words beyond which ``begin`` starts anew.
    """

    def __init__(self, limit: int = 8 << 20) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._renew()

    def _renew(self) -> None:
        self._data = np.zeros(1 << 18, np.int32)
        self._data[0] = 1
        self._found: dict[tuple[int, int, int], int] = {}

    @property
    def data(self) -> NDArray[np.int32]:
        """int32: every entry handed out since ``begin``; an older array keeps what it held."""
        return self._data

    def begin(self) -> None:
        """Begin a batch: an array that has outgrown its limit is left to those who use it."""
        with self._lock:
            if int(self._data[0]) > self._limit:
                self._renew()

    def find(self, in_sizes: Ints, out_sizes: Ints, kind: Filter) -> Ints:
        """Return the offsets of entries, made where they are new.

        Args:
            in_sizes: int64 [N], pixels along the axis before.
            out_sizes: likewise, after.
            kind: of filter.

        Returns:
            int64 [N]; 0 where the size stays, for Pillow then skips the pass.
        """
        pairs, which = np.unique(
            np.stack([in_sizes, out_sizes], axis=1), axis=0, return_inverse=True
        )
        with self._lock:
            offsets = [
                0 if before == after else self._entry(before, after, kind)
                for before, after in pairs.tolist()
            ]
        return np.array(offsets, np.int64)[which.reshape(-1)]

    def _entry(self, in_size: int, out_size: int, kind: Filter) -> int:
        key = (in_size, out_size, int(kind))
        if key not in self._found:
            start, weights = coefficients(in_size, out_size, kind)
            entry = np.concatenate([[weights.shape[1], out_size], start, weights.ravel()])
            used = int(self._data[0])
            if used + len(entry) > len(self._data):
                larger = np.zeros(2 * (used + len(entry)), np.int32)
                larger[:used] = self._data[:used]
                self._data = larger
            self._data[used : used + len(entry)] = entry
            self._data[0] = used + len(entry)
            self._found[key] = used
        return self._found[key]
