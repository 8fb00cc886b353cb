"""What every operator with steps has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from gpupipe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Parameters, Tape

CHANNELS = {"L": 1, "RGB": 3}
"""PIL modes whose pixels have no alpha, which Pillow would multiply in before it resizes."""


class Lowered:
    """One operator of a pipeline: how it draws, its steps, and torchvision's own word for it.

    Args:
        call: the transform object.
        ids: numbers for the random streams of operators, counted through the pipeline depth first.

    Attributes:
        call: see above.
        number: of its random stream.
        stage: ``"geometry"`` moves uint8 pixels; ``"erase"`` overwrites finished ones.
        commutes: whether it may stand behind pointwise operators: it only moves pixels.
        exact_on_tensors: whether torchvision's bits are known for uint8 tensors, not only PIL.
        draws_values: whether it writes random values.
    """

    stage: ClassVar[Literal["geometry", "erase"]] = "geometry"
    commutes: bool = True
    exact_on_tensors: ClassVar[bool] = True
    draws_values: bool = False

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        self.call = call
        self.number = next(ids)

    def numbers(self) -> list[int]:
        """Return the random streams that it draws from first."""
        return [self.number]

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:  # noqa: ARG002 # a default
        """Say why images of a kind stay on the CPU, or None.

        Args:
            kind: of the raw images.
            tensor: whether they are tensors by the time they come here.
        """
        return None

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """Draw for a batch and add steps for the samples of ``where``, bool [N]."""
        raise NotImplementedError

    def reference(self, image: Any, parameters: Parameters) -> Any:
        """Return what torchvision's functional makes of an image with one sample's parameters."""
        raise NotImplementedError

    def describe(self, parameters: Parameters) -> str:
        """Say what was drawn for one sample; empty where nothing happened."""
        raise NotImplementedError


def is_v2(call: Any) -> bool:
    """Whether a transform is of torchvision's v2."""
    return type(call).__module__.startswith("torchvision.transforms.v2")


def functional(call: Any) -> Any:
    """Return the functional module that a transform of torchvision's calls."""
    if is_v2(call):
        from torchvision.transforms.v2 import functional as v2

        return v2
    from torchvision.transforms import functional as v1

    return v1


def positive_pair(value: Sequence[int] | int, name: str, call: Any) -> tuple[int, int]:
    """Return a size as height and width.

    Raises:
        PlanError: no positive whole numbers.
    """
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or any(int(v) != v or v < 1 for v in pair):  # noqa: PLR2004 # two sides
        raise PlanError(
            f"{type(call).__name__} needs a {name} of one or two positive whole numbers, got "
            f"{value!r}; give pixels"
        )
    return int(pair[0]), int(pair[1])


def reals(values: Sequence[float], name: str, call: Any, *, positive: bool) -> tuple[float, float]:
    """Return a range as two numbers.

    Raises:
        PlanError: not finite, out of range or reversed.
    """
    low, high = (float(v) for v in values)
    good = (
        np.isfinite([low, high]).all() and low <= high and low >= 0 and not (positive and not low)
    )
    if not good:
        raise PlanError(
            f"{type(call).__name__} needs a {name} (min, max) of finite numbers "
            f"{'above' if positive else 'of at least'} 0, got {tuple(values)!r}; exchange or "
            "correct them"
        )
    return low, high


def colour(fill: Any, channels: int) -> tuple[int, ...] | None:
    """Return a fill as one level per channel, or None where it is something else."""
    if fill is None:
        return (0,) * channels
    values = list(fill) if isinstance(fill, (list, tuple)) else [fill]
    if len(values) not in (1, channels):
        return None
    numbers = values * channels if len(values) == 1 else values
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in numbers):
        return None
    if any(v != int(v) or not 0 <= v <= 255 for v in numbers):  # noqa: PLR2004 # levels
        return None
    return tuple(int(v) for v in numbers)


def fill_of(call: Any) -> Any:
    """Return what a transform fills images with."""
    if not is_v2(call):
        return call.fill
    from torchvision import tv_tensors
    from torchvision.transforms.v2._utils import _get_fill

    return _get_fill(call._fill, tv_tensors.Image)  # noqa: SLF001 # as the transform itself does
