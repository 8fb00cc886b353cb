"""torch's own loader, for what is not fused: its batches are moved to the device."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from gpupipe.batch import move, restyle
from gpupipe.epochs import EpochBatches
from gpupipe.errors import InputError
from gpupipe.plan import Plan


class TorchRoute:
    """torch's own loader; its batches are moved to the device.

    Args:
        loader: whose arguments to use, as they are now.
        dataset: to iterate over in the place of the loader's.
    """

    def __init__(self, loader: TorchDataLoader[Any], dataset: Any) -> None:
        inner = copy.copy(loader)
        inner.__class__ = TorchDataLoader
        inner.__dict__.update(dataset=dataset, _iterator=None, pin_memory=False)
        self._seen: _Seen | None = None
        if getattr(loader, "return_indices", False):
            batch_sampler: Any = loader.batch_sampler
            iterable = isinstance(loader.dataset, IterableDataset)
            if batch_sampler is None or iterable or not loader.in_order:
                raise InputError(
                    "return_indices needs batches of indices in order, got an IterableDataset, "
                    "batch_size=None or in_order=False; leave it out"
                )
            self._seen = _Seen(batch_sampler)
            inner.__dict__["batch_sampler"] = self._seen
        self._inner = inner

    def serves(self, other: TorchRoute) -> bool:
        """Whether this route's workers do what another's would."""
        mine, their = self._inner, other._inner
        same = getattr(mine.dataset, "identity", mine.dataset)
        return bool(
            same == getattr(their.dataset, "identity", their.dataset)
            and mine.collate_fn is their.collate_fn
            and mine.num_workers == their.num_workers
        )

    def iterate(self, finish: Callable[[Any], Any], plan: Plan) -> EpochBatches:
        """Begin an epoch; ``finish`` is applied to every batch."""
        if self._seen is not None:
            self._seen.batches.clear()
        return _Moved(iter(self._inner), finish, plan, self._seen)


class _Seen:
    """A batch sampler that remembers what it gave out."""

    def __init__(self, batch_sampler: Any) -> None:
        self._inner = batch_sampler
        self.batches: deque[NDArray[np.int64]] = deque()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._inner:
            self.batches.append(as_indices(batch))
            yield batch

    def __len__(self) -> int:
        return len(self._inner)


def as_indices(batch: Any) -> NDArray[np.int64]:
    """Return what a batch sampler gave as int64 [N].

    Raises:
        InputError: keys that are no integers.
    """
    try:
        return np.array([operator.index(index) for index in batch], np.int64)
    except TypeError as error:
        raise InputError(
            f"return_indices needs integer indices, the batch sampler gave {batch!r}; leave it out"
        ) from error


class _Moved(EpochBatches):
    """Applies ``finish`` to every batch of torch's iterator."""

    def __init__(
        self,
        batches: Iterator[Any],
        finish: Callable[[Any], Any],
        plan: Plan,
        seen: _Seen | None,
    ) -> None:
        self._batches = batches
        self._finish = finish
        self._plan = plan
        self._seen = seen

    def __next__(self) -> Any:
        """Return the next batch."""
        try:
            batch = next(self._batches)
        finally:  # a batch whose sample failed has had its indices, too
            if self._seen is not None and self._seen.batches:
                self.indices = self._seen.batches.popleft()
        self._plan.batches += 1
        return self._finish(batch)


def finisher(
    device: torch.device, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> Callable[[Any], Any]:
    """Return what a batch of torch's own loader still needs."""
    restyled = dtype is not None or memory_format is not torch.contiguous_format
    stays = device.type == "cpu"

    def finish(batch: Any) -> Any:
        batch = batch if stays else move(batch, device)
        return restyle(batch, dtype, memory_format) if restyled else batch

    return finish
