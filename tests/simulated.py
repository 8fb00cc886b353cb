"""A simulated asynchronous GPU that is as unkind as the rules allow. Never evidence about a GPU.

- A stream is a thread that runs its queue in order, with random delays of its own pace.
- Device memory is touched by operations alone. An operation keeps the addresses of what it reads
  and writes, not the tensors: a tensor that dies early does not stay alive for it.
- The allocator is torch's: a free list per stream, reuse in *host order* (a block whose tensor
  has died is at once given out again on its own stream, whatever other streams still do with
  it), unless ``record_stream`` named another stream: then once that stream's work is done.
- Retired memory is poisoned, in the order of the block's stream; retired host memory at once.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpupipe import cpu_ops
from gpupipe.devices import HostMemory
from gpupipe.program import Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpupipe.program import Recipe
    from gpupipe.tables import Layout, Lookup

POISON = 0xA5
GRANULE = 512
PATIENCE_S = 60.0
PACES_S = (0.0, 0.0, 0.0004, 0.0014)
"""Mean delays before an operation; each stream draws one of them for its life."""

Operation = Callable[[], None]


class SimulatedError(RuntimeError):
    """A failure that a test asked for."""


class SimulatedStream:
    """A thread that runs operations in order, sooner or later."""

    def __init__(self, seed: int, name: str) -> None:
        self._random = random.Random(f"{seed} {name}")  # noqa: S311 - delays, no secrets
        self.pace = self._random.choice(PACES_S)
        self.errors: list[BaseException] = []
        self.ended = False
        self._queue: SimpleQueue[Operation | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"simulated-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            if self.pace:
                time.sleep(self._random.uniform(0.0, 2.0 * self.pace))
            try:
                operation()
            except BaseException as error:  # noqa: BLE001 - the fixture raises it
                self.errors.append(error)

    def enqueue(self, operation: Operation) -> None:
        if self.ended:  # a feed that outlives its device may still be collected
            operation()
        else:
            self._queue.put(operation)

    def wait_event(self, event: SimulatedEvent) -> None:
        self.enqueue(event.latest())

    def synchronize(self) -> None:
        event = SimulatedEvent()
        event.record(self)
        event.synchronize()

    def shut(self) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE_S)
        self.ended = True


class SimulatedEvent:
    """The latest point recorded; a wait means the record that was latest when it was asked."""

    def __init__(self) -> None:
        self._reached: threading.Event | None = None

    def record(self, stream: SimulatedStream) -> None:
        self._reached = threading.Event()
        stream.enqueue(self._reached.set)

    def query(self) -> bool:
        return self._reached is None or self._reached.is_set()

    def latest(self) -> Operation:
        reached = self._reached

        def wait() -> None:
            if reached is not None and not reached.wait(PATIENCE_S):
                raise TimeoutError("an event was never reached")

        return wait

    def synchronize(self) -> None:
        self.latest()()


@dataclass(eq=False)
class Block:
    """Memory that is given out, retired and given out again, but never returned."""

    raw: NDArray[np.uint8]
    stream: SimulatedStream | None  # None: host memory
    users: set[SimulatedStream] = field(default_factory=set)


class Allocator:
    """torch's caching allocator, reduced to what can hurt."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: dict[int, Block] = {}
        self._live: Counter[bool] = Counter()
        self._free: defaultdict[tuple[SimulatedStream | None, int], list[Block]]
        self._free = defaultdict(list)
        self._retired: SimpleQueue[Block] = SimpleQueue()  # may be filled inside a collection
        self._pending: list[tuple[Block, list[SimulatedEvent]]] = []

    def allocate(self, nbytes: int, stream: SimulatedStream | None) -> torch.Tensor:
        """Return uint8 [nbytes]; the block is retired when the last view of it dies."""
        size = max(-(-nbytes // GRANULE), 1) * GRANULE
        with self._lock:
            self._reclaim()
            same = self._free[stream, size]
            block = same.pop() if same else Block(np.full(size, POISON, np.uint8), stream)
            self._blocks[block.raw.ctypes.data] = block
            self._live[stream is None] += size
        handle = block.raw[:nbytes]
        weakref.finalize(handle, self._retired.put, block).atexit = False
        return torch.from_numpy(handle)

    def block_of(self, tensor: torch.Tensor) -> Block:
        return self._blocks[tensor.untyped_storage().data_ptr()]

    def address_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same memory without holding the allocation, as a kernel's pointer does."""
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        if block is None:  # plain host memory, where pinning failed
            return tensor
        flat = torch.from_numpy(block.raw).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def live_bytes(self, *, host: bool) -> int:
        with self._lock:
            self._reclaim()
            return self._live[host]

    def _reclaim(self) -> None:
        while not self._retired.empty():
            block = self._retired.get()
            self._live[block.stream is None] -= block.raw.size
            events = [SimulatedEvent() for _ in block.users]
            for event, user in zip(events, block.users, strict=True):
                event.record(user)
            block.users.clear()
            self._pending.append((block, events))
        waiting = []
        for block, events in self._pending:
            if not all(event.query() for event in events):
                waiting.append((block, events))
            elif block.stream is None:
                block.raw.fill(POISON)  # and never given out again: a late copy reads poison
            else:
                block.stream.enqueue(partial(block.raw.fill, POISON))
                self._free[block.stream, block.raw.size].append(block)
        self._pending = waiting


class SimulatedDevice:
    """See ``gpupipe.devices.Device``.

    Args:
        seed: of every delay.
        fail: raise at the n-th call (from 1) of the method so named.
    """

    is_async = True
    torch_device = torch.device("cpu")

    def __init__(self, seed: int = 0, fail: dict[str, int] | None = None) -> None:
        self._seed = seed
        self._fail = fail or {}
        self._local = threading.local()
        self.calls: Counter[str] = Counter()
        self.memory = Allocator()
        self.streams: list[SimulatedStream] = []
        self.capturing = False
        self._host = HostMemory(self._pinned)
        self.default_stream = self.new_stream()

    def _step(self, name: str) -> None:
        self.calls[name] += 1
        if self._fail.get(name) == self.calls[name]:
            raise SimulatedError(name)

    def _pinned(self, nbytes: int) -> torch.Tensor:
        self._step("pin")
        return self.memory.allocate(nbytes, None)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        self._step("host_buffer")
        return self._host.empty(nbytes)

    def staging(self, host: torch.Tensor, stream: SimulatedStream) -> torch.Tensor:
        self._step("staging")
        return self.memory.allocate(host.numel(), stream)

    def new_stream(self) -> SimulatedStream:
        self.streams.append(SimulatedStream(self._seed, str(len(self.streams))))
        return self.streams[-1]

    def current_stream(self) -> SimulatedStream:
        current: SimulatedStream = getattr(self._local, "stream", self.default_stream)
        return current

    @contextmanager
    def stream(self, stream: SimulatedStream) -> Iterator[None]:
        """Make a stream the thread's current one."""
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def new_event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def is_capturing(self) -> bool:
        return self.capturing

    def enqueue(self, work: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Enqueue a kernel on the current stream; it is given the tensors' memory."""
        addresses = [self.memory.address_of(tensor) for tensor in tensors]
        self.current_stream().enqueue(lambda: work(*addresses))

    def copy(
        self, staging: torch.Tensor, host: torch.Tensor, nbytes: int, stream: SimulatedStream
    ) -> None:
        self._step("copy")
        with self.stream(stream):
            self.enqueue(lambda to, of: to.copy_(of), staging[:nbytes], host[:nbytes])

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        self._step("empty")
        flat = self.memory.allocate(prod(shape) * dtype.itemsize, self.current_stream())
        like = torch.empty(shape, device="meta", memory_format=memory_format)
        return flat.view(dtype).as_strided(shape, like.stride())

    def normalize(
        self,
        images: torch.Tensor,
        rows: torch.Tensor | None,
        outputs: Sequence[torch.Tensor],
        lookup: Lookup,
        *,
        layout: Layout,
    ) -> None:
        self._step("normalize")
        if rows is not None:
            raise NotImplementedError

        def work(source: torch.Tensor, *targets: torch.Tensor) -> None:
            levels = source.long()
            if layout == "NHW":
                levels = levels[:, None]
            elif layout == "NHWC":
                levels = levels.permute(0, 3, 1, 2)
            channels = torch.arange(lookup.channels)[:, None, None]
            done = iter(lookup.values[channels, levels])
            for target in targets:
                for row in target:
                    row.copy_(next(done).reshape(row.shape))

        self.enqueue(work, images, *outputs)

    def resample(
        self,
        images: torch.Tensor,
        program: Program,
        outputs: Sequence[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        self._step("resample")

        def work(*tensors: torch.Tensor) -> None:
            memory, frames, steps, weights, *targets = tensors
            host = Program(frames.numpy(), steps.numpy(), weights.numpy())
            cpu_ops.resample(memory.numpy(), host, targets, recipe, threads=1)

        self.enqueue(work, images, program.frames, program.steps, program.weights, *outputs)

    def clone(self, source: torch.Tensor) -> torch.Tensor:
        self._step("clone")
        nbytes = source.numel() * source.element_size()
        flat = self.memory.allocate(nbytes, self.current_stream())
        target = flat.view(source.dtype).view(source.shape)
        self.enqueue(lambda to, of: to.copy_(of), target, source)
        return target

    def record_stream(self, tensor: torch.Tensor, stream: SimulatedStream) -> None:
        self._step("record_stream")
        self.memory.block_of(tensor).users.add(stream)

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def synchronize(self) -> None:
        """Wait for all work."""
        for stream in self.streams:
            stream.synchronize()

    def shut(self) -> list[Any]:
        """End the streams' threads; return what their operations raised."""
        for stream in self.streams:
            stream.shut()
        return [error for stream in self.streams for error in stream.errors]
