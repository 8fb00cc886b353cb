"""``CenterCrop``, ``RandomCrop``, ``Pad`` and the flips: which pixel goes where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpupipe.draws import integers, uniform
from gpupipe.errors import PlanError, SourceError
from gpupipe.operators.lowered import (
    Lowered,
    colour,
    fill_of,
    functional,
    is_v2,
    positive_pair,
)
from gpupipe.program import Padding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Ints, Parameters, Tape

_MODES = {
    "constant": Padding.CONSTANT,
    "edge": Padding.EDGE,
    "reflect": Padding.REFLECT,
    "symmetric": Padding.SYMMETRIC,
}


class CenterCrop(Lowered):
    """The middle; a smaller image is padded with 0 first."""

    commutes = False  # it pads levels with 0

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._size = positive_pair(call.size, "size", call)

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        height, width = self._size
        top, left = _middle(tape.heights, height), _middle(tape.widths, width)
        tape.record(self, where, {"top": top, "left": left})
        tape.window(where, top, left, height, width)

    def reference(self, image: Any, parameters: Parameters) -> Any:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return functional(self.call).center_crop(image, list(self._size))

    def describe(self, parameters: Parameters) -> str:
        """See ``Lowered``."""
        return "center crop {},{} {}x{}".format(parameters["top"], parameters["left"], *self._size)


def _middle(size: Ints, crop: int) -> Ints:
    """Return where a centered crop begins, as torchvision rounds: half to even."""
    smaller = -((crop - size) // 2)
    return np.where(size < crop, smaller, np.rint((size - crop) / 2.0).astype(np.int64))


class _Padded(Lowered):
    """An operator with a border."""

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._padding_mode = _MODES[call.padding_mode]
        self._fill = fill_of(call)

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:
        """See ``Lowered``."""
        if colour(self._fill, kind.channels) is None:
            return (
                f"its fill {self._fill!r} is no level 0..255 for each of {kind.channels} channels"
            )
        small = self._padding_mode in (Padding.REFLECT, Padding.SYMMETRIC)
        return (
            "torchvision pads tensors so only by less than their size" if tensor and small else None
        )

    def _pad(
        self, tape: Tape, where: NDArray[np.bool_], left: Any, top: Any, right: Any, bottom: Any
    ) -> None:
        tape.window(
            where,
            -np.asarray(top),
            -np.asarray(left),
            tape.heights + top + bottom,
            tape.widths + left + right,
            self._padding_mode,
            colour(self._fill, tape.channels),
        )


def _borders(padding: Any, call: Any) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom."""
    values = [padding] if isinstance(padding, int) else list(padding)
    values = values * 4 if len(values) == 1 else values
    values = values * 2 if len(values) == 2 else values  # noqa: PLR2004 # left and top
    if len(values) != 4 or any(int(v) != v for v in values):  # noqa: PLR2004 # four sides
        raise PlanError(
            f"{type(call).__name__} needs a padding of 1, 2 or 4 whole numbers, got {padding!r}"
        )
    left, top, right, bottom = (int(v) for v in values)
    return left, top, right, bottom


class Pad(_Padded):
    """A border on all sides."""

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._borders = _borders(call.padding, call)
        self.commutes = self._padding_mode is not Padding.CONSTANT

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:
        """See ``Lowered``."""
        if min(self._borders) < 0:
            return "a negative padding"
        return super().check(kind, tensor=tensor)

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        tape.record(self, where, {})
        self._pad(tape, where, *self._borders)

    def reference(self, image: Any, parameters: Parameters) -> Any:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return functional(self.call).pad(
            image, list(self._borders), self._fill or 0, self.call.padding_mode
        )

    def describe(self, parameters: Parameters) -> str:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return "padded by {},{},{},{}".format(*self._borders)


class RandomCrop(_Padded):
    """A window anywhere, of the image or of the image with a border."""

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._size = positive_pair(call.size, "size", call)
        padding = call.padding
        self._borders = None if padding is None else _borders(padding, call)
        self._if_needed = bool(call.pad_if_needed)
        mirrors = self._padding_mode in (Padding.REFLECT, Padding.SYMMETRIC)
        self._twice = mirrors and self._if_needed and not is_v2(call)
        pads = self._borders is not None or self._if_needed
        self.commutes = not pads or self._padding_mode is not Padding.CONSTANT

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:
        """See ``Lowered``."""
        if self._borders is None and not self._if_needed:
            return None
        if self._borders is not None and min(self._borders) < 0:
            return "a negative padding"
        return super().check(kind, tensor=tensor)

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        height, width = self._size
        borders = self._border_of(tape.heights, tape.widths)
        if borders is not None and self._twice:
            # v1 pads what it has padded before: that shows where the border mirrors the image.
            own = self._borders or (0, 0, 0, 0)
            self._pad(tape, where, *own)
            self._pad(
                tape, where, *(all_ - first for all_, first in zip(borders, own, strict=True))
            )
        elif borders is not None:
            self._pad(tape, where, *borders)
        room_h, room_w = tape.heights - height, tape.widths - width
        small = where & ((room_h < 0) | (room_w < 0))
        if small.any():
            n = int(np.flatnonzero(small)[0])
            raise SourceError(
                f"Required crop size {self._size} is larger than input image size "
                f"({tape.heights[n]}, {tape.widths[n]}); use RandomCrop(pad_if_needed=True), a "
                "smaller crop, or a Resize before it"
            )
        words = tape.draws.block(self.number)
        top = integers(words[:, 0], np.maximum(room_h, 0) + 1)
        left = integers(words[:, 1], np.maximum(room_w, 0) + 1)
        four = np.zeros((len(where), 4), np.int64)
        if borders is not None:
            four[:] = np.stack(np.broadcast_arrays(*borders), axis=-1)
        tape.record(self, where, {"top": top, "left": left, "borders": four})
        tape.window(where, top, left, height, width)

    def _border_of(self, heights: Ints, widths: Ints) -> tuple[Any, Any, Any, Any] | None:
        """Return left, top, right, bottom; padding that is needed comes on both sides."""
        if self._borders is None and not self._if_needed:
            return None
        left, top, right, bottom = self._borders or (0, 0, 0, 0)
        if not self._if_needed:
            return left, top, right, bottom
        more_h = np.maximum(self._size[0] - (heights + top + bottom), 0)
        more_w = np.maximum(self._size[1] - (widths + left + right), 0)
        return left + more_w, top + more_h, right + more_w, bottom + more_h

    def reference(self, image: Any, parameters: Parameters) -> Any:
        """See ``Lowered``."""
        module = functional(self.call)
        fill, mode = self._fill or 0, self.call.padding_mode
        if is_v2(self.call):
            if any(parameters["borders"]):
                image = module.pad(image, parameters["borders"], fill, mode)
        else:
            image = self._pad_v1(image, module, fill, mode)
        return module.crop(image, parameters["top"], parameters["left"], *self._size)

    def _pad_v1(self, image: Any, module: Any, fill: Any, mode: str) -> Any:
        """Pad in the three steps of v1's ``forward``."""
        if self._borders is not None:
            image = module.pad(image, list(self._borders), fill, mode)
        _, height, width = module.get_dimensions(image)
        if self._if_needed and width < self._size[1]:
            image = module.pad(image, [self._size[1] - width, 0], fill, mode)
        if self._if_needed and height < self._size[0]:
            image = module.pad(image, [0, self._size[0] - height], fill, mode)
        return image

    def describe(self, parameters: Parameters) -> str:
        """See ``Lowered``."""
        text = "crop {},{} {}x{}".format(parameters["top"], parameters["left"], *self._size)
        borders = parameters["borders"]
        return f"padded by {','.join(map(str, borders))}, {text}" if any(borders) else text


class Flip(Lowered):
    """``RandomHorizontalFlip`` (axes 1) and ``RandomVerticalFlip`` (axes 2)."""

    def __init__(self, call: Any, ids: Iterator[int], axes: int) -> None:
        super().__init__(call, ids)
        self._p = probability(call)
        self._axes = axes

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        flipped = where & (uniform(tape.draws.block(self.number)[:, 0]) < self._p)
        tape.record(self, flipped, {})
        tape.flip(flipped, self._axes)

    def reference(self, image: Any, parameters: Parameters) -> Any:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        module = functional(self.call)
        return module.hflip(image) if self._axes == 1 else module.vflip(image)

    def describe(self, parameters: Parameters) -> str:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return "flipped" if self._axes == 1 else "flipped upside down"


def probability(call: Any) -> float:
    """Return a transform's ``p``.

    Raises:
        PlanError: not within 0..1.
    """
    p = float(call.p)
    if not 0.0 <= p <= 1.0:
        raise PlanError(f"{type(call).__name__} needs a p within 0..1, got {call.p!r}; correct it")
    return p
