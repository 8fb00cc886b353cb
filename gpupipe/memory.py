"""Output memory that is used again once its consumer has dropped it.

A fresh allocation of ImageNet size costs more in page faults than the kernel costs in time. The
pool hands out a tensor over an aligned buffer and takes the buffer back when nobody else refers to
it: not the tensor, not a view of it, not ``tensor.numpy()``. Tensors never share a buffer.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from math import prod

import numpy as np
import torch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector store."""

KEEP_BYTES = 1 << 30
"""Idle memory the pool keeps at most."""

SEARCH = 64
"""Buffers looked at for an idle one, so that a consumer who keeps everything pays no search."""

TRACKED = 1024
"""Buffers of one size that are remembered; older ones are freed by their consumer, not reused."""


class OutputPool:
    """Hands out CPU tensors and reuses their memory after they have died.

    Thread-safe. Memory that a live tensor uses is never counted, moved or freed here; idle memory
    of a size that was not asked for lately is let go first.
    """

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep = keep_bytes
        self._lock = threading.Lock()
        self._buffers: dict[int, deque[NDArray[np.uint8]]] = {}

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = False
    ) -> torch.Tensor:
        """Return an uninitialised tensor.

        Args:
            shape: [N, C, H, W], or any shape where ``channels_last`` is false.
            dtype: of the result.
            channels_last: lay a 4-D tensor out as ``torch.channels_last``.
        """
        buffer = self._take(prod(shape) * dtype.itemsize)
        flat = torch.from_numpy(buffer).view(dtype)
        if not channels_last:
            return flat.view(shape)
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        with self._lock:
            same = self._buffers.setdefault(nbytes, deque(maxlen=TRACKED))
            for _ in range(min(len(same), SEARCH)):
                if sys.getrefcount(same[0]) == _IDLE_REFERENCES:
                    same.rotate(-1)
                    return same[-1]
                same.rotate(-1)
            raw = np.empty(nbytes + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            buffer = raw[start : start + nbytes]
            del raw
            same.append(buffer)
            self._trim(nbytes)
            return buffer

    def _trim(self, wanted: int) -> None:
        """Let go of idle buffers beyond the limit, those of other sizes first."""
        excess = self.idle_bytes() - self._keep
        for nbytes in sorted(self._buffers, key=lambda size: size == wanted):
            same = self._buffers[nbytes]
            for _ in range(len(same)):
                if excess <= 0:
                    return
                if sys.getrefcount(same[0]) == _IDLE_REFERENCES:
                    same.popleft()
                    excess -= nbytes
                else:
                    same.rotate(-1)

    def idle_bytes(self) -> int:
        """Return the bytes kept for reuse that no tensor uses now."""
        return sum(
            nbytes
            for nbytes, same in self._buffers.items()
            for position in range(len(same))
            if sys.getrefcount(same[position]) == _IDLE_REFERENCES
        )

    def clear(self) -> None:
        """Let go of all memory: live tensors keep theirs, and nothing is reused."""
        with self._lock:
            self._buffers.clear()


def _idle_references() -> int:
    """Count the references of an object that only a deque holds, as this interpreter counts."""
    held = deque([np.empty(0, np.uint8)])
    return sys.getrefcount(held[0])


_IDLE_REFERENCES = _idle_references()
