"""``DataLoader``: torch's, with the transform's pointwise part compiled to one kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, IterableDataset, Sampler

from gpupipe import planning, routing
from gpupipe.epochs import EpochBatches
from gpupipe.errors import InputError
from gpupipe.faults import OnError
from gpupipe.plan import Plan
from gpupipe.rendering import Stream
from gpupipe.state import Settings, State
from gpupipe.tables import check_output

T = TypeVar("T")

Auto = Literal["auto"]
Device = str | int | torch.device | None
Decode = Literal["exact", "fast"]


@dataclass
class LoaderStats:
    """What a loader has done so far.

    Attributes:
        epochs: iterations begun.
        batches: batches delivered.
        deviations: samples that went through the original transform after all.
        errors: encoded images that could not be read, and were left out.
        seconds_decoding: time that decode threads spent at work, all of them together, s.
        seconds_waited: time that the loop spent in ``next()``, s.
    """

    epochs: int = 0
    batches: int = 0
    deviations: int = 0
    errors: int = 0
    seconds_decoding: float = 0.0
    seconds_waited: float = 0.0


class DataLoader(TorchDataLoader[T]):
    """torch's ``DataLoader`` whose batches are normalised by one kernel, with the same bits.

    The order is torch's for the same generator state. What cannot be fused runs as in torch, and
    ``print(loader.plan)`` says what and why.

    Args:
        dataset: map-style or iterable; stays the user's object, ``loader.dataset``.
        batch_size: as torch's, and so are all arguments up to ``in_order``; ``pin_memory`` is
            accepted and ignored.
        shuffle: see ``batch_size``.
        sampler: see ``batch_size``.
        batch_sampler: see ``batch_size``.
        num_workers: worker processes where a dataset's own Python makes the samples; threads where
            it keeps encoded images (0: they are decoded in line); datasets that lie in an array
            need none. None: no processes, and a thread for each core that this process may use.
        collate_fn: see ``batch_size``.
        pin_memory: see ``batch_size``.
        drop_last: see ``batch_size``.
        timeout: see ``batch_size``.
        worker_init_fn: see ``batch_size``.
        multiprocessing_context: see ``batch_size``.
        generator: see ``batch_size``.
        prefetch_factor: see ``batch_size``.
        persistent_workers: see ``batch_size``.
        pin_memory_device: see ``batch_size``.
        in_order: see ``batch_size``.
        transform: ``"auto"`` takes the torchvision transform off the dataset. A transform is
            applied to the image of each sample (the sample, or its first item), on top of what the
            dataset does. None: nothing is lifted.
        seed: of what operators draw: it, the epoch and the sample's index decide alone. None: what
            torch draws when iteration begins, so ``torch.manual_seed`` rules. It never changes the
            order.
        device: where batches arrive; None: the current CUDA device if there is one, else the CPU.
            Resolved when iteration begins.
        dtype: of the images: float32, float16 or bfloat16; None: as the transform returns them.
            The result is rounded once, as ``.to(dtype)`` does.
        memory_format: of the images, ``torch.contiguous_format`` or ``torch.channels_last``.
        cache: ``"device"`` keeps the raw dataset on the GPU and gathers there; pixels that are then
            changed in place are not seen. On a CPU it changes nothing.
        decode: how encoded images are decoded: ``"exact"`` as Pillow does; ``"fast"``: JPEGs at a
            smaller scale where the crop allows, with small errors (``docs/decoding.md``).
        on_error: what becomes of an encoded image that cannot be read: ``"raise"``; ``"skip"``: its
            place is taken by another sample of the batch, drawn anew; ``"substitute"``: by another
            one of the dataset. Neither changes the size or the number of batches.
        max_errors: raise after so many bad images all the same; None: never.
        error_log: a file that gets one JSON line for each bad image.
        strict: raise ``PlanError`` where an operator is not fused, instead of a warning.
        return_indices: yield ``(batch, indices)``, indices int64 [N] on the CPU.

    Raises:
        InputError: an argument that cannot be used, an empty dataset.
        PlanError: (when iteration begins) constants that cannot work; with ``strict``, anything
            that is not fused.
        DeviceError: (when iteration begins) a device that is not there.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        transform: Callable[[Any], Any] | Auto | None = "auto",
        device: Device = None,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        cache: Literal["device"] | None = None,
        decode: Decode = "exact",
        on_error: OnError = "raise",
        max_errors: int | None = None,
        error_log: str | os.PathLike[str] | None = None,
        strict: bool = False,
        return_indices: bool = False,
    ) -> None:
        _check_arguments(dataset, transform, dtype, memory_format, cache)
        _check_choices(seed, decode, on_error, max_errors)
        self.transform = transform
        self.device = device
        self.seed = seed
        self.decode = decode
        self.on_error = on_error
        self.max_errors = max_errors
        self.error_log = error_log
        self.dtype = dtype
        self.memory_format = memory_format
        self.cache = cache
        self.strict = strict
        self.return_indices = return_indices
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers or 0,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        self._threads = num_workers
        self._epoch: int | None = None
        self._state = State()
        self._stats = LoaderStats()

    @property
    def plan(self) -> Plan:
        """What runs where, and why; ``print`` it. Uses no GPU."""
        return planning.plan(self, self._settings(), self._state)

    @property
    def stats(self) -> LoaderStats:
        """What this loader has done so far."""
        self._stats.deviations = self._state.deviations
        self._stats.errors = self._state.faults.errors
        workers = self._state.workers
        self._stats.seconds_decoding = 0.0 if workers is None else workers.busy_s
        return self._stats

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next: to the operators that draw, and to the samplers that ask.

        Args:
            epoch: counted from 0; a ``DistributedSampler`` shuffles by it.
        """
        self._epoch = epoch
        inner = getattr(self.batch_sampler, "sampler", None)
        told: list[Any] = []
        for sampler in (self.sampler, self.batch_sampler, inner):
            if any(sampler is other for other in told):
                continue
            told.append(sampler)
            tell = getattr(sampler, "set_epoch", None)
            if callable(tell):
                tell(epoch)

    def _settings(self) -> Settings:
        faults = self._state.faults
        faults.on_error, faults.max_errors = self.on_error, self.max_errors
        faults.log = None if self.error_log is None else Path(self.error_log)
        return Settings(
            self.transform,
            self.device,
            self.dtype,
            self.memory_format,
            self.cache,
            self.strict,
            self.seed,
            self._epoch,
            self._threads,
            self.decode == "fast",
        )

    def reading(self, epoch: int) -> tuple[planning.Found, Stream]:
        """Return how the dataset is read, and which random numbers an epoch takes; no device."""
        settings = replace(self._settings(), epoch=epoch)
        found = planning.find(self, settings, self._state)
        return found, routing.stream_of(self, settings, self._state)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # torch promises its own class
        """Begin an epoch."""
        batches = routing.begin(self, self._settings(), self._state)
        self._stats.epochs += 1
        return _Epoch(batches, self._stats, self._index_sampler, with_indices=self.return_indices)

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled and device state behind; it is made again where the copy iterates."""
        return {**self.__dict__, "_state": None, "_iterator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with nothing compiled."""
        self.__dict__.update(state)
        self.__dict__["_state"] = State()


class _Epoch(Iterator[Any]):
    """Counts, times and, where asked to, adds the indices."""

    def __init__(
        self, batches: EpochBatches, stats: LoaderStats, sampler: Any, *, with_indices: bool
    ) -> None:
        self._batches = batches
        self._sampler = sampler
        self._stats = stats
        self._with_indices = with_indices

    def __len__(self) -> int:
        """Return the number of batches of the epoch, as torch's iterator does."""
        return len(self._sampler)

    def __next__(self) -> Any:
        """Return the next batch."""
        start = time.perf_counter()
        batch = next(self._batches)
        self._stats.seconds_waited += time.perf_counter() - start
        self._stats.batches += 1
        if self._with_indices:
            return batch, torch.from_numpy(self._batches.indices)
        return batch


def _check_choices(seed: Any, decode: Any, on_error: Any, max_errors: Any) -> None:
    """Refuse at once what cannot work later."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"seed must be an int or None, got {seed!r}; pass a number")
    if decode not in ("exact", "fast"):
        raise InputError(f'decode must be "exact" or "fast", got {decode!r}; leave it out')
    if on_error not in ("raise", "skip", "substitute"):
        raise InputError(
            f'on_error must be "raise", "skip" or "substitute", got {on_error!r}; leave it out'
        )
    if max_errors is not None and (not isinstance(max_errors, int) or max_errors < 0):
        raise InputError(f"max_errors must be None or at least 0, got {max_errors!r}; leave it out")


def _check_arguments(
    dataset: Any, transform: Any, dtype: Any, memory_format: Any, cache: Any
) -> None:
    """Refuse at once what cannot work later."""
    try:
        empty = not isinstance(dataset, IterableDataset) and len(dataset) == 0
    except (TypeError, NotImplementedError):  # a user's sampler may not need a length
        empty = False
    if empty:
        raise InputError(
            f"dataset must have samples, got an empty {type(dataset).__name__}; "
            "check its path and split"
        )
    if not (callable(transform) or transform is None or transform == "auto"):
        raise InputError(
            f'transform must be "auto", a callable or None, got {transform!r}; pass a Compose'
        )
    check_output(dtype, memory_format)
    if cache not in (None, "device"):
        raise InputError(f'cache must be None or "device", got {cache!r}; leave it out')
