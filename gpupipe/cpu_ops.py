"""The CPU twins of ``cuda_ops``: the same names, the same signatures, the same bits."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpupipe.geometry import check, check_program
from gpupipe.pauses import collector_paused
from gpupipe.program import Code
from gpupipe.threads import available, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gpupipe.cpu_kernels import Kernel
    from gpupipe.program import Program, Recipe
    from gpupipe.tables import Images, Layout, Lookup, Rows

STREAMING_BYTES = 16 << 20
"""Outputs of one call beyond this size are written around the cache."""

THREAD_BYTES = 256 << 10
"""A helper thread is woken for at least this much output."""

SMALL_BATCH_BYTES = 2 << 20
FEW_CPUS = 2
"""One helper does not pay for batches below this size, which are soon handed out: by the time it
has woken and the halves have met again, the caller could have gone on alone (``docs/cpu.md``)."""

MAX_VECTOR_CHANNELS = 4

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)


def normalize(
    images: Images,
    rows: Rows | None,
    outputs: Sequence[torch.Tensor],
    lookup: Lookup,
    *,
    layout: Layout,
) -> None:
    """Gather raw images and write what the pipeline makes of every pixel.

    ``outputs[n // B][n % B, c, h, w] = lookup.values[c, images[rows[n], h, w, c]]`` where B is the
    batch size of all outputs but the last.

    Args:
        images: uint8 array [M, H, W, C], [M, C, H, W] or [M, H, W], contiguous.
        rows: int64 [N] indices into ``images``, or None for all of them in order.
        outputs: tensors [B, C, H, W], contiguous or channels_last, or [B, H, W], of
            ``lookup.dtype``; all but the last of the same B, N images in all.
        lookup: the pipeline.
        layout: of ``images``.

    Raises:
        InputError: a dtype, shape or layout that does not fit.
        IndexRangeError: a row that ``images`` does not have.
    """
    g = check(images, rows, outputs, lookup, layout, "cpu")
    if not g.count or not g.pixels:
        return
    source = images if isinstance(images, np.ndarray) else images.numpy()
    picked = _NO_ROWS if rows is None else np.ascontiguousarray(rows)
    base = source.__array_interface__["data"][0]
    addresses = np.array([output.data_ptr() for output in outputs], np.int64)
    table, constants = _host_tables(lookup, planar=g.planar_out)
    written = g.count * g.pixels * g.channels * lookup.dtype.itemsize
    streaming = _streams(g.pixels, addresses, written)
    kernel = _kernel(g.channels, g.planar_in, g.planar_out, lookup, streaming)

    def run(begin: int, end: int) -> None:
        kernel(
            base, picked, addresses, g.per_output, begin, end, g.pixels, g.channels,
            table, 0 if constants is None else constants.ctypes.data,
        )  # fmt: skip

    split(run, g.count, _threads(written, len(outputs)))


def _threads(written: int, outputs: int) -> int | None:
    """Return on how many threads to write so many bytes; None: on all."""
    if written < 2 * THREAD_BYTES:
        return 1
    return 1 if written < outputs * SMALL_BATCH_BYTES and available() <= FEW_CPUS else None


def _streams(pixels: int, addresses: NDArray[np.int64], written: int) -> bool:
    """Whether stores may and should go around the cache: aligned, and larger than it."""
    aligned = pixels % 16 == 0 and not (addresses % 64).any()
    return aligned and written > STREAMING_BYTES


def _kernel(
    channels: int, planar_in: bool, planar_out: bool, lookup: Lookup, streaming: bool
) -> Kernel:
    """Return the compiled kernel for one case."""
    if lookup.constants is None or channels > MAX_VECTOR_CHANNELS:
        return _compiled_table(planar_in, planar_out, lookup.dtype.itemsize)
    return _compiled_vector(channels, planar_in, planar_out, _KINDS[lookup.dtype], streaming)


@cache
def _compiled_table(planar_in: bool, planar_out: bool, size: int) -> Kernel:
    with collector_paused():
        from gpupipe import cpu_kernels  # numba alone costs 0.2 s

        return cpu_kernels.table(planar_in, planar_out, size)


@cache
def _compiled_vector(
    channels: int, planar_in: bool, planar_out: bool, kind: int, streaming: bool
) -> Kernel:
    with collector_paused():
        from gpupipe import cpu_kernels  # numba alone costs 0.2 s

        return cpu_kernels.vector(channels, planar_in, planar_out, kind, streaming)


def _host_tables(
    lookup: Lookup, *, planar: bool
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Return the table's bits as int32 [C * 256], and the constants as [C, 5, 16] vectors.

    For interleaved output, vector k of a block of 16 pixels holds the channels
    ``(16 k + lane) % C``, lane by lane.
    """
    key = "planar" if planar else "interleaved"
    if key not in lookup.host:
        bits = lookup.values.contiguous().view(_BITS[lookup.dtype.itemsize])
        table = bits.to(torch.int32).flatten().numpy()
        constants = None
        if lookup.constants is not None:
            lanes = np.arange(16 * lookup.channels).reshape(lookup.channels, 16)
            channel = lanes // 16 if planar else lanes % lookup.channels
            raw = np.empty(lookup.channels * 5 * 16 * 4 + 64, np.uint8)
            start = -raw.ctypes.data % 64
            constants = raw[start : start + lookup.channels * 5 * 16 * 4].view(np.float32)
            constants = constants.reshape(lookup.channels, 5, 16)
            constants[...] = lookup.constants[channel].transpose(0, 2, 1)
        lookup.host[key] = (table, constants)
    return lookup.host[key]


SLACK_BYTES = 64
"""Behind a block of results: the last row may be copied a vector at a time."""

BLOCK_BYTES = 512 << 10
"""Raw results of geometry that are put through the table at a time: they stay in the cache."""


def resample(
    images: Images,
    program: Program,
    outputs: Sequence[torch.Tensor],
    recipe: Recipe,
    *,
    threads: int | None = None,
) -> None:
    """Make images by their programs, and write what the pipeline makes of every pixel.

    ``outputs[n // B][n % B, c, y, x] = lookup.values[c, geometry(n)[y, x, c]]``, then the erased
    rectangles; B is the batch size of all outputs but the last. For the steps see ``program``.

    Args:
        images: uint8 [n], the memory that frames point into; every byte of a frame lies in it.
        program: frames int64 [N, 8], steps int32 [N, S, 8] and weights int32, arrays.
        outputs: tensors [B, C, h, w], contiguous or channels_last, or [B, h, w], of the lookup's
            dtype; all but the last of the same B, N images in all.
        recipe: what all batches share.
        threads: 1: work in the calling thread alone; None: on all.

    Raises:
        InputError: a dtype, shape or layout that does not fit.
    """
    g = check_program(images, program, outputs, recipe, "cpu")
    if not g.count or not g.pixels:
        return
    source = images if isinstance(images, np.ndarray) else images.numpy()
    work = Resampling(program, outputs, recipe, planar_in=g.planar_in, planar_out=g.planar_out)
    base = source.__array_interface__["data"][0]
    split(lambda begin, end: work.run(base, begin, end), g.count, threads)


class Resampling:
    """A ``resample`` whose arguments are checked, for single images as they come.

    Args:
        program: see ``resample``.
        outputs: see ``resample``.
        recipe: see ``resample``.
        planar_in: whether the frames are planes.
        planar_out: whether the outputs are.
    """

    def __init__(
        self,
        program: Program,
        outputs: Sequence[torch.Tensor],
        recipe: Recipe,
        *,
        planar_in: bool,
        planar_out: bool,
    ) -> None:
        lookup = recipe.lookup
        self._recipe = recipe
        self._frames = np.ascontiguousarray(program.frames)
        self._steps = np.ascontiguousarray(program.steps)
        self._weights = program.weights
        self._pixels = recipe.size[0] * recipe.size[1]
        self._channels = lookup.channels
        self._bytes = self._pixels * lookup.channels
        self._table, constants = _host_tables(lookup, planar=planar_out)
        self._point = 0 if constants is None else constants.ctypes.data
        self._pointwise = _kernel(lookup.channels, planar_in, planar_out, lookup, streaming=False)
        self._geometry = _compiled_geometry()
        self._outputs = outputs  # their memory is written
        itemsize = lookup.dtype.itemsize
        self._addresses = np.concatenate(
            [output.data_ptr() + np.arange(len(output)) * (self._bytes * itemsize)
             for output in outputs]
        )  # fmt: skip
        codes = self._steps[:, :, 0]
        self._erases = bool(codes.size) and bool((codes == Code.ERASE).any())

    def run(self, base: int, begin: int, end: int) -> None:
        """Make images [begin, end) on the calling thread, from memory at address ``base``."""
        size, channels = self._bytes, self._channels
        block = max(1, BLOCK_BYTES // size)
        scratch = np.empty(min(block, end - begin) * size + SLACK_BYTES, np.uint8)
        raw = scratch.ctypes.data
        for first in range(begin, end, block):
            last = min(first + block, end)
            self._geometry(
                base, self._frames, self._steps, self._recipe.fills, self._weights, raw, size,
                channels, first, last,
            )  # fmt: skip
            self._pointwise(
                raw, _NO_ROWS, self._addresses[first:last], 1, 0, last - first, self._pixels,
                channels, self._table, self._point,
            )  # fmt: skip
        if self._erases:
            _erase(self._steps, begin, end, self._addresses, self._outputs[0], self._recipe)


def _erase(
    steps: NDArray[np.int32],
    begin: int,
    end: int,
    each: NDArray[np.int64],
    output: torch.Tensor,
    recipe: Recipe,
) -> None:
    """Overwrite the erased rectangles of images [begin, end)."""
    size = recipe.lookup.dtype.itemsize
    flat = output.ndim == 3  # noqa: PLR2004 # [B, h, w]
    strides = (0, *output.stride()[1:]) if flat else output.stride()[1:]
    values, noise = recipe.erasing_bits()
    _compiled_erasing(size)(
        steps, begin, end, each, np.array(strides, np.int64) * size,
        recipe.lookup.channels, values, noise,
    )  # fmt: skip


@cache
def _compiled_geometry() -> Kernel:
    with collector_paused():
        from gpupipe import cpu_resample  # numba alone costs 0.2 s

        return cpu_resample.geometry()


@cache
def _compiled_erasing(size: int) -> Kernel:
    with collector_paused():
        from gpupipe import cpu_erase  # numba alone costs 0.2 s

        return cpu_erase.erasing(size)
