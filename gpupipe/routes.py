"""The ways in which a loader's batches are made; ``routing`` picks one when iteration begins.

``ArrayRoute``: raw pixels lie in arrays; gather and kernel, no Python per sample.
``FileRoute``: encoded images, decoded on threads, then the kernel.
``recorded.RecordedBatches``: ``dataset[i]`` runs up to the raw image, the kernel does the rest.
``torch_route.TorchRoute``: torch does it all; its batches are moved to the device.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.batch import Assemble
from gpupipe.device import Device
from gpupipe.devices import CpuDevice
from gpupipe.epochs import PROGRAM_CHUNK_BYTES, Batches, Feed, Pick
from gpupipe.faults import Faults
from gpupipe.file_batch import Reading
from gpupipe.file_chunk import FileChunk
from gpupipe.file_feed import FileFeed
from gpupipe.file_sources import FileSource
from gpupipe.images import ImageKind
from gpupipe.plan import Pipeline, Plan, prove
from gpupipe.program import Frame
from gpupipe.program_chunks import ArrayChunk, ProgramSpec
from gpupipe.rendering import Picks, Renderer, Stream, array_frames, output_shape
from gpupipe.resident import DeviceImages, HostImages, PointwiseFeed
from gpupipe.resident_programs import DevicePrograms, HostPrograms, ProgramFeed
from gpupipe.sampling import IndexBatches
from gpupipe.sources import ArraySource
from gpupipe.staging import Column, FeedSpec
from gpupipe.tables import Layout, Lookup
from gpupipe.transfer import StagedFeed
from gpupipe.workers import Workers

DEPTH = 3
"""Chunks under way at once on a device that works asynchronously."""


def feed_spec(
    pipeline: Pipeline,
    lookup: Lookup,
    kind: ImageKind,
    image_shape: tuple[int, ...],
    layout: Layout,
    memory_format: torch.memory_format,
    columns: tuple[Column, ...] = (),
) -> FeedSpec:
    """Describe a sample; the output's shape is what the user's transform gives one image."""
    sizes = dict(zip(layout[1:], image_shape, strict=True))
    tiny = pipeline.run_pointwise(kind.build(np.zeros((2, 3, kind.channels), np.uint8)))
    flat = tiny.ndim == 2  # noqa: PLR2004 # [H, W] in, [H, W] out; it cannot be channels_last
    output_shape = (sizes["H"], sizes["W"]) if flat else (len(tiny), sizes["H"], sizes["W"])
    return FeedSpec(
        image_shape,
        layout,
        lookup,
        output_shape,
        torch.contiguous_format if flat else memory_format,
        columns,
    )


def proved(
    device: Device,
    pipeline: Pipeline,
    lookup: Lookup,
    kind: ImageKind,
    layout: Layout,
    memory_format: torch.memory_format,
) -> Lookup | None:
    """Prove the device's kernel against torchvision; see ``plan.prove``."""

    def render(raw: NDArray[np.uint8], tried: Lookup) -> torch.Tensor:
        spec = feed_spec(pipeline, tried, kind, raw.shape[1:], layout, memory_format)
        feed = StagedFeed(device, spec, _Rows(raw), depth=1, threaded=False)
        try:
            feed.submit([np.arange(len(raw))])
            images, _ = feed.next()
            device.current_stream().synchronize()
            return images.cpu()
        finally:
            feed.close()

    return prove(pipeline, lookup, kind, layout, render)


class _Rows:
    """Reads rows of an array, for the proof."""

    def __init__(self, raw: NDArray[np.uint8]) -> None:
        self._raw = raw

    def __call__(self, rows: NDArray[np.int64], views: list[NDArray[Any]]) -> None:
        views[0][...] = self._raw[rows]


class _ReadSource:
    """Reads images and columns of a source, on the producer's thread."""

    def __init__(self, source: ArraySource) -> None:
        self._source = source

    def __call__(self, rows: NDArray[np.int64], views: list[NDArray[Any]]) -> None:
        images, *columns = views
        self._source.read_images(rows, images)
        for number, column in enumerate(columns):
            column[...] = self._source.read_column(number, rows)


def picks_for(source: Any, stream: Stream) -> Pick:
    """Return a ``Pick`` for feeds of programs."""

    def pick(indices: NDArray[np.int64], position: int) -> Picks:
        local = np.arange(position, position + len(indices))
        return Picks(
            indices,
            source.locate(indices),
            local * stream.world + stream.rank,
            np.zeros(len(indices), bool),
        )

    return pick


class ArrayRoute:
    """Batches of an array source, made by the kernel.

    Args:
        device: where batches are made.
        source: the arrays.
        pipeline: the transform.
        table: its pointwise part, and the kind of the images.
        lookup: what was proved of it.
        memory_format: of the images.
        columns: what travels with them.
        plan: counts what happens.
        assemble: puts a batch together.
        cached: a copy of the source on the device.
    """

    def __init__(
        self,
        device: Device,
        source: ArraySource,
        pipeline: Pipeline,
        kind: ImageKind,
        lookup: Lookup,
        memory_format: torch.memory_format,
        columns: tuple[Column, ...],
        plan: Plan,
        assemble: Assemble,
        *,
        cached: DeviceImages | None,
    ) -> None:
        self._device = device
        self._source = source
        self._pipeline = pipeline
        self._kind = kind
        self._lookup = lookup
        self._memory_format = memory_format
        self._columns = columns
        self._plan = plan
        self._cached = cached
        self._assemble = assemble

    def iterate(self, indices: IndexBatches, free_ahead: int, stream: Stream) -> Batches:
        """Begin an epoch.

        Args:
            indices: dataset indices, batch by batch.
            free_ahead: batches that may be read ahead whatever the sampler is.
            stream: the epoch's random numbers.
        """
        feed, pick, shape = (
            self._pointwise() if self._pipeline.is_pointwise else self._programs(stream)
        )
        return Batches(
            indices,
            pick,
            feed,
            self._assemble,
            self._plan,
            sample_bytes=prod(shape) * self._lookup.dtype.itemsize,
            depth=DEPTH if isinstance(feed, StagedFeed) else 1,
            free_ahead=free_ahead,
            chunk_bytes=None if self._pipeline.is_pointwise else PROGRAM_CHUNK_BYTES,
        )

    def _pointwise(self) -> tuple[Feed, Pick, tuple[int, ...]]:
        """Return a feed of images that keep their size and place."""
        first = self._source.first
        spec = feed_spec(
            self._pipeline, self._lookup, self._kind, first.images.shape[1:], first.layout,
            self._memory_format, self._columns,
        )  # fmt: skip
        device = self._device
        feed: Feed
        if self._cached is not None:
            feed = PointwiseFeed(device, spec, self._cached)
        elif isinstance(device, CpuDevice):
            feed = PointwiseFeed(device, spec, HostImages(self._source))
        else:
            feed = StagedFeed(device, spec, _ReadSource(self._source), depth=DEPTH)
        return feed, lambda batch, _: self._source.locate(batch), spec.output_shape

    def _programs(self, stream: Stream) -> tuple[Feed, Pick, tuple[int, ...]]:
        """Return a feed of images with geometry."""
        device, source = self._device, self._source
        renderer = Renderer(self._pipeline, self._kind, self._lookup, stream)
        spec = ProgramSpec(renderer, self._memory_format, self._columns)
        feed: Feed
        if self._cached is not None:
            feed = ProgramFeed(device, spec, DevicePrograms(self._cached), source.first.layout)
        elif isinstance(device, CpuDevice):
            feed = ProgramFeed(device, spec, HostPrograms(source), source.first.layout)
        else:
            feed = StagedFeed(device, spec, partial(ArrayChunk, source), depth=DEPTH)
        pick = picks_for(source, stream)
        one = pick(np.zeros(1, np.int64), 0)
        frames = array_frames(one.rows, source.first.images.shape, source.first.layout)
        tape = renderer.tape(one, frames[:, Frame.HEIGHT], frames[:, Frame.WIDTH])
        return feed, pick, output_shape(renderer, renderer.size(tape, one))


class FileRoute:
    """Batches of encoded images, decoded on threads.

    Args:
        device: where batches are made.
        source: the files.
        pipeline: the transform.
        kind: of the decoded images.
        lookup: what was proved of the pointwise part.
        memory_format: of the images.
        columns: what travels with them.
        plan: counts what happens.
        assemble: puts a batch together.
        workers: the threads.
        faults: what becomes of bad files.
        fast: see ``decoding``.
    """

    def __init__(
        self,
        device: Device,
        source: FileSource,
        pipeline: Pipeline,
        kind: ImageKind,
        lookup: Lookup,
        memory_format: torch.memory_format,
        columns: tuple[Column, ...],
        plan: Plan,
        assemble: Assemble,
        workers: Workers,
        faults: Faults,
        *,
        fast: bool,
    ) -> None:
        self._device = device
        self._source = source
        self._renderer = partial(Renderer, pipeline, kind, lookup)
        self._memory_format = memory_format
        self._columns = columns
        self._plan = plan
        self._assemble = assemble
        self._workers = workers
        self._faults = faults
        self._fast = fast

    def iterate(self, indices: IndexBatches, free_ahead: int, stream: Stream) -> Batches:
        """Begin an epoch; see ``ArrayRoute.iterate``."""
        self._faults.begin()
        renderer = self._renderer(stream)
        reading = Reading(self._source, renderer, self._faults, fast=self._fast)
        feed: Feed
        if isinstance(self._device, CpuDevice):
            feed = FileFeed(self._device, reading, self._memory_format, self._workers)
        else:
            spec = ProgramSpec(renderer, self._memory_format, self._columns)
            numbers = count()

            def chunk(spec: ProgramSpec, batches: list[Picks]) -> FileChunk:
                return FileChunk(next(numbers), reading, self._workers, spec, batches)

            feed = StagedFeed(
                self._device, spec, chunk, depth=DEPTH, threaded=self._workers.threads > 0
            )
        return Batches(
            indices,
            picks_for(self._source, stream),
            feed,
            self._assemble,
            self._plan,
            sample_bytes=1,
            depth=DEPTH if self._workers.threads else 1,
            free_ahead=free_ahead,
            most=1,
        )
