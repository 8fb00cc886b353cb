"""Mean and standard deviation per channel, from exact integer counts.

Every pixel of a uint8 image is one of 256 values, so a histogram [C, 256] of int64 counts holds all
that is needed, and no sum can overflow or round before the last step::

    n = sum counts[v],  s = sum v * counts[v],  q = sum v^2 * counts[v]     Python ints
    mean = s / (255 n),  std = sqrt((n q - s^2) / (255 n)^2)                one rounding, and the root

Arrays are counted block by block as they lie, a memmap as well, on several threads:
``torch.bincount`` releases the GIL, ``np.bincount`` holds it and is half as fast. Other datasets
are read sample by sample, and counted batch by batch.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset

from gpupipe.errors import GpupipeError, InputError, SourceError
from gpupipe.images import ImageKind, kind_of, raw_bytes
from gpupipe.sources import ArraySource, resolve
from gpupipe.threads import split

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BLOCK_BYTES = 8 << 20
"""Pixels that are counted at once; they and one copy of them are all the memory that is needed."""

BLOCK_SAMPLES = 256
"""Samples that are read before they are counted, so that a slow dataset's bar still moves."""

PATIENCE = 1.0
"""Seconds before a progress bar appears that nobody asked for."""

_NCHW = {"NHW": (), "NHWC": (0, 3, 1, 2), "NCHW": (0, 1, 2, 3)}

Planes = NDArray[np.uint8]
"""uint8 [C, ...]: the pixels of some images, channel by channel, in any order within a channel."""


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of all pixels of a dataset, on the scale 0 to 1; ``str`` gives a line to paste.

    Attributes:
        mean: of each channel.
        std: of each channel; of the population, so the divisor is the number of pixels.
        pixels: how many there are in each channel.
        images: how many there are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: int
    images: int

    def __str__(self) -> str:
        """Return ``Normalize(mean=(0.2860,), std=(0.3530,))``."""
        mean, std = (
            "".join(f"{value:.4f}, " for value in values).removesuffix(" " * (len(values) > 1))
            for values in (self.mean, self.std)
        )
        return f"Normalize(mean=({mean}), std=({std}))"
