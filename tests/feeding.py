"""A dataset, a consumer and an epoch for the tests of the stream protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as reference

from gpupipe.staging import Column, FeedSpec
from gpupipe.tables import Layout, Lookup
from gpupipe.transfer import StagedFeed
from tests.simulated import SimulatedDevice, SimulatedStream

if TYPE_CHECKING:
    from gpupipe import staging

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = (Column((), torch.int64), Column((3,), torch.float32), Column((), torch.bool))
Rows = NDArray[np.int64]
MakeDevice = Callable[..., SimulatedDevice]


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Return torchvision's result for uint8 [N, C, H, W]."""
    scaled = reference.to_dtype(images, torch.float32, scale=True)
    done: torch.Tensor = reference.normalize(
        scaled, MEAN[: images.shape[1]], STD[: images.shape[1]]
    )
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
        fields: tuple[NDArray[Any], ...] = (self.raw, *self.columns)
        for view, values in zip(views, fields, strict=True):
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


def simulated_devices() -> Iterator[MakeDevice]:
    """Give out simulated devices; no operation on them may raise."""
    devices: list[SimulatedDevice] = []

    def make(seed: int = 0, fail: dict[str, int] | None = None) -> SimulatedDevice:
        devices.append(SimulatedDevice(seed, fail))
        return devices[-1]

    yield make
    assert [error for device in devices for error in device.shut()] == []


def small_source() -> Source:
    """Give out a small dataset."""
    return Source()


class BadSampleError(KeyError):
    """What a user's dataset raises."""


def fails_at(source: Source, bad: int) -> staging.Read:
    """Return a read that raises where ``bad`` is among the rows."""

    def read(rows: Rows, views: list[NDArray[Any]]) -> None:
        source.read(rows, views)
        if bad in rows:
            raise BadSampleError(bad)

    return read
