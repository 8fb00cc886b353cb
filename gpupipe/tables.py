"""The specification of a pointwise pipeline: one value per channel and uint8 level.

A uint8 pixel has 256 values, so what torchvision does to it, pixel by pixel, is a table. The
kernels either look the value up or evaluate an arithmetic form that gives every entry of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.errors import InputError

Layout = Literal["NHWC", "NCHW", "NHW"]
"""Where the channel lies in a batch of raw images; ``"NHW"`` has one channel and no axis for it."""

Images = NDArray[np.uint8] | torch.Tensor
"""Raw pixels, uint8, in one of the layouts: an array in host memory, a tensor on a GPU."""

Rows = NDArray[np.int64] | torch.Tensor
"""int64 [N]: which image of ``Images`` each image of the batch is."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
"""Output dtypes that the kernels write."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_output(dtype: Any, memory_format: Any) -> None:
    """Refuse at once an output that cannot be asked for.

    Args:
        dtype: a floating-point dtype that the kernels write; None: as the transform returns it.
        memory_format: contiguous or channels_last.

    Raises:
        InputError: another one.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise InputError(
            f"dtype must be torch.float32, float16 or bfloat16, got {dtype!r}; "
            "convert to others in the training step"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise InputError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format!r}; choose one of them"
        )


@dataclass(frozen=True, eq=False)
class Lookup:
    """What one pointwise pipeline makes of every uint8 level of every channel.

    Attributes:
        values: [C, 256], one of ``DTYPES``, on the CPU; the result of torchvision itself.
        constants: float32 [C, 5] or None: ``a, a_low, mean, b, b_low`` of the form
            ``t = fma(x, a, x * a_low) - mean; fma(t, b, t * b_low)``, rounded to the dtype.
            Only given after it was compared with all of ``values``, bit by bit.
        host: what the CPU kernels derive from it once, by memory format.
    """

    values: torch.Tensor
    constants: NDArray[np.float32] | None = None
    host: dict[str, tuple[NDArray[np.int32], NDArray[np.float32] | None]] = field(
        default_factory=dict, repr=False
    )
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return int(self.values.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the results."""
        return self.values.dtype

    def on(self, device: torch.device) -> torch.Tensor:
        """Return ``values`` on ``device``, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.values.contiguous().to(device)
        return self._copies[device]
