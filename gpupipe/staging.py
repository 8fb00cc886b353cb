"""The ring of pinned slots, and what lies in a slot.

A slot is a pinned host buffer with device staging of the same size, owned by the library, and two
events. ``copied``: the device has read the host buffer. ``consumed``: the launches have read the
staging. Each rule of the stream protocol that concerns a slot is one method here; ``transfer``
calls them in order, and ``docs/streams.md`` shows what goes wrong without each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from math import prod
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpupipe.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from gpupipe.device import Device, Event, Stream
    from gpupipe.tables import Layout, Lookup

Read = Callable[["NDArray[np.int64]", "list[NDArray[Any]]"], None]
"""``read(rows, views)`` fills ``views[0]``, uint8 [len(rows), *image_shape], and one array for each
column. It runs on the producer thread, must not refer to the feed or to the iterator that owns it,
and must give the same for the same rows: after an error in a chunk of several batches it is called
again, batch by batch, so that the batches before the bad one are still delivered."""

Batch = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""The images, and the columns."""

ALIGNMENT = 64
"""Bytes; where a column begins in a slot."""


@dataclass(frozen=True)
class Column:
    """Values that travel with the images, such as labels.

    Attributes:
        shape: of one sample's value; ``()`` for a label.
        dtype: one that NumPy has, too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out."""
        try:
            torch.empty(0, dtype=self.dtype, device="cpu").numpy()
        except TypeError as error:
            raise InputError(
                f"dtype of a column must be one that NumPy has, got {self.dtype}; "
                "convert the column, for example to torch.float32"
            ) from error

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FeedSpec:
    """What one sample is, raw and done.

    Attributes:
        image_shape: raw uint8 image: [H, W, C], [C, H, W] or [H, W], as ``layout`` says.
        layout: of a batch of raw images.
        lookup: the pipeline; its dtype is the output's.
        output_shape: one image of the output: [C, H, W] or [H, W].
        memory_format: of the output batch.
        columns: what travels with the images, in the same copy.
    """

    image_shape: tuple[int, ...]
    layout: Layout
    lookup: Lookup
    output_shape: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format
    columns: tuple[Column, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shapes that contradict the layout."""
        rank = len(self.layout) - 1
        if len(self.image_shape) != rank or min(self.image_shape) < 1:
            raise InputError(
                f"image_shape must be [{', '.join(self.layout[1:])}] of positive sizes for layout "
                f"{self.layout}, got {self.image_shape}; pass the shape of one raw image"
            )

    @property
    def fields(self) -> tuple[Column, ...]:
        """The images and the columns, in the order in which they lie in a slot."""
        return (Column(self.image_shape, torch.uint8), *self.columns)

    def offsets(self, count: int) -> list[int]:
        """Return where each field begins for ``count`` samples, and, last, the bytes in all."""
        offsets = [0]
        for field in self.fields:
            end = offsets[-1] + count * field.row_bytes
            offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        return offsets

    def host_views(self, host: torch.Tensor, count: int) -> list[NDArray[np.generic]]:
        """Return the fields of a host buffer as arrays [count, ...]."""
        return [view.numpy() for view in self.views(host, count)]

    def views(self, buffer: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Return the fields of a uint8 buffer as tensors [count, ...]."""
        return [
            buffer[start : start + count * field.row_bytes]
            .view(field.dtype)
            .view(count, *field.shape)
            for field, start in zip(self.fields, self.offsets(count), strict=False)
        ]

    def check(self, batches: Sequence[ArrayLike]) -> list[NDArray[np.int64]]:
        """Return batches of rows as ``chunk`` wants them.

        Raises:
            InputError: no batch, an empty one, or one that is no vector of integers.
        """
        rows = [np.asarray(batch) for batch in batches]
        if not rows or any(r.ndim != 1 or not len(r) or r.dtype.kind not in "iu" for r in rows):
            raise InputError(
                "batches must be a sequence of integer vectors, none of them empty, got "
                f"{[(str(r.dtype), r.shape) for r in rows]}; pass the sampler's indices"
            )
        return [batch.astype(np.int64, copy=False) for batch in rows]

    def chunk(self, read: Read, batches: list[NDArray[np.int64]]) -> PointwiseChunk:
        """Begin a chunk of batches that share one copy and, if of one size, one launch."""
        return PointwiseChunk(self, read, batches)


class PointwiseChunk:
    """Some batches of images of one size, for ``normalize``; see ``transfer.Chunk``."""

    def __init__(self, spec: FeedSpec, read: Read, batches: list[NDArray[np.int64]]) -> None:
        self._spec = spec
        self._read = read
        self._batches = batches
        self._errors: list[Exception] = []
        self.sizes = tuple(map(len, batches))
        self.count = sum(self.sizes)
        self.nbytes = spec.offsets(self.count)[-1]

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Read all batches at once; where that fails, one by one up to the bad one.

        No frame keeps the error: its traceback holds the frames, and the frames the memory.
        """
        views, batches = self._spec.host_views(host, self.count), self._batches
        try:
            self._read(np.concatenate(batches), views)
        except Exception as error:  # noqa: BLE001 - a user's dataset may raise anything
            self._errors.append(_noted(error, np.concatenate(batches)))
        if not self._errors:
            return len(batches), []
        start = 0
        for position, rows in enumerate(batches if len(batches) > 1 else ()):
            try:
                self._read(rows, [view[start : start + len(rows)] for view in views])
            except Exception as error:  # noqa: BLE001 - a user's dataset may raise anything
                self._errors[:] = [_noted(error, rows)]
                return position, self._errors
            start += len(rows)
        return 0, self._errors

    def after_copy(self, device: Device, staging: torch.Tensor, copy_stream: Stream) -> None:
        """Nothing follows the copy."""

    def launch(self, device: Device, staging: torch.Tensor, good: int) -> tuple[list[Batch], int]:
        """Normalise the first ``good`` batches; see ``transfer.Chunk``."""
        spec = self._spec
        sizes = self.sizes[:good]
        outputs = [
            device.empty((size, *spec.output_shape), spec.lookup.dtype, spec.memory_format)
            for size in sizes
        ]
        images, *columns = spec.views(staging, self.count)
        start = 0
        groups = launch_groups(outputs)
        for group in groups:
            end = start + sum(map(len, group))
            device.normalize(images[start:end], None, group, spec.lookup, layout=spec.layout)
            start = end
        ends = list(accumulate(sizes))
        return [
            (output, tuple(device.clone(column[end - len(output) : end]) for column in columns))
            for output, end in zip(outputs, ends, strict=True)
        ], len(groups)


def _noted(error: Exception, rows: NDArray[np.int64]) -> Exception:
    """Name the stage and the rows on the user's own exception."""
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")  # noqa: PLR2004
    error.add_note(f"gpupipe: while reading {len(rows)} sample(s) with indices {shown}")
    return error


def launch_groups(outputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Split into runs that one launch can write: all of one size, the last at most that."""
    groups: list[list[torch.Tensor]] = []
    sizes = [output.shape[0] for output in outputs]
    for position, (output, size) in enumerate(zip(outputs, sizes, strict=True)):
        first = position - len(groups[-1]) if groups else 0
        if groups and sizes[position - 1] == sizes[first] >= size:
            groups[-1].append(output)
        else:
            groups.append([output])
    return groups


class SlotState(Enum):
    """Who has the slot."""

    FREE = auto()
    """Nobody; the device may still read the staging, ``consumed`` tells."""
    FILLING = auto()
    """The producer: it writes the host buffer and enqueues the copy."""
    READY = auto()
    """The queue between them; the copy may still run, ``copied`` tells."""
    LAUNCHING = auto()
    """The consumer: work on ``Slot.user`` may read the staging, and no event tells when."""


class Slot:
    """A pinned buffer, its staging on the device, and the two events that guard them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.host: torch.Tensor | None = None
        self.staging: torch.Tensor | None = None
        self.state = SlotState.FREE
        self.user: Stream | None = None
        self._copied: Event = device.new_event()
        self._consumed: Event = device.new_event()

    @property
    def nbytes(self) -> int:
        """Capacity in bytes."""
        return 0 if self.staging is None else self.staging.numel()

    def await_copied(self) -> None:
        """Host: wait until the device has read the host buffer; before it is filled again."""
        self._copied.synchronize()

    def await_consumed_on(self, copy_stream: Stream) -> None:
        """Copy stream: wait until the launches have read the staging; before the next copy."""
        copy_stream.wait_event(self._consumed)

    def copy(self, nbytes: int, copy_stream: Stream) -> None:
        """Enqueue the one copy of this chunk."""
        host, staging = self.buffers()
        self._device.copy(staging, host, nbytes, copy_stream)

    def mark_copied(self, copy_stream: Stream) -> None:
        """Record ``copied``."""
        self._copied.record(copy_stream)

    def await_copied_on(self, stream: Stream) -> None:
        """Consumer's stream: wait until the staging is written; before the launch."""
        stream.wait_event(self._copied)

    def mark_consumed(self, stream: Stream) -> None:
        """Record ``consumed``."""
        self._consumed.record(stream)

    def await_outputs_on(self, stream: Stream) -> None:
        """Another stream of the consumer's: wait until the launches of this chunk are done."""
        stream.wait_event(self._consumed)

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return host buffer and staging."""
        if self.host is None or self.staging is None:
            raise InputError("this feed is closed and its memory is freed; iterate the loader anew")
        return self.host, self.staging

    def reserve(self, nbytes: int, copy_stream: Stream) -> None:
        """Grow to ``nbytes``, once the device is done with what is there."""
        if self.nbytes >= nbytes:
            return
        self.drain()
        self.host = self.staging = None
        # Not inference tensors, whatever the caller's mode: they are written again and again.
        with torch.inference_mode(mode=False):
            self.host = self._device.host_buffer(nbytes)
            self.staging = self._device.staging(self.host, copy_stream)

    def drain(self) -> None:
        """Host: wait until the device touches neither buffer."""
        self._copied.synchronize()
        self._consumed.synchronize()
        if self.state is SlotState.LAUNCHING and self.user is not None:
            self.user.synchronize()


class Ring:
    """The slots of one feed, the copy stream, and the queue of the slots that are free.

    Args:
        device: where the staging lies.
        depth: how many slots; chunks that may be under way at once.
    """

    def __init__(self, device: Device, depth: int) -> None:
        if depth < 1:
            raise InputError(f"depth must be at least 1, got {depth}; 2 or 3 overlap copies")
        self.copy_stream = device.new_stream()
        self.slots = [Slot(device) for _ in range(depth)]
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        self.closed = False
        self._largest = 0
        for slot in self.slots:
            self.free.put(slot)

    @property
    def nbytes(self) -> int:
        """Bytes held on either side: as many pinned on the host as staging on the device."""
        return sum(slot.nbytes for slot in self.slots)

    def reserve(self, slot: Slot, nbytes: int) -> None:
        """Make room for a chunk; every slot grows to the largest chunk so far, and then rests."""
        if slot.nbytes < nbytes:
            self._largest = max(self._largest, nbytes)
            slot.reserve(self._largest, self.copy_stream)

    def close(self) -> None:
        """Wait for the device, then free all memory; again is no error."""
        if self.closed:
            return
        self.closed = True
        try:
            self.copy_stream.synchronize()
            for slot in self.slots:
                slot.drain()
        finally:
            for slot in self.slots:
                slot.host = slot.staging = slot.user = None
                slot.state = SlotState.FREE
