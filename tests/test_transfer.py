"""The stream protocol on a simulated asynchronous GPU, and on the CPU.

A run on the simulated device shows that the order of events is right under its delays. It says
nothing about a real GPU.
"""

from __future__ import annotations

import warnings
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpupipe import staging, transfer
from gpupipe.devices import CpuDevice
from gpupipe.staging import FeedSpec, Slot
from gpupipe.transfer import Producer, StagedFeed
from tests.feeding import (
    MakeDevice,
    Source,
    Trainer,
    chunks_of,
    simulated_devices,
    small_source,
    train,
)
from tests.simulated import SimulatedDevice, SimulatedStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpupipe.tables import Layout

make_device = pytest.fixture(simulated_devices)
source = pytest.fixture(small_source)

SEEDS = range(8)
MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 32)]

EVEN = [[6] * 3] * 8
GROWING = [[4], [9], [9], [17], [17], [33], [33], [60], [60], [90], [90]]


def even(source: Source, device: SimulatedDevice, **options: Any) -> int:
    """Chunks of three equal batches."""
    return train(device, source, chunks_of(source, EVEN), **options)


def growing(source: Source, device: SimulatedDevice, **options: Any) -> int:
    """Chunks that grow: the slots do, too."""
    return train(device, source, chunks_of(source, GROWING), **options)


def two_streams(source: Source, device: SimulatedDevice, **options: Any) -> int:
    """The consumer changes its stream inside every chunk."""
    streams = [device.default_stream, device.new_stream()]
    return train(device, source, chunks_of(source, EVEN), streams=streams, **options)


@pytest.mark.parametrize("epoch", [even, growing, two_streams])
@pytest.mark.parametrize("seed", [*SEEDS, *MORE_SEEDS])
def test_no_batch_is_torn(
    make_device: MakeDevice, source: Source, seed: int, epoch: Callable[..., int]
) -> None:
    """Whatever the delays, each batch is torchvision's when the consumer's stream reads it."""
    assert epoch(source, make_device(seed)) == 0
    assert epoch(source, make_device(seed), depth=1) == 0
    assert epoch(source, make_device(seed), threaded=False) == 0


class LaunchingQueue(SimpleQueue[Any]):
    """The planted race: the thread launches, on the copy stream, into the consumer's memory."""

    def __init__(self, producer: LaunchingProducer) -> None:
        super().__init__()
        self.producer = producer

    def put(self, item: Any, *_: Any) -> None:
        """Make the outputs of a filled slot before handing it over."""
        if isinstance(item, transfer._Ready):
            self.producer.launch(item)
        super().put(item)


class LaunchingProducer(Producer):
    """Launches as soon as the copy is enqueued, in stream order after it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ready = LaunchingQueue(self)
        self.made: deque[tuple[list[torch.Tensor], Any]] = deque()

    def launch(self, ready: transfer._Ready) -> None:
        """Allocate on the default stream, which the consumer uses, and launch on another."""
        device, copy_stream, spec = ready.slot._device, self.ring.copy_stream, self.spec
        chunk = ready.chunk
        assert isinstance(spec, FeedSpec)
        assert isinstance(chunk, staging.PointwiseChunk)
        assert isinstance(device, SimulatedDevice)
        assert isinstance(copy_stream, SimulatedStream)
        outputs = [
            device.empty((size, *spec.output_shape), spec.lookup.dtype, spec.memory_format)
            for size in chunk.sizes
        ]
        with device.stream(copy_stream):
            images = spec.views(ready.slot.buffers()[1], chunk.count)[0]
            device.normalize(images, None, outputs, spec.lookup, layout=spec.layout)
        made = device.new_event()
        made.record(copy_stream)
        self.made.append((outputs, made))


class LaunchedElsewhere(StagedFeed):
    """Takes the outputs of ``LaunchingProducer``; the stream waits for them, it looks right."""

    producer_type: type[Producer] = LaunchingProducer

    def _enqueue(self, ready: transfer._Ready, stream: Any) -> list[staging.Batch]:
        assert isinstance(self._producer, LaunchingProducer)
        outputs, made = self._producer.made.popleft()
        stream.wait_event(made)
        batches = super()._enqueue(ready, stream)
        return [(output, columns) for output, (_, columns) in zip(outputs, batches, strict=True)]


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


def test_record_stream_is_needed(make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Batches of one size, the last smaller: one transfer, one launch, storages of their own."""
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


def test_pinning_may_fail(make_device: MakeDevice, source: Source) -> None:
    """Where memory cannot be pinned, the batches are the same, after one warning."""
    device = make_device(4, {"pin": 2})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert growing(source, device, depth=3) == 0
    assert [str(w.category.__name__) for w in said] == ["GpupipeWarning"]
    assert "could not be pinned" in str(said[0].message)
    assert device.calls["pin"] == 2
