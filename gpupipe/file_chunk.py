"""Image files on their way to a device: decoded on threads, straight into the pinned slot.

The headers give the sizes, so the parameters are drawn and the slot is laid out before anything is
decoded; a thread then keeps of each image only what its crop reads. The slot holds those parts and
no more. An image whose part is enormous is made on the CPU instead, by the same arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.file_batch import FileBatch, Reading
from gpupipe.program import FIELDS, FRAME, Code, Frame, Program, Recipe
from gpupipe.program_chunks import ProgramChunk, ProgramSpec, copy_part
from gpupipe.rendering import Picks, cropped_frames
from gpupipe.tables import Lookup

if TYPE_CHECKING:
    from gpupipe.tape import Tape
    from gpupipe.workers import Workers

ENORMOUS_BYTES = 64 << 20
"""Raw bytes of one image's part beyond which the slot gets its finished geometry."""


class FileChunk(ProgramChunk):
    """One batch of files; see ``transfer.Chunk`` and ``file_batch.Target``."""

    def __init__(
        self, number: int, reading: Reading, workers: Workers, spec: ProgramSpec,
        batches: list[Picks],
    ) -> None:  # fmt: skip
        super().__init__(spec, batches)
        self._reading = reading
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)
        self._pixels: NDArray[np.uint8] | None = None
        self._aside: dict[int, tuple[NDArray[np.int32], Recipe]] = {}
        (picks,) = batches
        self._batch = FileBatch(number, picks, reading, workers, self)
        try:
            self._batch.wait_laid_out()
        except BaseException:
            self._batch.cancel()
            raise

    @property
    def picks(self) -> Picks:
        """The samples, others in the places of bad ones."""
        return self._batch.picks

    def arrange(self, batch: FileBatch, tape: Tape) -> bool:
        """Draw the program and say what will lie in the slot; see ``file_batch.Target``."""
        renderer = self._reading.renderer
        channels = renderer.kind.channels
        recipe = renderer.recipe(tape, renderer.size(tape, batch.picks))
        heights, widths = tape.raw_sizes
        frames, self._rows, nbytes = cropped_frames(tape, heights, widths, channels)
        program = renderer.program(tape, frames)
        part = self._rows * frames[:, Frame.ROW_STRIDE]
        self._aside = {}
        if (part > ENORMOUS_BYTES).any():
            program, nbytes = self._put_aside(program, recipe, part > ENORMOUS_BYTES)
        self.lay_out(program, recipe, nbytes)
        return False

    def _put_aside(
        self, program: Program, recipe: Recipe, aside: NDArray[np.bool_]
    ) -> tuple[Program, int]:
        """Lay out again: of the images set aside the slot gets the finished geometry."""
        (height, width), channels = recipe.size, self._reading.renderer.kind.channels
        frames, steps = program.frames.copy(), program.steps.copy()
        levels = torch.arange(256, dtype=torch.uint8).repeat(channels, 1)
        plain = Recipe(Lookup(levels), recipe.size, recipe.fills, recipe.erasures[:0].byte())
        for place in np.flatnonzero(aside):
            own = steps[place].copy()
            erases = own[:, 0] == Code.ERASE
            steps[place] = 0
            steps[place, : int(erases.sum())] = own[erases]
            own[erases] = 0
            self._aside[int(place)] = own, plain
        whole = np.zeros(FRAME, np.int64)
        whole[[Frame.HEIGHT, Frame.WIDTH]] = height, width
        whole[Frame.ROW_STRIDE] = width * channels
        whole[[Frame.PIXEL_STRIDE, Frame.CHANNEL_STRIDE]] = channels, 1
        frames[aside] = whole
        rows = np.where(aside, height, self._rows)
        nbytes = rows * frames[:, Frame.ROW_STRIDE]
        frames[:, Frame.OFFSET] = np.cumsum(nbytes) - nbytes
        self._rows = rows
        return Program(frames, steps, program.weights), int(nbytes.sum())

    def put(self, place: int, pixels: NDArray[np.uint8]) -> None:
        """Keep what the steps read of one image; see ``file_batch.Target``."""
        program, _ = self.laid_out
        if self._pixels is None:
            raise RuntimeError("put() before fill()")
        if place in self._aside:
            pixels = self._geometry(place, pixels)
        copy_part(pixels, program.frames[place], int(self._rows[place]), self._pixels)

    def _geometry(self, place: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the finished geometry of one image, uint8 [h, w, C]."""
        from gpupipe import cpu_ops  # imports numba where it compiles

        steps, plain = self._aside[place]
        height, width, channels = pixels.shape
        frame = np.zeros((1, FRAME), np.int64)
        frame[0, [Frame.HEIGHT, Frame.WIDTH]] = height, width
        frame[0, Frame.ROW_STRIDE] = width * channels
        frame[0, [Frame.PIXEL_STRIDE, Frame.CHANNEL_STRIDE]] = channels, 1
        made = torch.empty((1, channels, *plain.size), dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        program = Program(frame, steps.reshape(1, -1, FIELDS), self.laid_out[0].weights)
        cpu_ops.resample(pixels.reshape(-1), program, [made], plain, threads=1)
        result: NDArray[np.uint8] = made[0].permute(1, 2, 0).numpy()
        return result

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Decode; see ``transfer.Chunk``."""
        try:
            rows = self._batch.picks.rows
            source = self._reading.source
            columns = [source.read_column(c, rows) for c in range(len(self.spec.columns))]
            self._pixels = self.write_tables(host, columns)
            if not self._batch.decode():
                return -1, []
        except BaseException:
            self._batch.cancel()
            raise
        self._pixels = None
        return 1, []
