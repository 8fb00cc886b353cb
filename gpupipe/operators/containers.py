"""``RandomApply``, ``RandomChoice`` and ``RandomOrder`` over operators that have steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpupipe.draws import uniform
from gpupipe.errors import PlanError
from gpupipe.operators.crop import probability
from gpupipe.operators.lowered import Lowered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Parameters, Tape


class Container(Lowered):
    """Operators that are played for some samples, or in some order.

    Args:
        call: the transform object.
        ids: see ``Lowered``; the children count behind their container.
        children: its operators, lowered.
    """

    def __init__(self, call: Any, ids: Iterator[int], children: Sequence[Lowered]) -> None:
        super().__init__(call, ids)
        self.children = list(children)
        self.commutes = all(child.commutes for child in children)

    @property
    def exact_on_tensors(self) -> bool:  # type: ignore[override] # a constant of single operators
        """Whether all children are."""
        return all(child.exact_on_tensors for child in self.children)

    def numbers(self) -> list[int]:
        """See ``Lowered``."""
        return [self.number, *(n for child in self.children for n in child.numbers())]

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:
        """See ``Lowered``."""
        reasons = (child.check(kind, tensor=tensor) for child in self.children)
        return next((reason for reason in reasons if reason), None)

    def reference(self, image: Any, parameters: Parameters) -> Any:
        """Never asked: the children record what they did."""
        raise NotImplementedError

    def describe(self, parameters: Parameters) -> str:
        """Never asked: see ``reference``."""
        raise NotImplementedError


class RandomApply(Container):
    """All children, or none."""

    def __init__(self, call: Any, ids: Iterator[int], children: Sequence[Lowered]) -> None:
        super().__init__(call, ids, children)
        self._p = probability(call)

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        chosen = where & (uniform(tape.draws.block(self.number)[:, 0]) < self._p)
        for child in self.children:
            child.play(tape, chosen)


class RandomChoice(Container):
    """One of the children."""

    def __init__(self, call: Any, ids: Iterator[int], children: Sequence[Lowered]) -> None:
        super().__init__(call, ids, children)
        given = getattr(call, "probabilities", None) or call.p  # v2 renamed it
        weights = np.array([1.0] * len(children) if given is None else list(given), np.float64)
        if len(weights) != len(children) or not (weights >= 0).all() or not weights.sum() > 0:
            raise PlanError(
                f"RandomChoice needs a p of at least 0 for each of {len(children)} transforms, "
                f"got {given!r}; correct it"
            )
        self._bounds = np.cumsum(weights / weights.sum())

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        drawn = uniform(tape.draws.block(self.number)[:, 0])
        choice = np.searchsorted(self._bounds[:-1], drawn, side="right")
        for number, child in enumerate(self.children):
            child.play(tape, where & (choice == number))


class RandomOrder(Container):
    """All children, in random order."""

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        count = len(self.children)
        words = np.concatenate(
            [tape.draws.block(self.number, block) for block in range(-(-count // 4))], axis=1
        )
        order = np.argsort(words[:, :count], axis=1, kind="stable")
        for place in range(count):
            for number, child in enumerate(self.children):
                child.play(tape, where & (order[:, place] == number))
