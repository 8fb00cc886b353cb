"""The stream protocol: from index batches to batches on the device, by way of pinned slots.

A producer thread fills pinned slots and enqueues one copy per chunk on the copy stream. ``next``
runs on the consumer's thread: it allocates the outputs on the consumer's current stream, launches
there, and never waits for the device. Who waits for whom, and why: ``docs/streams.md``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gpupipe import notices
from gpupipe.errors import DeviceError, GpupipeError, InputError
from gpupipe.staging import Batch, Ring, Slot, SlotState

if TYPE_CHECKING:
    from gpupipe.device import Device, Stream

CLOSE_TIMEOUT_S = 10.0
"""How long ``close`` waits for a read that is under way; the memory then goes with its thread."""


class Chunk(Protocol):
    """What one slot holds and one launch makes: some batches.

    It is made on the producer's thread by ``spec.chunk(read, batches)``, which may raise.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the slot that it takes."""

    def fill(self, host: torch.Tensor) -> tuple[int, list[Exception]]:
        """Write the host buffer, on the producer's thread.

        Returns:
            How many batches can be delivered, and, in a list, what the one after them failed with.
            -1: the chunk has grown, and wants a buffer of ``nbytes`` anew.
        """

    def after_copy(self, device: Device, staging: torch.Tensor, copy_stream: Stream) -> None:
        """Enqueue, on the copy stream, what has to follow the copy."""

    def launch(self, device: Device, staging: torch.Tensor, good: int) -> tuple[list[Batch], int]:
        """Allocate and make the first ``good`` batches, on the consumer's current stream.

        Returns:
            The batches, and how many launches it took.
        """


class Spec(Protocol):
    """Says how chunks are made, see ``staging.FeedSpec``."""

    def check(self, batches: Sequence[Any]) -> list[Any]:
        """Return the batches as ``chunk`` wants them, or refuse them."""

    def chunk(self, read: Any, batches: list[Any]) -> Chunk:
        """Begin a chunk."""


@dataclass(frozen=True)
class _Ready:
    """A filled slot whose copy is enqueued; the first ``good`` of its batches are there."""

    slot: Slot
    chunk: Chunk
    good: int


@dataclass(frozen=True)
class _Failed:
    """What the producer died of."""

    error: BaseException


class Producer:
    """The half of a feed that the thread holds: it knows nothing of the half that owns it."""

    def __init__(self, device: Device, spec: Spec, read: Any, depth: int) -> None:
        self.device = device
        self.spec = spec
        self.ring = Ring(device, depth)
        self.tasks: SimpleQueue[list[Any] | None] = SimpleQueue()
        self.ready: SimpleQueue[_Ready | _Failed | None] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.launching = threading.RLock()
        self.stopping = False
        self.copies = 0
        self._read = read
        self._pid = os.getpid()
        self._orphaned = False
        self._finished = False

    def run(self) -> None:
        """Serve chunks until told to stop or until one fails."""
        try:
            while (batches := self.tasks.get()) is not None and self.serve(batches):
                pass
        finally:
            self._finished = True
            if self._orphaned:
                self._release()

    def serve(self, batches: list[Any]) -> bool:
        """Fill a slot, enqueue its copy, and hand it over; return whether to go on."""
        slot = self.ring.free.get()
        if slot is None or self.stopping:
            return False
        try:
            return self._fill(slot, batches)
        except BaseException as error:  # noqa: BLE001 - next() raises it where it belongs
            self.ready.put(_Failed(error))
            return False

    def _fill(self, slot: Slot, batches: list[Any]) -> bool:
        """Read and copy what can be read, then report what the rest failed with."""
        slot.state = SlotState.FILLING
        chunk = self.spec.chunk(self._read, batches)
        slot.await_copied()
        good = -1
        while good < 0:
            self.ring.reserve(slot, chunk.nbytes)
            good, errors = chunk.fill(slot.buffers()[0])
        if good:
            slot.await_consumed_on(self.ring.copy_stream)
            slot.copy(chunk.nbytes, self.ring.copy_stream)
            chunk.after_copy(self.device, slot.buffers()[1], self.ring.copy_stream)
            slot.mark_copied(self.ring.copy_stream)
            slot.state = SlotState.READY
            self.copies += 1
            self.ready.put(_Ready(slot, chunk, good))
        if errors:
            self.ready.put(_Failed(errors.pop()))
        return good == len(batches)

    def stop(self) -> None:
        """Stop the thread, wait for the device, free the memory. Any thread; again is no error."""
        if os.getpid() != self._pid:
            return  # a forked child: the thread, the device and the memory are the parent's
        self.stopping = True
        self.tasks.put(None)
        self.ring.free.put(None)
        self.ready.put(None)
        thread = self.thread
        if thread is threading.current_thread():
            self._orphaned = True  # the collector runs us on the thread itself: it cleans up
            if not self._finished:
                return
        elif thread is not None:
            thread.join(CLOSE_TIMEOUT_S)
            if thread.is_alive():
                self._orphaned = True
                if not self._finished:
                    notices.warn(
                        f"a read has not returned for {CLOSE_TIMEOUT_S:g} s after close(); its "
                        "thread and its memory go when it does"
                    )
                    return
        self._release()

    def _release(self) -> None:
        with self.launching:
            self.ring.close()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that made the feed."""
        return os.getpid() != self._pid


class StagedFeed:
    """Batches on the device, in the order in which their indices were submitted.

    One thread at a time may call ``submit`` and ``next``; ``close`` may run on any thread.

    Args:
        device: where batches are made.
        spec: what a sample is.
        read: what ``spec.chunk`` reads with: for a ``FeedSpec`` see ``staging.Read``.
        depth: chunks that may be under way at once, each with a slot of its own.
        threaded: read on a thread; otherwise inside ``next``.
    """

    producer_type = Producer

    def __init__(
        self, device: Device, spec: Spec, read: Any, *, depth: int = 3, threaded: bool = True
    ) -> None:
        self._device = device
        self._spec = spec
        self._producer = producer = self.producer_type(device, spec, read, depth)
        self._delivery: deque[Batch] = deque()
        self._slot: Slot | None = None
        self._stream: Stream | None = None
        self._chunk: Chunk | None = None
        self._failure = ""
        self.pending = 0
        self.launches = 0
        self._finalizer = weakref.finalize(self, producer.stop)
        if threaded:
            thread = threading.Thread(target=producer.run, name="gpupipe-producer", daemon=True)
            thread.start()
            producer.thread = thread

    @property
    def copies(self) -> int:
        """Transfers enqueued so far."""
        return self._producer.copies

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory held now; the staging on the device is as large."""
        return self._producer.ring.nbytes

    @property
    def picks(self) -> Any:
        """Whose samples the chunk that was delivered last holds, where its chunk says so."""
        return getattr(self._chunk, "picks", None)

    def submit(self, batches: Sequence[Any]) -> None:
        """Ask for a chunk: its batches share one copy and, if of one size, one launch.

        Never blocks. ``pending`` counts the batches that were asked for and not yet delivered.

        Args:
            batches: as the spec wants them: for a ``FeedSpec`` int64 [N] each, N >= 1; the last of
                a chunk may be smaller. Kept, not copied.

        Raises:
            InputError: no batch, an empty one, or one that is no vector of integers.
            GpupipeError: the feed is closed, or failed before.
        """
        self._check()
        chunk = self._spec.check(batches)
        self._producer.tasks.put(chunk)
        self.pending += len(chunk)

    def next(self) -> Batch:
        """Return the next batch, for work on the caller's current stream.

        Blocks until the host has read the batch, never until the device has made it.

        Raises:
            InputError: nothing is pending.
            DeviceError: a CUDA graph is being captured on the current stream.
            GpupipeError: the feed is closed, or failed or was interrupted before.
            BaseException: what the read raised, where its batch would have come.
        """
        self._check()
        if self._device.is_capturing():
            raise DeviceError(
                "next() was called while a CUDA graph is captured on the current stream; the graph "
                "would replay one batch's memory; take the batch before the capture and copy it "
                "into a tensor of your own"
            )
        if not self.pending:
            raise InputError("next() was called with no batch pending; submit() one first")
        stream = self._device.current_stream()
        self._failure = "an interrupt inside next(), which may have lost a batch"  # until the end
        if not self._delivery:
            ready = self._take()
            with self._producer.launching:
                self._launch(ready, stream)
        images, columns = self._delivery.popleft()
        if stream != self._stream:
            self._hand_over(images, columns, stream)
        self.pending -= 1
        finish = self._device.finish
        batch = finish(images), tuple(map(finish, columns))
        self._failure = ""
        return batch

    def _check(self) -> None:
        if self._producer.foreign:
            raise DeviceError(
                f"this loader's iterator was made before fork, in another process than "
                f"{os.getpid()}; its thread and its device memory stay there; iterate a loader "
                "in this process instead"
            )
        if self._producer.stopping:
            raise GpupipeError("the feed is closed; iterate the loader anew")
        if self._failure:
            raise GpupipeError(f"the feed failed before, with {self._failure}; iterate anew")

    def _take(self) -> _Ready:
        """Wait for the producer's next chunk; without a thread, produce it here."""
        producer = self._producer
        if producer.thread is None and producer.ready.empty():
            batches = producer.tasks.get_nowait()
            if batches is not None:
                producer.serve(batches)
        ready = producer.ready.get()
        if ready is None:
            raise GpupipeError("the feed was closed while next() waited; iterate the loader anew")
        if isinstance(ready, _Failed):
            self._failure = repr(ready.error)
            try:
                raise ready.error
            finally:
                del ready  # the error's traceback holds this frame
        return ready

    def _launch(self, ready: _Ready, stream: Stream) -> None:
        """Make all batches of a chunk on ``stream``, and give the slot back."""
        slot = ready.slot
        slot.user = stream
        slot.state = SlotState.LAUNCHING  # until `consumed` is recorded, close() waits for `user`
        try:
            # Not inference tensors: a batch of this chunk may be used outside the caller's mode.
            with torch.inference_mode(mode=False):
                self._delivery.extend(self._enqueue(ready, stream))
            slot.mark_consumed(stream)
        except Exception as error:
            self._failure = repr(error)
            raise
        self._slot, self._stream, self._chunk = slot, stream, ready.chunk
        if self._producer.stopping:  # close() ran in a signal handler, in the midst of this
            stream.synchronize()
        slot.user = None
        slot.state = SlotState.FREE
        self._producer.ring.free.put(slot)

    def _enqueue(self, ready: _Ready, stream: Stream) -> list[Batch]:
        """Allocate on the current stream, which is ``stream``, and launch there."""
        ready.slot.await_copied_on(stream)
        batches, launches = ready.chunk.launch(self._device, ready.slot.buffers()[1], ready.good)
        self.launches += launches
        return batches

    def _hand_over(
        self, images: torch.Tensor, columns: Sequence[torch.Tensor], stream: Stream
    ) -> None:
        """Give tensors of a chunk that was launched on one stream to another."""
        if self._slot is not None:
            self._slot.await_outputs_on(stream)
        for tensor in (images, *columns):
            self._device.record_stream(tensor, stream)

    def close(self) -> None:
        """Stop the thread, wait for the device, free all memory. Any thread; again is no error.

        Batches that were delivered stay valid. In a forked child this does nothing.
        """
        self._producer.stop()
        self._delivery.clear()
        self._finalizer.detach()
