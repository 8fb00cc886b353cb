"""Limits measured in the same run: how fast this machine moves the same bytes.

A widening kernel reads uint8 and writes 2 or 4 bytes for each: the limit is a kernel with that
read-to-write ratio that neither gathers nor computes. It exists with ordinary stores and with
stores around the cache, on all CPUs; the faster of the two is the limit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from benchmarks.harness import Contender, Effort, cache_bytes, measure

LANES = 16
"""Bytes that one step reads; 64 or 32 bytes are written."""

ALIGNMENT = 64

BEYOND_CACHE = 8
"""Times the last-level cache that a limit writes."""

PLAIN, STREAMING = LIMITS = ("limit: same bytes, plain stores", "limit: same bytes, streaming")


def _step(size: int, streaming: bool) -> Callable[..., Any]:
    """Return the code for one step: load 16 bytes, widen to ``size`` bytes each, store."""

    def step(_context: Any, _source: Any, _output: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            narrow = ir.VectorType(ir.IntType(8), LANES)
            wide = ir.VectorType(ir.IntType(8 * size), LANES)
            load = builder.load(builder.inttoptr(args[0], narrow.as_pointer()))
            load.align = 1
            target = builder.inttoptr(args[1], wide.as_pointer())
            store = builder.store(builder.zext(load, wide), target)
            store.align = LANES * size
            if streaming:
                hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                store.set_metadata("nontemporal", hint)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    made: Callable[..., Any] = intrinsic(step)
    return made


@cache
def _widen(size: int, streaming: bool) -> Callable[[int, int, int], None]:
    step = _step(size, streaming)

    def widen(source: int, output: int, steps: int) -> None:
        for i in range(steps):
            step(source + i * LANES, output + i * (LANES * size))

    signature = types.void(types.int64, types.int64, types.int64)
    compiled: Callable[[int, int, int], None] = njit(signature, nogil=True)(widen)
    return compiled


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Return touched memory that begins at a cache line."""
    raw = np.ones(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpus())


def _widening(source: NDArray[np.uint8], output: NDArray[np.uint8], streaming: bool) -> None:
    size = output.nbytes // source.nbytes
    kernel = _widen(size, streaming)
    steps = source.nbytes // LANES
    parts = cpus()
    bounds = [steps * part // parts for part in range(parts + 1)]
    begin, out = source.ctypes.data, output.ctypes.data
    work = [
        _helpers().submit(kernel, begin + low * LANES, out + low * LANES * size, high - low)
        for low, high in itertools.pairwise(bounds)
    ]
    for future in work:
        future.result()


def widening(
    source: NDArray[np.uint8], size: int, items: int, nbytes: int | None = None
) -> list[Contender]:
    """Return limits: read ``source`` in order, write ``size`` bytes for each byte of it.

    Args:
        source: contiguous images; repeated, or cut, to what the outputs need.
        size: 2 or 4.
        items: how many images ``source`` is.
        nbytes: of the output memory; None: well beyond the cache.
    """
    wanted = (BEYOND_CACHE * cache_bytes() if nbytes is None else nbytes) // size
    whole = -(-wanted // LANES) * LANES
    flat = np.resize(source.reshape(-1), whole)
    output = aligned(whole * size)
    done = max(1, items * whole // source.size)

    def limit(name: str, streaming: bool) -> Contender:
        def run() -> tuple[int, None]:
            _widening(flat, output, streaming)
            return done, None

        output.fill(0)
        run()
        if not np.array_equal(output.reshape(-1, size)[:, 0], flat):
            raise SystemExit("the limit kernel does not move the bytes")
        note = "no gather, no arithmetic, written memory beyond the cache"
        return Contender(name, run, None, note=note)

    return [limit(PLAIN, streaming=False), limit(STREAMING, streaming=True)]


def memory_speeds(effort: Effort, nbytes: int = 128 << 20) -> dict[str, list[float]]:
    """Return GB/s read and written, on all of torch's threads: a copy, and STREAM's triad."""
    a, b, c = (torch.from_numpy(aligned(nbytes)).view(torch.float32) for _ in range(3))

    def copy() -> tuple[int, None]:
        a.copy_(b)
        return 2 * nbytes, None

    def triad() -> tuple[int, None]:
        torch.add(b, c, alpha=0.5, out=a)
        return 3 * nbytes, None

    rates = measure([Contender("copy", copy, None), Contender("triad", triad, None)], effort)
    return {name: [each / 1e9 for each in every] for name, every in rates.items()}
