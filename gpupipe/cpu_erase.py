"""numba: erased rectangles, with values or with normal noise, written into finished images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit, types

from gpupipe.cpu_kernels import compile_kernel, write_bits

if TYPE_CHECKING:
    from gpupipe.cpu_kernels import Kernel

ERASE = 4  # program.Code

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
