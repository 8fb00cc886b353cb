"""The contenders of ``bench_loader``: the same batches, in the same order, from four loaders."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

import gpupipe
from benchmarks.harness import Contender

Batches = Iterable[Any]

CPU = torch.device("cpu")

CHECKED = 3
"""Batches of each contender that are compared before it is timed."""

IN_FLIGHT = 2
"""Batches that a consumer on a GPU lets queue up before it waits."""

ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""What a contender that rounds otherwise may differ by: the last places of values up to 4."""


@dataclass(frozen=True)
class Work:
    """What every contender delivers: shuffled batches of a dataset, normalised.

    Attributes:
        dataset: with the transform ``ToTensor, Normalize``.
        batch: size of a batch.
        dtype: of the images.
        memory_format: of the images.
        device: where batches arrive.
    """

    dataset: Any
    batch: int
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    device: torch.device = CPU


def consume(batches: Batches, *, keep: bool = False) -> tuple[int, Any]:
    """Take every batch and drop it, or keep it; return how many images there were.

    On a GPU the consumer is a training loop that runs ``IN_FLIGHT`` batches ahead of the device:
    it waits for an event behind each batch, and at the end for all of them.
    """
    count, kept = 0, []
    events: deque[torch.cuda.Event] = deque()
    for batch in batches:
        images = batch[0]
        count += len(images)
        if keep:
            kept.append(batch)
        if images.is_cuda:
            event = torch.cuda.Event()
            event.record()
            events.append(event)
            if len(events) > IN_FLIGHT:
                events.popleft().synchronize()
    for event in events:
        event.synchronize()
    return count, kept


def first(make: Callable[[], Batches], seed: int = 7) -> list[torch.Tensor]:
    """Return images and labels of the first batches of an epoch under a fixed seed."""
    torch.manual_seed(seed)
    # Copied at once: a loop may write all its batches into one buffer.
    return [
        tensor.detach().clone()
        for batch in itertools.islice(iter(make()), CHECKED)
        for tensor in batch
    ]


def reference(work: Work) -> list[torch.Tensor]:
    """Return what torchvision gives, sample by sample, in torch's order."""
    return first(lambda: _restyled(DataLoader(work.dataset, work.batch, shuffle=True), work))


def _restyled(batches: Batches, work: Work) -> Iterator[Any]:
    """Give a loader's batches the dtype, layout and place that were asked for."""
    for images, labels in batches:
        yield (
            images.to(work.device).to(work.dtype, memory_format=work.memory_format),
            labels.to(work.device),
        )


def torchvision(work: Work, limited: Any, workers: int) -> Contender:
    """Return the tutorial's loader over ``limited``, a short form of the dataset."""
    options: dict[str, Any] = {"persistent_workers": True} if workers else {}
    loader = DataLoader(
        limited, work.batch, shuffle=True, num_workers=workers, **options,
        pin_memory=work.device.type == "cuda",
    )  # fmt: skip
    short = Work(limited, work.batch, work.dtype, work.memory_format, work.device)

    def answer() -> list[torch.Tensor]:
        got = first(lambda: _restyled(loader, work))
        wanted = reference(short)
        # The order is that of fewer images: where these are right, so is the loader.
        same = len(got) == len(wanted) and all(map(torch.equal, got, wanted))
        return reference(work) if same else got

    name = f"torchvision, {workers} workers"
    note = f"measured on {len(limited):,} images"
    return Contender(name, lambda: consume(_restyled(loader, work)), answer, note=note)


def plain_torch(work: Work, form: str) -> Contender:
    """Return the best loop that one writes with torch alone.

    The raw images are gathered into one buffer and converted in place in another, which is given
    out again and again: no allocation. On a GPU the gather goes to pinned memory.

    Args:
        work: what to deliver.
        form: "widen first" converts while it transposes; "transpose last" computes in the order
            that the raw images have.
    """
    data = torch.as_tensor(work.dataset.data)
    targets = torch.as_tensor(work.dataset.targets)
    rgb = data.ndim == 4  # noqa: PLR2004 # [N, H, W, C]
    constants = work.dataset.transform.transforms[1]
    cuda = work.device.type == "cuda"
    mean, std = (
        torch.tensor(values, device=work.device) for values in (constants.mean, constants.std)
    )
    planes = (-1, 1, 1) if form == "widen first" or not rgb else (-1,)
    mean, std = mean.view(planes), std.view(planes)
    raw = torch.empty((work.batch, *data.shape[1:]), dtype=torch.uint8, pin_memory=cuda)
    shape = (work.batch, *((3, *data.shape[1:3]) if rgb else (1, *data.shape[1:])))
    options: dict[str, Any] = {"device": work.device}
    result = torch.empty(shape, dtype=work.dtype, memory_format=work.memory_format, **options)
    wide = torch.empty((work.batch, *data.shape[1:]), **options)
    whole = result if work.dtype == torch.float32 else torch.empty(shape, **options)
    copied = torch.cuda.Event() if cuda else None

    def convert(pixels: torch.Tensor) -> torch.Tensor:
        n = len(pixels)
        if form == "transpose last" and rgb:
            x = wide[:n].copy_(pixels).div_(255).sub_(mean).div_(std)
            return result[:n].copy_(x.permute(0, 3, 1, 2))
        view = pixels.permute(0, 3, 1, 2) if rgb else pixels.unsqueeze(1)
        x = whole[:n].copy_(view).div_(255).sub_(mean).div_(std)
        return x if whole is result else result[:n].copy_(x)

    def epoch() -> Iterator[Any]:
        for indices in order(len(data)).split(work.batch):
            if copied is not None:
                copied.synchronize()  # raw is being copied
            pixels = torch.index_select(data, 0, indices, out=raw[: len(indices)])
            if copied is not None:
                pixels = pixels.to(work.device, non_blocking=True)
                copied.record()
            labels = targets[indices]
            yield convert(pixels), labels.to(work.device) if cuda else labels

    return Contender(
        f"plain torch, {form}",
        lambda: consume(epoch()),
        lambda: first(epoch),
        # CUDA's division by a number multiplies by the reciprocal.
        tolerance=ROUNDING[work.dtype] if cuda else 0.0,
        note="one output buffer for all batches",
    )


def order(count: int) -> torch.Tensor:
    """Draw the order as torch's loader does: the base seed, then the sampler's own seed."""
    torch.empty((), dtype=torch.int64).random_()
    generator = torch.Generator()
    generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return torch.randperm(count, generator=generator)


def ours(work: Work, *, keep: bool = False, cache: Any = None) -> Contender:
    """Return gpupipe's loader; ``keep``: its consumer keeps every batch of the epoch."""

    def make() -> Any:
        return gpupipe.DataLoader(
            work.dataset, work.batch, shuffle=True, device=work.device, dtype=work.dtype,
            memory_format=work.memory_format, cache=cache,
        )  # fmt: skip

    current = [make()]

    def fresh() -> None:
        """Take a loader that has no memory to use again, and let it prove its kernel."""
        current[0] = make()
        next(iter(current[0]))

    name = "gpupipe, every batch kept" if keep else "gpupipe"
    note = (
        "fresh outputs, memory new to the process"
        if keep
        else "fresh outputs, dropped ones recycled"
    )
    if work.device.type != "cpu":
        note = "fresh outputs" + (", dataset on the device" if cache else "")
    return Contender(
        name,
        lambda: consume(current[0], keep=keep),
        lambda: first(lambda: current[0]),
        prepare=fresh if keep else lambda: None,
        note=note,
    )
