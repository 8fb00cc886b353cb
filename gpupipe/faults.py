"""What becomes of a sample that cannot be read: an error, or another sample in its place.

Every batch keeps its size and the epoch its number of batches, whatever the files hold.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gpupipe import notices
from gpupipe.draws import Draws, integers
from gpupipe.errors import DecodeError

OnError = Literal["raise", "skip", "substitute"]

SUBSTITUTE = 0xFFFF
"""Number of the substitution among the operators of a pipeline, for its random numbers."""

ATTEMPTS = 256
"""Substitutes that are tried for one place."""


@dataclass
class Faults:
    """Counts, logs and replaces bad samples; one for a loader, shared by its threads.

    Attributes:
        on_error: ``"raise"``; ``"skip"``: the place is taken by the next good sample of the same
            batch, drawn anew; ``"substitute"``: by another sample of the dataset, drawn by key.
        max_errors: bad samples (each counted once an epoch) that are borne; None: any number.
        log: file that gets one JSON line for each of them, or None.
        errors: bad samples so far.
    """

    on_error: OnError = "raise"
    max_errors: int | None = None
    log: Path | None = None
    errors: int = 0
    _bad: dict[int, DecodeError] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> None:
        """Begin an epoch: bad files are tried again, and counted again."""
        with self._lock:
            self._bad.clear()

    def replace(
        self,
        indices: Mapping[int, int],
        failed: Mapping[int, DecodeError],
        draw: Callable[[int, int], Draws],
        length: int,
    ) -> dict[int, int]:
        """Choose other samples for the places of a batch that failed.

        Args:
            indices: by place in the batch, the dataset index of every sample.
            failed: by place, what was wrong.
            draw: ``draw(place, index)`` gives the random numbers of a sample.
            length: of the dataset.

        Returns:
            By place, the new dataset index.

        Raises:
            DecodeError: the first failure, where ``on_error`` is ``"raise"``, too many were seen,
                or nothing good is left.
        """
        first = failed[min(failed)]
        if self.on_error == "raise":
            raise first
        for place, error in failed.items():
            self._count(indices[place], error)
        if self.on_error == "skip":
            good = sorted(set(indices) - set(failed))
            if not good:
                raise DecodeError(
                    f"no sample of a batch of {len(indices)} could be read, and on_error='skip' "
                    f"fills the batch from its own good samples; the first error: {first}"
                ) from first
            return {
                place: indices[next((g for g in good if g > place), good[0])] for place in failed
            }
        return {place: self._substitute(draw(place, indices[place]), length) for place in failed}

    def _substitute(self, draws: Draws, length: int) -> int:
        """Return a sample that is not known to be bad, drawn by the key of the one it replaces."""
        for attempt in range(ATTEMPTS):
            words = draws.block(SUBSTITUTE, attempt)
            index = int(integers(words[:, 0], np.array([length]))[0])
            if index not in self._bad:
                return index
        raise DecodeError(
            f"{ATTEMPTS} substitutes for a bad sample were bad, too ({self.errors} errors so far); "
            "look at the files, or at the quarantine log (error_log=)"
        )

    def _count(self, index: int, error: DecodeError) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = error
            self.errors += 1
            too_many = self.max_errors is not None and self.errors > self.max_errors
            if self.log is not None:
                self._write(index, error)
        if self.errors == 1:
            notices.warn(f"a sample was left out (on_error={self.on_error!r}): {error}")
        if too_many:
            raise DecodeError(
                f"{self.errors} samples could not be read, max_errors={self.max_errors}; "
                f"the last: {error}"
            ) from error

    def _write(self, index: int, error: DecodeError) -> None:
        cause = error.__cause__
        line = {
            "time": time.time(),
            "index": index,
            "name": getattr(error, "name", ""),
            "error": type(cause or error).__name__,
            "message": str(error),
        }
        with Path(str(self.log)).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
