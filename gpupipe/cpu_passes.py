"""numba: the two passes of a resize, as loops of explicit LLVM vectors.

16 bytes of a row in the vertical pass; one pixel of four rows in the horizontal one, so that a
weight serves 16 products. Integers throughout: 22-bit weights, 32-bit sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from gpupipe.cpu_kernels import (
    I8,
    I32,
    I64,
    LANES,
    at,
    declared,
    load,
    make_intrinsic,
    read_byte,
    splat,
    vector_type,
    write_bits,
)

HALF = 1 << 21
BITS = 22

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


@njit(nogil=True)  # type: ignore[untyped-decorator] # likewise
def vertical(
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
def horizontal(
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
