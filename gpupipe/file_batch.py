"""One batch of encoded images on its way: read, drawn, decoded, put in its place.

::

    open (each sample: bytes, header) -> lay out (once: parameters, program) -> decode (each sample)

Sizes are known from the headers, so the parameters are drawn for the whole batch before a pixel is
decoded, and only what the crops need is kept. Tasks run on ``workers``; whatever goes wrong in one
is kept and raised by ``wait``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpupipe import decoding
from gpupipe.draws import Draws
from gpupipe.errors import DecodeError, GpupipeError
from gpupipe.faults import Faults
from gpupipe.rendering import Picks, Renderer
from gpupipe.tape import Tape

if TYPE_CHECKING:
    from gpupipe.file_sources import FileSource
    from gpupipe.workers import Task, Workers

GROUP = 2
"""Samples of one task: small, so that the threads finish a batch together."""


class Target(Protocol):
    """Where decoded images go."""

    def arrange(self, batch: FileBatch, tape: Tape) -> bool:
        """Make room; return whether decoding may begin at once. Any thread; again after faults."""

    def put(self, place: int, pixels: NDArray[np.uint8]) -> None:
        """Take image ``place`` of the batch, uint8 [H, W, C]. Runs on any thread."""


@dataclass(frozen=True)
class Reading:
    """What all batches of an epoch share.

    Attributes:
        source: where the bytes are.
        renderer: draws the parameters.
        faults: what becomes of bad samples.
        fast: whether JPEGs are decoded at a smaller scale where the crop allows.
    """

    source: FileSource
    renderer: Renderer
    faults: Faults
    fast: bool = False


class FileBatch:
    """See the module.

    Args:
        number: of the batch; earlier ones go first.
        picks: its samples.
        reading: what it shares with others.
        workers: run the tasks.
        target: where the images go.
    """

    def __init__(
        self, number: int, picks: Picks, reading: Reading, workers: Workers, target: Target
    ) -> None:
        self.picks = picks
        self.scales = np.ones(len(picks), np.int64)
        self.heights = np.zeros(len(picks), np.int64)
        self.widths = np.zeros(len(picks), np.int64)
        self._number = number
        self._reading = reading
        self._workers = workers
        self._target = target
        self._opened: list[Any] = [None] * len(picks)
        self._failed: dict[int, DecodeError] = {}
        self._error: BaseException | None = None
        self._state = threading.Condition(threading.RLock())  # the collector may cancel us within
        self._left = 0
        self._running = 0
        self._layouts = 0
        self._done = self._cancelled = False
        self._run(self._open, range(len(picks)), self._after_opening)

    def decode(self) -> bool:
        """Decode into the room that the target has now.

        Returns:
            Whether all images are in their places. If not, bad samples were replaced, the target
            was arranged anew, and all have to be decoded again.

        Raises:
            BaseException: what went wrong.
        """
        seen = self._layouts
        self._begin_decoding()
        self._wait(lambda: self._done or self._layouts > seen)
        return self._done

    def _begin_decoding(self) -> None:
        self._run(self._decode, range(len(self.picks)), self._after_decoding)

    def wait_laid_out(self) -> None:
        """Wait until the program is known.

        Raises:
            BaseException: what went wrong.
        """
        self._wait(lambda: self._layouts > 0)

    def wait(self) -> None:
        """Wait until every image is in its place.

        Raises:
            BaseException: what went wrong.
        """
        self._wait(lambda: self._done)

    def cancel(self, *, wait: bool = True) -> None:
        """Let no further task touch the target.

        Args:
            wait: for those that run.
        """
        with self._state:
            self._cancelled = True
        self._workers.discard(lambda task: getattr(task, "args", (None,))[0] is self)
        with self._state:
            self._state.wait_for(lambda: not (wait and self._running))

    def _wait(self, reached: Callable[[], bool]) -> None:
        if not self._workers.threads:
            while not (reached() or self._error is not None) and self._workers.help():
                pass
        with self._state:
            self._state.wait_for(lambda: reached() or self._error is not None)
            if self._error is not None:
                error, self._error = self._error, GpupipeError("this batch failed before")
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame

    def _run(
        self, each: Callable[[int], None], places: Sequence[int], then: Callable[[], None]
    ) -> None:
        """Run ``each`` for the places in tasks, and ``then`` after the last."""
        groups = [places[n : n + GROUP] for n in range(0, len(places), GROUP)]
        with self._state:
            self._left = len(groups)
        tasks: list[Task] = [partial(_task, self, each, group, then) for group in groups]
        self._workers.submit(self._number, tasks)

    def _enter(self) -> bool:
        with self._state:
            if self._cancelled or self._error is not None:
                return False
            self._running += 1
            return True

    def _leave(self, error: BaseException | None) -> bool:
        """End a task; return whether it was the last of its stage."""
        with self._state:
            self._running -= 1
            if error is not None and self._error is None:
                self._error = error
            self._left -= 1
            self._state.notify_all()
            return not self._left and self._error is None and not self._cancelled

    def _fault(self, error: BaseException) -> None:
        with self._state:
            if self._error is None:
                self._error = error
            self._state.notify_all()

    def _open(self, place: int) -> None:
        """Read a file and its header."""
        source, row = self._reading.source, int(self.picks.rows[place])
        try:
            data = source.read(row)
            header = decoding.read_header(data)
        except (OSError, DecodeError) as error:
            self._fail(place, error)
            return
        self._opened[place] = data, header
        self.heights[place], self.widths[place] = header.height, header.width

    def _after_opening(self) -> None:
        if self._failed:
            self._replace()
            return
        renderer, picks = self._reading.renderer, self.picks
        tape = renderer.tape(picks, self.heights, self.widths)
        if self._reading.fast:
            jpeg = np.array([header.kind == "jpeg" for _, header in self._opened])
            self.scales = np.where(jpeg, tape.allowed_scales(), 1)
            tape.shrink(self.scales)
        ready = self._target.arrange(self, tape)
        with self._state:
            self._layouts += 1
            self._state.notify_all()
        if ready:
            self._begin_decoding()

    def _decode(self, place: int) -> None:
        data, header = self._opened[place]
        try:
            pixels = decoding.decode(data, header, scale=int(self.scales[place]))
        except (OSError, DecodeError) as error:
            self._fail(place, error)
            return
        self._target.put(place, pixels)

    def _after_decoding(self) -> None:
        if self._failed:
            self._replace()
            return
        self._opened = []
        with self._state:
            self._done = True
            self._state.notify_all()

    def _fail(self, place: int, error: Exception) -> None:
        row, index = int(self.picks.rows[place]), int(self.picks.indices[place])
        name = self._reading.source.name(row)
        failure = DecodeError(f"index {index}, {name}: {error}")
        failure.__cause__ = error
        failure.name = name  # type: ignore[attr-defined] # for the quarantine log
        with self._state:
            self._failed[place] = failure

    def _replace(self) -> None:
        """Put other samples in the places of bad ones, and open those."""
        reading, picks = self._reading, self.picks
        failed, self._failed = dict(sorted(self._failed.items())), {}
        stream = reading.renderer.stream

        def draw(place: int, index: int) -> Draws:
            here = picks.positions[place : place + 1] + 1
            return Draws(stream.seed, stream.epoch, np.array([index]), here)

        others = reading.faults.replace(
            dict(enumerate(picks.indices.tolist())), failed, draw, len(reading.source)
        )
        indices = picks.indices.copy()
        indices[list(others)] = list(others.values())
        anew = picks.anew.copy()
        anew[list(others)] = True
        self.picks = Picks(indices, reading.source.locate(indices), picks.positions, anew)
        self._run(self._open, sorted(others), self._after_opening)


def _task(
    batch: FileBatch,
    each: Callable[[int], None],
    places: Sequence[int],
    then: Callable[[], None],
) -> None:
    """Run one task of a batch; what goes wrong is the batch's to tell."""
    if not batch._enter():  # noqa: SLF001 # the other half of the class
        return
    error: BaseException | None = None
    try:
        for place in places:
            each(place)
    except BaseException as raised:  # noqa: BLE001 # raised by wait()
        error = raised
    if batch._leave(error):  # noqa: SLF001 # likewise
        try:
            then()
        except BaseException as raised:  # noqa: BLE001 # raised by wait()
            batch._fault(raised)  # noqa: SLF001 # likewise
