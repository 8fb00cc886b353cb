"""The stream protocol on a simulated asynchronous GPU, and on the CPU.

A run on the simulated device shows that the order of events is right under its delays. It says
nothing about a real GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as reference

from gpupipe import transfer
from gpupipe.devices import CpuDevice, Device
from gpupipe.errors import DeviceError, GpupipeError, GpupipeWarning, InputError
from gpupipe.staging import Column, FeedSpec, Slot
from gpupipe.tables import Layout, Lookup
from gpupipe.transfer import Producer, StagedFeed
from tests.simulated import SimulatedDevice, SimulatedError, SimulatedStream

SEEDS = range(16)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = (Column((), torch.int64), Column((3,), torch.float32), Column((), torch.bool))
Rows = NDArray[np.int64]
MakeDevice = Callable[..., SimulatedDevice]


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Return torchvision's result for uint8 [N, C, H, W]."""
    scaled = reference.to_dtype(images, torch.float32, scale=True)
    done: torch.Tensor = reference.normalize(scaled, MEAN[: images.shape[1]], STD[: images.shape[1]])
    return done


class Source:
    """A dataset in memory, and what torchvision makes of it."""

    def __init__(self, count: int = 97, layout: Layout = "NHWC", h: int = 5, w: int = 7) -> None:
        random = np.random.default_rng(0)
        c = 1 if layout == "NHW" else 3
        planar = random.integers(0, 256, (count, c, h, w), dtype=np.uint8)
        raw = planar[:, 0] if layout == "NHW" else planar
        raw = planar.transpose(0, 2, 3, 1) if layout == "NHWC" else raw
        self.raw = np.ascontiguousarray(raw)
        self.labels = random.integers(-(2**40), 2**40, count)
        self.points = random.random((count, 3), np.float32)
        self.flags = random.random(count) < 0.5
        self.done = normalized(torch.from_numpy(planar))
        ramp = torch.arange(256, dtype=torch.uint8).expand(1, c, 1, 256).contiguous()
        self.spec = FeedSpec(
            image_shape=self.raw.shape[1:],
            layout=layout,
            lookup=Lookup(normalized(ramp)[0, :, 0]),
            output_shape=(c, h, w),
            memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format,
            columns=COLUMNS,
        )

    def read(self, rows: Rows, views: list[NDArray[Any]]) -> None:
        for view, values in zip(
            views, (self.raw, self.labels, self.points, self.flags), strict=True
        ):
            view[...] = values[rows]

    def expected(self, rows: Rows) -> list[torch.Tensor]:
        columns = (torch.from_numpy(values[rows]) for values in self.columns)
        return [self.done[torch.from_numpy(rows)], *columns]

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        return self.labels, self.points, self.flags


def chunks_of(source: Source, sizes: Sequence[Sequence[int]], seed: int = 0) -> list[list[Rows]]:
    """Return chunks of batches of random rows, of these sizes."""
    random = np.random.default_rng(seed)
    return [[random.integers(0, len(source.raw), n) for n in chunk] for chunk in sizes]


class Trainer:
    """A consumer like a training loop: it enqueues work that reads a batch, and drops the batch."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.seen: deque[tuple[Rows, list[torch.Tensor]]] = deque()

    def use(self, rows: Rows, images: torch.Tensor, columns: Sequence[torch.Tensor]) -> None:
        """Enqueue one kernel on the current stream that reads everything."""
        copies: list[torch.Tensor] = []

        def kernel(*tensors: torch.Tensor) -> None:
            copies.extend(tensor.clone() for tensor in tensors)

        self.device.enqueue(kernel, images, *columns)
        self.seen.append((rows, copies))

    def torn(self, source: Source) -> int:
        """Wait, and count the batches that are not what torchvision makes of their rows."""
        self.device.synchronize()
        pairs = [(copies, source.expected(rows)) for rows, copies in self.seen]
        return sum(
            len(got) != len(want) or not all(map(torch.equal, got, want)) for got, want in pairs
        )


def train(
    device: SimulatedDevice,
    source: Source,
    chunks: list[list[Rows]],
    *,
    feed_type: type[StagedFeed] = StagedFeed,
    depth: int = 2,
    threaded: bool = True,
    streams: Sequence[SimulatedStream] = (),
) -> int:
    """Run an epoch; batch i on ``streams[i % len]``, if given. Return the torn batches."""
    feed = feed_type(device, source.spec, source.read, depth=depth, threaded=threaded)
    trainer = Trainer(device)
    ahead, step = iter(chunks), 0
    try:
        for chunk in chunks:
            while feed.pending < 8 and (wanted := next(ahead, None)) is not None:
                feed.submit(wanted)
            for rows in chunk:
                stream = streams[step % len(streams)] if streams else device.default_stream
                with device.stream(stream):
                    trainer.use(rows, *feed.next())
                step += 1
    finally:
        feed.close()
    return trainer.torn(source)


@pytest.fixture
def make_device() -> Iterator[MakeDevice]:
    """Give out simulated devices; no operation on them may raise."""
    devices: list[SimulatedDevice] = []

    def make(seed: int = 0, fail: dict[str, int] | None = None) -> SimulatedDevice:
        devices.append(SimulatedDevice(seed, fail))
        return devices[-1]

    yield make
    assert [error for device in devices for error in device.shut()] == []


@pytest.fixture
def source() -> Source:
    return Source()


EVEN = [[6] * 3] * 8
GROWING = [[4], [9], [9], [17], [17], [33], [33], [60], [60], [90], [90]]


def even(source: Source, device: SimulatedDevice, **options: Any) -> int:
    return train(device, source, chunks_of(source, EVEN), **options)


def growing(source: Source, device: SimulatedDevice, **options: Any) -> int:
    return train(device, source, chunks_of(source, GROWING), **options)


def two_streams(source: Source, device: SimulatedDevice, **options: Any) -> int:
    streams = [device.default_stream, device.new_stream()]
    return train(device, source, chunks_of(source, EVEN), streams=streams, **options)


@pytest.mark.parametrize("epoch", [even, growing, two_streams])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_batch_is_torn(
    make_device: MakeDevice, source: Source, seed: int, epoch: Callable[..., int]
) -> None:
    """Whatever the delays, each batch is torchvision's when the consumer's stream reads it."""
    assert epoch(source, make_device(seed)) == 0
    assert epoch(source, make_device(seed), depth=1) == 0
    assert epoch(source, make_device(seed), threaded=False) == 0


class LaunchingProducer(Producer):
    """The planted race: the thread launches, on the copy stream, into the consumer's memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made: deque[tuple[list[torch.Tensor], Any]] = deque()

    def _fill(self, slot: Slot, batches: list[Rows]) -> bool:
        handed_over, self.ready = self.ready, transfer.SimpleQueue()
        good = super()._fill(slot, batches)
        ready, self.ready = self.ready.get(), handed_over
        device, spec = slot._device, self.spec
        assert isinstance(device, SimulatedDevice)
        assert isinstance(ready, transfer._Ready)
        outputs = [
            device.empty((size, *spec.output_shape), spec.lookup.dtype, spec.memory_format)
            for size in ready.sizes
        ]
        copy_stream: Any = self.ring.copy_stream
        made = device.new_event()
        with device.stream(copy_stream):
            images = spec.views(slot.buffers()[1], ready.count)[0]
            device.normalize(images, None, outputs, spec.lookup, layout=spec.layout)
        made.record(copy_stream)
        self.made.append((outputs, made))
        self.ready.put(ready)
        return good


class LaunchedElsewhere(StagedFeed):
    """Takes the outputs of ``LaunchingProducer``; the stream waits for them, it looks right."""

    producer_type = LaunchingProducer

    def _enqueue(self, ready: transfer._Ready, stream: Any) -> list[transfer.Batch]:
        assert isinstance(self._producer, LaunchingProducer)
        outputs, made = self._producer.made.popleft()
        stream.wait_event(made)
        batches = super()._enqueue(ready, stream)
        return [
            (output, columns) for output, (_, columns) in zip(outputs, batches, strict=True)
        ]


def nothing(*_: object) -> None:
    """Stand in for a rule that was forgotten."""


def caught(epoch: Callable[..., int], make_device: MakeDevice, **options: Any) -> bool:
    """Whether any seed shows a torn batch; each passes without the bug, see above."""
    return any(epoch(Source(), make_device(seed), **options) for seed in SEEDS)


def test_launching_from_the_producer_is_caught(make_device: MakeDevice) -> None:
    """Outputs of one stream, written on another: queued reads of the block's last life tear."""
    assert caught(even, make_device, feed_type=LaunchedElsewhere)


@pytest.mark.parametrize(
    ("rule", "epoch"),
    [
        ("await_consumed_on", even),  # the copy overwrites staging that a launch still reads
        ("await_copied", even),  # the host overwrites a slot that the copy still reads
        ("await_copied_on", even),  # the launch reads staging before the copy has written it
        ("await_outputs_on", two_streams),  # a second stream reads what is not yet launched
        ("drain", growing),  # memory is freed while the device still uses it
    ],
)
def test_each_rule_of_a_slot_is_needed(
    make_device: MakeDevice,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    epoch: Callable[..., int],
) -> None:
    """Without any one of the waits, batches tear."""
    monkeypatch.setattr(Slot, rule, nothing)
    assert caught(epoch, make_device)


def test_record_stream_is_needed(
    make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second stream reads a batch whose memory the first stream has reused."""
    monkeypatch.setattr(SimulatedDevice, "record_stream", nothing)
    assert caught(two_streams, make_device)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("threaded", [True, False])
def test_layouts_and_columns(layout: Layout, threaded: bool) -> None:
    """Images in every layout, and columns of several dtypes, arrive equal on the CPU."""
    source = Source(layout=layout)
    feed = StagedFeed(CpuDevice(), source.spec, source.read, depth=2, threaded=threaded)
    chunks = chunks_of(source, [[1], [19, 19, 3], [5, 1, 8]])
    for chunk in chunks:
        feed.submit(chunk)
    for rows in (rows for chunk in chunks for rows in chunk):
        images, columns = feed.next()
        assert all(map(torch.equal, (images, *columns), source.expected(rows)))
        assert images.is_contiguous(memory_format=source.spec.memory_format)
    feed.close()


def test_a_chunk_is_one_copy_and_one_launch(make_device: MakeDevice, source: Source) -> None:
    """k batches of one size, the last smaller: one transfer, one launch, k storages."""
    device = make_device()
    feed = StagedFeed(device, source.spec, source.read)
    feed.submit(chunks_of(source, [[7, 7, 7, 7, 2]])[0])
    batches = [feed.next() for _ in range(5)]
    assert (device.calls["copy"], device.calls["normalize"]) == (1, 1)
    assert (feed.copies, feed.launches) == (1, 1)
    tensors = [tensor for images, columns in batches for tensor in (images, *columns)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 5 * 4
    feed.submit(chunks_of(source, [[2, 7, 7]])[0])  # one launch writes equal sizes only
    batches = [feed.next() for _ in range(3)]
    assert (feed.copies, feed.launches) == (2, 3)
    feed.close()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6),
    depth=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    threaded=st.booleans(),
)
def test_any_sizes_and_depth(
    source: Source, sizes: list[list[int]], depth: int, seed: int, threaded: bool
) -> None:
    """Any batch sizes in any chunks, at any depth, arrive whole and in order."""
    device = SimulatedDevice(seed)
    try:
        chunks = chunks_of(source, sizes, seed)
        assert train(device, source, chunks, depth=depth, threaded=threaded) == 0
    finally:
        assert device.shut() == []


def test_batches_that_are_kept_stay_whole(make_device: MakeDevice, source: Source) -> None:
    """Batches kept over a break and a close are never written again."""
    device = make_device(3)
    feed = StagedFeed(device, source.spec, source.read, depth=2)
    chunks = chunks_of(source, [[8, 8]] * 6)
    for chunk in chunks:
        feed.submit(chunk)
    flat = [rows for chunk in chunks for rows in chunk][:7]
    kept = [feed.next() for _ in flat]
    feed.close()
    assert even(source, device) == 0
    trainer = Trainer(device)
    for rows, (images, columns) in zip(flat, kept, strict=True):
        trainer.use(rows, images, columns)
    assert trainer.torn(source) == 0


def test_feeds_side_by_side(make_device: MakeDevice, source: Source) -> None:
    """Several feeds on one device, taken in turn, do not disturb each other."""
    device = make_device(5)
    chunks = chunks_of(source, EVEN)
    feeds = [StagedFeed(device, source.spec, source.read, depth=d) for d in (1, 2, 3)]
    trainer = Trainer(device)
    for chunk in chunks:
        for feed in feeds:
            feed.submit(chunk)
        for rows in chunk:
            for feed in feeds:
                trainer.use(rows, *feed.next())
    for feed in feeds:
        feed.close()
    assert trainer.torn(source) == 0


def fails_at(source: Source, bad: int) -> transfer.Read:
    """Return a read that raises KeyError where ``bad`` is among the rows."""

    def read(rows: Rows, views: list[NDArray[Any]]) -> None:
        source.read(rows, views)
        if bad in rows:
            raise KeyError(bad)

    return read


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("chunking", [[1] * 12, [4] * 3, [5, 7], [12]])
def test_a_failing_read_surfaces_at_its_batch(
    make_device: MakeDevice, source: Source, chunking: list[int], threaded: bool
) -> None:
    """The batches before the bad one are delivered; then comes the read's own exception."""
    device = make_device(1)
    batches = [np.arange(start, start + 3) for start in range(0, 36, 3)]
    feed = StagedFeed(device, source.spec, fails_at(source, 22), threaded=threaded)
    ahead = iter(batches)
    for count in chunking:
        feed.submit([next(ahead) for _ in range(count)])
    trainer = Trainer(device)
    for rows in batches[:7]:
        trainer.use(rows, *feed.next())
    with pytest.raises(KeyError) as raised:
        feed.next()
    assert raised.value.args == (22,)
    assert raised.value.__notes__ == [
        "gpupipe: while reading 3 sample(s) with indices 21, 22, 23"
    ]
    with pytest.raises(GpupipeError, match="failed before, with KeyError"):
        feed.next()
    feed.close()
    assert trainer.torn(source) == 0
    assert device.memory.live_bytes(host=True) == 0


def test_a_read_that_fails_once_is_not_hidden(make_device: MakeDevice, source: Source) -> None:
    """An error that does not come again, batch by batch, is raised at the chunk's first batch."""
    calls: list[int] = []

    def read(rows: Rows, views: list[NDArray[Any]]) -> None:
        calls.append(len(rows))
        source.read(rows, views)
        if len(calls) == 1:
            raise OSError("flaky")

    feed = StagedFeed(make_device(), source.spec, read)
    feed.submit(chunks_of(source, [[4, 4]])[0])
    with pytest.raises(OSError, match="flaky"):
        feed.next()
    assert calls == [8, 4, 4]
    feed.close()


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize(
    ("step", "at", "whole"),
    [
        ("host_buffer", 1, 0),
        ("staging", 2, 2),
        ("copy", 1, 0),
        ("copy", 3, 4),
        ("empty", 1, 0),
        ("empty", 4, 2),
        ("normalize", 2, 2),
        ("clone", 7, 2),
    ],
)
def test_a_failure_at_any_step_surfaces(
    make_device: MakeDevice, source: Source, step: str, at: int, whole: int, threaded: bool
) -> None:
    """The device's exception comes at the right next(); nothing hangs, everything is freed."""
    if step == "staging" and not threaded:
        pytest.skip("one slot is enough when there is no thread ahead")
    device = make_device(2, {step: at})
    feed = StagedFeed(device, source.spec, source.read, depth=3, threaded=threaded)
    chunks = chunks_of(source, [[4, 4]] * 5)
    for chunk in chunks:
        feed.submit(chunk)
    trainer = Trainer(device)
    for rows in [rows for chunk in chunks for rows in chunk][:whole]:
        trainer.use(rows, *feed.next())
    with pytest.raises(SimulatedError, match=step):
        feed.next()
    feed.close()
    gc.collect()
    assert trainer.torn(source) == 0
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


def test_an_error_is_in_no_cycle(make_device: MakeDevice, source: Source) -> None:
    """An exception and all that its traceback holds go when the caller drops it."""
    feed = StagedFeed(make_device(), source.spec, fails_at(source, 5))
    feed.submit([np.arange(3), np.arange(3, 6)])
    feed.next()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyError) as raised:
            feed.next()
        gone = weakref.ref(raised.value)
        del raised
        assert gone() is None
    finally:
        gc.enable()
    feed.close()


def test_pinning_may_fail(make_device: MakeDevice, source: Source) -> None:
    """Where memory cannot be pinned, the batches are the same, after one warning."""
    device = make_device(4, {"pin": 2})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert growing(source, device, depth=3) == 0
    assert [str(w.category.__name__) for w in said] == ["GpupipeWarning"]
    assert "could not be pinned" in str(said[0].message)
    assert device.calls["pin"] == 2


def test_capture_is_refused(make_device: MakeDevice, source: Source) -> None:
    """next() inside a CUDA graph capture raises, loses nothing, and works afterwards."""
    device = make_device()
    feed = StagedFeed(device, source.spec, source.read)
    feed.submit([np.arange(4)])
    device.capturing = True
    with pytest.raises(DeviceError, match="before the capture"):
        feed.next()
    device.capturing = False
    trainer = Trainer(device)
    trainer.use(np.arange(4), *feed.next())
    feed.close()
    assert trainer.torn(source) == 0


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [np.arange(0)],
        [np.arange(4), np.arange(0)],
        [np.zeros((2, 2), np.int64)],
        [np.zeros(3)],
        [np.zeros(3, bool)],
    ],
)
def test_bad_chunks_are_refused(source: Source, batches: list[NDArray[Any]]) -> None:
    """A chunk without batches, or a batch that is no vector of indices, is an error at once."""
    feed = StagedFeed(CpuDevice(), source.spec, source.read)
    with pytest.raises(InputError, match="integer vectors, none of them empty, got"):
        feed.submit(batches)
    with pytest.raises(InputError, match="no batch pending"):
        feed.next()
    feed.close()
    feed.close()
    with pytest.raises(GpupipeError, match="closed"):
        feed.submit([np.arange(3)])
    with pytest.raises(GpupipeError, match="closed"):
        feed.next()


def test_batches_are_no_inference_tensors(source: Source) -> None:
    """A feed used first under inference_mode trains afterwards."""
    feed = StagedFeed(CpuDevice(), source.spec, source.read, threaded=False, depth=1)
    for _ in range(2):
        feed.submit([np.arange(4), np.arange(4)])
    with torch.inference_mode():
        feed.next()
    weight = torch.ones(1, requires_grad=True)
    for _ in range(3):
        images, columns = feed.next()
        (images * weight).sum().backward()
        columns[0].add_(1)
    feed.close()


def producers() -> int:
    """Count the producer threads that live."""
    return sum(thread.name == "gpupipe-producer" for thread in threading.enumerate())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def exhausted(feed: StagedFeed, batches: list[Rows]) -> None:
    for _ in batches:
        feed.next()
    feed.close()


def broken_off(feed: StagedFeed, batches: list[Rows]) -> None:
    for _ in batches[:3]:
        feed.next()
    feed.close()


def forgotten(feed: StagedFeed, batches: list[Rows]) -> None:
    for _ in batches[:3]:
        feed.next()


def excepted(feed: StagedFeed, batches: list[Rows]) -> None:
    with pytest.raises(KeyError):
        exhausted(feed, batches)
    feed.close()


def interrupted(feed: StagedFeed, batches: list[Rows]) -> None:
    main = threading.get_ident()
    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may come at any of these
        timer.start()
        for _ in batches:
            feed.next()
            time.sleep(0.001)
        time.sleep(5.0)
    timer.join()
    feed.close()


def slow(source: Source) -> transfer.Read:
    """Return a read that is waited for."""

    def read(rows: Rows, views: list[NDArray[Any]]) -> None:
        source.read(rows, views)
        time.sleep(0.02)

    return read


@pytest.mark.parametrize("end", [exhausted, broken_off, forgotten, excepted, interrupted])
def test_resources_return_to_their_level(
    make_device: MakeDevice, source: Source, end: Callable[[StagedFeed, list[Rows]], None]
) -> None:
    """Threads, files and memory, of host and device, do not grow over many epochs."""
    device = make_device(6)
    read = {excepted: fails_at(source, 20), interrupted: slow(source)}.get(end, source.read)
    batches = [np.arange(start, start + 3) for start in range(0, 36, 3)]
    levels = []
    for _ in range(8):
        feed = StagedFeed(device, source.spec, read)
        for rows in batches:
            feed.submit([rows, rows[:2]])
        end(feed, batches)
        del feed
        device.synchronize()
        memory = [device.memory.live_bytes(host=host) for host in (True, False)]
        levels.append((producers(), open_files(), *memory))
    assert levels == [(0, levels[0][1], 0, 0)] * 8


def test_host_memory_returns() -> None:
    """On the CPU, epochs that are broken off leave the process no larger."""
    source = Source(64, h=160, w=160)
    levels = []
    for _ in range(12):
        feed = StagedFeed(CpuDevice(), source.spec, source.read, depth=3)
        for _ in range(4):
            feed.submit([np.arange(64)])
        broken_off(feed, [np.arange(64)] * 3)
        assert feed.nbytes == 0
        del feed
        levels.append(resident_bytes())
    assert levels[-1] - levels[3] < 3 * source.raw.nbytes  # one epoch's slots would stay 8 times


def test_dropping_the_feed_ends_its_thread(source: Source) -> None:
    """Neither the thread nor a batch holds the feed: without close, the last reference ends it."""
    feed = StagedFeed(CpuDevice(), source.spec, source.read)
    feed.submit([np.arange(3)] * 4)
    batch = feed.next()
    thread = feed._producer.thread
    gone = weakref.ref(feed)
    gc.disable()
    try:
        del feed
        assert gone() is None
    finally:
        gc.enable()
    assert thread is not None
    assert not thread.is_alive()
    assert len(batch[0]) == 3


def test_the_collector_may_close_on_the_producers_own_thread(
    make_device: MakeDevice, source: Source
) -> None:
    """Where the last reference goes on the thread itself, it does not wait for itself."""
    device = make_device()
    held: list[Any] = []
    reading = threading.Event()

    def read(rows: Rows, views: list[NDArray[Any]]) -> None:
        source.read(rows, views)
        reading.set()
        while not held:
            time.sleep(0.001)
        held.clear()  # the last reference

    feed = StagedFeed(device, source.spec, read)
    thread = feed._producer.thread
    assert thread is not None
    feed.submit([np.arange(3)])
    feed.submit([np.arange(3)])
    reading.wait(5.0)
    held.append(feed)
    del feed
    thread.join(5.0)
    assert not thread.is_alive()
    device.synchronize()
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


@pytest.mark.parametrize("blocked_on", ["a slot", "a chunk", "a read"])
def test_close_while_the_producer_is_blocked(
    make_device: MakeDevice, source: Source, blocked_on: str
) -> None:
    """close() wakes the thread from any wait, from any thread, as often as one likes."""
    device = make_device()
    feed = StagedFeed(
        device, source.spec, slow(source) if blocked_on == "a read" else source.read, depth=1
    )
    for _ in range({"a chunk": 0}.get(blocked_on, 4)):
        feed.submit([np.arange(5)])
    time.sleep(0.01)
    closers = [threading.Thread(target=feed.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(5.0)
        assert not closer.is_alive()
    assert producers() == 0
    assert device.memory.live_bytes(host=True) == 0


def test_close_wakes_a_consumer_that_waits(source: Source) -> None:
    """next() in one thread ends with an error when another closes the feed."""
    release = threading.Event()

    def read(_rows: Rows, _views: list[NDArray[Any]]) -> None:
        release.wait(5.0)

    feed = StagedFeed(CpuDevice(), source.spec, read)
    feed.submit([np.arange(3)])
    threading.Timer(0.05, feed.close).start()
    threading.Timer(0.2, release.set).start()
    with pytest.raises(GpupipeError, match="closed while"):
        feed.next()
    release.set()
    feed.close()
    assert producers() == 0


def test_a_read_that_does_not_return(
    make_device: MakeDevice, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() gives up after a while, with a warning; the memory goes when the read returns."""
    monkeypatch.setattr(transfer, "CLOSE_TIMEOUT_S", 0.05)
    device, release = make_device(), threading.Event()

    def read(_rows: Rows, _views: list[NDArray[Any]]) -> None:
        release.wait(30.0)

    feed = StagedFeed(device, source.spec, read)
    feed.submit([np.arange(3)])
    time.sleep(0.01)
    with pytest.warns(GpupipeWarning, match="has not returned"):
        feed.close()
    assert device.memory.live_bytes(host=True) > 0
    release.set()
    thread = feed._producer.thread
    assert thread is not None
    thread.join(5.0)
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


def test_an_interrupt_leaves_an_error_and_no_gap(source: Source) -> None:
    """After Ctrl-C inside next() the feed says so instead of skipping a batch in silence."""
    feed = StagedFeed(CpuDevice(), source.spec, slow(source))
    feed.submit([np.arange(3)])
    timer = threading.Timer(0.005, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may come late
        timer.start()
        feed.next()
        time.sleep(5.0)
    if feed.pending:
        with pytest.raises(GpupipeError, match="an interrupt inside next"):
            feed.next()
    feed.close()
    assert producers() == 0


def test_signal_handler_may_close(make_device: MakeDevice, source: Source) -> None:
    """close() inside next(), between the launch and its event, neither hangs nor frees early."""
    device = make_device(7)
    normalize = device.normalize

    class Closing(StagedFeed):
        def _enqueue(self, ready: transfer._Ready, stream: Any) -> list[transfer.Batch]:
            batches = super()._enqueue(ready, stream)
            self.close()
            return batches

    feed = Closing(device, source.spec, source.read)
    feed.submit([np.arange(4)] * 2)
    trainer = Trainer(device)
    trainer.use(np.arange(4), *feed.next())
    with pytest.raises(GpupipeError, match="closed"):
        feed.next()
    assert normalize is not None
    assert trainer.torn(source) == 0
    assert producers() == 0


SCRIPT = textwrap.dedent("""
    import os, sys
    import numpy as np, torch
    from gpupipe.devices import CpuDevice
    from gpupipe.errors import DeviceError
    from gpupipe.staging import FeedSpec
    from gpupipe.tables import Lookup
    from gpupipe.transfer import StagedFeed

    def read(rows, views):
        views[0][...] = 3

    spec = FeedSpec((5, 7), "NHW", Lookup(torch.rand(1, 256)), (1, 5, 7))
    feed = StagedFeed(CpuDevice(), spec, read, depth=2)
    for _ in range(6):
        feed.submit([np.arange(4)])
    feed.next()
    child = os.fork() if sys.argv[1] == "fork" else None
    if child == 0:
        try:
            feed.next()
        except DeviceError as error:
            assert "before fork" in str(error), error
        else:
            sys.exit(3)
        feed.close()
        sys.exit(0)  # runs the exit handlers, too
    if child is not None:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        feed.next()
    print("end", flush=True)
""")


@pytest.mark.parametrize("how", ["exit", "fork"])
def test_interpreter_exit_with_a_live_feed(how: str, tmp_path: Path) -> None:
    """A feed that nobody closed, and a child that inherited one, end quietly and at once."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    root = Path(transfer.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script), how],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_both_devices_keep_the_protocol(make_device: MakeDevice) -> None:
    """The CPU and the simulated device are ``Device`` to the type checker."""
    devices: list[Device] = [CpuDevice(), make_device()]
    assert [device.is_async for device in devices] == [False, True]
