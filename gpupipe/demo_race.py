"""The demo's contenders for one job: shuffled, normalised batches of Fashion-MNIST on a device.

Every contender is asked for the same order, so that their batches can be compared before any of
them is timed. They take turns, and the median of the turns counts.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchDataLoader

from gpupipe.loader import DataLoader
from gpupipe.operators.pointwise import same_bits

BATCH = 256
CHECKED = 4
"""Batches of each contender that are compared with torchvision's."""

SHORTEST = 0.1
"""Seconds that a turn of whole epochs lasts at least."""

Batches = Iterator[Any]
"""Yields (images, labels), or a list of both."""


@dataclass
class Contender:
    """One way of making the batches.

    Attributes:
        name: for the table.
        begin: takes a seed and begins an epoch.
        warm: batches that are taken before the clock starts; None: whole epochs are timed.
        timed: batches that are timed; None: to the end of the epoch.
        threads: of torch; None: as they are.
        same: whether its first batches have torchvision's bits; None: not looked at yet.
        rates: images/s of each turn.
    """

    name: str
    begin: Callable[[int], Batches]
    warm: int = 0
    timed: int | None = None
    threads: int | None = None
    same: bool | None = None
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images/s, the median of all turns."""
        return statistics.median(self.rates)


def contenders(dataset: Any, device: torch.device, *, quick: bool) -> list[Contender]:
    """Return the tutorial's loader with 0 and 2 workers, plain torch ops, and gpupipe.

    Args:
        dataset: of torchvision's MNIST family, with ``Compose([ToTensor(), Normalize(...)])``.
        device: where batches are wanted.
        quick: time fewer batches of the slow ones.
    """
    few = 3 if quick else 12
    spare = (len(dataset) - 1) // BATCH  # of a tiny dataset one batch is left to be timed
    normalize = dataset.transform.transforms[-1]

    def tutorial(workers: int) -> Callable[[int], Batches]:
        def begin(seed: int) -> Batches:
            loader = TorchDataLoader(
                dataset, BATCH, shuffle=True, num_workers=workers, generator=_generator(seed)
            )
            return ((x.to(device), y.to(device)) for x, y in loader)

        return begin

    def plain(seed: int) -> Batches:
        return _plain(dataset.data, dataset.targets, normalize.mean, normalize.std, seed, device)

    generator = torch.Generator()
    loader = DataLoader(dataset, BATCH, shuffle=True, generator=generator, device=device)

    def ours(seed: int) -> Batches:
        generator.manual_seed(seed)
        return iter(loader)

    # What workers have made before the clock starts must not count: their queue is 4 batches long.
    return [
        Contender("torchvision, 0 workers", tutorial(0), warm=min(1, spare), timed=few),
        Contender("torchvision, 2 workers", tutorial(2), warm=min(4, spare), timed=2 * few),
        Contender("plain torch ops", plain),
        Contender("plain torch ops, 1 thread", plain, threads=1),
        Contender("gpupipe", ours),
    ]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _plain(
    images: torch.Tensor,
    labels: torch.Tensor,
    mean: Any,
    std: Any,
    seed: int,
    device: torch.device,
) -> Batches:
    """The best loop in plain torch: gather, then in-place ops on a buffer that is used again."""
    generator = _generator(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # a DataLoader's base_seed
    order = torch.randperm(len(images), generator=generator)
    means, stds = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    raw = torch.empty((BATCH, *images.shape[1:]), dtype=torch.uint8)
    raw = raw.pin_memory() if device.type == "cuda" else raw
    buffer = torch.empty((BATCH, 1, *images.shape[1:]), device=device)
    for chosen in torch.split(order, BATCH):
        out = buffer[: len(chosen)]
        gathered = raw[: len(chosen)]
        torch.index_select(images, 0, chosen, out=gathered)
        out[:, 0].copy_(gathered)
        out.div_(255).sub_(means).div_(stds)
        yield out, labels.index_select(0, chosen).to(device)


def check(racers: list[Contender], seed: int = 0) -> None:
    """Compare the first batches of each with those of the first, which is torchvision's."""
    expected: list[tuple[torch.Tensor, torch.Tensor]] = []
    for racer in racers:
        with _running(racer, seed) as batches:
            for number, (images, labels) in enumerate(islice(batches, CHECKED)):
                made = images.cpu().clone(), labels.cpu().clone()
                if racer is racers[0]:
                    expected.append(made)
                pairs = zip(made, expected[number], strict=True)
                racer.same = racer.same is not False and all(same_bits(a, b) for a, b in pairs)


def turn(racer: Contender, seed: int, device: torch.device) -> None:
    """Time one turn: ``timed`` batches, or whole epochs from ``iter()`` on."""
    images, seconds = 0, 0.0
    while not images or (racer.timed is None and seconds < SHORTEST):
        start = time.perf_counter()
        with _running(racer, seed) as batches:
            if racer.timed is not None:
                for _ in islice(batches, racer.warm):
                    pass
                _synchronize(device)
                start = time.perf_counter()
            for batch, _ in islice(batches, racer.timed):
                images += len(batch)
            _synchronize(device)
            seconds += time.perf_counter() - start
    racer.rates.append(images / seconds)


@contextmanager
def _running(racer: Contender, seed: int) -> Iterator[Batches]:
    """Begin an epoch, and end it however far it came."""
    with warnings.catch_warnings(), torch_threads(racer.threads):
        warnings.simplefilter("ignore")  # of few CPUs and of forking beside threads
        batches = racer.begin(seed)
        try:
            yield batches
        finally:
            close = getattr(batches, "close", None)  # a generator's: its workers end
            if close is not None:
                close()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads meanwhile; None: with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
