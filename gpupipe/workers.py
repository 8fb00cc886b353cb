"""Threads that read and decode files: tasks in the order of their batches, no processes.

Decoding releases the GIL, so threads are enough; nothing is pickled, copied between processes or
started anew at each epoch. The threads hold no reference to the loader: they end when it does.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

Task = Callable[[], None]
"""Raises nothing: what goes wrong in a task is kept by whoever waits for it."""


@dataclass
class _Queue:
    """What the threads hold: the tasks, and nothing of the loader.

    Attributes:
        tasks: (priority, order of arrival, task), a heap.
        busy_s: time that threads spent in tasks, s.
    """

    tasks: list[tuple[int, int, Task]] = field(default_factory=list)
    changed: threading.Condition = field(
        default_factory=lambda: threading.Condition(threading.RLock())
    )
    closed: bool = False
    busy_s: float = 0.0

    def take(self, *, wait: bool) -> Task | None:
        """Return the most urgent task; None at the end, or where there is none to wait for."""
        with self.changed:
            while wait and not self.tasks and not self.closed:
                self.changed.wait()
            return heapq.heappop(self.tasks)[2] if self.tasks and not self.closed else None

    def serve(self) -> None:
        """Run tasks until the queue is closed."""
        while (task := self.take(wait=True)) is not None:
            start = time.perf_counter()
            task()
            del task  # a waiting thread keeps no batch alive
            with self.changed:
                self.busy_s += time.perf_counter() - start


class Workers:
    """A queue of tasks and the threads that serve it, started at the first task.

    Args:
        threads: how many; with 0 whoever waits for a result runs the tasks (``help``).
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pid = 0
        self._started: list[threading.Thread] = []
        self._numbers = count()
        self._queue = _Queue()
        weakref.finalize(self, Workers._close, self._queue, os.getpid())

    @staticmethod
    def _close(queue: _Queue, pid: int) -> None:
        if os.getpid() != pid:
            return  # a forked child: a thread of the parent may have held the lock
        with queue.changed:
            queue.closed = True
            queue.tasks.clear()
            queue.changed.notify_all()

    @property
    def busy_s(self) -> float:
        """Time that the threads spent in tasks so far, s, all of them together."""
        return self._queue.busy_s

    def submit(self, priority: int, tasks: list[Task]) -> None:
        """Ask for tasks; those of a smaller priority run first, equals in their order."""
        self._start()
        with self._queue.changed:
            for task in tasks:
                heapq.heappush(self._queue.tasks, (priority, next(self._numbers), task))
            self._queue.changed.notify(len(tasks))

    def help(self) -> bool:
        """Run one task on the calling thread; return whether there was one."""
        task = self._queue.take(wait=False)
        if task is None:
            return False
        task()
        return True

    def discard(self, belongs: Callable[[Task], bool]) -> None:
        """Forget the waiting tasks of which ``belongs`` is true."""
        with self._queue.changed:
            self._queue.tasks = [entry for entry in self._queue.tasks if not belongs(entry[2])]
            heapq.heapify(self._queue.tasks)

    def close(self) -> None:
        """End the threads once they have finished the tasks at hand; waiting ones are forgotten."""
        self._close(self._queue, os.getpid())
        if self._pid == os.getpid():
            for thread in self._started:
                if thread is not threading.current_thread():
                    thread.join()
        self._started = []

    def _start(self) -> None:
        """Start the threads, once in a process: a forked child has none of its parent's."""
        if self._pid == os.getpid():
            return
        if self._pid:
            self._queue = _Queue()  # the parent's lock may have been held at the fork
            weakref.finalize(self, Workers._close, self._queue, os.getpid())
        self._pid = os.getpid()
        self._started = [
            threading.Thread(target=self._queue.serve, name=f"gpupipe-decode-{number}", daemon=True)
            for number in range(self.threads)
        ]
        for thread in self._started:
            thread.start()
