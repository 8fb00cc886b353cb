"""Output memory that is used again once its consumer has dropped it.

A fresh allocation of ImageNet size costs more in page faults than the kernel costs in time. The
pool hands out a tensor over an aligned buffer and takes the buffer back when nobody else refers to
it: not the tensor, not a view of it, not ``tensor.numpy()``. Tensors never share a buffer.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector store."""

KEEP_BYTES = 1 << 30
"""Memory the pool remembers at most, and so the most that it keeps idle."""

SEARCH = 64
"""Buffers looked at for an idle one, so that a consumer who keeps everything pays no search."""

TRACKED = 1024
"""Buffers of one shape that are remembered; older ones are freed by their consumer, not reused."""

_Key = tuple[tuple[int, ...], torch.dtype, bool]

_NUMPY = {torch.float32: "f4", torch.float16: "f2", torch.uint8: "u1"}
"""NumPy's names of the dtypes it has; the bits of others are kept as unsigned integers."""


_POOLS: weakref.WeakSet[OutputPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in _POOLS:
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class OutputPool:
    """Hands out CPU tensors and reuses their memory after they have died.

    Thread-safe. Memory that a live tensor uses is never moved or freed here. What the
    pool remembers, idle or not, is at most ``keep_bytes``: beyond that it forgets first what was
    not asked for lately, and such memory is freed with its tensor.

    Args:
        keep_bytes: see above.
    """

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep = keep_bytes
        self._lock = threading.Lock()
        # Arrays in the shape of the tensor, by that shape; what was asked for last at the end.
        self._buffers: dict[_Key, deque[NDArray[Any]]] = {}
        self._remembered = 0
        _POOLS.add(self)

    def after_fork(self) -> None:
        """Forget, in a forked child, a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = False
    ) -> torch.Tensor:
        """Return an uninitialised tensor.

        Args:
            shape: [N, C, H, W], or any shape where ``channels_last`` is false.
            dtype: of the result.
            channels_last: lay a 4-D tensor out as ``torch.channels_last``.
        """
        tensor = torch.from_numpy(self._take((shape, dtype, channels_last)))
        return tensor if tensor.dtype == dtype else tensor.view(dtype)

    def _take(self, key: _Key) -> NDArray[Any]:
        with self._lock:
            same = self._buffers[key] = self._buffers.pop(key, deque())
            for _ in range(min(len(same), SEARCH)):
                if sys.getrefcount(same[0]) == _IDLE_REFERENCES:
                    same.rotate(-1)
                    return same[-1]
                same.rotate(-1)
            buffer = _aligned(*key)
            nbytes = buffer.nbytes
            if nbytes <= self._keep:
                self._forget(self._keep - nbytes)
                if len(same) >= TRACKED:
                    self._remembered -= same.popleft().nbytes
                same.append(buffer)
                self._remembered += nbytes
            return buffer

    def _forget(self, limit: int) -> None:
        """Forget buffers until the rest has ``limit`` bytes; those of old sizes first."""
        for key, same in list(self._buffers.items()):
            while same and self._remembered > limit:
                self._remembered -= same.popleft().nbytes
            if self._remembered <= limit:
                return
            del self._buffers[key]

    def idle_bytes(self) -> int:
        """Return the bytes kept for reuse that no tensor uses now."""
        with self._lock:
            return sum(
                same[position].nbytes
                for same in self._buffers.values()
                for position in range(len(same))
                if sys.getrefcount(same[position]) == _IDLE_REFERENCES
            )

    def clear(self) -> None:
        """Let go of all memory: live tensors keep theirs, and nothing is reused."""
        with self._lock:
            self._buffers.clear()
            self._remembered = 0


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> NDArray[Any]:
    """Return an array in the shape and layout of the tensor, at an aligned address."""
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    flat = raw[start : start + nbytes].view(_NUMPY.get(dtype) or f"u{dtype.itemsize}")
    if not channels_last:
        return flat.reshape(shape)
    n, c, h, w = shape
    return flat.reshape(n, h, w, c).transpose(0, 3, 1, 2)


def _idle_references() -> int:
    """Count the references of an object that only a deque holds, as this interpreter counts."""
    held = deque([np.empty(0, np.uint8)])
    return sys.getrefcount(held[0])


_IDLE_REFERENCES = _idle_references()
