"""A batch's operators, played: what is drawn, the steps that come of it, and the sizes between.

Every operator acts on all samples at once, under a mask: ``RandomApply`` plays its children for
some of them, ``RandomChoice`` each child for others. A step is a column over the batch; samples
that it does not concern get ``Code.NOP``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpupipe.draws import Draws
from gpupipe.errors import SourceError
from gpupipe.program import FIELDS, Code, Padding
from gpupipe.resampling import Filter, Weights, vertical_first

if TYPE_CHECKING:
    from collections.abc import Sequence

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Parameters = dict[str, Any]

SCALES = (8, 4, 2)
"""Fractions at which a JPEG can be decoded, the coarsest first."""


class Tape:
    """See the module.

    Args:
        draws: the random numbers of the samples, N.
        heights: int64 [N], of the raw images.
        widths: likewise.
        channels: C.

    Attributes:
        draws: see above.
        heights: int64 [N], as the operators so far leave them.
        widths: likewise.
        raw_sizes: heights and widths of the raw images.
        tensors: whether the images are uint8 tensors for the operator at hand, not PIL images.
    """

    def __init__(self, draws: Draws, heights: Ints, widths: Ints, channels: int) -> None:
        self.draws = draws
        self.heights = heights.astype(np.int64)
        self.widths = widths.astype(np.int64)
        self.raw_sizes = self.heights, self.widths
        self.tensors = False
        self.channels = channels
        self._columns: list[
            NDArray[np.int32]
        ] = []  # [N, FIELDS] each; RESIZE holds its filter and input size
        self._fills: list[tuple[int, ...]] = []
        self._records: list[tuple[Any, Mask, Parameters]] = []

    def everyone(self) -> Mask:
        """Return the mask of all samples."""
        return np.ones(len(self.heights), bool)

    def record(self, player: Any, where: Mask, parameters: Parameters) -> None:
        """Remember, for ``played``, what an operator drew: arrays [N], or one value for all."""
        self._records.append((player, where, parameters))

    def played(self, n: int) -> list[tuple[Any, Parameters]]:
        """Return what was played for one sample, in order, with its own parameters."""
        return [
            (player, {key: _own(value, n) for key, value in parameters.items()})
            for player, where, parameters in self._records
            if where[n]
        ]

    def fill(self, colour: Sequence[int]) -> int:
        """Return the number of a colour, [C] levels."""
        key = tuple(int(level) for level in colour)
        if key not in self._fills:
            self._fills.append(key)
        return self._fills.index(key)

    def fills(self) -> NDArray[np.uint8]:
        """Return the colours, uint8 [F, C]."""
        return np.array(self._fills, np.uint8).reshape(len(self._fills), self.channels)

    def window(
        self,
        where: Mask,
        top: Ints | int,
        left: Ints | int,
        height: Ints | int,
        width: Ints | int,
        padding: Padding = Padding.CONSTANT,
        colour: Sequence[int] | None = None,
    ) -> None:
        """Cut a window out, which may reach beyond the image."""
        self._refuse_empty(where, height, width)
        fill = self.fill(colour if colour is not None else [0] * self.channels)
        self._step(where, Code.WINDOW, top, left, height, width, padding, fill)
        self.heights = np.where(where, height, self.heights)
        self.widths = np.where(where, width, self.widths)

    def flip(self, where: Mask, axes: int) -> None:
        """Exchange left and right (1) or top and bottom (2)."""
        self._step(where, Code.FLIP, axes)

    def resize(self, where: Mask, height: Ints | int, width: Ints | int, kind: Filter) -> None:
        """Resample to a size."""
        self._refuse_empty(where, height, width)
        sizes = self.heights, self.widths
        self._step(where, Code.RESIZE, height, width, kind, *sizes, int(self.tensors))
        self.heights = np.where(where, height, self.heights)
        self.widths = np.where(where, width, self.widths)

    def erase(
        self, where: Mask, top: Ints, left: Ints, height: Ints, width: Ints, value: int,
        key: NDArray[np.uint32] | None = None,
    ) -> None:  # fmt: skip
        """Overwrite a rectangle of the finished image.

        Args:
            where: which samples.
            top: of the rectangle, int64 [N], and so on.
            left: see ``top``.
            height: see ``top``.
            width: see ``top``.
            value: row of ``Recipe.erasures``; -1: noise.
            key: uint32 [N, 2], of the noise.
        """
        self._step(where, Code.ERASE, top, left, height, width, value)
        if key is not None:
            self._columns[-1][:, 6:8] = key.view(np.int32)

    def _refuse_empty(self, where: Mask, height: Ints | int, width: Ints | int) -> None:
        """Refuse an image without pixels.

        Raises:
            SourceError: a height or width below 1.
        """
        empty = where & ((np.asarray(height) < 1) | (np.asarray(width) < 1))
        if empty.any():
            n = int(np.flatnonzero(empty)[0])
            raise SourceError(
                f"an image of {self.raw_sizes[0][n]}x{self.raw_sizes[1][n]} (height x width) "
                "leaves no pixels after a crop or resize; take it out, or change the sizes"
            )

    def _step(self, where: Mask, code: Code, *fields: Ints | int) -> None:
        column = np.zeros((len(where), FIELDS), np.int32)
        column[:, 0] = np.where(where, code, Code.NOP)
        for number, value in enumerate(fields, start=1):
            column[:, number] = value
        self._columns.append(column)

    def _compact(self) -> NDArray[np.int32]:
        """Return the columns as [N, S, FIELDS], each sample's own steps first."""
        count = len(self.heights)
        if not self._columns:
            return np.zeros((count, 0, FIELDS), np.int32)
        steps = np.stack(self._columns, axis=1)
        if (steps[:, :, 0] == Code.NOP).any():
            order = np.argsort(steps[:, :, 0] == Code.NOP, axis=1, kind="stable")
            steps = np.take_along_axis(steps, order[:, :, None], axis=1)
            longest = int((steps[:, :, 0] != Code.NOP).sum(1).max(initial=0))
            steps = steps[:, :longest]
        return steps

    def finish(self, weights: Weights) -> NDArray[np.int32]:
        """Return the steps for the kernels, int32 [N, S, FIELDS]; see ``program.Code``."""
        if not self._columns:
            return np.zeros((len(self.heights), 0, FIELDS), np.int32)
        steps = np.stack(self._columns, axis=1)
        for column in range(steps.shape[1]):
            here = np.flatnonzero(steps[:, column, 0] == Code.RESIZE)
            if not here.size:
                continue
            height, width, kinds, in_height, in_width = steps[here, column, 1:6].T.astype(np.int64)
            first = vertical_first(in_height, in_width, height, width)
            first &= steps[here, column, 6] == 0  # torch resizes tensors columns first, always
            rows, columns = np.zeros(len(here), np.int64), np.zeros(len(here), np.int64)
            for kind in np.unique(kinds):
                one = kinds == kind
                rows[one] = weights.find(in_height[one], height[one], Filter(kind))
                columns[one] = weights.find(in_width[one], width[one], Filter(kind))
            steps[here, column, 3:6] = np.stack([first, rows, columns], axis=1)
            steps[here, column, 6] = 0
        return steps

    def source_windows(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Return the part of the raw images that the steps read: top, left, height, width [N].

        It is found for a first step that cuts; without one it is the whole image.
        """
        heights, widths = self.raw_sizes
        top, left = np.zeros_like(heights), np.zeros_like(widths)
        bottom, right = heights.copy(), widths.copy()
        steps = self._compact()
        if steps.shape[1]:
            first = steps[:, 0]
            inside = first[:, 5] == Padding.CONSTANT  # the others look back into the image
            cuts = (first[:, 0] == Code.WINDOW) & inside
            top = np.where(cuts, np.clip(first[:, 1], 0, heights - 1), top)
            left = np.where(cuts, np.clip(first[:, 2], 0, widths - 1), left)
            bottom = np.where(cuts, np.clip(first[:, 1] + first[:, 3], top + 1, heights), bottom)
            right = np.where(cuts, np.clip(first[:, 2] + first[:, 4], left + 1, widths), right)
        return top, left, bottom - top, right - left

    def allowed_scales(self) -> Ints:
        """Return by how much each image may be decoded smaller, int64 [N] of 1, 2, 4, 8.

        Where a first window is resized at once: as far as it stays at least as large as the result.
        """
        scales = np.ones(len(self.heights), np.int64)
        steps = self._compact()
        if steps.shape[1] < 2:  # noqa: PLR2004 # a window and a resize
            return scales
        window, resize = steps[:, 0], steps[:, 1]
        fits = (window[:, 0] == Code.WINDOW) & (resize[:, 0] == Code.RESIZE)
        fits &= (window[:, 1:3] >= 0).all(1)
        for size, whole in ((1, 0), (2, 1)):
            fits &= window[:, size] + window[:, size + 2] <= self.raw_sizes[whole]
        for scale in SCALES:
            enough = (window[:, 3:5] // scale >= resize[:, 1:3]).all(1)
            scales = np.where(fits & enough & (scales == 1), scale, scales)
        return scales

    def shrink(self, scales: Ints) -> None:
        """Let the raw images be decoded smaller: their windows become smaller with them."""
        if (scales == 1).all():
            return
        steps = self._compact()
        heights, widths = self.raw_sizes
        self.raw_sizes = -(-heights // scales), -(-widths // scales)
        window = steps[:, 0]
        for place, whole in ((1, 0), (2, 1)):
            begin = np.rint(window[:, place] / scales).astype(np.int64)
            size = np.maximum(np.rint(window[:, place + 2] / scales).astype(np.int64), 1)
            begin = np.minimum(begin, self.raw_sizes[whole] - 1)
            size = np.minimum(size, self.raw_sizes[whole] - begin)
            changed = scales > 1
            window[:, place] = np.where(changed, begin, window[:, place])
            window[:, place + 2] = np.where(changed, size, window[:, place + 2])
            steps[:, 1, place + 3] = np.where(changed, size, steps[:, 1, place + 3])
        self._columns = [steps[:, column] for column in range(steps.shape[1])]


def _own(value: Any, n: int) -> Any:
    """Return sample ``n``'s part of a parameter, as a Python value."""
    if isinstance(value, np.ndarray):
        return value[n].tolist() if value.ndim > 1 else value[n].item()
    return value
