"""Index batches as arrays, in the order and with the random draws of torch's ``DataLoader``.

::

    batch_sampler ──known──> blocks (one array per draw) ──slices──> int64 [B]
                  ──other──> its own iterator ──converted──────────> int64 [B]

The samplers of ``torch.utils.data`` hand out Python ints one at a time. Those of exactly known
type are rewritten here over whole arrays: each draw is torch's own call, made at the moment when
torch's generator functions make it. Whatever else yields batches is iterated as torch does it.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from gpupipe.errors import IndexRangeError, InputError

Indices = NDArray[np.int64]
"""int64 [B]: dataset indices of one batch, or of a block that batches are cut from."""

Blocks = Generator[Indices, int, None]
"""A sampler's indices, one array per draw; it is sent how many indices are missing."""

_PLAIN = (list, tuple, range, np.ndarray, torch.Tensor)
_BLOCK = 1 << 16  # indices in a block that nothing forces to be larger: 512 KB
_GROUP = 32  # RandomSampler draws with replacement in groups of this size
_EMPTY: Indices = np.empty(0, np.int64)


class IndexBatches(Iterator[Indices]):
    """The batches of one epoch, each int64 [B]; what ``index_batches`` returns."""

    def ahead(self) -> int:
        """Return how many batches can be read now without any effect outside this iterator.

        Reading them early changes no generator's state and runs no code of the user's. It is 0
        before the first batch, when the samplers draw, and always for a sampler of unknown type.
        """
        return 0


def index_batches(batch_sampler: Any, length: int, *, batched: bool = True) -> IndexBatches:
    """Iterate over a batch sampler as torch does, in arrays.

    ``iter(batch_sampler)`` is called at once, as ``iter(DataLoader)`` does; nothing is drawn by a
    ``BatchSampler`` before the first ``next``. Samplers of known type are checked against
    ``length`` block by block, so that a bad index may be reported some batches early.

    Args:
        batch_sampler: what torch iterates over: ``loader.batch_sampler``, or ``loader.sampler``
            where ``batch_size`` is None.
        length: number of samples in the dataset.
        batched: False for a plain sampler: a single index is allowed and comes as int64 [].

    Returns:
        An iterator over int64 [B], which the sampler does not write to again.

    Raises:
        InputError: (at ``next``) the sampler yields something else than integer indices.
        IndexRangeError: (at ``next``) an index is negative or not below ``length``.
    """
    blocks = _find_blocks(batch_sampler)
    if blocks is None:
        return _Converted(batch_sampler, length, batched=batched)
    return _Sliced(batch_sampler, blocks, length)


def known(batch_sampler: Any) -> bool:
    """Return whether batches can be read ahead from the first ``next`` on, unseen by the user.

    True for an exact ``BatchSampler`` over an exactly known sampler that draws at the first
    ``next`` only. A ``RandomSampler`` with a generator of its own draws again at the end of every
    pass, where the user's code may see the generator: there ``IndexBatches.ahead`` says how far.
    """
    return _find_blocks(batch_sampler) is not None and not _draws_late(batch_sampler.sampler)


def may_repeat(batch_sampler: Any) -> bool:
    """Return whether an index may come twice in an epoch; True where that is not known.

    A ``DistributedSampler`` repeats a few at the end to fill up the ranks: those are the same
    sample drawn the same way.
    """
    if type(batch_sampler) is not BatchSampler:
        return True
    sampler: Any = batch_sampler.sampler
    if type(sampler) is RandomSampler:
        return bool(sampler.replacement) or sampler.num_samples > len(sampler.data_source)
    if type(sampler) is SubsetRandomSampler and type(sampler.indices) in _PLAIN:
        return len(np.unique(np.asarray(sampler.indices))) < len(sampler.indices)
    if type(sampler) is WeightedRandomSampler:
        return bool(sampler.replacement)
    return type(sampler) not in (SequentialSampler, DistributedSampler)


def draw_base_seed(generator: torch.Generator | None) -> int:
    """Draw what torch's ``_BaseDataLoaderIter`` draws at each ``iter()``, also with 0 workers.

    Args:
        generator: the loader's, or None for torch's global one.
    """
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def start(
    batch_sampler: Any,
    generator: torch.Generator | None,
    length: int,
    *,
    num_workers: int = 0,
    batched: bool = True,
) -> tuple[IndexBatches, int]:
    """Begin an epoch with the calls that ``iter(DataLoader)`` makes, in its order.

    ``iter(batch_sampler)``, then the base seed, and with workers ``iter(batch_sampler)`` again:
    only a user's batch sampler whose ``__iter__`` is not a generator function can tell. From its
    second epoch on a loader with persistent workers draws no base seed: call ``index_batches``.

    Args:
        batch_sampler: see ``index_batches``.
        generator: ``loader.generator``.
        length: number of samples in the dataset.
        num_workers: of the loader that is followed.
        batched: see ``index_batches``.

    Returns:
        The iterator over the epoch's batches, and the base seed.
    """
    batches = index_batches(batch_sampler, length, batched=batched)
    base_seed = draw_base_seed(generator)
    if num_workers > 0:
        batches = index_batches(batch_sampler, length, batched=batched)
    return batches, base_seed


class _Converted(IndexBatches):
    """Batches of any iterable, converted one by one."""

    def __init__(self, batch_sampler: Any, length: int, *, batched: bool) -> None:
        inner = batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler
        self._name = _name(inner)
        self._source = iter(batch_sampler)
        self._length = length
        self._batched = batched

    def __next__(self) -> Indices:
        batch = next(self._source)
        indices = _as_indices(batch, self._name)
        if self._batched and indices.ndim == 0:
            raise _refusal(self._name, batch, "batches of integer indices")
        _check(indices, self._length, self._name)
        return indices


class _Sliced(IndexBatches):
    """Batches cut from the blocks of a known sampler, under an exact ``BatchSampler``."""

    def __init__(
        self, batch_sampler: BatchSampler, blocks: Callable[[Any, int], Blocks], length: int
    ) -> None:
        self._batch_sampler = batch_sampler
        self._sampler = batch_sampler.sampler
        self._make = blocks
        self._length = length
        self._quiet = not _draws_late(self._sampler)
        self._blocks: Blocks | None = None
        self._drop_last = False
        self._fixed = 0  # torch reads batch_size once where drop_last is set, else at each batch
        self._block = _EMPTY
        self._at = 0

    def __next__(self) -> Indices:
        size = self._fixed or self._batch_sampler.batch_size
        at = self._at
        stop = at + size
        if at < stop <= len(self._block):
            self._at = stop
            return self._block[at:stop]
        return self._join(size)

    def ahead(self) -> int:
        if self._blocks is None:
            return 0
        if self._quiet:
            return sys.maxsize
        size = self._fixed or self._batch_sampler.batch_size
        return (len(self._block) - self._at) // max(size, 1)

    def _join(self, size: int) -> Indices:
        """Return a batch that needs another block: nothing is drawn before it is needed."""
        parts = [self._block[self._at : self._at + max(size, 0)]]
        missing = size - len(parts[0])
        self._block, self._at = _EMPTY, 0
        while missing > 0 and (block := self._draw(missing)) is not None:
            parts.append(block[:missing])
            self._block, self._at = block, len(parts[-1])
            missing -= self._at
        batch = np.concatenate(parts) if len(parts) != 2 or len(parts[0]) else parts[1]  # noqa: PLR2004
        if not len(batch) or (missing and self._drop_last):
            raise StopIteration
        return batch

    def _draw(self, missing: int) -> Indices | None:
        """Return the sampler's next block, checked; None at its end."""
        try:
            if self._blocks is None:
                self._drop_last = self._batch_sampler.drop_last
                self._fixed = self._batch_sampler.batch_size if self._drop_last else 0
                self._blocks = self._make(self._sampler, missing)
                block = next(self._blocks)
            else:
                block = self._blocks.send(missing)
        except StopIteration:
            return None
        try:
            _check(block, self._length, _name(self._sampler))
        except IndexRangeError:
            self._blocks.close()
            raise
        return block


def _sequential(sampler: SequentialSampler, _need: int) -> Blocks:
    n = len(sampler.data_source)
    for low in range(0, n, _BLOCK):
        yield np.arange(low, min(low + _BLOCK, n), dtype=np.int64)


def _random(sampler: RandomSampler, need: int) -> Blocks:
    n = len(sampler.data_source)
    own = sampler.generator is None  # nobody else sees such a generator: draw as is convenient
    generator = sampler.generator
    if own:
        generator = torch.Generator()
        generator.manual_seed(draw_base_seed(None))  # the same call, and the global generator's
    if sampler.replacement:
        groups = sampler.num_samples // _GROUP
        while groups:
            # Serial draws: k groups at once are the same numbers as k groups one by one.
            count = min(groups, -(-max(need, _BLOCK if own else 1) // _GROUP))
            need = yield _array(torch.randint(n, (count * _GROUP,), generator=generator))
            groups -= count
        rest = sampler.num_samples % _GROUP
        yield _array(torch.randint(n, (rest,), generator=generator))
        return
    for _ in range(sampler.num_samples // n):
        yield _array(torch.randperm(n, generator=generator))
    rest = sampler.num_samples % n
    if rest or not own:  # torch draws a last permutation even if it takes nothing of it
        yield _array(torch.randperm(n, generator=generator))[:rest]


def _subset(sampler: SubsetRandomSampler, _need: int) -> Blocks:
    order = _array(torch.randperm(len(sampler.indices), generator=sampler.generator))
    yield _as_indices(sampler.indices, _name(sampler))[order]


def _weighted(sampler: WeightedRandomSampler, _need: int) -> Blocks:
    yield _array(
        torch.multinomial(
            sampler.weights, sampler.num_samples, sampler.replacement, generator=sampler.generator
        )
    )


def _distributed(sampler: DistributedSampler[Any], _need: int) -> Blocks:
    n = len(cast("Any", sampler.dataset))
    places = range(sampler.rank, sampler.total_size, sampler.num_replicas)
    fits = sampler.total_size <= n if sampler.drop_last else 0 < n <= sampler.total_size
    if len(places) != sampler.num_samples or not (fits or sampler.total_size == n):
        yield np.fromiter(sampler, np.int64)  # the dataset's length changed: torch's own words
        return
    order: Indices | None = None
    if sampler.shuffle:
        generator = torch.Generator()
        generator.manual_seed(sampler.seed + sampler.epoch)
        order = _array(torch.randperm(n, generator=generator))
    for low in range(0, len(places), _BLOCK):
        part = places[low : low + _BLOCK]
        wrapped = np.arange(part.start, part.stop, part.step, dtype=np.int64) % n  # the padding
        yield wrapped if order is None else order[wrapped]


_BLOCKS: dict[type, Callable[[Any, int], Blocks]] = {
    SequentialSampler: _sequential,
    RandomSampler: _random,
    SubsetRandomSampler: _subset,
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}


def _find_blocks(batch_sampler: Any) -> Callable[[Any, int], Blocks] | None:
    """Return how to draw the sampler's blocks, or None where only its own ``__iter__`` knows."""
    if type(batch_sampler) is not BatchSampler:
        return None
    sampler = batch_sampler.sampler
    if type(sampler) is SubsetRandomSampler and type(sampler.indices) not in _PLAIN:
        return None  # a sequence class of the user's: its __getitem__ runs once per sample
    return _BLOCKS.get(type(sampler))


def _draws_late(sampler: object) -> bool:
    """Return whether a known sampler draws from a visible generator after its first draw."""
    return type(sampler) is RandomSampler and sampler.generator is not None


def _array(drawn: torch.Tensor) -> Indices:
    return cast("Indices", drawn.cpu().numpy())


def _as_indices(batch: Any, name: str) -> Indices:
    """Copy a batch of integers into int64 [B], a single one into int64 []."""
    expected = "integer indices (int, NumPy integer, integer array or tensor [B])"
    values = batch
    if isinstance(values, torch.Tensor):
        if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
            raise _refusal(name, batch, expected)
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":
        if values.dtype.kind not in "iu" or values.ndim > 1:
            raise _refusal(name, batch, expected)
        if values.dtype != np.uint64:  # uint64 may exceed int64: by way of Python's ints
            return values.astype(np.int64)
        values = values.tolist()
    items: Any
    try:
        iterator = iter(values)
    except TypeError:
        items = _as_index(values, name, expected)
    else:
        items = list(iterator)
        if {*map(type, items)} != {int}:
            items = [_as_index(item, name, expected) for item in items]
    try:
        return np.array(items, dtype=np.int64)
    except OverflowError:
        raise IndexRangeError(
            f"{name} asked for an index that no dataset has, beyond int64: {batch!r:.200}; "
            "yield indices below the dataset's length"
        ) from None


def _as_index(item: Any, name: str, expected: str) -> int:
    """Return one index as an int; truth values, fractions and arrays are not indices."""
    single = getattr(item, "ndim", 0) == 0  # torch would take a tensor of shape [1] for an int
    if single and not isinstance(item, bool) and getattr(item, "dtype", None) != torch.bool:
        with contextlib.suppress(TypeError, RuntimeError):  # torch's and NumPy's for no integer
            return operator.index(item)
    raise _refusal(name, item, expected)


def _refusal(name: str, came: Any, expected: str) -> InputError:
    dtype, shape = getattr(came, "dtype", ""), tuple(getattr(came, "shape", ()))
    kind = f"{type(came).__name__} {dtype} {shape}" if shape else type(came).__name__
    return InputError(f"{name} must yield {expected}, got {kind}: {came!r:.80}; convert it there")


def _check(indices: Indices, length: int, name: str) -> None:
    """Raise unless all indices lie in [0, length)."""
    # Seen as uint64 a negative index is a huge one: a single reduction finds both.
    if indices.size == 0 or int(indices.view(np.uint64).max()) < length:
        return
    flat = indices.reshape(-1)
    bad = int(flat[np.argmax((flat < 0) | (flat >= length))])
    raise IndexRangeError(
        f"{name} asked for index {bad}, but the dataset has {length} samples, so indices must be "
        f"in [0, {length}); build the sampler over this dataset, or count from its start"
    )


def _name(sampler: object) -> str:
    return type(sampler).__qualname__
