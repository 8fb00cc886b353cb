"""``resident``: the kernel reads raw images where they lie; several batches share one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset
from torchvision import transforms as T  # noqa: N812 # torchvision's own habit

from gpupipe import ArrayDataset, cpu_ops
from gpupipe.devices import CpuDevice
from gpupipe.plan import cut, specify
from gpupipe.resident import DeviceImages, HostImages, PointwiseFeed
from gpupipe.routes import feed_spec
from gpupipe.sources import ArraySource, resolve

TRANSFORM = T.Compose([T.ToTensor(), T.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])


def source(parts: int) -> tuple[ArraySource, list[torch.Tensor]]:
    """Return a source of several parts, and torchvision's result for each of its images."""
    rng = np.random.default_rng(parts)
    arrays = [rng.integers(0, 256, (11 + i, 5, 7, 3), np.uint8) for i in range(parts)]
    datasets = [
        ArrayDataset(array, np.arange(len(array)) + 100 * i, transform=TRANSFORM)
        for i, array in enumerate(arrays)
    ]
    found = resolve(ConcatDataset(datasets) if parts > 1 else datasets[0])
    assert isinstance(found, ArraySource)
    return found, [TRANSFORM(image) for array in arrays for image in array]


def feed(found: ArraySource, *, copied: bool) -> PointwiseFeed:
    """Return a feed over the host's arrays, or over a copy as ``cache="device"`` makes it."""
    pipeline = cut(TRANSFORM)
    kind = found.first.kind
    spec = feed_spec(
        pipeline, specify(pipeline, kind), kind, (5, 7, 3), "NHWC", torch.channels_last
    )
    device = CpuDevice()
    return PointwiseFeed(device, spec, DeviceImages(found, device) if copied else HostImages(found))


def test_batches_equal_torchvision() -> None:
    """One part or several, in place or copied: the same bits, in the order asked for."""
    for parts in (1, 3):
        for copied in (False, True):
            found, expected = source(parts)
            made = feed(found, copied=copied)
            batches = [
                np.array([3, 0]),
                np.array([10, len(found) - 1, 7]),
                np.array([1]),
                np.array([2]),
            ]
            made.submit(batches[:2])
            made.submit(batches[2:])  # smaller first: two launches
            assert made.pending == 4
            labels = np.concatenate([part.columns[0] for part in found.parts])
            for rows in batches:
                images, columns = made.next()
                assert torch.equal(images, torch.stack([expected[row] for row in rows]))
                assert columns[0].tolist() == labels[rows].tolist()
            assert made.pending == 0


def test_a_chunk_is_one_launch_with_outputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of one size are one call of the kernel; no two share memory."""
    found, _ = source(1)
    calls = []
    kernel = cpu_ops.normalize

    def counted(*args: object, **kwargs: object) -> None:
        calls.append(1)
        kernel(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_ops, "normalize", counted)
    made = feed(found, copied=False)
    made.submit([np.arange(4), np.arange(4), np.arange(3)])
    batches = [made.next()[0] for _ in range(3)]
    assert len(calls) == 1
    assert len({batch.untyped_storage().data_ptr() for batch in batches}) == 3


def test_closing_forgets_what_was_submitted() -> None:
    """After ``close`` nothing is pending, and delivered batches stay valid."""
    found, expected = source(1)
    made = feed(found, copied=False)
    made.submit([np.arange(4), np.arange(4)])
    images, _ = made.next()
    made.close()
    assert made.pending == 0
    assert torch.equal(images, torch.stack(expected[:4]))
