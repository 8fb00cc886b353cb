"""A few threads for kernels that release the GIL; the caller is one of them.

Why not numba's ``prange``: its layer is chosen per process (OpenMP, TBB or workqueue, 6 to 180 us
an empty launch), GNU OpenMP does not survive a fork, and workqueue refuses concurrent callers.
Ordinary threads that call ``nogil`` kernels cost some 30 us a dispatch, on every machine alike,
which several batches per dispatch make small. See ``docs/cpu.md``.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_THREADS = 8
"""More threads than this do not make a memory-bound kernel faster."""


def _cgroup_cpus() -> float:
    """CPUs that the cgroup (version 2) grants, or infinity where it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return float("inf")


def cpu_count() -> int:
    """Return the CPUs this process may use: affinity and cgroup, divided by LOCAL_WORLD_SIZE."""
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    world = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(world) if world.isdecimal() and int(world) > 0 else 1
    return max(1, int(min(affinity, _cgroup_cpus()) // ranks))


class _Pool:
    """The helper threads of this process, started at the first use and dropped after a fork."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Forget the threads: a forked child has none of them."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._parts = 0

    @property
    def parts(self) -> int:
        """How many threads share a job, the caller among them; counted once."""
        if not self._parts:
            self._parts = min(cpu_count(), MAX_THREADS)
        return self._parts

    def executor(self) -> ThreadPoolExecutor:
        """Return the helpers, one fewer than the CPUs."""
        with self._lock:
            if self._executor is None:
                helpers = max(1, self.parts - 1)
                self._executor = ThreadPoolExecutor(helpers, thread_name_prefix="gpupipe-cpu")
            return self._executor


_POOL = _Pool()


def split(run: Callable[[int, int], None], count: int, parts: int | None = None) -> None:
    """Call ``run(begin, end)`` over ``range(count)``, in parallel, and wait for all of it.

    Args:
        run: releases the GIL; must not raise for one range only.
        count: how many items there are.
        parts: how many ranges; default: one for each CPU, at most ``MAX_THREADS``.
    """
    if parts is None:
        parts = _POOL.parts
    parts = max(1, min(parts, count))
    if parts == 1:
        run(0, count)
        return
    bounds = [count * part // parts for part in range(parts + 1)]
    helpers = _POOL.executor()
    futures = [
        helpers.submit(run, begin, end) for begin, end in zip(bounds[1:-1], bounds[2:], strict=True)
    ]
    try:
        run(bounds[0], bounds[1])
    finally:
        # Also after KeyboardInterrupt: nobody may free memory that a helper still writes.
        for future in futures:
            future.exception()
    for future in futures:
        future.result()
