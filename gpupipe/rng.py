"""The three global generators that a dataset's transforms draw from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class RngState:
    """The states of ``random``, NumPy's global generator and torch's CPU generator.

    Taking them costs about 35 us, most of it NumPy's.
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> RngState:
        """Take the states as they are."""
        numpy: Any = np.random.get_state()  # noqa: NPY002 # what the user's transforms draw from
        return cls(random.getstate(), numpy, torch.get_rng_state())

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
