"""The general route: ``dataset[i]`` runs up to the raw image, the kernel does the rest.

In line, one batch at a time, as torch's loader with 0 workers; its speed is not the point. Every
sample and every batch that is not as the probe found it gets torch's own treatment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from gpupipe.batch import move
from gpupipe.collate import CollateChanged, CollatePlan, CollateRefusal, recognise
from gpupipe.device import Device
from gpupipe.epochs import EpochBatches
from gpupipe.errors import InputError, PlanError, SourceError
from gpupipe.fetching import LiftedFetcher, is_batched, read
from gpupipe.images import ImageKind, kind_of, raw_bytes
from gpupipe.plan import Pipeline, Plan
from gpupipe.program_chunks import GivenChunk, ProgramSpec
from gpupipe.rendering import Picks, Renderer, Stream
from gpupipe.routes import feed_spec
from gpupipe.staging import FeedSpec
from gpupipe.tables import Lookup
from gpupipe.torch_route import as_indices
from gpupipe.transfer import StagedFeed
from gpupipe.trees import fill

LookupFor = Callable[[ImageKind], Lookup | None]
"""Returns the proved pipeline for a kind of image, or None where torchvision has to do it."""


class RecordedBatches(EpochBatches):
    """One epoch over any map-style dataset whose transform was found by the probe.

    Args:
        batches: what the batch sampler yields, as torch reads it.
        dataset: the user's, or the wrapper that applies an explicit transform.
        fetcher: fetches from a copy of it with the image taken out.
        collate_fn: the user's.
        pipeline: the transform.
        lookup_for: see ``LookupFor``.
        device: where batches are made.
        memory_format: of the images.
        finish: what a batch that torch made still needs.
        plan: counts what happens.
        warn: says something once.
        stream: the epoch's random numbers.
        strict: raise where a ``collate_fn`` stands against it.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        dataset: Any,
        fetcher: LiftedFetcher,
        collate_fn: Callable[[list[Any]], Any],
        pipeline: Pipeline,
        lookup_for: LookupFor,
        device: Device,
        memory_format: torch.memory_format,
        finish: Callable[[Any], Any],
        plan: Plan,
        warn: Callable[[str], None],
        stream: Stream,
        *,
        strict: bool = False,
    ) -> None:
        self._batches = batches
        self._position = 0
        self._stream = stream
        self._dataset = dataset
        self._fetcher = fetcher
        self._collate_fn = collate_fn
        self._collate: CollatePlan | CollateRefusal | None = None
        self._kernel = _Kernel(pipeline, lookup_for, device, memory_format, stream)
        self._finish = finish
        self._plan = plan
        self._warn = warn
        self._strict = strict
        self._before = plan.deviations
        self._wanted: list[Any] = []

    def __next__(self) -> Any:
        """Return the next batch."""
        try:
            wanted = next(self._batches)
        except StopIteration:
            self._kernel.close()
            raise
        indices = list(wanted)
        batch = self._make(indices)
        self._plan.batches += 1
        self._plan.deviations = self._before + self._fetcher.deviations
        self._wanted = indices
        return batch

    @property
    def indices(self) -> NDArray[np.int64]:  # type: ignore[override] # made where it is asked for
        """The dataset indices of the batch that was returned last, int64 [N].

        Raises:
            InputError: the batch sampler gives keys that are no integers.
        """
        return as_indices(self._wanted)

    def _make(self, indices: list[Any]) -> Any:
        if self._keeps():
            samples = read(self._dataset, indices, batched=is_batched(self._dataset))
            return self._finish(self._collate_fn(samples))
        fetched = self._fetcher.fetch(indices)
        if self._keeps():  # asked again: fetching may have shown it
            self._plan.reason = "the dataset keeps transformed samples; torch makes the batches"
            self._warn(f"{type(self._dataset).__name__} was lifted until now: {self._plan.reason}")
        raws = [raw for _, raw in fetched]
        made = self._kernel.run(raws, indices, self._position, strict=self._stacks)
        self._position += len(indices)
        if made is not None:
            batch = self._collated([sample for sample, _ in fetched], made)
            if batch is not None:
                return batch
        samples = [self._fetcher.complete(sample, raw) for sample, raw in fetched]
        return self._finish(self._collate_fn(samples))

    def _keeps(self) -> bool:
        return self._fetcher.keeps_samples

    @property
    def _stacks(self) -> bool:
        """Whether images of two sizes are an error, as they are for torch's default."""
        return self._collate_fn is default_collate

    def _collated(self, samples: list[Any], images: torch.Tensor) -> Any:
        """Return the batch around the finished images; None where only torch can make it."""
        if self._collate is None:
            c, h, w = (1, *images.shape[1:])[-3:]
            self._collate = recognise(
                self._collate_fn, samples[:4], self._fetcher.path, shape=(c, h, w),
                dtype=images.dtype,
            )  # fmt: skip
            if isinstance(self._collate, CollateRefusal):
                self._plan.reason = self._collate.reason
                if self._strict:
                    raise PlanError(f"not all is fused: {self._collate.reason}")
                self._warn(f"nothing was fused: {self._collate.reason}")
        if isinstance(self._collate, CollateRefusal):
            return None
        try:
            batch, path = self._collate.apply(samples)
        except CollateChanged as changed:
            self._plan.note(f"a batch was collated by torch: {changed}")
            return None
        except (TypeError, RuntimeError, ValueError) as error:
            raise InputError(
                f"the samples' other items cannot be collated: {error}; make them numbers, "
                "strings or tensors of one shape, or pass a collate_fn that knows them"
            ) from error
        return fill(move(batch, images.device), path, images)


class _Kernel:
    """Runs the kernel on the raw images of one batch."""

    def __init__(
        self,
        pipeline: Pipeline,
        lookup_for: LookupFor,
        device: Device,
        memory_format: torch.memory_format,
        stream: Stream,
    ) -> None:
        self._pipeline = pipeline
        self._lookup_for = lookup_for
        self._device = device
        self._memory_format = memory_format
        self._stream = stream
        self._given = _Given()
        self._feed: StagedFeed | None = None
        self._key: Any = None

    def run(
        self, raws: Sequence[Any], indices: Sequence[Any], position: int, *, strict: bool
    ) -> torch.Tensor | None:
        """Return the batch of finished images, or None where torchvision has to make them.

        Raises:
            SourceError: images of two sizes, where ``strict``.
        """
        if not raws or any(raw is None for raw in raws):
            return None
        kinds = [kind_of(raw) for raw in raws]
        if kinds[0] is None or any(kind != kinds[0] for kind in kinds):
            return None
        lookup = self._lookup_for(kinds[0])
        if lookup is None:
            return None
        arrays = [raw_bytes(raw) for raw in raws]
        self._given.arrays = arrays
        if not self._pipeline.is_pointwise:
            feed = self._programs(kinds[0], lookup)
            feed.submit([_picks(indices, position)])
        elif _one_size(arrays, indices, kinds[0], strict=strict):
            feed = self._pointwise(kinds[0], arrays[0].shape, lookup)
            feed.submit([np.arange(len(arrays))])
        else:
            return None
        images, _ = feed.next()
        self._given.arrays = []
        return images

    def _pointwise(self, kind: ImageKind, shape: tuple[int, ...], lookup: Lookup) -> StagedFeed:
        """Keep one feed, for the size at hand."""
        spec = feed_spec(self._pipeline, lookup, kind, shape, kind.layout, self._memory_format)
        return self._open((kind, shape, lookup), spec, self._given)

    def _programs(self, kind: ImageKind, lookup: Lookup) -> StagedFeed:
        """Keep one feed, for images of any sizes."""
        renderer = Renderer(self._pipeline, kind, lookup, self._stream)
        return self._open(
            (kind, lookup), ProgramSpec(renderer, self._memory_format), self._given.chunk
        )

    def _open(self, key: Any, spec: FeedSpec | ProgramSpec, read: Any) -> StagedFeed:
        if self._feed is None or key != self._key:
            self.close()
            self._feed = StagedFeed(self._device, spec, read, depth=2, threaded=False)
            self._key = key
        return self._feed

    def close(self) -> None:
        """Free the staging."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def _picks(indices: Sequence[Any], position: int) -> Picks:
    """Return the samples of a batch; keys that are no integers count by their position."""
    try:
        numbers = as_indices(indices)
    except InputError:
        numbers = np.arange(position, position + len(indices))
    here = np.arange(len(indices))
    return Picks(numbers, here, here + position, np.zeros(len(indices), bool))


def _one_size(
    arrays: Sequence[NDArray[np.uint8]], indices: Sequence[Any], kind: ImageKind, *, strict: bool
) -> bool:
    """Whether all images have one size.

    Raises:
        SourceError: they have not, where ``strict``.
    """
    for index, array in zip(indices, arrays, strict=True):
        if array.shape == arrays[0].shape:
            continue
        if strict:
            raise SourceError(
                f"images of one batch must have one size, got {_size(arrays[0], kind)} at "
                f"index {indices[0]} and {_size(array, kind)} at index {index}; add a Resize "
                "or crop of a fixed size to the transform, or pass a collate_fn"
            )
        return False
    return True


class _Given:
    """Hands the raw images of the batch at hand to the feed."""

    def __init__(self) -> None:
        self.arrays: list[NDArray[np.uint8]] = []

    def __call__(self, rows: NDArray[np.int64], views: list[NDArray[Any]]) -> None:
        for place, row in enumerate(rows):
            views[0][place] = self.arrays[row]

    def chunk(self, spec: ProgramSpec, batches: list[Picks]) -> GivenChunk:
        """Begin a chunk of programs for them."""
        return GivenChunk(self.arrays, spec, batches)


def _size(array: NDArray[np.uint8], kind: ImageKind | None) -> str:
    return f"{kind} of shape {tuple(array.shape)}"
