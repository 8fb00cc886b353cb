"""numba kernels: the geometry of one image after the other, and erasing; on one thread.

``geometry`` reads frames and steps (``program``) and writes uint8 images of the final size, which
the kernels of ``cpu_kernels`` then put through the table while they are in the cache. Rows and
columns are looked up in index maps: entry i of a map is the row or column of the current image that
row or column i of the result reads, or -1 - s where step s padded. A resize reads through the maps
before it, and makes only the rows and columns that the maps behind it ask for.

The two passes of a resize are loops of explicit LLVM vectors: 16 bytes of a row in the vertical
one; one pixel of four rows in the horizontal one, so that a weight serves 16 products. Integers
throughout: 22-bit weights, 32-bit sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from gpupipe.cpu_kernels import (
    I8,
    I32,
    I64,
    at,
    compile_kernel,
    declared,
    load,
    make_intrinsic,
    read_byte,
    read_word,
    splat,
    vector_type,
    write_bits,
)

if TYPE_CHECKING:
    from gpupipe.cpu_kernels import Kernel

LANES = 16
HALF = 1 << 21
BITS = 22
SLACK = 64
"""Bytes behind every scratch row and buffer: vectors may read and write beyond the last pixel."""

NOP, WINDOW, FLIP, RESIZE, ERASE = range(5)
EDGE, REFLECT = 1, 2

_VOID = types.void


def _rounded(builder: Any, total: Any) -> Any:
    """Shift 16 sums by the weights' fraction, clip to a byte, narrow."""
    wide = vector_type(I32)
    shifted = builder.ashr(total, splat(I32, BITS))
    smax = declared(builder, ir.FunctionType(wide, [wide] * 2), f"llvm.smax.v{LANES}i32")
    smin = declared(builder, ir.FunctionType(wide, [wide] * 2), f"llvm.smin.v{LANES}i32")
    clipped = builder.call(smin, [builder.call(smax, [shifted, splat(I32, 0)]), splat(I32, 255)])
    return builder.trunc(clipped, vector_type(I8))


def _spread(builder: Any, weight: Any) -> Any:
    """Return one 32-bit weight in all lanes."""
    one = builder.insert_element(
        ir.Constant(vector_type(I32), ir.Undefined), weight, ir.Constant(I32, 0)
    )
    zeros = ir.Constant(vector_type(I32), [0] * LANES)
    return builder.shuffle_vector(one, one, zeros)


def _weighted_sum(builder: Any, taps: Any, weights: Any, pixels: Any) -> Any:
    """Return the sum over ``taps`` of ``pixels(tap)``, <16 x i8>, times their weights, rounded."""
    total = cgutils.alloca_once_value(builder, splat(I32, HALF))
    with cgutils.for_range(builder, taps) as loop:
        address = builder.add(weights, builder.mul(loop.index, ir.Constant(I64, 4)))
        weight = _spread(builder, load(builder, address, I32, 4))
        wide = builder.zext(pixels(loop.index), vector_type(I32))
        builder.store(builder.add(builder.load(total), builder.mul(wide, weight)), total)
    return _rounded(builder, builder.load(total))


@make_intrinsic
def _vertical16(
    _context: Any, _source: Any, _stride: Any, _output: Any, _weights: Any, _taps: Any
) -> Any:
    """Make 16 bytes of a row from ``taps`` rows that lie ``stride`` bytes apart."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, stride, output, weights, taps = args

        def pixels(tap: Any) -> Any:
            address = builder.add(source, builder.mul(tap, stride))
            return load(builder, address, vector_type(I8), 1)

        made = _weighted_sum(builder, taps, weights, pixels)
        builder.store(made, at(builder, output, made.type)).align = 1
        return context.get_dummy_value()

    return _VOID(*(types.int64,) * 5), codegen


@make_intrinsic
def _horizontal4(
    _context: Any, _a: Any, _b: Any, _c: Any, _d: Any, _output: Any, _stride: Any,
    _weights: Any, _taps: Any,
) -> Any:  # fmt: skip
    """Make a pixel of 3 bytes in four rows; ``a`` to ``d`` are where their first taps lie.

    Four bytes of each tap are read and four of each result written: one more than is meant.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        rows, (output, stride, weights, taps) = args[:4], args[4:]

        def pixels(tap: Any) -> Any:
            offset = builder.mul(tap, ir.Constant(I64, 3))
            four: Any = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
            for lane, row in enumerate(rows):
                word = load(builder, builder.add(row, offset), I32, 1)
                four = builder.insert_element(four, word, ir.Constant(I32, lane))
            return builder.bitcast(four, vector_type(I8))

        made = builder.bitcast(_weighted_sum(builder, taps, weights, pixels), ir.VectorType(I32, 4))
        for lane in range(4):
            word = builder.extract_element(made, ir.Constant(I32, lane))
            address = builder.add(output, builder.mul(stride, ir.Constant(I64, lane)))
            builder.store(word, at(builder, address, I32)).align = 1
        return context.get_dummy_value()

    return _VOID(*(types.int64,) * 8), codegen


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
def _window(old: Any, start: int, count: int, mode: int, step: int) -> Any:
    """Return a map cut at ``start``; beyond the old one lies padding."""
    new = np.empty(count, np.int32)
    size = len(old)
    for i in range(count):
        place = start + i
        if 0 <= place < size:
            new[i] = old[place]
        elif mode == 0:
            new[i] = -1 - step
        else:
            new[i] = old[_fold(place, size, mode)]
    return new


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _maps(steps: Any, first: int, height: int, width: int) -> Any:
    """Follow windows and flips from step ``first`` on; return the maps and the step after them."""
    rows = np.arange(height).astype(np.int32)
    columns = np.arange(width).astype(np.int32)
    s = first
    while s < len(steps) and steps[s, 0] <= FLIP:
        if steps[s, 0] == WINDOW:
            rows = _window(rows, steps[s, 1], steps[s, 3], steps[s, 5], s)
            columns = _window(columns, steps[s, 2], steps[s, 4], steps[s, 5], s)
        elif steps[s, 0] == FLIP:
            if steps[s, 1] & 1:
                columns = columns[::-1].copy()
            if steps[s, 1] & 2:
                rows = rows[::-1].copy()
        s += 1
    return rows, columns, s


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _span(places: Any) -> Any:
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
    begin, end, direction = _span(columns)
    for y in range(len(rows)):
        there = output + y * output_stride
        row = rows[y]
        line = source + row * row_stride
        if row >= 0 and direction == 1 and pixel == channels:
            inside = end - begin
            _copy(line + columns[begin] * pixel, there + begin * channels, inside * channels)
        elif row >= 0 and direction == -1 and pixel == channels:
            last = line + columns[begin] * pixel
            _mirror(last, there + begin * channels, end - begin, channels)
        elif row >= 0:
            for x in range(begin, end):
                column = columns[x]
                if column >= 0:
                    for c in range(channels):
                        level = read_byte(line + column * pixel + c)
                        write_bits(there + x * channels + c, np.int32(level), 1)
        if row < 0 or direction == 0:
            _pad(row, columns, 0, len(columns), steps, fills, channel, there, channels)
        else:
            _pad(row, columns, 0, begin, steps, fills, channel, there, channels)
            _pad(row, columns, end, len(columns), steps, fills, channel, there, channels)


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _vertical(
    source: int, stride: int, output: int, output_stride: int, count: int, weights: Any,
    offset: int, first: int, last: int, origin: int,
) -> None:  # fmt: skip
    """Make rows [first, last) of ``count`` bytes; row ``origin`` of the input is at ``source``."""
    taps, outputs = weights[offset], weights[offset + 1]
    base = weights.ctypes.data
    for y in range(first, last):
        start = source + (weights[offset + 2 + y] - origin) * stride
        k = offset + 2 + outputs + y * taps
        there = output + (y - first) * output_stride
        i = 0
        while i + LANES <= count:
            _vertical16(start + i, stride, there + i, base + k * 4, taps)
            i += LANES
        if i < count and count >= LANES:
            i = count - LANES
            _vertical16(start + i, stride, there + i, base + k * 4, taps)
            i = count
        while i < count:
            total = HALF
            for t in range(taps):
                total += weights[k + t] * read_byte(start + i + t * stride)
            write_bits(there + i, np.int32(min(max(total >> BITS, 0), 255)), 1)
            i += 1


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _horizontal(
    source: int, stride: int, output: int, output_stride: int, count: int, channels: int,
    weights: Any, offset: int, first: int, last: int, origin: int, safe: int,
) -> None:  # fmt: skip
    """Make columns [first, last) of ``count`` rows; input column ``origin`` is at ``source``.

    ``safe`` rows may be read one byte beyond their last pixel.
    """
    taps, outputs = weights[offset], weights[offset + 1]
    base = weights.ctypes.data
    y = 0
    if channels == 3 and safe >= 4:
        while y < safe:
            y = min(y, safe - 4)  # the last four may be made twice
            a = source + y * stride
            there = output + y * output_stride
            for x in range(first, last):
                start = (weights[offset + 2 + x] - origin) * 3
                k = offset + 2 + outputs + x * taps
                _horizontal4(
                    a + start, a + start + stride, a + start + 2 * stride, a + start + 3 * stride,
                    there + (x - first) * 3, output_stride, base + k * 4, taps,
                )  # fmt: skip
            y += 4
    while y < count:
        line, there = source + y * stride, output + y * output_stride
        for x in range(first, last):
            start = line + (weights[offset + 2 + x] - origin) * channels
            k = offset + 2 + outputs + x * taps
            for c in range(channels):
                total = HALF
                for t in range(taps):
                    total += weights[k + t] * read_byte(start + t * channels + c)
                level = np.int32(min(max(total >> BITS, 0), 255))
                write_bits(there + (x - first) * channels + c, level, 1)
        y += 1


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _reads(weights: Any, offset: int, first: int, last: int) -> Any:
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
def _needed(places: Any) -> Any:
    """Return the range of the places that a map reads."""
    begin, end = np.int64(1 << 30), np.int64(0)
    for place in places:
        if place >= 0:
            begin, end = min(begin, place), max(end, place + 1)
    return min(begin, end), end


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
    r0, r1 = _reads(weights, by_row, y0, y1)
    c0, c1 = _reads(weights, by_column, x0, x1)
    _, _, down = _span(rows[r0:r1])
    left, right, across = _span(columns[c0:c1])
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
        _vertical(
            here, stride, middle.ctypes.data, middle_stride, middle_stride, weights, by_row,
            y0, y1, r0,
        )  # fmt: skip
        _horizontal(
            middle.ctypes.data, middle_stride, there, out_stride, height, channels, weights,
            by_column, x0, x1, c0, height,
        )  # fmt: skip
    elif by_row != 0 and by_column != 0:
        middle = np.empty((r1 - r0) * out_stride + SLACK, np.uint8)
        _horizontal(
            here, stride, middle.ctypes.data, out_stride, r1 - r0, channels, weights, by_column,
            x0, x1, c0, safe,
        )  # fmt: skip
        _vertical(
            middle.ctypes.data, out_stride, there, out_stride, out_bytes, weights, by_row,
            y0, y1, r0,
        )  # fmt: skip
    elif by_row != 0:
        _vertical(here, stride, there, out_stride, out_bytes, weights, by_row, y0, y1, r0)
    elif by_column != 0:
        _horizontal(
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
) -> None:  # fmt: skip
    """Make one image, uint8 [h, w, C], or [C, h, w] from planes."""
    pixel, step_channel = frame[6], frame[7]
    planes = channels if pixel == 1 else 1
    each = channels // planes
    begun_rows, begun_columns, begun = _maps(steps, 0, frame[1], frame[2])
    for plane in range(planes):
        rows, columns, s = begun_rows, begun_columns, begun
        stride = frame[5]
        source = memory + frame[0] + plane * step_channel - frame[3] * stride - frame[4] * pixel
        source_pixel = pixel
        kept = np.empty(0, np.uint8)
        first = True
        while s < len(steps) and steps[s, 0] == RESIZE:
            after_rows, after_columns, following = _maps(steps, s + 1, steps[s, 1], steps[s, 2])
            y0, y1 = _needed(after_rows)
            x0, x1 = _needed(after_columns)
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
            rows, columns, s, first = after_rows, after_columns, following, False
        width = len(columns) * each
        _gather(
            source, stride, source_pixel, rows, columns, steps, fills, plane,
            output + plane * len(rows) * width, width, each,
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

_ERASING = types.void(
    types.Array(types.int32, 3, "C", readonly=True),  # steps [N, S, 8]
    types.int64,  # first image
    types.int64,  # one past the last
    types.Array(types.int64, 1, "C", readonly=True),  # address of each output image
    types.Array(types.int64, 1, "C", readonly=True),  # strides of channel, row, column; bytes
    types.int64,  # channels
    types.Array(types.int32, 2, "C", readonly=True),  # bits of the values [E, C]
    types.Array(types.int32, 1, "C", readonly=True),  # bits of the noise [65536]
)


def geometry() -> Kernel:
    """Return the compiled ``geometry`` kernel."""

    def kernel(
        memory: int, frames: Any, steps: Any, fills: Any, weights: Any, output: int,
        image_bytes: int, channels: int, begin: int, end: int,
    ) -> None:  # fmt: skip
        for n in range(begin, end):
            there = output + (n - begin) * image_bytes
            _image(memory, frames[n], steps[n], fills, weights, there, channels)

    return compile_kernel(kernel, _GEOMETRY)


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def _philox(counter: int, low: int, high: int, lane: int) -> Any:
    """Return one word of Philox4x32-10 for counter (i, 0, 0, "nois")."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    x0, x1, x2, x3 = np.uint64(counter), np.uint64(0), np.uint64(0), np.uint64(0x6E6F6973)
    k0, k1 = np.uint64(low) & mask, np.uint64(high) & mask
    for _ in range(10):
        first, second = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (second >> shift) ^ x1 ^ k0,
            second & mask,
            (first >> shift) ^ x3 ^ k1,
            first & mask,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    if lane == 0:
        return x0
    if lane == 1:
        return x1
    return x2 if lane == 2 else x3


def erasing(size: int) -> Kernel:
    """Return the compiled ``erase`` kernel for elements of ``size`` bytes."""

    def kernel(
        steps: Any, begin: int, end: int, outputs: Any, strides: Any, channels: int,
        values: Any, noise: Any,
    ) -> None:  # fmt: skip
        for n in range(begin, end):
            for s in range(steps.shape[1]):
                if steps[n, s, 0] != ERASE:
                    continue
                top, left, height, width = (
                    steps[n, s, 1], steps[n, s, 2], steps[n, s, 3], steps[n, s, 4],
                )  # fmt: skip
                row = steps[n, s, 5]
                low, high = np.uint32(steps[n, s, 6]), np.uint32(steps[n, s, 7])
                i = 0
                for c in range(channels):
                    for y in range(height):
                        line = outputs[n] + c * strides[0] + (top + y) * strides[1]
                        for x in range(width):
                            if row >= 0:
                                bits = values[row, c]
                            else:
                                bits = noise[_philox(i >> 2, low, high, i & 3) >> np.uint64(16)]
                            write_bits(line + (left + x) * strides[2], bits, size)
                            i += 1

    return compile_kernel(kernel, _ERASING, size)
