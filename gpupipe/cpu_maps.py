"""numba: index maps, which say for each row or column of an image where it is read from.

Entry i is the row or column of the current image that row or column i of the result reads, or
-1 - s where step s padded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

NOP, WINDOW, FLIP, RESIZE, ERASE = range(5)
EDGE, REFLECT = 1, 2


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _fold(i: int, size: int, mode: int) -> int:
    """Return the place that a place beyond the image stands for, as numpy.pad has it."""
    if mode == EDGE or size == 1:
        return min(max(i, 0), size - 1)
    if mode == REFLECT:
        period = 2 * size - 2
        i = i % period
        return i if i < size else period - i
    period = 2 * size
    i = i % period
    return i if i < size else period - 1 - i


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _window(
    places: Any, size: int, start: int, count: int, mode: int, step: int, spare: Any
) -> None:
    """Cut a map of ``size`` entries at ``start``; beyond it lies padding."""
    for i in range(count):
        place = start + i
        if 0 <= place < size:
            spare[i] = places[place]
        elif mode == 0:
            spare[i] = -1 - step
        else:
            spare[i] = places[_fold(place, size, mode)]
    for i in range(count):
        places[i] = spare[i]


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _mirrored(places: Any, size: int) -> None:
    """Reverse a map."""
    for i in range(size // 2):
        places[i], places[size - 1 - i] = places[size - 1 - i], places[i]


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def follow(
    steps: Any, first: int, height: Any, width: Any, rows: Any, columns: Any, spare: Any
) -> Any:
    """Follow windows and flips from step ``first`` on; fill the maps.

    Returns:
        How many rows and columns there are then, and the step after them.
    """
    for i in range(height):
        rows[i] = i
    for i in range(width):
        columns[i] = i
    s = first
    while s < len(steps) and steps[s, 0] <= FLIP:
        if steps[s, 0] == WINDOW:
            _window(rows, height, steps[s, 1], steps[s, 3], steps[s, 5], s, spare)
            _window(columns, width, steps[s, 2], steps[s, 4], steps[s, 5], s, spare)
            height, width = np.int64(steps[s, 3]), np.int64(steps[s, 4])
        elif steps[s, 0] == FLIP:
            if steps[s, 1] & 1:
                _mirrored(columns, width)
            if steps[s, 1] & 2:
                _mirrored(rows, height)
        s += 1
    return height, width, s


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def longest(frames: Any, steps: Any, begin: int, end: int) -> Any:
    """Return the most entries that a map of these images has."""
    longest = np.int64(1)
    for n in range(begin, end):
        longest = max(longest, frames[n, 1], frames[n, 2])
        for s in range(steps.shape[1]):
            if steps[n, s, 0] == WINDOW:
                longest = max(longest, steps[n, s, 3], steps[n, s, 4])
            elif steps[n, s, 0] == RESIZE:
                longest = max(longest, steps[n, s, 1], steps[n, s, 2])
    return longest


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def span(places: Any) -> Any:
    """Return the first and one past the last entry that is read, and whether they ascend by 1.

    (0, 0, ...) where all is padding. The third is 1 or -1 where the entries that are read lie
    side by side in one direction, 0 where they do not.
    """
    begin, end = 0, len(places)
    while begin < end and places[begin] < 0:
        begin += 1
    while end > begin and places[end - 1] < 0:
        end -= 1
    if end - begin < 2:
        return begin, end, 1
    direction = places[begin + 1] - places[begin]
    if direction not in (1, -1):
        return begin, end, 0
    for i in range(begin + 1, end):
        if places[i] - places[i - 1] != direction or places[i] < 0:
            return begin, end, 0
    return begin, end, direction


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def reads(weights: Any, offset: int, first: int, last: int) -> Any:
    """Return which input places outputs [first, last) of an axis read; offset 0: the axis stays."""
    if offset == 0:
        return first, last
    taps = weights[offset]
    begin, end = weights[offset + 2 + first], 0
    for i in range(first, last):
        start = weights[offset + 2 + i]
        begin, end = min(begin, start), max(end, start + taps)
    return begin, end


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def needed(places: Any) -> Any:
    """Return the range of the places that a map reads."""
    begin, end = np.int64(1 << 30), np.int64(0)
    for place in places:
        if place >= 0:
            begin, end = min(begin, place), max(end, place + 1)
    return min(begin, end), end
