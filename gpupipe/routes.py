"""The ways in which a loader's batches are made; ``routing`` picks one when iteration begins.

``ArrayRoute``: raw pixels lie in arrays; gather and kernel, no Python per sample.
``recorded.RecordedBatches``: ``dataset[i]`` runs up to the raw image, the kernel does the rest.
``torch_route.TorchRoute``: torch does it all; its batches are moved to the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.batch import Assemble
from gpupipe.devices import CpuDevice, Device
from gpupipe.errors import GpupipeError, IndexRangeError, InputError
from gpupipe.images import ImageKind
from gpupipe.plan import Pipeline, Plan, prove
from gpupipe.resident import DeviceImages, HostImages, ResidentFeed
from gpupipe.sampling import IndexBatches
from gpupipe.sources import ArraySource
from gpupipe.staging import Column, FeedSpec
from gpupipe.tables import Layout, Lookup
from gpupipe.transfer import Batch, StagedFeed

CHUNK_BYTES = 8 << 20
"""Outputs that one launch makes at most, of several batches."""

MAX_CHUNK = 32
"""Batches in one launch at most."""

DEPTH = 3
"""Chunks under way at once on a device that works asynchronously."""


class Feed(Protocol):
    """Makes batches from rows, in order."""

    pending: int

    def submit(self, batches: Any) -> None:
        """Ask for a chunk of batches."""

    def next(self) -> Batch:
        """Return the next batch."""

    def close(self) -> None:
        """Free everything."""


class EpochBatches(Iterator[Any]):
    """The batches of one epoch.

    Attributes:
        indices: int64 [N]: the dataset indices of the batch that was returned last.
    """

    indices: NDArray[np.int64] = np.empty(0, np.int64)


class Batches(EpochBatches):
    """One epoch over an array source."""

    def __init__(
        self,
        indices: IndexBatches,
        source: ArraySource,
        feed: Feed,
        assemble: Assemble,
        plan: Plan,
        *,
        sample_bytes: int,
        depth: int,
        free_ahead: int,
    ) -> None:
        self._indices = indices
        self._source = source
        self._feed = feed
        self._assemble = assemble
        self._plan = plan
        self._sample_bytes = sample_bytes
        self._chunk = 1  # the first batch comes soon, later ones many at a time
        self._depth = depth
        self._free_ahead = free_ahead
        self._taken: deque[NDArray[np.int64]] = deque()
        self._sizes: deque[int] = deque()
        self._error: BaseException | None = None

    def __next__(self) -> Any:
        """Return the next batch."""
        try:
            return self._advance()
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C anywhere in here: what was done is not known
            self._error = GpupipeError(
                f"this iterator was interrupted by {type(error).__name__}; iterate the loader anew"
            )
            self._taken.clear()
            raise

    def _advance(self) -> Any:
        if len(self._sizes) < self._depth and self._error is None:
            self.top_up()
        if not self._taken:
            raise self._end()
        images, columns = self._feed.next()
        self.indices = self._taken.popleft()
        self._sizes[0] -= 1
        if not self._sizes[0]:
            self._sizes.popleft()
        self._plan.batches += 1
        return self._assemble(images, columns, self.indices)

    def _end(self) -> BaseException:
        """Return what ends the epoch, or, once, what a bad batch of the sampler's raised."""
        error = self._error or StopIteration()
        if isinstance(error, (IndexRangeError, InputError)):
            self._error = None  # as in torch, the batch after it can still be asked for
            return error
        self.close()
        self._error = StopIteration()
        return error

    def top_up(self) -> None:
        """Read indices, as far ahead as nobody can tell, and ask for their batches."""
        while len(self._sizes) < self._depth and self._may_read():
            batches: list[NDArray[np.int64]] = []
            try:
                batches.append(self._read())
                for _ in range(self._more(len(batches[0]))):
                    batches.append(self._read())  # noqa: PERF401 # what came before an error counts
            except Exception as error:  # noqa: BLE001 # raised once the batches before it are out
                self._error = error
            self._chunk = min(2 * self._chunk, MAX_CHUNK)
            if batches:
                self._taken.extend(batches)
                self._sizes.append(len(batches))
                self._feed.submit([self._source.locate(batch) for batch in batches])
            if self._error is not None:
                return

    def _read(self) -> NDArray[np.int64]:
        batch = next(self._indices)
        if not len(batch):
            raise InputError(
                "the batch sampler gave an empty batch, and images of none cannot be stacked; "
                "give at least one index per batch"
            )
        return batch

    def _more(self, size: int) -> int:
        """Return how many batches may join one of ``size`` images in its launch."""
        room = CHUNK_BYTES // max(1, size * self._sample_bytes)
        unseen = max(self._indices.ahead(), self._free_ahead - len(self._taken) - 1)
        return max(0, min(self._chunk - 1, room - 1, unseen))

    def _may_read(self) -> bool:
        ahead = len(self._taken)
        return ahead == 0 or self._indices.ahead() > 0 or ahead < self._free_ahead

    def close(self) -> None:
        """Stop threads and free memory; the iterator is at its end."""
        self._taken.clear()
        self._sizes.clear()
        self._feed.close()
        if self._error is None:
            self._error = StopIteration()


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
    tiny = pipeline.suffix(kind.build(np.zeros((2, 3, kind.channels), np.uint8)))
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


class ArrayRoute:
    """Batches of an array source, made by the kernel."""

    def __init__(
        self,
        device: Device,
        source: ArraySource,
        spec: FeedSpec,
        plan: Plan,
        assemble: Assemble,
        *,
        cached: DeviceImages | None,
    ) -> None:
        self._device = device
        self._source = source
        self._spec = spec
        self._plan = plan
        self._cached = cached
        self._assemble = assemble

    def iterate(self, indices: IndexBatches, free_ahead: int) -> Batches:
        """Begin an epoch.

        Args:
            indices: dataset indices, batch by batch.
            free_ahead: batches that may be read ahead whatever the sampler is.
        """
        spec, device = self._spec, self._device
        feed: Feed
        if self._cached is not None:
            feed = ResidentFeed(device, spec, self._cached)
        elif isinstance(device, CpuDevice):
            feed = ResidentFeed(device, spec, HostImages(self._source))
        else:
            feed = StagedFeed(device, spec, _ReadSource(self._source), depth=DEPTH)
        return Batches(
            indices,
            self._source,
            feed,
            self._assemble,
            self._plan,
            sample_bytes=prod(spec.output_shape) * spec.lookup.dtype.itemsize,
            depth=DEPTH if isinstance(feed, StagedFeed) else 1,
            free_ahead=free_ahead,
        )
