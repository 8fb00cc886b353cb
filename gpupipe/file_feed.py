"""Batches of image files on the CPU: a thread decodes an image and makes its output at once.

The decoded pixels are still in the cache when the kernel reads them, and live no longer than that.
What is held at a time: the encoded bytes and the outputs of the batches that were asked for, and
one decoded image per thread.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.device import Device
from gpupipe.errors import GpupipeError
from gpupipe.file_batch import FileBatch, Reading
from gpupipe.geometry import check_program
from gpupipe.program import FRAME, Frame
from gpupipe.rendering import Picks, output_shape
from gpupipe.staging import Batch

if TYPE_CHECKING:
    from gpupipe import cpu_ops
    from gpupipe.tape import Tape
    from gpupipe.workers import Workers


class _Outputs:
    """The finished images of one batch, made one by one."""

    def __init__(
        self, device: Device, reading: Reading, memory_format: torch.memory_format
    ) -> None:
        self._device = device
        self._reading = reading
        self._memory_format = memory_format
        self._work: cpu_ops.Resampling | None = None
        self.images = torch.empty(0)

    def arrange(self, batch: FileBatch, tape: Tape) -> bool:
        """Draw the program and allocate the batch."""
        from gpupipe import cpu_ops  # imports numba where it compiles

        renderer = self._reading.renderer
        size = renderer.size(tape, batch.picks)
        frames = np.zeros((len(batch.picks), FRAME), np.int64)
        heights, widths = tape.raw_sizes
        frames[:, Frame.HEIGHT], frames[:, Frame.WIDTH] = heights, widths
        frames[:, Frame.ROW_STRIDE] = widths * renderer.kind.channels
        frames[:, Frame.PIXEL_STRIDE] = renderer.kind.channels
        frames[:, Frame.CHANNEL_STRIDE] = 1
        program, recipe = renderer.program(tape, frames), renderer.recipe(tape, size)
        with torch.inference_mode(mode=False):
            self.images = self._device.empty(
                (len(batch.picks), *output_shape(renderer, size)),
                renderer.lookup.dtype,
                self._memory_format,
            )
        check_program(np.empty(0, np.uint8), program, [self.images], recipe, "cpu")
        self._work = cpu_ops.Resampling(
            program, [self.images], recipe, planar_in=False,
            planar_out=self.images.is_contiguous(),
        )  # fmt: skip
        return True

    def put(self, place: int, pixels: NDArray[np.uint8]) -> None:
        """Make one image."""
        if self._work is None:
            raise RuntimeError("put() before arrange()")
        self._work.run(pixels.__array_interface__["data"][0], place, place + 1)


class FileFeed:
    """Batches in the order in which their picks were submitted, as ``transfer.StagedFeed``.

    Args:
        device: the CPU; ``finish`` may copy to another.
        reading: the source, the renderer, the faults.
        memory_format: of the images.
        workers: run the tasks.
    """

    def __init__(
        self,
        device: Device,
        reading: Reading,
        memory_format: torch.memory_format,
        workers: Workers,
    ) -> None:
        self._device = device
        self._reading = reading
        self._memory_format = memory_format
        self._workers = workers
        self._batches: deque[tuple[FileBatch, _Outputs]] = deque()
        self._count = 0
        self.pending = 0
        self.picks: Picks | None = None
        self._pid = os.getpid()
        weakref.finalize(self, _abandon, self._batches, self._pid)

    def submit(self, batches: Sequence[Picks]) -> None:
        """Ask for batches; they are begun at once."""
        for picks in batches:
            outputs = _Outputs(self._device, self._reading, self._memory_format)
            batch = FileBatch(self._count, picks, self._reading, self._workers, outputs)
            self._batches.append((batch, outputs))
            self._count += 1
            self.pending += 1

    def next(self) -> Batch:
        """Return the next batch's images and columns.

        Raises:
            DecodeError: a sample could not be read.
            GpupipeError: this is a forked child of the process that made the iterator.
            SourceError: images of different sizes.
        """
        if os.getpid() != self._pid:
            raise GpupipeError(
                f"this loader's iterator was made before fork, in another process than "
                f"{os.getpid()}; its threads stay there; iterate a loader in this process instead"
            )
        batch, outputs = self._batches.popleft()
        self.pending -= 1
        try:
            batch.wait()
        except BaseException:
            batch.cancel()
            raise
        self.picks = batch.picks
        source, finish = self._reading.source, self._device.finish
        columns = (
            torch.from_numpy(np.ascontiguousarray(source.read_column(number, batch.picks.rows)))
            for number in range(len(source.first.columns))
        )
        return finish(outputs.images), tuple(map(finish, columns))

    def close(self) -> None:
        """Forget what was submitted; no task of it runs any more."""
        batches = [batch for batch, _ in self._batches]
        _abandon(self._batches, self._pid)
        for batch in batches:
            batch.cancel()
        self.pending = 0


def _abandon(batches: deque[tuple[FileBatch, _Outputs]], pid: int) -> None:
    """Let no further task of these batches begin. Any thread, the collector's too: never waits."""
    if os.getpid() != pid:
        return  # a forked child: a thread of the parent may have held the locks
    while batches:
        batches.popleft()[0].cancel(wait=False)
