"""What is raised, where and how often: failing reads, failing steps, wrong calls."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpupipe.devices import CpuDevice
from gpupipe.errors import DeviceError, GpupipeError, InputError
from gpupipe.transfer import StagedFeed
from tests.feeding import (
    BadSampleError,
    MakeDevice,
    Rows,
    Source,
    Trainer,
    chunks_of,
    fails_at,
    simulated_devices,
    small_source,
)
from tests.simulated import SimulatedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

make_device = pytest.fixture(simulated_devices)
source = pytest.fixture(small_source)


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
    with pytest.raises(BadSampleError) as raised:
        feed.next()
    assert raised.value.args == (22,)
    assert raised.value.__notes__ == ["gpupipe: while reading 3 sample(s) with indices 21, 22, 23"]
    with pytest.raises(GpupipeError, match="failed before, with BadSampleError"):
        feed.next()
    feed.close()
    assert trainer.torn(source) == 0
    del raised  # its traceback holds the read's frame, and that the views of the slot
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


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
    make_device: MakeDevice, source: Source, *, step: str, at: int, whole: int, threaded: bool
) -> None:
    """The device's exception comes at the right next(); nothing hangs, everything is freed."""
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
        with pytest.raises(BadSampleError) as raised:
            feed.next()
        gone = weakref.ref(raised.value)
        del raised
        assert gone() is None
    finally:
        gc.enable()
    feed.close()


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
        torch.autograd.backward((images * weight).sum())
        columns[0].add_(1)
    feed.close()
