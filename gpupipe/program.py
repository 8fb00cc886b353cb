"""What a batch's geometry is, sample by sample: frames, steps, and what all samples share.

A *frame* says where a raw image lies and which part of it is there; *steps* are op codes with
parameters, run in order, that make the output image out of the frame. Both are plain integer
arrays, written by ``tape`` and read by ``cpu_ops.resample`` and ``cuda_ops.resample``. A *recipe*
is what does not change from batch to batch.

The kernels read images through index maps: a window or a flip only changes which row and column is
read, a resize reads through the maps before it, and the maps after it say which of its rows and
columns are needed at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpupipe.draws import quantiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpupipe.tables import Lookup

FIELDS = 8
"""int32 of one step: its code and seven parameters."""

FRAME = 8
"""int64 of one frame, see ``Frame``."""


class Frame(IntEnum):
    """The fields of a frame, by their place."""

    OFFSET = 0  # byte offset of the stored part's first byte from the start of the memory
    HEIGHT = 1  # of the whole image, which steps count in
    WIDTH = 2
    TOP = 3  # where the stored part begins in the whole image
    LEFT = 4
    ROW_STRIDE = 5  # bytes from one stored row to the next
    PIXEL_STRIDE = 6  # bytes from one pixel to the next: C interleaved, 1 planar
    CHANNEL_STRIDE = 7  # bytes from one channel to the next: 1 interleaved


class Code(IntEnum):
    """What a step does; parameters in the order in which they follow the code."""

    NOP = 0
    WINDOW = 1  # top, left, height, width, Padding, row of Recipe.fills; may reach beyond the image
    FLIP = 2  # 1: left and right are exchanged, 2: top and bottom, 3: both
    RESIZE = (
        3  # height, width, vertical first (0, 1), weights of rows, weights of columns (0: kept)
    )
    ERASE = 4  # top, left, height, width, row of Recipe.erasures or -1: noise, key low, key high


class Padding(IntEnum):
    """What lies beyond the image."""

    CONSTANT = 0
    EDGE = 1
    REFLECT = 2  # without repeating the edge, as often as needed
    SYMMETRIC = 3  # with it


@dataclass(frozen=True, eq=False)
class Recipe:
    """What all batches of one pipeline and kind of image share.

    Attributes:
        lookup: the pointwise part.
        size: height and width of the output images.
        fills: uint8 [F, C]: raw colours for ``Padding.CONSTANT``.
        erasures: [E, C] of ``lookup.dtype``: finished values for ``Code.ERASE``.
        noise: whether a step may ask for noise.
    """

    lookup: Lookup
    size: tuple[int, int]
    fills: NDArray[np.uint8]
    erasures: torch.Tensor
    noise: bool = False
    _copies: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)
    _bits: dict[str, tuple[NDArray[np.int32], NDArray[np.int32]]] = field(
        default_factory=dict, repr=False
    )

    def erasing_bits(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the bits of ``erasures``, int32 [E, C], and of the noise, int32 [65536] or []."""
        if not self._bits:  # several threads may do this at once: the assignment is one step
            noise = torch.from_numpy(quantiles()) if self.noise else torch.empty(0)
            carriers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
            carrier = carriers[self.lookup.dtype.itemsize]
            values, noise_bits = (
                value.to(self.lookup.dtype).contiguous().view(carrier).to(torch.int32).numpy()
                for value in (self.erasures, noise)
            )
            self._bits["host"] = values, noise_bits
        return self._bits["host"]

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """Return ``fills`` or ``erasures`` on a device, copied there once."""
        key = (name, device)
        if key not in self._copies:
            value = self.erasures if name == "erasures" else torch.from_numpy(self.fills)
            self._copies[key] = value.contiguous().to(device)
        return self._copies[key]


@dataclass(frozen=True, eq=False)
class Program:
    """One batch's frames and steps.

    Attributes:
        frames: int64 [N, FRAME]; an array, or a tensor where the kernel runs, and so the others.
        steps: int32 [N, S, FIELDS]; ``Code.NOP`` may stand anywhere. ``ERASE`` stands behind
            everything else.
        weights: int32, what ``RESIZE`` steps point into; see ``resampling``.
    """

    frames: Any
    steps: Any
    weights: Any

    def on_host(self) -> Program:
        """Return it as arrays; its tensors lie in host memory."""
        values = (self.frames, self.steps, self.weights)
        return Program(*(v.numpy() if isinstance(v, torch.Tensor) else v for v in values))
