"""From drawn parameters to a batch's program: what the geometry kernels are told.

A ``Renderer`` belongs to one pipeline, one kind of image and one epoch. It plays the pipeline's
operators on a ``Tape`` for a whole batch at once, and writes the frames and steps of the result.
The same tape tells ``replay`` and ``verify`` what was drawn.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.draws import Draws
from gpupipe.errors import SourceError
from gpupipe.images import ImageKind
from gpupipe.operators.erase import RandomErasing
from gpupipe.plan import Pipeline
from gpupipe.program import FRAME, Frame, Program, Recipe
from gpupipe.resampling import Weights
from gpupipe.tables import Layout, Lookup
from gpupipe.tape import Tape


class _Shared:
    """Resize weights depend on sizes and filter alone: all loaders of a process share them."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Begin anew: in a forked child, a thread of the parent may have held the locks."""
        self.lock = threading.Lock()
        self.weights = Weights()


_SHARED = _Shared()


@dataclass(frozen=True)
class Picks:
    """The samples of one batch.

    Attributes:
        indices: int64 [N], of the dataset: parameters are drawn for these.
        rows: int64 [N], where the source has them.
        positions: int64 [N], in the epoch, over all ranks: tells repeats of an index apart.
        anew: bool [N]: samples that took a bad one's place, and may stand in the epoch twice.
    """

    indices: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    anew: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return N."""
        return len(self.indices)

    @staticmethod
    def joined(parts: Sequence[Picks]) -> Picks:
        """Return several batches as one."""
        if len(parts) == 1:
            return parts[0]
        return Picks(
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.anew for part in parts]),
        )


@dataclass(frozen=True)
class Stream:
    """Which of all random numbers an epoch takes.

    Attributes:
        seed: the user's, or what torch drew at ``iter()``.
        epoch: counted from 0.
        repeats: whether the sampler may visit an index twice, so that the position joins the key.
        rank: of this process, and how many there are: positions are counted over all of them.
        world: see ``rank``.
    """

    seed: int
    epoch: int
    repeats: bool = False
    rank: int = 0
    world: int = 1


class Renderer:
    """See the module.

    Args:
        pipeline: its lowered operators are played.
        kind: of the raw images.
        lookup: the pointwise part, proved or to be proved.
        stream: whose random numbers.
    """

    def __init__(self, pipeline: Pipeline, kind: ImageKind, lookup: Lookup, stream: Stream) -> None:
        self.pipeline = pipeline
        self.kind = kind
        self.lookup = lookup
        self.stream = stream
        self._erasures = self._finished_values()
        self._recipe: Recipe | None = None

    def tape(self, picks: Picks, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Tape:
        """Draw the parameters of a batch.

        Args:
            picks: its samples, N.
            heights: int64 [N], of the raw images.
            widths: likewise.
        """
        stream = self.stream
        keyed = picks.anew | stream.repeats
        positions = np.where(keyed, picks.positions + 1, 0)
        draws = Draws(stream.seed, stream.epoch, picks.indices, positions)
        draws.prepare([number for lowered in self.pipeline.steps for number in lowered.numbers()])
        tape = Tape(draws, heights, widths, self.kind.channels)
        everywhere = np.ones(len(picks), bool)
        for _, lowered, tape.tensors in self.pipeline.walk(self.kind):
            lowered.play(tape, everywhere)
        return tape

    def size(self, tape: Tape, picks: Picks) -> tuple[int, int]:
        """Return the one height and width that all images of a batch come out with.

        Raises:
            SourceError: they differ.
        """
        sizes = np.stack([tape.heights, tape.widths], 1)
        other = np.flatnonzero((sizes != sizes[0]).any(1))
        if other.size:
            n = int(other[0])
            first, second = (f"{h}x{w}" for h, w in (sizes[0], sizes[n]))
            raise SourceError(
                f"images of one batch must come out in one size, got {first} (height x width) at "
                f"index {picks.indices[0]} and {second} at index {picks.indices[n]}; add a Resize "
                "to a fixed height and width or a crop to the transform, or use batch_size=1"
            )
        return int(sizes[0, 0]), int(sizes[0, 1])

    def recipe(self, tape: Tape, size: tuple[int, int]) -> Recipe:
        """Return what the batches of one output size share."""
        fills = tape.fills()
        old = self._recipe
        if old is None or not np.array_equal(old.fills, fills):
            noise = any(lowered.draws_values for lowered in self.pipeline.steps)
            self._recipe = old = Recipe(self.lookup, size, fills, self._erasures, noise)
        if old.size != size:
            self._recipe = old = replace(old, size=size)
        return old

    def program(self, tape: Tape, frames: NDArray[np.int64]) -> Program:
        """Write the program of a batch whose raw images lie as ``frames`` says."""
        with _SHARED.lock:
            _SHARED.weights.begin()
            steps = tape.finish(_SHARED.weights)
            return Program(frames, steps, _SHARED.weights.data)

    def reference(self, tape: Tape, n: int, image: Any) -> Any:
        """Return what torchvision makes of a raw image with the parameters of sample ``n``."""
        everything = np.ones(len(tape.heights), bool)
        again = Tape(tape.draws, *tape.raw_sizes, self.kind.channels)
        pairs = zip(
            self.pipeline.operators[self.pipeline.cut :], self.pipeline.lowered, strict=True
        )
        seen = 0
        for operator, lowered in pairs:
            if lowered is None:
                image = operator.call(image)
                continue
            lowered.play(again, everything)
            played = again.played(n)
            for part, parameters in played[seen:]:
                image = part.reference(image, parameters)
            seen = len(played)
        return image

    def story(self, tape: Tape, n: int) -> list[str]:
        """Say what was drawn for sample ``n``, in the order of the operators."""
        return [part.describe(parameters) for part, parameters in tape.played(n)]

    def _finished_values(self) -> torch.Tensor:
        """Return [E, C] of the output's dtype: what erased pixels end as."""
        rows: list[torch.Tensor] = []
        for lowered in self.pipeline.steps:
            if isinstance(lowered, RandomErasing) and not lowered.draws_values:
                lowered.row = len(rows)
                rows.append(self._finished(lowered))
        if not rows:
            return torch.empty((0, self.lookup.channels), dtype=self.lookup.dtype)
        return torch.stack(rows)

    def _finished(self, erasing: RandomErasing) -> torch.Tensor:
        """Return [C]: its value after the pointwise operators behind it, by torchvision."""
        kind = self.kind
        image = kind.build(np.zeros((2, 3, kind.channels), np.uint8))
        pairs = zip(
            self.pipeline.operators[self.pipeline.cut :], self.pipeline.lowered, strict=True
        )
        for operator, lowered in pairs:
            if lowered is None:
                image = operator.call(image)
            elif lowered is erasing:
                value = erasing.value().to(image.dtype).expand(kind.channels, 1, 1)
                image = image.clone()
                image[...] = value
        done: torch.Tensor = image.as_subclass(torch.Tensor)
        return done.reshape(kind.channels, -1)[:, 0].to(self.lookup.dtype)


def array_frames(
    rows: NDArray[np.int64], shape: tuple[int, ...], layout: Layout
) -> NDArray[np.int64]:
    """Return frames of whole images that lie one behind the other in one array.

    Args:
        rows: int64 [N]: which image each one is.
        shape: of the array, in ``layout``.
        layout: of the array.
    """
    sizes = dict(zip(layout, shape, strict=True)) | ({"C": 1} if layout == "NHW" else {})
    h, w, c = sizes["H"], sizes["W"], sizes["C"]
    planar = layout == "NCHW"
    frames = np.zeros((len(rows), FRAME), np.int64)
    frames[:, Frame.OFFSET] = rows * (h * w * c)
    frames[:, Frame.HEIGHT], frames[:, Frame.WIDTH] = h, w
    frames[:, Frame.ROW_STRIDE] = w if planar else w * c
    frames[:, Frame.PIXEL_STRIDE] = 1 if planar else c
    frames[:, Frame.CHANNEL_STRIDE] = h * w if planar else 1
    return frames


def cropped_frames(
    tape: Tape, heights: NDArray[np.int64], widths: NDArray[np.int64], channels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Lay the parts of the raw images that the steps read back to back.

    Args:
        tape: what was played.
        heights: int64 [N], of the raw images.
        widths: likewise.
        channels: C, interleaved.

    Returns:
        The frames, how many rows each keeps, and the bytes in all.
    """
    top, left, height, width = tape.source_windows()
    frames = np.zeros((len(heights), FRAME), np.int64)
    nbytes = height * width * channels
    frames[:, Frame.OFFSET] = np.cumsum(nbytes) - nbytes
    frames[:, Frame.HEIGHT], frames[:, Frame.WIDTH] = heights, widths
    frames[:, Frame.TOP], frames[:, Frame.LEFT] = top, left
    frames[:, Frame.ROW_STRIDE] = width * channels
    frames[:, Frame.PIXEL_STRIDE], frames[:, Frame.CHANNEL_STRIDE] = channels, 1
    return frames, height, int(nbytes.sum())


def output_shape(renderer: Renderer, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of one finished image: [C, h, w], or [h, w] where torchvision gives that."""
    kind = renderer.kind
    tiny = renderer.pipeline.run_pointwise(kind.build(np.zeros((2, 3, kind.channels), np.uint8)))
    return size if tiny.ndim == 2 else (len(tiny), *size)  # noqa: PLR2004 # [h, w]


def planar_frames(
    heights: NDArray[np.int64], widths: NDArray[np.int64], channels: int
) -> tuple[NDArray[np.int64], int]:
    """Lay whole images [C, H, W] of different sizes back to back; return frames and bytes."""
    frames = np.zeros((len(heights), FRAME), np.int64)
    nbytes = heights * widths * channels
    frames[:, Frame.OFFSET] = np.cumsum(nbytes) - nbytes
    frames[:, Frame.HEIGHT], frames[:, Frame.WIDTH] = heights, widths
    frames[:, Frame.ROW_STRIDE] = widths
    frames[:, Frame.PIXEL_STRIDE], frames[:, Frame.CHANNEL_STRIDE] = 1, heights * widths
    return frames, int(nbytes.sum())


def raw_sizes(
    images: Sequence[NDArray[np.uint8]], layout: Layout
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heights and widths, int64 [N], of raw images in a layout."""
    first = 1 if layout == "NCHW" else 0
    sizes = np.array([image.shape[first : first + 2] for image in images], np.int64)
    return sizes[:, 0].copy(), sizes[:, 1].copy()
