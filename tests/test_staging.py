"""What lies in a slot, how the ring grows, and how it ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpupipe.errors import InputError
from gpupipe.staging import ALIGNMENT, Column, FeedSpec, Ring, SlotState
from gpupipe.tables import Lookup
from tests.feeding import MakeDevice, simulated_devices
from tests.simulated import SimulatedError, SimulatedStream

make_device = pytest.fixture(simulated_devices)

DTYPES = (torch.uint8, torch.bool, torch.int16, torch.float16, torch.float32, torch.int64)
LOOKUP = Lookup(torch.zeros(3, 256))


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    count=st.integers(1, 20),
    columns=st.lists(
        st.builds(
            Column, st.lists(st.integers(0, 3), max_size=2).map(tuple), st.sampled_from(DTYPES)
        ),
        max_size=4,
    ),
)
def test_fields_are_aligned_and_apart(h: int, w: int, count: int, columns: list[Column]) -> None:
    """Each field begins on a cache line and what is written to one is not seen in another."""
    spec = FeedSpec((h, w, 3), "NHWC", LOOKUP, (3, h, w), columns=tuple(columns))
    *starts, end = spec.offsets(count)
    assert all(start % ALIGNMENT == 0 for start in starts)
    buffer = torch.zeros(end, dtype=torch.uint8)
    host = spec.host_views(buffer, count)
    for number, array in enumerate(host):
        assert array.flags.c_contiguous
        array[...] = np.asarray(number + 1).astype(array.dtype)
    for number, (view, field) in enumerate(
        zip(spec.views(buffer, count), spec.fields, strict=True)
    ):
        assert view.dtype == field.dtype
        assert view.shape == (count, *field.shape)
        assert torch.equal(view, torch.full_like(view, number + 1))


def test_what_cannot_be_laid_out_is_refused() -> None:
    """A dtype that NumPy lacks, and a shape that is not the layout's, are errors that say so."""
    with pytest.raises(InputError, match=r"one that NumPy has, got torch\.bfloat16; convert"):
        Column((), torch.bfloat16)
    with pytest.raises(InputError, match=r"\[H, W, C\].*got \(28, 28\)"):
        FeedSpec((28, 28), "NHWC", LOOKUP, (3, 28, 28))
    with pytest.raises(InputError, match=r"positive sizes.*got \(0, 28\)"):
        FeedSpec((0, 28), "NHW", LOOKUP, (1, 0, 28))


def test_slots_grow_rarely(make_device: MakeDevice) -> None:
    """A slot grows when a larger chunk comes, to the largest so far, and never shrinks."""
    device = make_device()
    ring = Ring(device, 2)
    for slot, nbytes in zip(ring.slots * 4, (100, 90, 300, 40, 90, 299, 300, 1), strict=True):
        ring.reserve(slot, nbytes)
    assert [slot.nbytes for slot in ring.slots] == [300, 300]
    assert (device.calls["host_buffer"], device.calls["staging"]) == (4, 4)
    assert ring.nbytes == 600
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 2 * 512
    ring.close()
    ring.close()
    assert ring.nbytes == 0
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


def test_a_ring_has_a_slot(make_device: MakeDevice) -> None:
    """A depth below 1 is an error."""
    with pytest.raises(InputError, match="depth must be at least 1, got 0"):
        Ring(make_device(), 0)


def test_close_waits_for_a_launch_without_an_event(make_device: MakeDevice) -> None:
    """Where ``consumed`` was not recorded, close() waits for the consumer's stream itself."""
    device, gate = make_device(), threading.Event()
    ring = Ring(device, 1)
    slot = ring.slots[0]
    ring.reserve(slot, 10)
    slot.user, slot.state = device.default_stream, SlotState.LAUNCHING
    done: list[bool] = []

    def wait() -> None:
        gate.wait(5.0)

    device.default_stream.enqueue(wait)
    device.default_stream.enqueue(lambda: done.append(slot.staging is not None))
    threading.Timer(0.05, gate.set).start()
    ring.close()
    assert done == [True]
    assert slot.state is SlotState.FREE


def test_close_frees_although_the_device_is_lost(
    make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the device while closing is raised once the memory has been let go."""
    device = make_device()
    ring = Ring(device, 2)
    ring.reserve(ring.slots[0], 10)

    def lost(_: SimulatedStream) -> None:
        raise SimulatedError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedStream, "synchronize", lost)
        with pytest.raises(SimulatedError, match="lost"):
            ring.close()
    ring.close()
    assert device.memory.live_bytes(host=True) == device.memory.live_bytes(host=False) == 0


def test_a_freed_slot_says_so(make_device: MakeDevice) -> None:
    """Buffers that are not there are an error, never None."""
    ring = Ring(make_device(), 1)
    with pytest.raises(InputError, match="this feed is closed"):
        ring.slots[0].buffers()
    ring.close()
