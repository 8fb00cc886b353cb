"""numba kernels: the geometry of one image after the other, on one thread.

``geometry`` reads frames and steps (``program``) and writes uint8 images of the final size, which
the kernels of ``cpu_kernels`` then put through the table while they are in the cache. Rows and
columns are looked up in index maps: entry i of a map is the row or column of the current image that
row or column i of the result reads, or -1 - s where step s padded. A resize reads through the maps
before it, and makes only the rows and columns that the maps behind it ask for.

The two passes of a resize are those of ``cpu_passes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from gpupipe.cpu_kernels import (
    I8,
    I32,
    LANES,
    at,
    compile_kernel,
    load,
    make_intrinsic,
    read_byte,
    read_word,
    vector_type,
    write_bits,
)
from gpupipe.cpu_maps import RESIZE, follow, longest, needed, reads, span
from gpupipe.cpu_passes import horizontal, vertical

if TYPE_CHECKING:
    from gpupipe.cpu_kernels import Kernel

SLACK = 64
"""Bytes behind every scratch row and buffer: vectors may read and write beyond the last pixel."""

_VOID = types.void


@make_intrinsic
def _move16(_context: Any, _source: Any, _output: Any, reverse: Any) -> Any:
    """Copy 16 bytes; with ``reverse``, a literal, the last one first."""
    lanes = list(range(LANES))[:: -1 if reverse.literal_value else 1]

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        moved = load(builder, args[0], vector_type(I8), 1)
        if reverse.literal_value:
            order = ir.Constant(vector_type(I32), lanes)
            moved = builder.shuffle_vector(moved, moved, order)
        builder.store(moved, at(builder, args[1], moved.type)).align = 1
        return context.get_dummy_value()

    return _VOID(types.int64, types.int64, reverse), codegen


@njit(nogil=True)  # type: ignore[untyped-decorator] # numba has no types here
def _copy(source: int, output: int, count: int) -> None:
    """Copy bytes."""
    if count < LANES:
        for i in range(count):
            write_bits(output + i, np.int32(read_byte(source + i)), 1)
        return
    for i in range(0, count - LANES, LANES):
        _move16(source + i, output + i, False)
    _move16(source + count - LANES, output + count - LANES, False)


@njit(nogil=True, inline="never")  # type: ignore[untyped-decorator] # likewise
def _mirror(last: int, output: int, count: int, channels: int) -> None:
    """Copy pixels in reverse: the first comes from ``last``, the next from in front of it."""
    if channels == 1 and count >= LANES:
        start = last - LANES + 1
        for i in range(0, count - LANES, LANES):
            _move16(start - i, output + i, True)
        _move16(start - count + LANES, output + count - LANES, True)
        return
    whole = channels == 3 and count > 2
    for i in range(count):
        if whole and 0 < i < count - 1:  # a fourth byte is read of the pixel before, and
            # written where the next one comes
            write_bits(output + i * 3, read_word(last - i * 3), 4)
        else:
            for c in range(channels):
                level = np.int32(read_byte(last - i * channels + c))
                write_bits(output + i * channels + c, level, 1)


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _pad(
    row: int, columns: Any, first: int, last: int, steps: Any, fills: Any, channel: int,
    there: int, channels: int,
) -> None:  # fmt: skip
    """Write the colours of the padding among columns [first, last) of a row."""
    for x in range(first, last):
        column = columns[x]
        if row < 0 or column < 0:
            step = -1 - min(row, column)  # the later step's colour lies on top
            for c in range(channels):
                level = fills[steps[step, 6], channel + c]
                write_bits(there + x * channels + c, np.int32(level), 1)


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _gather(
    source: int, row_stride: int, pixel: int, rows: Any, columns: Any, steps: Any, fills: Any,
    channel: int, output: int, output_stride: int, channels: int,
) -> None:  # fmt: skip
    """Write the image that the maps describe.

    Args:
        source: address of the pixel that place (0, 0) of the maps means.
        row_stride: bytes.
        pixel: bytes from one pixel to the next.
        rows: map.
        columns: map.
        steps: for the colours of the padding.
        fills: colours.
        channel: first channel of this plane.
        output: address.
        output_stride: bytes of a row.
        channels: bytes of a pixel of the output.
    """
    begin, end, direction = span(columns)
    count = len(columns)
    padded = begin > 0 or end < count
    inside = end - begin
    start = columns[begin] * pixel if inside > 0 else 0
    model: Any = np.int64(0)  # address of a finished row with the same padding at its sides
    blank: Any = np.int64(0)
    blank_row = 0
    # address of a finished row of padding, and of which step
    for y in range(len(rows)):
        there = output + y * output_stride
        row = rows[y]
        if row < 0:
            if blank != 0 and blank_row == row:
                _copy(blank, there, count * channels)
            else:
                _pad(row, columns, 0, count, steps, fills, channel, there, channels)
                blank, blank_row = there, row
            continue
        line = source + row * row_stride
        if padded or direction == 0:
            if model == 0:
                _pad(row, columns, 0, count, steps, fills, channel, there, channels)
                model = there
            else:
                _copy(model, there, count * channels)
        if direction == 1 and pixel == channels:
            _copy(line + start, there + begin * channels, inside * channels)
        elif direction == -1 and pixel == channels:
            _mirror(line + start, there + begin * channels, inside, channels)
        else:
            for x in range(begin, end):
                column = columns[x]
                if column >= 0:
                    for c in range(channels):
                        level = read_byte(line + column * pixel + c)
                        write_bits(there + x * channels + c, np.int32(level), 1)


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _resize(
    source: int, row_stride: int, pixel: int, rows: Any, columns: Any, steps: Any, s: int,
    fills: Any, channel: int, channels: int, weights: Any, y0: int, y1: int, x0: int, x1: int,
    in_memory: bool,
) -> Any:  # fmt: skip
    """Return rows [y0, y1) and columns [x0, x1) of the resize that is step ``s``, of one plane.

    Returns:
        Scratch memory, and the bytes of its rows.
    """
    vertical_first, by_row, by_column = steps[s, 3], steps[s, 4], steps[s, 5]
    r0, r1 = reads(weights, by_row, y0, y1)
    c0, c1 = reads(weights, by_column, x0, x1)
    _, _, down = span(rows[r0:r1])
    left, right, across = span(columns[c0:c1])
    stride = row_stride
    plain = down != 0 and across == 1 and right - left == c1 - c0 and pixel == channels
    for y in range(r0, r1):
        plain = plain and rows[y] >= 0
    gathered = np.empty(0, np.uint8)
    safe = r1 - r0
    if plain:
        here = source + rows[r0] * row_stride + columns[c0] * pixel
        stride = row_stride * down
        if in_memory:  # the row that lies last in memory may end with it
            safe = safe - 1 if down == 1 else 0
    else:
        stride = (c1 - c0) * channels
        gathered = np.empty((r1 - r0) * stride + SLACK, np.uint8)
        here = gathered.ctypes.data
        _gather(
            source, row_stride, pixel, rows[r0:r1], columns[c0:c1], steps, fills, channel,
            here, stride, channels,
        )  # fmt: skip
    height = y1 - y0
    out_bytes = (x1 - x0) * channels
    out_stride = out_bytes + SLACK  # pixels are written four bytes at a time
    result = np.empty(height * out_stride + SLACK, np.uint8)
    there = result.ctypes.data
    middle = np.empty(0, np.uint8)
    if by_row != 0 and by_column != 0 and vertical_first != 0:
        middle_stride = (c1 - c0) * channels
        middle = np.empty(height * middle_stride + SLACK, np.uint8)
        vertical(
            here, stride, middle.ctypes.data, middle_stride, middle_stride, weights, by_row,
            y0, y1, r0,
        )  # fmt: skip
        horizontal(
            middle.ctypes.data, middle_stride, there, out_stride, height, channels, weights,
            by_column, x0, x1, c0, height,
        )  # fmt: skip
    elif by_row != 0 and by_column != 0:
        middle = np.empty((r1 - r0) * out_stride + SLACK, np.uint8)
        horizontal(
            here, stride, middle.ctypes.data, out_stride, r1 - r0, channels, weights, by_column,
            x0, x1, c0, safe,
        )  # fmt: skip
        vertical(
            middle.ctypes.data, out_stride, there, out_stride, out_bytes, weights, by_row,
            y0, y1, r0,
        )  # fmt: skip
    elif by_row != 0:
        vertical(here, stride, there, out_stride, out_bytes, weights, by_row, y0, y1, r0)
    elif by_column != 0:
        horizontal(
            here, stride, there, out_stride, height, channels, weights, by_column, x0, x1, c0,
            safe,
        )  # fmt: skip
    else:
        for y in range(height):
            _copy(here + y * stride, there + y * out_stride, out_bytes)
    # The addresses above do not keep the arrays alive; this does.
    if len(gathered) + len(middle) < 0:
        out_stride = 0
    return result, out_stride


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _image(
    memory: int, frame: Any, steps: Any, fills: Any, weights: Any, output: int, channels: int,
    maps: Any,
) -> None:  # fmt: skip
    """Make one image, uint8 [h, w, C], or [C, h, w] from planes; ``maps`` is scratch [5, n]."""
    pixel, step_channel = frame[6], frame[7]
    planes = channels if pixel == 1 else 1
    each = channels // planes
    height, width, begun = follow(steps, 0, frame[1], frame[2], maps[0], maps[1], maps[4])
    for plane in range(planes):
        if plane > 0 and begun < len(steps) and steps[begun, 0] == RESIZE:
            height, width, begun = follow(steps, 0, frame[1], frame[2], maps[0], maps[1], maps[4])
        here, s = 0, begun
        rows, columns = maps[0, :height], maps[1, :width]
        stride = frame[5]
        source = memory + frame[0] + plane * step_channel - frame[3] * stride - frame[4] * pixel
        source_pixel = pixel
        kept = np.empty(0, np.uint8)
        first = True
        while s < len(steps) and steps[s, 0] == RESIZE:
            other = 2 - here
            height_after, width_after, following = follow(
                steps, s + 1, np.int64(steps[s, 1]), np.int64(steps[s, 2]),
                maps[other], maps[other + 1], maps[4],
            )  # fmt: skip
            after_rows, after_columns = (
                maps[other, :height_after], maps[other + 1, :width_after],
            )  # fmt: skip
            y0, y1 = needed(after_rows)
            x0, x1 = needed(after_columns)
            if y1 == 0 or x1 == 0:  # all of it is padding
                y0, y1, x0, x1 = np.int64(0), np.int64(1), np.int64(0), np.int64(1)
            made, stride = _resize(
                source, stride, source_pixel, rows, columns, steps, s, fills, plane, each,
                weights, y0, y1, x0, x1, first,
            )  # fmt: skip
            if len(kept) < 0:
                stride = 0  # the image before this one stays alive until here
            kept = made
            source = kept.ctypes.data - y0 * stride - x0 * each
            source_pixel = np.int64(each)
            rows, columns, s, first, here = after_rows, after_columns, following, False, other
        row_bytes = len(columns) * each
        _gather(
            source, stride, source_pixel, rows, columns, steps, fills, plane,
            output + plane * len(rows) * row_bytes, row_bytes, each,
        )  # fmt: skip
        if len(kept) < 0:
            return


_GEOMETRY = types.void(
    types.int64,  # address of the raw memory
    types.Array(types.int64, 2, "C", readonly=True),  # frames [N, 8]
    types.Array(types.int32, 3, "C", readonly=True),  # steps [N, S, 8]
    types.Array(types.uint8, 2, "C", readonly=True),  # fills [F, C]
    types.Array(types.int32, 1, "C", readonly=True),  # weights
    types.int64,  # address of the output, uint8 [end - begin, image]
    types.int64,  # bytes of one output image
    types.int64,  # channels
    types.int64,  # first image
    types.int64,  # one past the last
)


def geometry() -> Kernel:
    """Return the compiled ``geometry`` kernel."""

    def kernel(
        memory: int, frames: Any, steps: Any, fills: Any, weights: Any, output: int,
        image_bytes: int, channels: int, begin: int, end: int,
    ) -> None:  # fmt: skip
        maps = np.empty((5, longest(frames, steps, begin, end)), np.int32)
        for n in range(begin, end):
            there = output + (n - begin) * image_bytes
            _image(memory, frames[n], steps[n], fills, weights, there, channels, maps)

    return compile_kernel(kernel, _GEOMETRY)
