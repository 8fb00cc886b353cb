"""An epoch: indices are read as far ahead as nobody can tell, and batches come out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpupipe.errors import DecodeError, GpupipeError, IndexRangeError, InputError

if TYPE_CHECKING:
    from gpupipe.batch import Assemble
    from gpupipe.plan import Plan
    from gpupipe.sampling import IndexBatches
    from gpupipe.staging import Batch

CHUNK_BYTES = 8 << 20
"""Outputs that one launch makes at most, of several batches."""

PROGRAM_CHUNK_BYTES = 32 << 20
"""Likewise, where parameters are drawn for every batch: many at once cost little more than one."""

MAX_CHUNK = 32
"""Batches in one launch at most."""

Pick = Callable[[NDArray[np.int64], int], Any]
"""``pick(indices, position)``: what the feed wants to know of a batch that begins at a position of
the epoch."""


class Feed(Protocol):
    """Makes batches in order."""

    pending: int

    @property
    def picks(self) -> Any:
        """The samples of the batch delivered last, where they may differ from what was asked."""

    def submit(self, batches: Any) -> None:
        """Ask for a chunk of batches."""

    def next(self) -> Batch:
        """Return the next batch."""

    def close(self) -> None:
        """Free everything."""


class EpochBatches(Iterator[Any]):
    """The batches of one epoch.

    Attributes:
        indices: int64 [N]: the dataset indices of the batch that was returned last.
    """

    indices: NDArray[np.int64] = np.empty(0, np.int64)


class Batches(EpochBatches):
    """One epoch over an array source."""

    def __init__(
        self,
        indices: IndexBatches,
        pick: Pick,
        feed: Feed,
        assemble: Assemble,
        plan: Plan,
        *,
        sample_bytes: int,
        depth: int,
        free_ahead: int,
        most: int = MAX_CHUNK,
        chunk_bytes: int | None = None,
    ) -> None:
        self._indices = indices
        self._pick = pick
        self._position = 0
        self._most = most
        self._chunk_bytes = chunk_bytes
        self._feed = feed
        self._assemble = assemble
        self._plan = plan
        self._sample_bytes = sample_bytes
        self._chunk = 1  # the first batch comes soon, later ones many at a time
        self._depth = depth
        self._free_ahead = free_ahead
        self._taken: deque[NDArray[np.int64]] = deque()
        self._sizes: deque[int] = deque()
        self._error: BaseException | None = None

    def __next__(self) -> Any:
        """Return the next batch."""
        try:
            return self._advance()
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C anywhere in here: what was done is not known
            self._error = GpupipeError(
                f"this iterator was interrupted by {type(error).__name__}; iterate the loader anew"
            )
            self._taken.clear()
            raise

    def _advance(self) -> Any:
        if len(self._sizes) < self._depth and self._error is None:
            self.top_up()
        if not self._taken:
            raise self._end()
        try:
            images, columns = self._feed.next()
        except DecodeError:  # only this batch: the next can still be asked for
            self._took()
            raise
        self.indices = self._took()
        picks = self._feed.picks
        if picks is not None:
            self.indices = picks.indices  # others may stand in the places of bad samples
        self._plan.batches += 1
        return self._assemble(images, columns, self.indices)

    def _took(self) -> NDArray[np.int64]:
        """Count a batch as delivered; return its indices."""
        self._sizes[0] -= 1
        if not self._sizes[0]:
            self._sizes.popleft()
        return self._taken.popleft()

    def _end(self) -> BaseException:
        """Return what ends the epoch, or, once, what a bad batch of the sampler's raised."""
        error = self._error or StopIteration()
        if isinstance(error, (IndexRangeError, InputError)):
            self._error = None  # as in torch, the batch after it can still be asked for
            return error
        self.close()
        self._error = StopIteration()
        return error

    def top_up(self) -> None:
        """Read indices, as far ahead as nobody can tell, and ask for their batches."""
        while len(self._sizes) < self._depth and self._may_read():
            batches: list[NDArray[np.int64]] = []
            try:
                batches.append(self._read())
                for _ in range(self._more(len(batches[0]))):
                    batches.append(self._read())  # noqa: PERF401 # what came before an error counts
            except Exception as error:  # noqa: BLE001 # raised once the batches before it are out
                self._error = error
            self._chunk = min(2 * self._chunk, self._most)
            if batches:
                self._taken.extend(batches)
                self._sizes.append(len(batches))
                self._feed.submit([self._picked(batch) for batch in batches])
            if self._error is not None:
                return

    def _picked(self, batch: NDArray[np.int64]) -> Any:
        picked = self._pick(batch, self._position)
        self._position += len(batch)
        return picked

    def _read(self) -> NDArray[np.int64]:
        batch = next(self._indices)
        if not len(batch):
            raise InputError(
                "the batch sampler gave an empty batch, and images of none cannot be stacked; "
                "give at least one index per batch"
            )
        return batch

    def _more(self, size: int) -> int:
        """Return how many batches may join one of ``size`` images in its launch."""
        room = (self._chunk_bytes or CHUNK_BYTES) // max(1, size * self._sample_bytes)
        unseen = max(self._indices.ahead(), self._free_ahead - len(self._taken) - 1)
        return max(0, min(self._chunk - 1, room - 1, unseen))

    def _may_read(self) -> bool:
        ahead = len(self._taken)
        return ahead == 0 or self._indices.ahead() > 0 or ahead < self._free_ahead

    def close(self) -> None:
        """Stop threads and free memory; the iterator is at its end."""
        self._taken.clear()
        self._sizes.clear()
        self._feed.close()
        if self._error is None:
            self._error = StopIteration()
