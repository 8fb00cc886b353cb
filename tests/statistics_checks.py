"""Goodness-of-fit checks at one stated level, without SciPy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGMAS = 5.0
"""A right sampler fails a check with a probability below 1e-6; a planted bug must fail it."""


def uniform_counts(values: NDArray[np.int64], size: int) -> bool:
    """Whether integers look uniform over range(size): chi-square, in standard deviations."""
    if values.min() < 0 or values.max() >= size:
        return False
    counts = np.bincount(values, minlength=size)
    expected = len(values) / size
    chi = float(((counts - expected) ** 2 / expected).sum())
    return size == 1 or abs(chi - (size - 1)) < SIGMAS * math.sqrt(2 * (size - 1)) + SIGMAS**2


def same_counts(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether two samples of integers come from one distribution: chi-square of two rows."""
    low = min(one.min(), other.min())
    size = int(max(one.max(), other.max()) - low) + 1
    a = np.bincount(one - low, minlength=size).astype(np.float64)
    b = np.bincount(other - low, minlength=size).astype(np.float64)
    a, b = _merged(a, b)
    total = a + b
    chi = float((((a * len(other) - b * len(one)) ** 2) / total).sum() / len(one) / len(other))
    freedom = max(len(a) - 1, 1)
    return chi < freedom + SIGMAS * math.sqrt(2 * freedom) + SIGMAS**2


def _merged(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Merge neighbouring cells until each has 20 values at least."""
    total, bounds, run = a + b, [0], 0.0
    for place, value in enumerate(total):
        run += value
        if run >= 20:
            bounds.append(place + 1)
            run = 0.0
    if len(bounds) == 1:
        bounds.append(len(total))
    starts = bounds[:-1]
    starts[-1] = min(starts[-1], len(total) - 1)
    return np.add.reduceat(a, starts), np.add.reduceat(b, starts)


def close_share(hits: int, count: int, p: float) -> bool:
    """Whether ``hits`` of ``count`` is as probable as ``p`` says."""
    return abs(hits - count * p) < SIGMAS * math.sqrt(max(count * p * (1 - p), 1.0))


def same_distribution(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two samples of numbers come from one distribution: Kolmogorov-Smirnov."""
    grid = np.sort(np.concatenate([one, other]))
    gap = np.abs(
        np.searchsorted(np.sort(one), grid, "right") / len(one)
        - np.searchsorted(np.sort(other), grid, "right") / len(other)
    ).max()
    # P(gap > c sqrt((n + m) / nm)) = 2 exp(-2 c^2): 1e-6 for c = 2.69.
    return bool(gap < 2.7 * math.sqrt((len(one) + len(other)) / len(one) / len(other)))
