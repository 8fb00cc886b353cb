"""Memory is used again when nothing refers to it any more, and never before."""

from __future__ import annotations

import gc
import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpupipe.memory import ALIGNMENT, OutputPool

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (4, 3, 5, 7)


def address(pool: OutputPool, shape: tuple[int, ...] = SHAPE) -> int:
    """Where the next tensor would lie."""
    return pool.empty(shape, torch.float32).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [SHAPE, (1, 1, 1, 1), (2, 3, 1, 1000), (0, 3, 5, 7), (2, 1, 4, 4)]
)
def test_tensors_are_what_torch_would_allocate(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    """Shape, dtype and strides of torch.empty, at an aligned address, and writable."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    ours = OutputPool().empty(shape, dtype, channels_last=channels_last)
    own = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    assert (ours.shape, ours.dtype) == (own.shape, own.dtype)
    assert ours.is_contiguous(memory_format=memory_format)
    if ours.numel():
        assert ours.stride() == own.stride()
        assert ours.data_ptr() % ALIGNMENT == 0
    ours.fill_(3)
    assert (ours == 3).all()


def test_a_dropped_tensor_is_used_again() -> None:
    """The next tensor of that shape lies where the dropped one did."""
    pool = OutputPool()
    first = pool.empty(SHAPE, torch.float32)
    where = first.data_ptr()
    second = pool.empty(SHAPE, torch.float32)
    assert second.data_ptr() != where
    del first
    assert pool.idle_bytes() == 4 * 3 * 5 * 7 * 4
    again = pool.empty(SHAPE, torch.float32)
    assert again.data_ptr() == where
    assert pool.idle_bytes() == 0


def _cycle(tensor: torch.Tensor) -> list[Any]:
    ring: list[Any] = [tensor]
    ring.append(ring)
    return ring


ALIASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1:, 0],
    "a transpose": lambda tensor: tensor.permute(0, 2, 3, 1),
    "another dtype": lambda tensor: tensor.view(torch.int32)[0],
    "detached": torch.Tensor.detach,
    "its data": lambda tensor: tensor.data,
    "an array": torch.Tensor.numpy,
    "a view of an array": lambda tensor: tensor.numpy()[1:, :, ::2],
    "a tensor of an array": lambda tensor: torch.from_numpy(tensor.numpy()[2]),
    "its storage": torch.Tensor.untyped_storage,
    "a buffer": lambda tensor: tensor.numpy().data,
    "a capsule": torch.Tensor.__dlpack__,
    "an element of a list": lambda tensor: [{"images": tensor}],
    "saved for backward": lambda tensor: torch.ones(SHAPE, requires_grad=True) * tensor,
    "set": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "a cycle": _cycle,
    "a parameter": lambda tensor: torch.nn.Parameter(tensor[0]),
}


@pytest.mark.parametrize("name", ALIASES)
def test_nothing_is_reused_while_anything_refers_to_it(name: str) -> None:
    """Views, arrays, storages and saved tensors keep the memory; it comes back after them."""
    pool = OutputPool()
    tensor = pool.empty(SHAPE, torch.float32)
    where = tensor.data_ptr()
    alias = ALIASES[name](tensor)
    del tensor
    others = [pool.empty(SHAPE, torch.float32) for _ in range(3)]
    assert where not in {other.data_ptr() for other in others}
    assert address(pool) != where
    del alias, others
    gc.collect()
    kept = [pool.empty(SHAPE, torch.float32) for _ in range(5)]
    assert where in {tensor.data_ptr() for tensor in kept}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(("take", "drop", "alias")), st.integers(1, 3), st.integers(0, 9)),
        max_size=60,
    )
)
def test_live_tensors_never_share_memory(steps: list[tuple[str, int, int]]) -> None:
    """Each keeps the value that was written to it, through any order of takes and drops."""
    pool = OutputPool(keep_bytes=600)
    live: list[tuple[torch.Tensor, int]] = []
    for value, (action, size, which) in enumerate(steps):
        if action == "take":
            live.append((pool.empty((size, 16), torch.float32).fill_(value), value))
        elif live and action == "drop":
            live.pop(which % len(live))
        elif live:
            tensor, own = live[which % len(live)]
            live[which % len(live)] = (tensor[-1:], own)
        assert pool.idle_bytes() <= 600
        for tensor, own in live:
            assert (tensor == own).all()


def test_several_threads() -> None:
    """Threads that take, pass on and drop tensors never see each other's values."""
    pool = OutputPool(keep_bytes=1 << 16)
    passed: queue.SimpleQueue[tuple[torch.Tensor, int]] = queue.SimpleQueue()
    errors: list[str] = []

    def work(number: int) -> None:
        for step in range(400):
            value = number * 1000 + step
            mine = pool.empty((1 + step % 3, 64), torch.int32).fill_(value)
            passed.put((mine[-1], value))
            theirs, expected = passed.get()
            if not ((theirs == expected).all() and (mine == value).all()):
                errors.append(f"{number}: {expected} at step {step}")
            if step % 50 == 0:
                pool.idle_bytes()
            if step % 150 == 149:
                pool.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_idle_memory_is_bounded() -> None:
    """A consumer that kept much and drops all of it leaves at most ``keep_bytes`` behind."""
    pool = OutputPool(keep_bytes=10_000)
    kept = [pool.empty((1000,), torch.float32) for _ in range(20)]
    assert pool.idle_bytes() == 0
    del kept
    assert pool.idle_bytes() <= 10_000
    address(pool, (1000,))
    assert pool.idle_bytes() <= 10_000


def test_old_sizes_go_first() -> None:
    """The size in use stays; another, not asked for since, is let go."""
    pool = OutputPool(keep_bytes=10_000)
    address(pool, (1000,))
    where = address(pool, (500,))
    kept = pool.empty((500,), torch.float32)
    assert kept.data_ptr() == where
    others = [pool.empty((500,), torch.float32) for _ in range(3)]  # 8,000 bytes in all
    del kept, others
    assert pool.idle_bytes() == 8_000
    assert address(pool, (500,)) == where


def test_a_tensor_beyond_the_limit_is_not_kept() -> None:
    """It works, and its memory goes with it."""
    pool = OutputPool(keep_bytes=1000)
    large = pool.empty((1000,), torch.float32).fill_(1)
    assert (large == 1).all()
    del large
    assert pool.idle_bytes() == 0


def test_clear_leaves_live_tensors_alone() -> None:
    """They keep their memory and values; nothing of it is handed out again."""
    pool = OutputPool()
    live = pool.empty(SHAPE, torch.float32).fill_(5)
    dropped = pool.empty(SHAPE, torch.float32)
    del dropped
    pool.clear()
    assert pool.idle_bytes() == 0
    other = pool.empty(SHAPE, torch.float32).fill_(6)
    assert other.data_ptr() != live.data_ptr()
    assert (live == 5).all()


def test_a_consumer_who_keeps_everything() -> None:
    """Many live tensors of one size cost no search through all of them."""
    pool = OutputPool()
    kept = [pool.empty((8,), torch.float32) for _ in range(3000)]
    assert len({tensor.data_ptr() for tensor in kept}) == 3000
