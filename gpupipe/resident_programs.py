"""Batches with geometry from raw images that the kernel reads where they lie; see ``resident``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.device import Device
from gpupipe.program import Frame, Program, Recipe
from gpupipe.program_chunks import ProgramSpec
from gpupipe.rendering import Picks, array_frames, output_shape
from gpupipe.resident import DeviceImages, ResidentFeed
from gpupipe.sources import ArraySource
from gpupipe.staging import Batch, launch_groups
from gpupipe.tables import Layout


class Resident(Protocol):
    """Raw images that lie where the kernel reads them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all images, in their layout."""

    def resample(
        self,
        rows: NDArray[np.int64],
        program: Program,
        outputs: list[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        """Make batches on the current stream."""

    def columns(self, rows: NDArray[np.int64], start: int) -> tuple[torch.Tensor, ...]:
        """Gather the columns of one batch."""


class HostPrograms:
    """The arrays of a source, read by the CPU kernel in place."""

    def __init__(self, source: ArraySource) -> None:
        self._source = source
        self._columns = range(len(source.first.columns))

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Resident``."""
        return tuple(self._source.first.images.shape)

    def resample(
        self,
        rows: NDArray[np.int64],
        program: Program,
        outputs: list[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        """See ``Resident``; several or strided arrays are gathered first."""
        from gpupipe import cpu_ops  # imports numba where it compiles

        images = self._source.first.images
        if not self._source.in_place:
            images = np.empty((len(rows), *self.shape[1:]), np.uint8)
            self._source.read_images(rows, images)
            frames = array_frames(np.arange(len(rows)), images.shape, self._source.first.layout)
            program = Program(frames, program.steps, program.weights)
        cpu_ops.resample(images.reshape(-1), program, outputs, recipe)

    def columns(self, rows: NDArray[np.int64], _start: int) -> tuple[torch.Tensor, ...]:
        """See ``Resident``."""
        return tuple(torch.from_numpy(self._source.read_column(c, rows)) for c in self._columns)


class DevicePrograms:
    """A device's copy of a source, and the programs on their way to it."""

    def __init__(self, images: DeviceImages) -> None:
        self._images = images
        self._weights: tuple[NDArray[np.int32], int, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``Resident``."""
        return tuple(self._images.images.shape)

    def resample(
        self,
        rows: NDArray[np.int64],
        program: Program,
        outputs: list[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        """See ``Resident``."""
        images = self._images
        images.upload_rows(rows)
        there = Program(
            images.upload(program.frames),
            images.upload(program.steps),
            self._weights_of(program.weights),
        )
        images.device.resample(images.images.view(-1), there, outputs, recipe)

    def _weights_of(self, host: NDArray[np.int32]) -> torch.Tensor:
        """Return the resize weights on the device; sent whole when there are new ones."""
        used = int(host[0])
        if self._weights is None or self._weights[0] is not host or self._weights[1] != used:
            self._weights = host, used, self._images.upload(host[: max(used, 1)])
        self._images.device.record_stream(self._weights[2], self._images.device.current_stream())
        return self._weights[2]

    def columns(self, rows: NDArray[np.int64], start: int) -> tuple[torch.Tensor, ...]:
        """See ``Resident``."""
        return self._images.columns(rows, start)


class ProgramFeed(ResidentFeed):
    """Batches in the order in which their picks were submitted.

    Args:
        device: where the outputs are allocated.
        spec: what a batch is.
        images: where the raw images lie.
        layout: of the images.
    """

    def __init__(self, device: Device, spec: ProgramSpec, images: Resident, layout: Layout) -> None:
        super().__init__(device)
        self._spec = spec
        self._images = images
        self._layout = layout

    def _make(self, batches: Sequence[Picks]) -> list[Batch]:
        device, renderer = self._device, self._spec.renderer
        picks = Picks.joined(batches)
        frames = array_frames(picks.rows, self._images.shape, self._layout)
        tape = renderer.tape(picks, frames[:, Frame.HEIGHT].copy(), frames[:, Frame.WIDTH].copy())
        recipe = renderer.recipe(tape, renderer.size(tape, picks))
        program = renderer.program(tape, frames)
        shape, dtype = output_shape(renderer, recipe.size), recipe.lookup.dtype
        outputs = [
            device.empty((len(batch), *shape), dtype, self._spec.memory_format) for batch in batches
        ]
        made: list[Batch] = []
        start = 0
        for group in launch_groups(outputs):
            end = start + sum(map(len, group))
            here = slice(start, end)
            part = Program(program.frames[here], program.steps[here], program.weights)
            rows = picks.rows[here]
            self._images.resample(rows, part, group, recipe)
            starts = [0, *accumulate(map(len, group))]
            made += [
                (output, self._images.columns(rows[begin : begin + len(output)], begin))
                for output, begin in zip(group, starts, strict=False)
            ]
            start = end
        return made
