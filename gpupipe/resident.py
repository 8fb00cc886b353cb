"""Batches from raw images that the kernel reads where they lie: no staging, no thread.

On the CPU that is the dataset's own array or memmap; on a GPU the copy that ``cache="device"``
keeps there. Several batches share one launch, with outputs of their own, as in ``transfer``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.device import Device
from gpupipe.errors import DeviceError
from gpupipe.sources import ArraySource
from gpupipe.staging import Batch, FeedSpec, launch_groups


class HostImages:
    """The arrays of a source, read by the CPU kernel in place."""

    def __init__(self, source: ArraySource) -> None:
        self._source = source
        self._columns = range(len(source.first.columns))

    def normalize(
        self, rows: NDArray[np.int64], outputs: list[torch.Tensor], spec: FeedSpec
    ) -> None:
        """Gather and normalise in one pass; several or strided arrays are gathered first."""
        from gpupipe import cpu_ops  # imports numba where it compiles

        images = self._source.first.images
        picked: NDArray[np.int64] | None = rows
        if not self._source.in_place:
            images, picked = np.empty((len(rows), *images.shape[1:]), np.uint8), None
            self._source.read_images(rows, images)
        cpu_ops.normalize(images, picked, outputs, spec.lookup, layout=spec.layout)

    def columns(self, rows: NDArray[np.int64], _start: int) -> tuple[torch.Tensor, ...]:
        """Gather the columns of one batch."""
        return tuple(torch.from_numpy(self._source.read_column(c, rows)) for c in self._columns)


class DeviceImages:
    """A copy of a source's arrays on a GPU, made once."""

    def __init__(self, source: ArraySource, device: Device) -> None:
        self.device = device
        where = device.torch_device
        images = _joined([part.images for part in source.parts])
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else images.nbytes
        if images.nbytes > free:
            raise DeviceError(
                f'cache="device" needs {images.nbytes / 2**30:.1f} GiB on {where}, which has '
                f"{free / 2**30:.1f} GiB free; leave the argument out to read from host memory"
            )
        self.images = _upload(images, where)
        self._columns = [
            _upload(_joined([part.columns[c] for part in source.parts]), where)
            for c in range(len(source.first.columns))
        ]
        self._rows = torch.empty(0, dtype=torch.int64)

    def normalize(
        self, rows: NDArray[np.int64], outputs: list[torch.Tensor], spec: FeedSpec
    ) -> None:
        """Gather and normalise on the current stream."""
        self.upload_rows(rows)
        self.device.normalize(self.images, self._rows, outputs, spec.lookup, layout=spec.layout)

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """Return an array on the device, copied on the current stream; nothing waits."""
        host = torch.from_numpy(array)
        where = self.device.torch_device
        if where.type == "cuda":
            # The pinned block is not used again before this copy is done: torch's host allocator
            # records an event for every non-blocking copy from it.
            host = host.pin_memory()
        return host.to(where, non_blocking=True)

    def upload_rows(self, rows: NDArray[np.int64]) -> None:
        """Say of which images a chunk's ``columns`` are."""
        self._rows = self.upload(rows)

    def columns(self, rows: NDArray[np.int64], start: int) -> tuple[torch.Tensor, ...]:
        """Gather the columns of one batch of the chunk that ``normalize`` was called with."""
        here = self._rows[start : start + len(rows)]
        return tuple(column.index_select(0, here) for column in self._columns)


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _upload(array: NDArray[Any], where: torch.device, piece: int = 256 << 20) -> torch.Tensor:
    """Copy an array to a device piece by piece, so that a memmap is never in memory whole."""
    probe = torch.from_numpy(array[:1].copy())
    result = torch.empty(array.shape, dtype=probe.dtype, device=where)
    step = max(1, piece // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        result[start : start + step].copy_(torch.from_numpy(array[start : start + step].copy()))
    return result


class ResidentFeed:
    """Batches in the order in which they were submitted, as ``transfer.StagedFeed``.

    Args:
        device: where the outputs are allocated.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tasks: deque[Sequence[Any]] = deque()
        self._ready: deque[Batch] = deque()
        self._stream: Any = None
        self._done = device.new_event()
        self.pending = 0

    @property
    def picks(self) -> Any:
        """None: what is delivered is what was asked for."""
        return None

    def submit(self, batches: Sequence[Any]) -> None:
        """Ask for a chunk of batches, not empty and of checked rows; done at ``next``."""
        self._tasks.append(batches)
        self.pending += len(batches)

    def next(self) -> Batch:
        """Return the next batch's images and columns, for work on the caller's current stream.

        Raises:
            DeviceError: a CUDA graph is being captured on the current stream.
        """
        if self._device.is_capturing():
            raise DeviceError(
                "a batch was asked for while a CUDA graph is captured on the current stream; "
                "take the batch before the capture"
            )
        stream = self._device.current_stream()
        if not self._ready:
            self._launch(self._tasks[0], stream)
            self._tasks.popleft()
        images, columns = self._ready.popleft()
        if stream != self._stream:
            stream.wait_event(self._done)
            for tensor in (images, *columns):
                self._device.record_stream(tensor, stream)
        self.pending -= 1
        finish = self._device.finish
        return finish(images), tuple(map(finish, columns))

    def _launch(self, batches: Sequence[Any], stream: Any) -> None:
        with torch.inference_mode(mode=False):
            made = self._make(batches)
        self._done.record(stream)
        self._stream = stream
        self._ready.extend(made)

    def _make(self, batches: Sequence[Any]) -> list[Batch]:
        """Allocate and launch on the current stream."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget what was submitted. Batches that were delivered stay valid."""
        self._tasks.clear()
        self._ready.clear()
        self.pending = 0


class PointwiseFeed(ResidentFeed):
    """Batches of images of one size, without geometry.

    Args:
        device: where the outputs are allocated.
        spec: what a sample is.
        images: where the raw images lie.
    """

    def __init__(self, device: Device, spec: FeedSpec, images: HostImages | DeviceImages) -> None:
        super().__init__(device)
        self._spec = spec
        self._images = images

    def _make(self, batches: Sequence[NDArray[np.int64]]) -> list[Batch]:
        device, spec = self._device, self._spec
        outputs = [
            device.empty((len(rows), *spec.output_shape), spec.lookup.dtype, spec.memory_format)
            for rows in batches
        ]
        columns: list[tuple[torch.Tensor, ...]] = []
        for group in launch_groups(outputs):
            parts = batches[len(columns) : len(columns) + len(group)]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._images.normalize(rows, group, spec)
            starts = [0, *accumulate(map(len, parts))]
            columns += map(self._images.columns, parts, starts)
        return list(zip(outputs, columns, strict=True))
