"""A few threads for kernels that release the GIL; the caller is one of them.

Why not numba's ``prange``: its layer is chosen per process (OpenMP, TBB or workqueue, whose
launches cost very differently), GNU OpenMP does not survive a fork, and workqueue refuses
concurrent callers. Ordinary threads that call ``nogil`` kernels behave the same everywhere, and
several batches per dispatch make their cost small. See ``docs/cpu.md``.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def available() -> int:
    """Return how many threads share a job, the caller among them; counted once a process."""
    return _POOL.parts


class _Job:
    """Ranges of one call, taken one by one by the caller and by helpers that have the time."""

    def __init__(self, run: Callable[[int, int], None], count: int, parts: int) -> None:
        self._run = run
        self._ranges = [
            (count * part // parts, count * (part + 1) // parts) for part in reversed(range(parts))
        ]
        self._helping = 0
        self._idle = threading.Condition()
        self.error: BaseException | None = None

    def take(self) -> bool:
        """Run one range; return whether there was one."""
        with self._idle:
            if not self._ranges:
                return False
            begin, end = self._ranges.pop()
        self._run(begin, end)
        return True

    def help(self) -> None:
        """Run ranges on a helper thread; its error is the caller's to raise."""
        with self._idle:
            self._helping += 1
        try:
            while self.take():
                pass
        except BaseException as error:  # noqa: BLE001 # raised by ``split``
            self.error = error
        finally:
            with self._idle:
                self._helping -= 1
                self._idle.notify_all()

    def finish(self) -> None:
        """Wait until no helper runs a range, whatever interrupts the wait; hand out no more."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self._idle:
                    self._ranges.clear()
                    self._idle.wait_for(lambda: not self._helping)
                break
            except BaseException as error:  # noqa: BLE001 # raised once nothing runs
                interrupt = error
        if interrupt is not None:
            raise interrupt


def split(run: Callable[[int, int], None], count: int, parts: int | None = None) -> None:
    """Call ``run(begin, end)`` over ``range(count)``, in parallel, and wait for all of it.

    When it returns or raises, whatever the reason, no thread runs ``run`` any more: its memory may
    be freed. After an exception in one range some of the others may not have run.

    Args:
        run: releases the GIL.
        count: how many items there are.
        parts: how many ranges; default: one for each CPU, at most ``MAX_THREADS``.
    """
    if parts is None:
        parts = _POOL.parts
    parts = max(1, min(parts, count))
    if parts == 1:
        run(0, count)
        return
    job = _Job(run, count, parts)
    try:
        with suppress(RuntimeError):  # the interpreter is shutting down: the caller does it all
            for _ in range(parts - 1):
                _POOL.executor().submit(job.help)
        while job.take():
            pass
    finally:
        job.finish()
    if job.error is not None:
        raise job.error
