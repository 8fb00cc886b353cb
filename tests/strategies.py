"""Hypothesis strategies: raw batches of awkward sizes and addresses, and pointwise pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpupipe.tables import Layout

AXES = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 3, 1, 2)}


@dataclass(frozen=True)
class RawBatch:
    """A dataset of raw images and the rows that a batch takes from it.

    Attributes:
        images: in ``layout``, possibly at an odd address.
        layout: of ``images``.
        rows: int64 [N], or None for all images in order.
        pixels: [N, H, W, C], what the batch consists of.
    """

    images: NDArray[np.uint8]
    layout: Layout
    rows: NDArray[np.int64] | None
    pixels: NDArray[np.uint8]

    def __repr__(self) -> str:
        rows = None if self.rows is None else self.rows.tolist()
        address = self.images.__array_interface__["data"][0] % 64
        return f"RawBatch({self.layout} {self.images.shape} at {address} mod 64, rows {rows})"


def raw(pixels: NDArray[np.uint8], layout: Layout, offset: int = 0) -> NDArray[np.uint8]:
    """Return pixels [N, H, W, C] in a layout, ``offset`` bytes beyond a multiple of 64."""
    wanted = pixels[..., 0] if layout == "NHW" else pixels.transpose(AXES[layout])
    memory = np.empty(wanted.size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    placed = memory[start : start + wanted.size].reshape(wanted.shape)
    placed[...] = wanted
    return placed


def levels(count: int, height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return random pixels [N, H, W, C]; images of 256 pixels and more hold all 256 levels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, height * width, channels), np.uint8)
    if height * width >= 256:
        for image in pixels:
            for channel in range(channels):
                image[:256, channel] = rng.permutation(256)
    return pixels.reshape(count, height, width, channels)


@st.composite
def raw_batches(draw: st.DrawFn, max_side: int = 37) -> RawBatch:
    """Draw images mostly with H != W, 1 to 5 channels, any layout and address, repeated rows."""
    channels = draw(st.integers(1, 5))
    layout: Layout = draw(st.sampled_from(("NHWC", "NCHW") + ("NHW",) * (channels == 1)))
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    count = draw(st.integers(1, 6))
    pixels = levels(count, height, width, channels, draw(st.integers(0, 99)))
    images = raw(pixels, layout, draw(st.integers(0, 63)))
    rows = draw(st.none() | st.lists(st.integers(0, count - 1), max_size=9))
    if rows is None:
        return RawBatch(images, layout, None, pixels)
    picked = np.array(rows, np.int64)
    return RawBatch(images, layout, picked, pixels[picked])


@dataclass(frozen=True)
class PointwiseCase:
    """A pipeline of torchvision's and how images are given to it."""

    transform: Callable[[Any], Any]
    container: str

    @property
    def make(self) -> Callable[[NDArray[np.uint8]], Any]:
        """Make what the transform takes of pixels [H, W, C]."""
        return reference.pil if self.container == "PIL" else reference.tensor


def constants(channels: int) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    """Draw a mean and a std, for each channel or for all at once."""
    mean = st.floats(0, 1, allow_subnormal=False)
    std = st.floats(0.01, 2)
    sizes = st.sampled_from(sorted({1, channels}))
    return sizes.flatmap(
        lambda n: st.tuples(
            st.lists(mean, min_size=n, max_size=n), st.lists(std, min_size=n, max_size=n)
        )
    )


@st.composite
def pointwise_cases(draw: st.DrawFn, channels: int) -> PointwiseCase:
    """Draw a pointwise pipeline of v1 or v2."""
    mean, std = draw(constants(channels))
    as_pil = channels <= 4 and draw(st.booleans())
    float_type = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    scaled = v2.ToDtype(torch.float32, scale=True)
    if as_pil:
        pipelines: list[Callable[[Any], Any]] = [
            v1.Compose([v1.ToTensor(), v1.Normalize(mean, std)]),
            v1.Compose([v1.ToTensor()]),
            v1.ToTensor(),
            v1.Compose([v1.PILToTensor()]),
            v1.Compose(
                [v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), v1.Normalize(mean, std)]
            ),
            v2.Compose([v2.ToImage(), scaled, v2.Normalize(mean, std), v2.ToPureTensor()]),
            v2.Compose([v2.Compose([v2.ToImage()]), v1.Compose([scaled, v2.Normalize(mean, std)])]),
            v2.Compose([v2.PILToTensor(), v2.ToDtype(float_type, scale=True)]),
        ]
    else:
        pipelines = [
            v1.Compose([v1.ConvertImageDtype(torch.float32), v1.Normalize(mean, std)]),
            nn.Sequential(v1.ConvertImageDtype(torch.float32), v1.Normalize(mean, std)),
            v2.Compose([v2.ToImage(), scaled, v2.Normalize(mean, std)]),
            v2.Compose([v2.ToDtype(float_type, scale=True), v2.Normalize(mean, std)]),
            v2.Compose([v2.ToDtype(torch.float32, scale=False), v2.Normalize([128.0], [64.0])]),
        ]
    transform = draw(st.sampled_from(range(len(pipelines))).map(pipelines.__getitem__))
    return PointwiseCase(transform, "PIL" if as_pil else "tensor")
