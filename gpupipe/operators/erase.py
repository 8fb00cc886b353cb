"""``RandomErasing``: a rectangle of the finished image is overwritten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from gpupipe.draws import exp, integers, philox, quantiles, uniform
from gpupipe.errors import PlanError
from gpupipe.operators.crop import probability
from gpupipe.operators.lowered import Lowered, functional, reals
from gpupipe.operators.resize import ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Ints, Parameters, Tape

_NOISE = 0x6E6F6973
"""Last counter word of the noise's Philox calls, in every kernel."""

_FIRST_ATTEMPT = 1  # block 0 has the coin


class RandomErasing(Lowered):
    """A rectangle of random area and aspect ratio, filled with values or with normal noise.

    Attributes:
        row: of its values in ``Recipe.erasures``; set by the renderer.
    """

    stage: ClassVar[Literal["geometry", "erase"]] = "erase"
    commutes = False

    def __init__(self, call: Any, ids: Iterator[int]) -> None:
        super().__init__(call, ids)
        self._p = probability(call)
        self._scale = reals(call.scale, "scale", call, positive=False)
        self._ratio = reals(call.ratio, "ratio", call, positive=True)
        value = call.value
        if isinstance(value, str) and value != "random":
            raise PlanError(f'RandomErasing needs a value of numbers or "random", got {value!r}')
        self.draws_values = value is None or isinstance(value, str)
        numbers = [value] if isinstance(value, (int, float)) else list(value or [])
        self._value = [] if self.draws_values else [float(v) for v in numbers]
        self.row = -1

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:  # noqa: ARG002 # as its base
        """See ``Lowered``."""
        if not self.draws_values and len(self._value) not in (1, kind.channels):
            raise PlanError(
                f"RandomErasing needs one value, or one for each of {kind.channels} channels, got "
                f"{self._value}; correct it"
            )
        return None

    def value(self) -> torch.Tensor:
        """Return what is written, float32 [1 or C, 1, 1]."""
        return torch.tensor(self._value, dtype=torch.float32)[:, None, None]

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """See ``Lowered``."""
        words = tape.draws.block(self.number)
        chosen = where & (uniform(words[:, 0]) < self._p)
        top, left, height, width, found = self._boxes(tape)
        erased = chosen & found
        key = words[:, 2:4]
        tape.record(
            self, erased,
            {"top": top, "left": left, "height": height, "width": width, "key": key,
             "channels": tape.channels},
        )  # fmt: skip
        row = -1 if self.draws_values else self.row
        noise = np.ascontiguousarray(key) if self.draws_values else None
        tape.erase(erased, top, left, height, width, row, noise)

    def _boxes(self, tape: Tape) -> tuple[Ints, Ints, Ints, Ints, NDArray[np.bool_]]:
        """Draw rectangles as ``get_params`` does: ten attempts, then none."""
        heights, widths = tape.heights, tape.widths
        low, high = (float(np.float32(math.log(r))) for r in self._ratio)
        found = np.zeros(len(heights), bool)
        top = left = height = width = np.zeros(len(heights), np.int64)
        for attempt in range(ATTEMPTS):
            words = tape.draws.block(self.number, attempt + _FIRST_ATTEMPT)
            share = self._scale[0] + uniform(words[:, 0]) * (self._scale[1] - self._scale[0])
            aspect = exp(low + uniform(words[:, 1]) * (high - low))
            area = heights * widths * share
            h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
            w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
            fits = ~found & (h < heights) & (w < widths)
            i = integers(words[:, 2], np.maximum(heights - h, 0) + 1)
            j = integers(words[:, 3], np.maximum(widths - w, 0) + 1)
            top, left = np.where(fits, i, top), np.where(fits, j, left)
            height, width = np.where(fits, h, height), np.where(fits, w, width)
            found |= fits
            if found.all():
                break
        return top, left, height, width, found

    def reference(self, image: Any, parameters: Parameters) -> Any:
        """See ``Lowered``."""
        box = [parameters[key] for key in ("top", "left", "height", "width")]
        value = self.value()
        if self.draws_values:
            low, high = parameters["key"]
            value = noise((low, high), (parameters["channels"], *box[2:]))
        return functional(self.call).erase(image, *box, value.to(image.dtype), inplace=False)

    def describe(self, parameters: Parameters) -> str:
        """See ``Lowered``."""
        return "erased {top},{left} {height}x{width}".format(**parameters)


def noise(key: tuple[int, int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the normal noise of one erased box, float32 [C, h, w].

    Value i is the quantile at the high half of word ``i % 4`` of Philox's counter ``i // 4``.
    """
    count = math.prod(shape)
    counter = np.zeros((-(-count // 4), 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 3] = _NOISE
    words = philox(counter, key).reshape(-1)[:count]
    return torch.from_numpy(quantiles()[words >> np.uint32(16)].reshape(shape))
