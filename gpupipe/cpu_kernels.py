"""numba kernels: pointwise lookup of uint8 images, gathered row by row, on one thread.

Two forms with the same result:

- ``vector``: 16 pixels at a time in explicit LLVM vectors, for 1 to 4 channels. Bytes are put in
  output order by a shuffle, widened to float32 and evaluated as
  ``t = fma(x, a, x * a_low) - mean; fma(t, b, t * b_low)``, which is the correctly rounded
  ``(x / 255 - mean) / std`` wherever ``Lookup.constants`` is given. Stores go around the cache
  (``streaming``) where the output is larger than it.
- ``table``: one look-up per element, any channel count, any function.

LLVM chooses the instructions of the machine at hand (AVX-512, AVX2, NEON ...); nothing here is
"fast math". This is the only module that imports numba, and it is imported inside functions.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba import njit, types
from numba.extending import intrinsic

from gpupipe.caches import cache_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LANES = 16
"""Pixels per vector; divides a 64-byte line for every output type."""

PREFETCH_BYTES = 4096
"""How far ahead a gathered image is asked for: random rows defeat the hardware's own guesses."""

CONSTANTS = 5
"""Vectors per channel in the constants block: a, a_low, mean, b, b_low."""

FLOAT32, FLOAT16, BFLOAT16, UINT8 = range(4)
"""Output types, as the integers that specialise a kernel."""

ITEMSIZE = (4, 2, 2, 1)

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VOID = types.void


def make_intrinsic(typed: Callable[..., Any]) -> Callable[..., Any]:
    """Register code generation with numba; the call takes all arguments but the first."""
    made: Callable[..., Any] = intrinsic(prefer_literal=True)(typed)
    return made


def vector_type(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """Return the type of some lanes."""
    return ir.VectorType(element, lanes)


def declared(builder: Any, kind: ir.FunctionType, name: str) -> Any:
    """Return an LLVM intrinsic, declared in the module once."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def splat(element: ir.Type, value: int) -> ir.Constant:
    """Return a constant in all lanes."""
    return ir.Constant(vector_type(element), [value] * LANES)


def at(builder: Any, address: Any, kind: ir.Type) -> Any:
    """Return an address as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    """Load a value from an address."""
    value = builder.load(at(builder, address, kind))
    value.align = align
    return value


def _offset(builder: Any, address: Any, stride: Any, times: int) -> Any:
    return builder.add(address, builder.mul(stride, ir.Constant(I64, times)))


def _raw_vectors(builder: Any, source: Any, stride: Any, form: tuple[int, bool, bool]) -> list[Any]:
    """Load 16 pixels of every channel: C vectors of 16 bytes, in the order of the output."""
    channels, planar_in, planar_out = form
    if planar_in or channels == 1:
        planes = [
            load(builder, _offset(builder, source, stride, c), vector_type(I8), 1)
            for c in range(channels)
        ]
        if planar_out or channels == 1:
            return planes
        return _interleave(builder, planes)
    block = load(builder, source, vector_type(I8, LANES * channels), 1)
    starts = (
        [range(c, LANES * channels, channels) for c in range(channels)]
        if planar_out
        else [range(LANES * k, LANES * (k + 1)) for k in range(channels)]
    )
    return [_shuffle(builder, block, block, list(lanes)) for lanes in starts]


def _shuffle(builder: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(vector_type(I32, len(lanes)), lanes))


def _interleave(builder: Any, planes: list[Any]) -> list[Any]:
    """Turn C vectors of one channel each into C consecutive vectors of whole pixels."""
    channels = len(planes)
    joined = planes[0]
    for count, plane in enumerate(planes[1:], start=1):
        # Widen the new plane to the width of what is joined so far; the added lanes are not read.
        lanes = [*range(LANES), *([0] * (LANES * (count - 1)))]
        wide = _shuffle(builder, plane, plane, lanes)
        joined = _shuffle(builder, joined, wide, list(range(LANES * (count + 1))))
    order = [LANES * c + p for p in range(LANES) for c in range(channels)]
    return [
        _shuffle(builder, joined, joined, order[LANES * k : LANES * (k + 1)])
        for k in range(channels)
    ]


def _evaluate(builder: Any, raw: Any, constants: Any, k: int) -> Any:
    """Evaluate the arithmetic form in float32 for vector ``k`` of a block."""
    wide = vector_type(ir.FloatType())
    fma = declared(builder, ir.FunctionType(wide, [wide] * 3), f"llvm.fma.v{LANES}f32")
    a, a_low, mean, b, b_low = (
        load(
            builder,
            builder.add(constants, ir.Constant(I64, (k * CONSTANTS + j) * LANES * 4)),
            wide,
            64,
        )
        for j in range(CONSTANTS)
    )
    x = builder.uitofp(raw, wide)
    t = builder.fsub(builder.call(fma, [x, a, builder.fmul(x, a_low)]), mean)
    return builder.call(fma, [t, b, builder.fmul(t, b_low)])


def _round(builder: Any, value: Any, kind: int) -> Any:
    """Round float32 to the output type, to nearest even; finite values only."""
    if kind == FLOAT16:
        return builder.fptrunc(value, vector_type(ir.HalfType()))
    if kind == BFLOAT16:
        bits = builder.bitcast(value, vector_type(I32))
        odd = builder.and_(builder.lshr(bits, splat(I32, 16)), splat(I32, 1))
        bits = builder.add(bits, builder.add(odd, splat(I32, 0x7FFF)))
        return builder.trunc(builder.lshr(bits, splat(I32, 16)), vector_type(I16))
    return value


@make_intrinsic
def _block(  # numba calls it by position
    _context: Any,
    _source: Any,
    _source_plane: Any,
    _output: Any,
    _output_plane: Any,
    _constants: Any,
    channels: Any,
    planar_in: Any,
    planar_out: Any,
    kind: Any,
    streaming: Any,
) -> Any:
    """Convert 16 pixels: addresses and strides in bytes; the last five are literals."""
    form = (channels.literal_value, bool(planar_in.literal_value), bool(planar_out.literal_value))
    out_kind, stream = kind.literal_value, bool(streaming.literal_value)
    size = ITEMSIZE[out_kind]

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        src, src_plane, dst, dst_plane, consts = args[:5]
        for k, raw in enumerate(_raw_vectors(builder, src, src_plane, form)):
            value = _round(builder, _evaluate(builder, raw, consts, k), out_kind)
            address = (
                _offset(builder, dst, dst_plane, k)
                if form[2]
                else builder.add(dst, ir.Constant(I64, k * LANES * size))
            )
            store = builder.store(value, at(builder, address, value.type))
            store.align = LANES * size if stream else size
            if stream:
                hint = builder.module.add_metadata([ir.Constant(I32, 1)])
                store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    signature = _VOID(*(types.int64,) * 5, channels, planar_in, planar_out, kind, streaming)
    return signature, codegen


@make_intrinsic
def _prefetch(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address, for reading."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        fetch = declared(builder, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(I32, value) for value in (0, 3, 1)]
        builder.call(fetch, [builder.inttoptr(args[0], pointer), *hints])
        return context.get_dummy_value()

    return _VOID(types.int64), codegen


@make_intrinsic
def read_byte(_context: Any, _address: Any) -> Any:
    """Read one byte at an address."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.zext(load(builder, args[0], I8, 1), I64)

    return types.int64(types.int64), codegen


@make_intrinsic
def read_word(_context: Any, _address: Any) -> Any:
    """Read 32 bits at any address."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return load(builder, args[0], I32, 1)

    return types.int32(types.int64), codegen


@make_intrinsic
def write_bits(_context: Any, _address: Any, _bits: Any, size: Any) -> Any:
    """Write the low ``size`` bytes (a literal) of ``bits`` at an address."""
    width = ir.IntType(8 * size.literal_value)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = args[1] if width.width == I32.width else builder.trunc(args[1], width)
        builder.store(bits, at(builder, args[0], width)).align = 1
        return context.get_dummy_value()

    return _VOID(types.int64, types.int32, size), codegen


_SIGNATURE = types.void(
    types.int64,  # address of the raw images
    types.Array(types.int64, 1, "C", readonly=True),  # rows; empty: the images in their order
    types.Array(types.int64, 1, "C", readonly=True),  # addresses of the outputs
    types.int64,  # images per output
    types.int64,  # first image of this call
    types.int64,  # one past its last image
    types.int64,  # pixels per image
    types.int64,  # channels
    types.Array(types.int32, 1, "C", readonly=True),  # bits of the table, [C * 256]
    types.int64,  # address of the constants, [C, 5, 16] float32, 64-byte aligned
)

Kernel = Callable[..., None]


_COMPILING = threading.Lock()
"""numba's cache folder is a setting of the process: one thread at a time changes it."""


def compile_kernel(function: Any, signature: Any, *variant: int) -> Kernel:
    """Compile for one signature, with numba's cache in our own user-only directory.

    Every variant has a folder of its own, by CPU and numba version: numba names the files of one
    folder by counting, so that two processes which compile different variants of one function at
    once could exchange them.
    """
    cpu = f"{get_host_cpu_name()}\n{get_host_cpu_features().flatten()}\n{numba.__version__}"
    cpu += _sources()
    digest = hashlib.sha256(cpu.encode()).hexdigest()[:12]
    name = "-".join([digest, function.__qualname__.split(".")[0], *map(str, map(int, variant))])
    config: Any = numba.config
    with _COMPILING:
        before = config.CACHE_DIR
        config.CACHE_DIR = str(cache_dir("numba") / name)
        try:
            kernel: Kernel = njit(signature, nogil=True, cache=True)(function)
        finally:
            config.CACHE_DIR = before
    return kernel


@cache
def _sources() -> str:
    """Name the state of all kernels' files: numba looks only at the one that is compiled."""
    files = sorted(Path(__file__).parent.glob("cpu_*.py"))
    return "".join(f"\n{path.name} {path.stat().st_mtime_ns}" for path in files)


def vector(channels: int, planar_in: bool, planar_out: bool, kind: int, streaming: bool) -> Kernel:
    """Return the compiled ``vector`` kernel for 1 to 4 channels."""
    size = ITEMSIZE[kind]
    source_step = LANES if planar_in else LANES * channels
    output_step = LANES * size if planar_out else LANES * size * channels
    # Strides of the scalar tail, in bytes.
    source_pixel = 1 if planar_in else channels
    output_pixel = size if planar_out else size * channels

    def kernel(  # the order of _SIGNATURE
        images: int,
        rows: NDArray[np.int64],
        outputs: NDArray[np.int64],
        per_output: int,
        begin: int,
        end: int,
        pixels: int,
        _channels: int,
        table: NDArray[np.int32],
        constants: int,
    ) -> None:
        image_bytes = pixels * channels
        blocks = pixels // LANES
        source_plane = pixels if planar_in else 1
        output_plane = pixels * size if planar_out else size
        ahead = 1 + PREFETCH_BYTES // image_bytes
        for n in range(begin, end):
            row = rows[n] if rows.size else n
            source = images + row * image_bytes
            if rows.size and n + ahead < end:
                following = images + rows[n + ahead] * image_bytes
                for line in range(0, min(image_bytes, PREFETCH_BYTES), 64):
                    _prefetch(following + line)
            output = outputs[n // per_output] + (n % per_output) * image_bytes * size
            for i in range(blocks):
                _block(
                    source + i * source_step,
                    source_plane,
                    output + i * output_step,
                    output_plane,
                    constants,
                    channels,
                    planar_in,
                    planar_out,
                    kind,
                    streaming,
                )
            for p in range(blocks * LANES, pixels):
                for c in range(channels):
                    level = read_byte(source + p * source_pixel + c * source_plane)
                    write_bits(
                        output + p * output_pixel + c * output_plane, table[c * 256 + level], size
                    )

    return compile_kernel(kernel, _SIGNATURE, channels, planar_in, planar_out, kind, streaming)


def table(planar_in: bool, planar_out: bool, size: int) -> Kernel:
    """Return the compiled ``table`` kernel for elements of ``size`` bytes."""

    def kernel(  # the order of _SIGNATURE
        images: int,
        rows: NDArray[np.int64],
        outputs: NDArray[np.int64],
        per_output: int,
        begin: int,
        end: int,
        pixels: int,
        channels: int,
        table: NDArray[np.int32],
        _constants: int,
    ) -> None:
        image_bytes = pixels * channels
        source_pixel = 1 if planar_in else channels
        source_plane = pixels if planar_in else 1
        output_pixel = size if planar_out else size * channels
        output_plane = pixels * size if planar_out else size
        for n in range(begin, end):
            row = rows[n] if rows.size else n
            source = images + row * image_bytes
            output = outputs[n // per_output] + (n % per_output) * image_bytes * size
            for c in range(channels):
                for p in range(pixels):
                    level = read_byte(source + p * source_pixel + c * source_plane)
                    write_bits(
                        output + p * output_pixel + c * output_plane, table[c * 256 + level], size
                    )

    return compile_kernel(kernel, _SIGNATURE, planar_in, planar_out, size)
