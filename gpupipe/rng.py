"""The three global generators that a dataset's transforms draw from."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_MT19937_BYTES = 624 * 4 + 4  # the key and the position in it

_last: tuple[bytes, Any] = (b"", None)


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of ``random``, NumPy's global generator and torch's CPU generator.

    Taking them costs about 10 us, and 25 us more where NumPy's has changed since the last time.
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> RngState:
        """Take the states as they are."""
        return cls(random.getstate(), _numpy_state(), torch.get_rng_state())

    def restore(self) -> None:
        """Put the states back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 # likewise
        torch.set_rng_state(self.torch)

    def same_as(self, other: RngState) -> bool:
        """Whether both hold the same states."""
        numpy = zip(self.numpy, other.numpy, strict=True)
        return (
            self.python == other.python
            and all(np.array_equal(mine, theirs) for mine, theirs in numpy)
            and torch.equal(self.torch, other.torch)
        )


def _numpy_state() -> Any:
    """NumPy's state; the last one again if its memory shows that nothing was drawn since.

    A normal deviate that NumPy holds back lies elsewhere. It is held back only by drawing, so a
    state that held none back is the same as long as its memory is.
    """
    global _last  # noqa: PLW0603 # one process-wide generator, one process-wide cache
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined] # missing in NumPy's stub
    if not isinstance(bits, np.random.MT19937):
        return np.random.get_state()  # noqa: NPY002 # what the user's transforms draw from
    memory = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)
    seen, state = _last
    if memory != seen:
        legacy: Any = np.random.get_state()  # noqa: NPY002 # likewise
        state, held_back = legacy, bool(legacy[3])
        _last = (b"" if held_back else memory, state)
    return state
