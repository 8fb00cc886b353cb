"""``Resize`` and ``RandomResizedCrop``, in Pillow's arithmetic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1

from gpupipe.draws import exp, integers, uniform
from gpupipe.errors import PlanError
from gpupipe.operators.lowered import CHANNELS, Lowered, functional, positive_pair, reals
from gpupipe.resampling import Filter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Ints, Parameters, Tape

ATTEMPTS = 10
"""How often torchvision draws a crop before it falls back."""


class _Resampled(Lowered):
    """An operator that resizes."""

    commutes = False
    exact_on_tensors = False

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._interpolation = _mode(call.interpolation)
        self._filter = Filter(v1.pil_modes_mapping[self._interpolation])
        self._antialias = getattr(call, "antialias", True)

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:
        """See ``Lowered``."""
        if kind.container == "PIL" and kind.mode not in CHANNELS:
            return f"Pillow resizes mode {kind.mode} by way of another mode"
        smooth = self._interpolation in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
        if tensor and not (smooth and self._antialias):
            return (
                f"torchvision resizes tensors with {self._interpolation.value}, "
                f"antialias={self._antialias} in another arithmetic; resize the PIL image"
            )
        return None


def _mode(interpolation: Any) -> InterpolationMode:
    """Return an interpolation, given by name or as Pillow's number too, as torchvision's."""
    if isinstance(interpolation, int):
        numbers = {number: mode for mode, number in reversed(v1.pil_modes_mapping.items())}
        return numbers[interpolation]
    return InterpolationMode(interpolation)


class Resize(_Resampled):
    """To a size, or to a size of the shorter side."""

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        size = call.size
        self._max_size: int | None = call.max_size
        values = [] if size is None else [size] if isinstance(size, int) else list(size)
        if values:
            positive_pair(values, "size", call)
        elif self._max_size is None:
            raise PlanError("Resize needs a size or a max_size, got neither; give one")
        self._size: list[int] = [int(v) for v in values]
        limit = self._max_size
        if limit is not None and (limit < 1 or (len(values) == 1 and limit <= values[0])):
            raise PlanError(
                f"Resize needs a max_size above its size, got max_size={limit} and size={size}; "
                "raise max_size"
            )

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        height, width = self._target(tape.heights, tape.widths)
        tape.record(self, where, {"height": height, "width": width})
        tape.resize(where, height, width, self._filter)

    def _target(self, heights: Ints, widths: Ints) -> tuple[Ints, Ints]:
        """Return the new sizes, as torchvision computes them."""
        if len(self._size) == 2:  # noqa: PLR2004 # height and width
            height, width = self._size
            return np.full_like(heights, height), np.full_like(widths, width)
        upright = widths <= heights
        short, long = np.where(upright, widths, heights), np.where(upright, heights, widths)
        limit = self._max_size
        if self._size:
            new_short = np.full_like(short, self._size[0])
            new_long = (self._size[0] * long / short).astype(np.int64)
        else:
            new_short, new_long = long, long + (limit or 0) + 1  # too long, in any case
            new_short = (np.float64(limit or 0) * short / long).astype(np.int64)
            return self._ordered(upright, new_short, np.full_like(long, limit or 0))
        if limit is not None:
            over = new_long > limit
            fitted = (limit * new_short / np.maximum(new_long, 1)).astype(np.int64)
            new_short = np.where(over, fitted, new_short)
            new_long = np.where(over, limit, new_long)
        return self._ordered(upright, new_short, new_long)

    @staticmethod
    def _ordered(upright: NDArray[np.bool_], short: Ints, long: Ints) -> tuple[Ints, Ints]:
        return np.where(upright, long, short), np.where(upright, short, long)

    def reference(self, image: Any, parameters: Parameters) -> Any:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        size: Any = self._size or None
        return functional(self.call).resize(
            image, size, self._interpolation, self._max_size, self._antialias
        )

    def describe(self, parameters: Parameters) -> str:
        """See ``Lowered``."""
        return f"resized to {parameters['height']}x{parameters['width']}"


class RandomResizedCrop(_Resampled):
    """A window of random area and aspect ratio, resized."""

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._size = positive_pair(call.size, "size", call)
        self._scale = reals(call.scale, "scale", call, positive=False)
        self._ratio = reals(call.ratio, "ratio", call, positive=True)

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        top, left, height, width = self._windows(tape)
        tape.record(self, where, {"top": top, "left": left, "height": height, "width": width})
        tape.window(where, top, left, height, width)
        tape.resize(where, *self._size, self._filter)

    def _windows(self, tape: Tape) -> tuple[Ints, Ints, Ints, Ints]:
        """Draw windows as ``get_params`` does: ten attempts, then the largest that fits."""
        heights, widths = tape.heights, tape.widths
        height, width = self._fallback(heights, widths)
        top, left = (heights - height) // 2, (widths - width) // 2
        open_ = np.ones(len(heights), bool)
        for attempt in range(ATTEMPTS):
            words = tape.draws.block(self.number, attempt)
            h, w = areas(words, heights, widths, self._scale, self._ratio)
            fits = open_ & (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
            i = integers(words[:, 2], np.maximum(heights - h, 0) + 1)
            j = integers(words[:, 3], np.maximum(widths - w, 0) + 1)
            height, width = np.where(fits, h, height), np.where(fits, w, width)
            top, left = np.where(fits, i, top), np.where(fits, j, left)
            open_ &= ~fits
            if not open_.any():
                break
        return top, left, height, width

    def _fallback(self, heights: Ints, widths: Ints) -> tuple[Ints, Ints]:
        ratio = widths / heights
        low, high = self._ratio
        h = np.where(ratio < low, np.rint(widths / low).astype(np.int64), heights)
        w = np.where(ratio > high, np.rint(heights * high).astype(np.int64), widths)
        return h, w

    def reference(self, image: Any, parameters: Parameters) -> Any:
        """See ``Lowered``."""
        window = [parameters[key] for key in ("top", "left", "height", "width")]
        return functional(self.call).resized_crop(
            image, *window, list(self._size), self._interpolation, antialias=self._antialias
        )

    def describe(self, parameters: Parameters) -> str:
        """See ``Lowered``."""
        return "crop {top},{left} {height}x{width}".format(**parameters) + (
            f", resized to {self._size[0]}x{self._size[1]}"
        )


def areas(
    words: NDArray[np.uint32],
    heights: Ints,
    widths: Ints,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Ints, Ints]:
    """Draw a share of the area and an aspect ratio; return height and width, rounded.

    Args:
        words: uint32 [N, 4]; the first two are used.
        heights: int64 [N], of the images.
        widths: likewise.
        scale: range of the share, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    low, high = (float(np.float32(math.log(r))) for r in ratio)
    share = scale[0] + uniform(words[:, 0]) * (scale[1] - scale[0])
    aspect = exp(low + uniform(words[:, 1]) * (high - low))
    target = heights * widths * share
    height = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    width = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    return height, width
