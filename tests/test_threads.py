"""``split`` covers every item once, and nothing runs any more when it returns or raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpupipe import threads


@settings(deadline=None, max_examples=80)
@given(count=st.integers(0, 40), parts=st.none() | st.integers(0, 12))
def test_every_item_once(count: int, parts: int | None) -> None:
    """The ranges are disjoint, in all of equal size but for one, and cover everything."""
    ranges: list[tuple[int, int]] = []
    threads.split(lambda begin, end: ranges.append((begin, end)), count, parts)
    items = [item for begin, end in ranges for item in range(begin, end)]
    assert sorted(items) == list(range(count))
    sizes = {end - begin for begin, end in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_ranges_run_at_the_same_time() -> None:
    """Two ranges meet: helpers do not wait for the caller."""
    meeting = threading.Barrier(2, timeout=30)
    seen: set[int] = set()

    def run(_begin: int, _end: int) -> None:
        seen.add(threading.get_ident())
        meeting.wait()

    threads.split(run, 2, 2)
    assert len(seen) == 2


def test_busy_helpers_do_not_hold_up_the_caller() -> None:
    """While another call has the helpers, the caller does all the ranges itself."""
    leave = threading.Event()
    in_all = threads._POOL.parts + 1
    entered = threading.Semaphore(0)

    def block(_begin: int, _end: int) -> None:
        entered.release()
        leave.wait(30)

    blocking = threading.Thread(target=threads.split, args=(block, in_all, in_all))
    blocking.start()
    for _ in range(max(2, threads._POOL.parts)):
        assert entered.acquire(timeout=30)
    ran: list[int] = []
    threads.split(lambda begin, _end: ran.append(begin), 4, 4)
    leave.set()
    blocking.join()
    assert sorted(ran) == [0, 1, 2, 3]


class PlannedError(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_exception_reaches_the_caller_after_all_have_stopped(bad: int) -> None:
    """Whichever range fails; the next call works."""
    running: list[int] = []

    def run(begin: int, _end: int) -> None:
        running.append(begin)
        try:
            time.sleep(0.02)
            if begin == bad:
                raise PlannedError(begin)
        finally:
            running.remove(begin)

    for _ in range(5):
        with pytest.raises(PlannedError, match=str(bad)):
            threads.split(run, 3, 3)
        assert running == []
    threads.split(lambda _begin, _end: None, 3, 3)


def test_an_interrupt_waits_for_the_helpers() -> None:
    """KeyboardInterrupt, once and again while waiting, is raised when no helper runs."""
    caller = threading.get_ident()
    started, running = threading.Event(), threading.Event()

    def run(_begin: int, _end: int) -> None:
        if threading.get_ident() == caller:
            assert started.wait(30)
            signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(5)  # the interrupt ends it
            return
        running.set()
        started.set()
        time.sleep(0.1)
        signal.pthread_kill(caller, signal.SIGINT)  # the caller waits for this helper now
        time.sleep(0.3)
        running.clear()

    with pytest.raises(KeyboardInterrupt):
        threads.split(run, 2, 2)
    assert not running.is_set()
    assert started.is_set()


def test_a_forked_child_can_split() -> None:
    """The child has none of its parent's threads and starts its own, even amid a call."""
    code = """
import os, sys, threading, time, warnings
from gpupipe import threads
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point

def work():
    for _ in range(200):
        threads.split(lambda begin, end: time.sleep(1e-4), 8, 4)

threads.split(lambda begin, end: None, 8, 4)
busy = threading.Thread(target=work)
busy.start()
for _ in range(10):
    child = os.fork()
    if not child:
        seen = []
        threads.split(lambda begin, end: seen.append(threading.get_ident()), 64, 64)
        meeting = threading.Barrier(2, timeout=30)
        threads.split(lambda begin, end: meeting.wait(), 2, 2)
        os._exit(0 if len(seen) == 64 else 1)
    assert os.waitpid(child, 0)[1] == 0
busy.join()
print("all well")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "all well", done.stderr


def test_split_works_while_the_interpreter_ends() -> None:
    """At exit no thread can be started: the caller does it all."""
    code = """
import atexit
from gpupipe import threads
seen = []
def last():
    threads.split(lambda begin, end: seen.append(begin), 4, 4)
    print(sorted(seen))
threads.split(lambda begin, end: None, 4, 4)
atexit.register(last)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "[0, 1, 2, 3]", done.stderr


def test_helpers_leave_with_the_process() -> None:
    """Threads of the pool do not keep the interpreter from ending."""
    code = "from gpupipe import threads; threads.split(lambda b, e: None, 8, 8); print('end')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "end"


@pytest.mark.parametrize(
    ("world", "share"),
    [(None, 8), ("1", 8), ("2", 4), ("3", 2), ("100", 1), ("0", 8), ("-2", 8), ("many", 8)],
)
def test_cpus_are_shared_between_local_ranks(
    world: str | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOCAL_WORLD_SIZE divides; what is no positive number is ignored; never less than one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: float("inf"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
    assert threads.cpu_count() == share


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000", 1),
        ("5000 100000", 1),
        ("", 8),
    ],
)
def test_cpus_that_the_container_grants(
    content: str, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cgroup's quota counts, rounded down, at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _path, **_options: content)
    assert threads.cpu_count() == cpus
