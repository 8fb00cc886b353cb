"""Chunks whose images need geometry: raw bytes and their program travel in one copy.

A slot holds, back to back: frames, steps, columns, pixels. Images may have different sizes, and
only the part that a crop reads is there. The resize weights lie on the device and only grow; what a
chunk adds to them travels in the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.errors import InputError
from gpupipe.program import Frame, Program, Recipe
from gpupipe.rendering import (
    Picks,
    Renderer,
    array_frames,
    cropped_frames,
    output_shape,
    planar_frames,
    raw_sizes,
)
from gpupipe.staging import ALIGNMENT, Batch, Column, launch_groups

if TYPE_CHECKING:
    from gpupipe.device import Device, Stream
    from gpupipe.sources import ArraySource

MakeChunk = Callable[["ProgramSpec", list[Picks]], "ProgramChunk"]
"""Begins a chunk of one source's images."""


@dataclass
class DeviceWeights:
    """The resize weights on a device, for one feed: every copy is on its copy stream.

    Attributes:
        host: the array that ``tensor`` follows.
        tensor: int32 on the device; None on the CPU, where the host's are read.
        sent: how many of them are there.
    """

    host: NDArray[np.int32] | None = None
    tensor: torch.Tensor | None = None
    sent: int = 0


@dataclass(frozen=True, eq=False)
class ProgramSpec:
    """What a feed of programs makes; see ``transfer.Spec``.

    Attributes:
        renderer: draws the parameters.
        memory_format: of the output batches.
        columns: what travels with the images.
        most: batches of one chunk at most.
    """

    renderer: Renderer
    memory_format: torch.memory_format = torch.contiguous_format
    columns: tuple[Column, ...] = ()
    most: int = 32
    weights: DeviceWeights = field(default_factory=DeviceWeights, repr=False)

    def check(self, batches: Sequence[Picks]) -> list[Picks]:
        """Return the batches of a chunk.

        Raises:
            InputError: no batch, or an empty one.
        """
        if not batches or any(not len(picks) for picks in batches):
            raise InputError("batches must be picks of at least one sample each; leave empty ones")
        return list(batches)

    def chunk(self, read: MakeChunk, batches: list[Picks]) -> ProgramChunk:
        """Begin a chunk."""
        return read(self, batches)


class ProgramChunk:
    """Batches of one output size that share a copy; see ``transfer.Chunk``.

    Args:
        spec: of the feed.
        batches: the picks of each.
    """

    def __init__(self, spec: ProgramSpec, batches: list[Picks]) -> None:
        self.spec = spec
        self.batches = batches
        self.sizes = tuple(map(len, batches))
        self.count = sum(self.sizes)
        self._program: Program | None = None
        self._recipe: Recipe | None = None
        self._starts: list[int] = []
        self._new_weights = (0, 0)
        self._weights: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slot that the chunk takes."""
        return self._starts[-1]

    @property
    def laid_out(self) -> tuple[Program, Recipe]:
        """Program and recipe.

        Raises:
            InputError: before ``lay_out``.
        """
        if self._program is None or self._recipe is None:
            raise InputError("this chunk is not laid out yet; lay_out() comes first")
        return self._program, self._recipe

    def lay_out(self, program: Program, recipe: Recipe, pixel_bytes: int) -> None:
        """Say what will lie in the slot."""
        self._program, self._recipe = program, recipe
        self._new_weights = self._missing(program)
        sizes = [
            program.frames.nbytes,
            program.steps.nbytes,
            4 * (self._new_weights[1] - self._new_weights[0]),
            *(self.count * column.row_bytes for column in self.spec.columns),
            pixel_bytes,
        ]
        self._starts = [0]
        for size in sizes:
            self._starts.append(-(-(self._starts[-1] + size) // ALIGNMENT) * ALIGNMENT)

    def _missing(self, program: Program) -> tuple[int, int]:
        """Return which weights the device does not have yet."""
        kept = self.spec.weights
        used = int(program.weights[0])  # entry 0 of the pool says how many there are
        if kept.host is not program.weights:
            return 0, used
        return kept.sent, max(used, kept.sent)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return frames, steps, new weights, columns and pixels of a slot's buffer."""
        program, _ = self.laid_out
        first, last = self._new_weights
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [
            (program.frames.shape, torch.int64),
            (program.steps.shape, torch.int32),
            ((last - first,), torch.int32),
            *(((self.count, *column.shape), column.dtype) for column in self.spec.columns),
        ]
        views = [
            buffer[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
            for (shape, dtype), start in zip(kinds, self._starts, strict=False)
        ]
        return [*views, buffer[self._starts[len(kinds)] : self.nbytes]]

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Write everything; see ``transfer.Chunk``."""
        raise NotImplementedError

    def write_tables(
        self, host: torch.Tensor, columns: Sequence[NDArray[Any]]
    ) -> NDArray[np.uint8]:
        """Write all but the pixels; return the array for those."""
        program, _ = self.laid_out
        frames, steps, weights, *rest = (view.numpy() for view in self.views(host))
        frames[...], steps[...] = program.frames, program.steps
        weights[...] = program.weights[slice(*self._new_weights)]
        *places, pixels = rest
        for place, column in zip(places, columns, strict=True):
            place[...] = column
        result: NDArray[np.uint8] = pixels
        return result

    def after_copy(self, device: Device, staging: torch.Tensor, copy_stream: Stream) -> None:
        """Bring the device's weights up to date, on the copy stream, behind the slot's copy."""
        if not device.is_async:
            return
        program, _ = self.laid_out
        kept = self.spec.weights
        first, last = self._new_weights
        if kept.tensor is None or kept.host is not program.weights:
            memory = torch.from_numpy(program.weights).view(torch.uint8)
            kept.tensor = device.staging(memory, copy_stream).view(torch.int32)
            kept.host = program.weights
        if last > first:
            new = self.views(staging)[2].view(torch.uint8)
            there = kept.tensor[first:last].view(torch.uint8)
            device.copy(there, new, new.numel(), copy_stream)
        kept.sent = last
        self._weights = kept.tensor

    def launch(self, device: Device, staging: torch.Tensor, good: int) -> tuple[list[Batch], int]:
        """Make the batches; see ``transfer.Chunk``."""
        program, recipe = self.laid_out
        spec = self.spec
        shape = output_shape(spec.renderer, recipe.size)
        sizes = self.sizes[:good]
        dtype = recipe.lookup.dtype
        outputs = [device.empty((size, *shape), dtype, spec.memory_format) for size in sizes]
        frames, steps, _, *columns, pixels = self.views(staging)
        weights = self._weights
        if weights is None:
            weights = torch.from_numpy(program.weights)
        else:
            device.record_stream(weights, device.current_stream())
        start, groups = 0, launch_groups(outputs)
        for group in groups:
            end = start + sum(map(len, group))
            here = slice(start, end)
            device.resample(pixels, Program(frames[here], steps[here], weights), group, recipe)
            start = end
        ends = np.cumsum(sizes).tolist()
        return [
            (output, tuple(device.clone(column[end - len(output) : end]) for column in columns))
            for output, end in zip(outputs, ends, strict=True)
        ], len(groups)


class ArrayChunk(ProgramChunk):
    """Images of one size that lie in arrays: gathered whole."""

    def __init__(self, source: ArraySource, spec: ProgramSpec, batches: list[Picks]) -> None:
        super().__init__(spec, batches)
        self._source = source
        self._picks = picks = Picks.joined(batches)
        part, renderer = source.first, spec.renderer
        shape = (len(picks), *part.images.shape[1:])
        frames = array_frames(np.arange(len(picks)), shape, part.layout)
        tape = renderer.tape(picks, frames[:, 1].copy(), frames[:, 2].copy())
        recipe = renderer.recipe(tape, renderer.size(tape, picks))
        self.lay_out(renderer.program(tape, frames), recipe, int(np.prod(shape)))

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Gather the images; see ``transfer.Chunk``."""
        rows = self._picks.rows
        columns = [self._source.read_column(c, rows) for c in range(len(self.spec.columns))]
        pixels = self.write_tables(host, columns)
        shape = (len(rows), *self._source.first.images.shape[1:])
        self._source.read_images(rows, pixels[: int(np.prod(shape))].reshape(shape))
        return len(self.batches), []


class GivenChunk(ProgramChunk):
    """One batch of images that are at hand, each of its own size, uint8 [H, W, C] or [H, W]."""

    def __init__(
        self, images: Sequence[NDArray[np.uint8]], spec: ProgramSpec, batches: list[Picks]
    ) -> None:
        super().__init__(spec, batches)
        self._images = images
        renderer, picks = spec.renderer, Picks.joined(batches)
        heights, widths = raw_sizes(images, renderer.kind.layout)
        tape = renderer.tape(picks, heights, widths)
        recipe = renderer.recipe(tape, renderer.size(tape, picks))
        self._rows = heights
        if renderer.kind.layout == "NCHW":
            frames, nbytes = planar_frames(heights, widths, renderer.kind.channels)
        else:
            channels = renderer.kind.channels
            frames, self._rows, nbytes = cropped_frames(tape, heights, widths, channels)
        self.lay_out(renderer.program(tape, frames), recipe, nbytes)

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Copy what the steps read; see ``transfer.Chunk``."""
        pixels = self.write_tables(host, [])
        frames = self.laid_out[0].frames
        planar = self.spec.renderer.kind.layout == "NCHW"
        for frame, rows, image in zip(frames, self._rows, self._images, strict=True):
            if planar:
                start = int(frame[Frame.OFFSET])
                pixels[start : start + image.size] = image.reshape(-1)
            else:
                copy_part(image, frame, int(rows), pixels)
        return len(self.batches), []


def copy_part(
    image: NDArray[np.uint8], frame: NDArray[np.int64], height: int, pixels: NDArray[np.uint8]
) -> None:
    """Copy the part of an image [H, W, C] or [H, W] that its frame keeps, ``height`` rows of it."""
    start, top, left = (int(frame[key]) for key in (Frame.OFFSET, Frame.TOP, Frame.LEFT))
    channels = int(frame[Frame.PIXEL_STRIDE])
    width = int(frame[Frame.ROW_STRIDE]) // channels
    part = image.reshape(*image.shape[:2], channels)[top : top + height, left : left + width]
    there = pixels[start : start + height * width * channels]
    there.reshape(height, width, channels)[...] = part
