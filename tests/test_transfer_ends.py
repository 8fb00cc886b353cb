"""How a feed ends: close() from anywhere, Ctrl-C, interpreter exit, and what is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gpupipe import staging, transfer
from gpupipe.device import Device
from gpupipe.devices import CpuDevice
from gpupipe.errors import GpupipeError, GpupipeWarning
from gpupipe.transfer import StagedFeed
from tests.feeding import (
    BadSampleError,
    MakeDevice,
    Rows,
    Source,
    Trainer,
    fails_at,
    simulated_devices,
    small_source,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

make_device = pytest.fixture(simulated_devices)
source = pytest.fixture(small_source)


def producers() -> int:
    """Count the producer threads that live."""
    return sum(thread.name == "gpupipe-producer" for thread in threading.enumerate())


def open_files() -> int:
    """Count this process's file descriptors."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident_bytes() -> int:
    """Return the memory that this process has in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def exhausted(feed: StagedFeed, batches: list[Rows]) -> None:
    """All of it."""
    for _ in batches:
        feed.next()
    feed.close()


def broken_off(feed: StagedFeed, batches: list[Rows]) -> None:
    """A break."""
    for _ in batches[:3]:
        feed.next()
    feed.close()


def forgotten(feed: StagedFeed, batches: list[Rows]) -> None:
    """A break without close()."""
    for _ in batches[:3]:
        feed.next()


def excepted(feed: StagedFeed, batches: list[Rows]) -> None:
    """A sample that cannot be read."""
    with pytest.raises(BadSampleError):
        exhausted(feed, batches)
    feed.close()


def interrupted(feed: StagedFeed, batches: list[Rows]) -> None:
    """Ctrl-C."""
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


def slow(source: Source) -> staging.Read:
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
    reads = {"excepted": fails_at(source, 7), "interrupted": slow(source)}
    read = reads.get(end.__name__, source.read)
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
    for _ in range(16):
        feed = StagedFeed(CpuDevice(), source.spec, source.read, depth=3)
        for _ in range(4):
            feed.submit([np.arange(64)])
        broken_off(feed, [np.arange(64)] * 3)
        assert feed.nbytes == 0
        del feed
        levels.append(resident_bytes())
    # An epoch has three slots and twelve slots' worth of outputs, of which malloc may keep some;
    # slots that were lost would add up to 36 since the fourth epoch.
    assert levels[-1] - levels[3] < 15 * source.raw.nbytes


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

    class Closing(StagedFeed):
        def _enqueue(self, ready: transfer._Ready, stream: Any) -> list[staging.Batch]:
            batches = super()._enqueue(ready, stream)
            self.close()
            return batches

    feed = Closing(device, source.spec, source.read)
    feed.submit([np.arange(4)] * 2)
    trainer = Trainer(device)
    trainer.use(np.arange(4), *feed.next())
    with pytest.raises(GpupipeError, match="closed"):
        feed.next()
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
