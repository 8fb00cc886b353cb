"""The order of indices and every random draw are those of torch's own ``DataLoader``.

The oracle is ``torch.utils.data.DataLoader`` over a dataset whose samples are their indices. A
trace holds, for each epoch, what ``iter`` and every ``next`` gave and the state of every generator
after it; the two traces must be equal, event by event.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from gpupipe.errors import GpupipeError, IndexRangeError, InputError
from gpupipe.sampling import draw_base_seed, index_batches, known, start

SIZES = (1, 2, 31, 32, 33, 100)
Loader = DataLoader[Any]
Trace = list[tuple[object, ...]]


class Numbers(Dataset[int]):
    """A dataset whose samples are their indices; ``n`` may grow."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return int(index)


def as_is(batch: Any) -> Any:
    """Collate nothing."""
    return batch


def load(n: int, **arguments: Any) -> Loader:
    """Build torch's loader over n numbers."""
    return DataLoader(Numbers(n), collate_fn=as_is, **arguments)


def seeded(seed: int) -> torch.Generator:
    """Return a generator of the user's."""
    return torch.Generator().manual_seed(seed)


def states(loader: Loader) -> tuple[bytes, ...]:
    """Return the states of all generators that a user could look at."""
    owners = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = [torch.default_generator, *(getattr(owner, "generator", None) for owner in owners)]
    return tuple(g.get_state().numpy().tobytes() for g in generators if g is not None)


Begin = Callable[[Loader], tuple[Iterator[Any], int]]


def torch_begin(loader: Loader) -> tuple[Iterator[Any], int]:
    """Begin an epoch as torch does: the oracle."""
    iterator = iter(loader)
    return iterator, int(iterator._base_seed)


def our_begin(loader: Loader) -> tuple[Iterator[Any], int]:
    """Begin an epoch as gpupipe does."""
    dataset: Any = loader.dataset
    return start(loader.batch_sampler, loader.generator, len(dataset))


def trace(make: Callable[[], Loader], begin: Begin, epochs: int, stop: int | None) -> Trace:
    """Record every event of some epochs; each breaks off after ``stop`` batches."""
    torch.manual_seed(17)
    loader = make()
    events: Trace = []
    for epoch in range(epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        iterator, base_seed = begin(loader)
        events.append(("iter", base_seed, states(loader)))
        for batch in itertools.islice(iterator, stop):
            events.append(("batch", [int(index) for index in batch], states(loader)))
        events.append(("end", states(loader)))
        if stop is None:
            assert next(iterator, None) is None
            events.append(("past the end", states(loader)))
        events.append(("rand", torch.rand(()).item()))
    return events


def assert_follows_torch(
    make: Callable[[], Loader], *, epochs: int = 2, stop: int | None = None
) -> None:
    """Compare the two traces."""
    expected = trace(make, torch_begin, epochs, stop)
    assert trace(make, our_begin, epochs, stop) == expected


def batch_sizes(n: int) -> list[int]:
    """Return sizes that straddle the end of n samples."""
    return sorted({1, 7, n, n + 1})


# --- samplers of known type -------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_loader_is_followed(shuffle: bool, generator: int | None, drop_last: bool) -> None:
    """Sequential and shuffled order, all sizes: order and generator states after every batch."""
    for n in SIZES if shuffle else (0, *SIZES):
        for batch_size in batch_sizes(n)[n == 0 :]:
            assert_follows_torch(
                lambda n=n, batch_size=batch_size: load(  # type: ignore[misc]
                    n,
                    batch_size=batch_size,
                    shuffle=shuffle,
                    drop_last=drop_last,
                    generator=None if generator is None else seeded(generator),
                )
            )


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_random_sampler_is_followed(
    replacement: bool, generator: int | None, drop_last: bool
) -> None:
    """``num_samples`` below, at and above n and multiples of 32, with and without replacement."""
    for n, samples, batch_size in itertools.product(
        (1, 10, 33), (None, 1, 9, 10, 20, 32, 64, 95), (1, 7, 10, 32, 40)
    ):

        def make(n: int = n, samples: int | None = samples, batch_size: int = batch_size) -> Loader:
            own = None if generator is None else seeded(generator)
            sampler = RandomSampler(Numbers(n), replacement, samples, own)
            return load(n, sampler=sampler, batch_size=batch_size, drop_last=drop_last)

        assert_follows_torch(make)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_break_leaves_generators_as_torch_does(replacement: bool, stop: int) -> None:
    """After ``break``, at the last batch too, nothing was drawn that torch had not drawn yet."""
    for n, batch_size in ((12, 4), (13, 4), (12, 3), (128, 32), (96, 40)):

        def make(n: int = n, batch_size: int = batch_size) -> Loader:
            own = seeded(3)
            sampler = RandomSampler(Numbers(n), replacement, generator=own)
            return load(n, sampler=sampler, batch_size=batch_size, generator=own)

        assert_follows_torch(make, epochs=3, stop=stop)


def test_large_blocks_are_followed() -> None:
    """Orders longer than an internal block, batches longer than one, indices beyond 2^32."""
    n = 70_001
    for sampler, batch_size in (
        (SequentialSampler(range(n)), 997),
        (SequentialSampler(range(3 * n)), 150_000),
        (RandomSampler(range(n), replacement=True), 997),
        (RandomSampler(range(2**40), replacement=True, num_samples=n), 4_099),
        (DistributedSampler(Numbers(3 * n), 2, 1, shuffle=False), 997),
        (DistributedSampler(Numbers(3 * n), 2, 1), 997),
    ):
        batch_sampler = BatchSampler(sampler, batch_size, drop_last=False)
        torch.manual_seed(5)
        expected = list(batch_sampler)
        torch.manual_seed(5)
        came = list(index_batches(batch_sampler, 2**40))
        assert [len(batch) for batch in came] == [len(batch) for batch in expected]
        assert np.array_equal(np.concatenate(came), list(itertools.chain(*expected)))


def test_a_huge_sequence_is_never_materialised() -> None:
    """The first batches of 2^50 indices cost neither memory nor time."""
    batches = index_batches(BatchSampler(SequentialSampler(range(2**50)), 3, False), 2**50)
    assert [batch.tolist() for batch in itertools.islice(batches, 2)] == [[0, 1, 2], [3, 4, 5]]


def _subsets() -> list[Any]:
    kept = [5, 0, 9, 2, 7, 7, 1]
    return [
        kept,
        tuple(kept),
        range(1, 9, 2),
        np.array(kept, dtype=np.uint8),
        np.array(kept, dtype=np.uint64),
        torch.tensor(kept),
        torch.tensor(kept, dtype=torch.int32),
        [np.int32(i) for i in kept],
        [torch.tensor(i) for i in kept],
        [],
    ]


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("indices", _subsets(), ids=lambda indices: type(indices).__name__)
def test_a_subset_sampler_is_followed(indices: Any, generator: int | None) -> None:
    """Whatever kind of sequence holds the indices."""
    for batch_size, drop_last in itertools.product((1, 3, 7, 8), (False, True)):

        def make(batch_size: int = batch_size, drop_last: bool = drop_last) -> Loader:
            own = None if generator is None else seeded(generator)
            sampler = SubsetRandomSampler(indices, own)
            return load(10, sampler=sampler, batch_size=batch_size, drop_last=drop_last)

        assert_follows_torch(make)


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_weighted_sampler_is_followed(replacement: bool, generator: int | None) -> None:
    """Weighted draws come from the same generator at the same moment."""
    for samples, batch_size, drop_last in itertools.product((1, 9, 11), (1, 4, 12), (False, True)):

        def make(
            samples: int = samples, batch_size: int = batch_size, drop_last: bool = drop_last
        ) -> Loader:
            own = None if generator is None else seeded(generator)
            weights = [float(i % 4 + 1) for i in range(11)]
            sampler = WeightedRandomSampler(weights, samples, replacement, own)
            return load(11, sampler=sampler, batch_size=batch_size, drop_last=drop_last)

        assert_follows_torch(make)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_distributed_sampler_is_followed(shuffle: bool, drop_last: bool) -> None:
    """Every rank and epoch, with padding (several times around too) and with a dropped tail."""
    for n, replicas in itertools.product((1, 2, 7, 32, 33), (1, 2, 3, 8)):
        for rank in range(replicas):

            def make(n: int = n, replicas: int = replicas, rank: int = rank) -> Loader:
                sampler: DistributedSampler[int] = DistributedSampler(
                    Numbers(n), replicas, rank, shuffle=shuffle, seed=4, drop_last=drop_last
                )
                return load(n, sampler=sampler, batch_size=3)

            assert_follows_torch(make)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 130),
    samples=st.none() | st.integers(1, 300),
    batch_size=st.integers(1, 140),
    replacement=st.booleans(),
    drop_last=st.booleans(),
    own=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    stop=st.none() | st.integers(0, 6),
)
def test_any_random_sampler_is_followed(
    *,
    n: int,
    samples: int | None,
    batch_size: int,
    replacement: bool,
    drop_last: bool,
    own: bool,
    shared: bool,
    seed: int,
    stop: int | None,
) -> None:
    """For any arguments; the loader may share the sampler's generator or use the global one."""

    def make() -> Loader:
        generator = seeded(seed) if own else None
        sampler = RandomSampler(Numbers(n), replacement, samples, generator)
        return load(
            n,
            sampler=sampler,
            batch_size=batch_size,
            drop_last=drop_last,
            generator=generator if shared else None,
        )

    assert_follows_torch(make, stop=stop)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    replicas=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
    tail=st.booleans(),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_any_distributed_sampler_is_followed(
    *,
    n: int,
    replicas: int,
    seed: int,
    shuffle: bool,
    tail: bool,
    drop_last: bool,
    data: st.DataObject,
) -> None:
    """For any world, also one larger than the dataset."""
    rank = data.draw(st.integers(0, replicas - 1))
    batch_size = data.draw(st.integers(1, n + 1))

    def make() -> Loader:
        sampler: DistributedSampler[int] = DistributedSampler(
            Numbers(n), replicas, rank, shuffle=shuffle, seed=seed, drop_last=tail
        )
        return load(n, sampler=sampler, batch_size=batch_size, drop_last=drop_last)

    assert_follows_torch(make)


# --- changes while the loader lives -------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_grown_or_shrunk_dataset_is_followed(shuffle: bool) -> None:
    """The length is read anew in each epoch, at the first ``next``."""

    def run(begin: Begin) -> list[list[int]]:
        torch.manual_seed(1)
        loader = load(5, batch_size=3, shuffle=shuffle)
        numbers: Any = loader.dataset
        came: list[list[int]] = []
        for n in (5, 9, 4):
            numbers.n = n
            came += [[int(i) for i in batch] for batch in begin(loader)[0]]
        return came

    assert run(our_begin) == run(torch_begin)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [0, 3, 5, 9, 12])
def test_a_distributed_sampler_of_another_length_is_followed(n: int, drop_last: bool) -> None:
    """Where torch can pad or cut the changed dataset we do too, else torch's error comes."""

    def run(begin: Begin) -> object:
        sampler: DistributedSampler[int] = DistributedSampler(Numbers(7), 2, 1, drop_last=drop_last)
        loader = DataLoader(sampler.dataset, 2, sampler=sampler, collate_fn=as_is)
        numbers: Any = sampler.dataset
        numbers.n = n
        try:
            return [[int(i) for i in batch] for batch in begin(loader)[0]]
        except (AssertionError, ZeroDivisionError) as error:
            return type(error), str(error)

    assert run(our_begin) == run(torch_begin)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_size_changed_in_mid_epoch_is_followed(drop_last: bool) -> None:
    """``batch_size`` is read at each batch, with ``drop_last`` once."""

    def run(begin: Begin) -> list[list[int]]:
        loader = load(20, batch_size=3, drop_last=drop_last)
        batch_sampler: Any = loader.batch_sampler
        came: list[list[int]] = []
        for batch, size in zip(begin(loader)[0], (5, 1, 2, 0), strict=False):
            came.append([int(i) for i in batch])
            batch_sampler.batch_size = size
        return came

    assert run(our_begin) == run(torch_begin)


def test_the_seed_is_drawn_at_the_first_next() -> None:
    """Draws of the user's between ``iter`` and ``next`` move the order, as with torch."""

    def run(begin: Begin) -> list[list[int]]:
        torch.manual_seed(2)
        iterator, _ = begin(load(9, batch_size=4, shuffle=True))
        torch.rand(3)
        return [[int(i) for i in batch] for batch in iterator]

    assert run(our_begin) == run(torch_begin)


def test_manual_seed_rules_after_whole_epochs() -> None:
    """After two epochs ``torch.rand`` continues as after two epochs of torch's loader."""

    def run(begin: Begin) -> float:
        torch.manual_seed(8)
        loader = load(33, batch_size=8, shuffle=True)
        for _ in range(2):
            list(begin(loader)[0])
        return torch.rand(()).item()

    assert run(our_begin) == run(torch_begin)


def test_the_base_seed_is_the_draw_of_torch() -> None:
    """From the given generator or the global one, the same 64 bits."""
    for generator in (None, seeded(6)):
        torch.manual_seed(6)
        expected = torch_begin(load(1, generator=None if generator is None else seeded(6)))[1]
        torch.manual_seed(6)
        assert draw_base_seed(generator) == expected


# --- samplers of the user's ---------------------------------------------------------------------


class Backwards(Sampler[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        yield from reversed(range(self.n))


class Shifted(RandomSampler):
    def __iter__(self) -> Iterator[int]:
        for index in super().__iter__():
            yield (index + 1) % len(self.data_source)


class EagerBatches:
    """Draws at ``iter``, not at the first ``next``; counts its calls."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.calls = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.calls += 1
        order = torch.randperm(self.n).tolist()
        return iter([order[i : i + 3] for i in range(0, self.n, 3)])

    def __len__(self) -> int:
        return (self.n + 2) // 3


class Uneven(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        yield [4, 2]
        yield torch.randperm(5).tolist()
        yield [0]


class MyBatchSampler(BatchSampler):
    """A subclass: its ``__iter__`` counts."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[::-1]


class OnlyGetItem:
    """The old sequence protocol, without ``__iter__``."""

    def __getitem__(self, at: int) -> int:
        if at == 5:
            raise IndexError
        return 4 - at


class Lookup(Sequence[int]):
    """A sequence class whose ``__getitem__`` may see that it is read ahead."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, at: Any) -> Any:
        return int(torch.randint(10, ()))


UNKNOWN: dict[str, Callable[[], Loader]] = {
    "sampler": lambda: load(10, sampler=Backwards(10), batch_size=4),
    "subclass": lambda: load(10, sampler=Shifted(Numbers(10)), batch_size=4, drop_last=True),
    "list": lambda: load(10, sampler=[3, 1, 2], batch_size=2),
    "array": lambda: load(10, sampler=np.array([3, 1, 2]), batch_size=2),
    "tensor": lambda: load(10, sampler=torch.tensor([3, 1, 2]), batch_size=2),
    "getitem": lambda: load(10, sampler=OnlyGetItem(), batch_size=2),
    "generator": lambda: load(10, sampler=(i * i for i in range(4)), batch_size=3),
    "sequence class": lambda: load(10, sampler=SubsetRandomSampler(Lookup()), batch_size=4),
    "eager batches": lambda: load(10, batch_sampler=EagerBatches(10)),
    "uneven batches": lambda: load(10, batch_sampler=Uneven()),
    "list of lists": lambda: load(10, batch_sampler=[[1, 2], [3]]),
    "batch subclass": lambda: load(
        10, batch_sampler=MyBatchSampler(RandomSampler(range(10)), 4, drop_last=False)
    ),
}


@pytest.mark.parametrize("stop", [None, 1])
@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_users_sampler_is_followed(make: Callable[[], Loader], stop: int | None) -> None:
    """Order and draws of anything iterable, read no earlier than torch reads it."""
    assert not known(make().batch_sampler)
    assert_follows_torch(make, stop=stop)


def test_an_eager_batch_sampler_draws_before_the_base_seed() -> None:
    """``iter(batch_sampler)`` comes first, and with workers once more after the base seed."""
    for num_workers in (0, 1):
        torch.manual_seed(3)
        expected = EagerBatches(10)
        iterator = iter(load(10, batch_sampler=expected, num_workers=num_workers))
        base_seed, batches = iterator._base_seed, list(iterator)
        torch.manual_seed(3)
        sampler = EagerBatches(10)
        came, seed = start(sampler, None, 10, num_workers=num_workers)
        assert seed == base_seed
        assert [batch.tolist() for batch in came] == batches
        assert sampler.calls == expected.calls


@pytest.mark.parametrize(
    "batch",
    [
        [3, 0, 7],
        (3, 0, 7),
        [np.int64(3), np.uint8(0), 7],
        [torch.tensor(3), torch.tensor(0, dtype=torch.uint8), 7],
        [np.array(3), np.array(0), np.array(7)],
        torch.tensor([3, 0, 7]),
        torch.tensor([3, 0, 7], dtype=torch.int16),
        np.array([3, 0, 7], dtype=np.int8),
        np.array([3, 0, 7], dtype=np.uint64),
        np.array([3, 0, 7], dtype=object),
        np.array([3, 9, 0, 9, 7])[::2],
    ],
    ids=repr,
)
def test_every_kind_of_batch_becomes_int64(batch: Any) -> None:
    """Ints, NumPy integers, 0-d and 1-d tensors and arrays, of any integer dtype."""
    (came,) = index_batches([batch], 8)
    assert came.dtype == np.int64
    assert came.tolist() == [3, 0, 7]


def test_a_batch_is_a_copy() -> None:
    """A sampler may reuse its buffer: batches that were read keep their indices."""
    buffer = np.array([1, 2])

    def reuse() -> Iterator[Any]:
        yield buffer
        buffer[:] = 0
        yield torch.from_numpy(buffer)
        buffer[:] = 3

    assert [b.tolist() for b in list(index_batches(reuse(), 4))] == [[1, 2], [0, 0]]


def test_a_plain_sampler_gives_single_indices() -> None:
    """``batch_size=None``: one index is 0-d, a list of indices still a batch."""
    loader = load(5, sampler=Backwards(5), batch_size=None)
    came = list(index_batches(loader.sampler, 5, batched=False))
    assert [index.item() for index in came] == list(loader)
    assert {(index.ndim, index.dtype) for index in came} == {(0, np.dtype(np.int64))}
    pair, one = index_batches([[1, 2], torch.tensor(3)], 5, batched=False)
    assert (pair.tolist(), one.tolist()) == ([1, 2], 3)


# --- reading ahead ------------------------------------------------------------------------------


def test_known_is_true_of_exact_types_only() -> None:
    """A subclass, another iterable or a generator that the user can see is not known."""
    numbers = Numbers(4)
    yes: list[Any] = [
        SequentialSampler(numbers),
        RandomSampler(numbers),
        RandomSampler(numbers, replacement=True),
        SubsetRandomSampler([1], seeded(1)),
        WeightedRandomSampler([1.0], 1, generator=seeded(1)),
        DistributedSampler(numbers, 2, 0),
    ]
    no: list[Any] = [
        RandomSampler(numbers, generator=seeded(1)),
        Shifted(numbers),
        Backwards(4),
        range(4),
    ]
    assert [known(BatchSampler(s, 2, drop_last=False)) for s in yes] == [True] * len(yes)
    assert not any(known(BatchSampler(s, 2, drop_last=False)) for s in no)
    assert not any(known(sampler) for sampler in yes)
    assert not known(MyBatchSampler(range(4), 2, drop_last=False))
    assert not known(None)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (13, 4), (70, 40), (70, 32), (5, 9)])
def test_reading_ahead_touches_no_visible_generator(
    n: int, batch_size: int, replacement: bool
) -> None:
    """``ahead()`` batches can be read with all generators' states unchanged, and it is not idle."""
    own = seeded(9)
    sampler = RandomSampler(Numbers(n), replacement, 3 * n, own)
    loader = load(n, sampler=sampler, batch_size=batch_size)
    batches = index_batches(loader.batch_sampler, n)
    assert batches.ahead() == 0
    read = 0
    for _ in batches:
        before = states(loader)
        for _ in range(batches.ahead()):
            next(batches)
            read += 1
        assert batches.ahead() == 0
        assert states(loader) == before
    assert read > 0 or n < batch_size or replacement


def test_a_known_sampler_can_be_read_to_its_end() -> None:
    """After the first batch nothing that follows can be seen outside the iterator."""
    loader = load(10, batch_size=3, shuffle=True)
    batches = index_batches(loader.batch_sampler, 10)
    assert batches.ahead() == 0
    next(batches)
    before = states(loader)
    assert batches.ahead() == sys.maxsize
    assert len(list(batches)) == 3
    assert states(loader) == before
    assert index_batches(Uneven(), 5).ahead() == 0


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ([1, True], "bool: True"),
        ([np.True_], "bool: np.True_"),
        ([torch.tensor(data=True)], r"Tensor: tensor\(True\)"),
        ([1.0], "float: 1.0"),
        ([np.float32(1)], "float32"),
        ([torch.tensor(1.0)], r"Tensor: tensor\(1.\)"),
        ([torch.tensor([1])], r"Tensor torch.int64 \(1,\)"),
        ([[1, 2]], r"list: \[1, 2\]"),
        (["a"], "str: 'a'"),
        ("ab", "str: 'a'"),
        ([None], "NoneType: None"),
        (None, "NoneType: None"),
        (3, "int: 3"),
        (torch.tensor(3), r"Tensor: tensor\(3\)"),
        (np.array([1.0]), r"ndarray float64 \(1,\)"),
        (np.array([True]), r"ndarray bool \(1,\)"),
        (np.array([[1]]), r"ndarray int64 \(1, 1\)"),
        (torch.tensor([1.0]), r"Tensor torch.float32 \(1,\)"),
        (torch.tensor([1.0], dtype=torch.bfloat16), r"Tensor torch.bfloat16 \(1,\)"),
        (torch.tensor([True]), r"Tensor torch.bool \(1,\)"),
        (torch.tensor([[1]]), r"Tensor torch.int64 \(1, 1\)"),
    ],
    ids=repr,
)
def test_what_is_no_index_is_refused(batch: Any, came: str) -> None:
    """Truth values, fractions and nested batches: the error names the sampler and what came."""

    class Mine(list[Any]):
        pass

    with pytest.raises(InputError, match=f"^.*Mine must yield .*integer indices.*, got {came}"):
        next(index_batches(Mine([batch]), 8))


def test_a_subset_of_fractions_is_refused() -> None:
    """Also where the indices are read as one array."""
    for indices in ([0.0, 1.0], [True], np.array([0.5]), torch.tensor([1.0])):
        batch_sampler = BatchSampler(SubsetRandomSampler(indices), 2, drop_last=False)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="SubsetRandomSampler must yield"):
            next(index_batches(batch_sampler, 8))


@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**63)])
def test_an_index_outside_the_dataset_is_refused(bad: int) -> None:
    """Negative or too large: the error names index, length, sampler and remedy."""
    message = rf"{{}} asked for index {bad}, but the dataset has 5 samples.*\[0, 5\); build"
    known_one = BatchSampler(SubsetRandomSampler([0, bad, 4]), 2, drop_last=False)
    with pytest.raises(IndexRangeError, match=message.format("SubsetRandomSampler")):
        list(index_batches(known_one, 5))
    users = index_batches(BatchSampler([0, bad, 4], 2, drop_last=False), 5)
    with pytest.raises(IndexRangeError, match=message.format("list")):
        list(users)


@pytest.mark.parametrize("bad", [2**63, 2**64, -(2**70)])
def test_an_index_beyond_int64_is_refused(bad: int) -> None:
    """It never wraps around to one that the dataset has."""
    batches: list[Any] = [[0, bad]]
    if 0 < bad < 2**64:
        batches.append(np.array([bad], dtype=np.uint64))
    for batch in batches:
        with pytest.raises(
            IndexRangeError, match=f"list asked for an index that no dataset has.*{bad}"
        ):
            next(index_batches([batch], 5))


@pytest.mark.parametrize(
    "sampler",
    [
        SequentialSampler(range(6)),
        RandomSampler(range(6)),
        RandomSampler(range(6), replacement=True, num_samples=500),
        WeightedRandomSampler([0.0] * 5 + [1.0], 3),
        DistributedSampler(Numbers(6), 1, 0),
        DistributedSampler(Numbers(6), 1, 0, shuffle=False),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_sampler_over_another_dataset_is_refused(sampler: Sampler[int]) -> None:
    """Every known sampler is checked; after the error the iterator is at its end."""
    batches = index_batches(BatchSampler(sampler, 2, drop_last=False), 5)
    with pytest.raises(IndexRangeError, match=f"{type(sampler).__name__} asked for index 5"):
        list(batches)
    assert next(batches, None) is None


def test_a_bad_batch_of_a_users_sampler_is_not_the_end() -> None:
    """The batch after it can still be read, as from torch's iterator."""
    batches = index_batches([[0], [9], [1.5], [1]], 2)
    assert next(batches).tolist() == [0]
    for _ in range(2):
        with pytest.raises(GpupipeError):
            next(batches)
    assert next(batches).tolist() == [1]


def test_an_exception_of_the_users_comes_through() -> None:
    """Also a TypeError, which must not be taken for a batch that cannot be iterated."""

    def broken() -> Iterator[int]:
        yield 1
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        next(index_batches([broken()], 5))
    with pytest.raises(TypeError, match="not iterable"):
        index_batches(5, 5)
