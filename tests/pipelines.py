"""Hypothesis strategies: pipelines of geometry and erasing, and images of awkward sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

MODES = [
    InterpolationMode.NEAREST,
    InterpolationMode.BOX,
    InterpolationMode.BILINEAR,
    InterpolationMode.HAMMING,
    InterpolationMode.BICUBIC,
    InterpolationMode.LANCZOS,
]

sides = st.one_of(st.integers(1, 40), st.integers(1, 130), st.sampled_from([1, 2, 600]))
outputs = st.integers(1, 40)


@st.composite
def images(draw: st.DrawFn, channels: int) -> Any:
    """Draw pixels [H, W, C], thin ones too, at most 80,000 of them."""
    height = draw(sides)
    width = draw(sides.filter(lambda w: w * height <= 80_000))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    if draw(st.booleans()):  # extremes, where clipping shows
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    return pixels


@st.composite
def geometry(draw: st.DrawFn, module: Any, channels: int, depth: int = 0) -> Any:
    """Draw one operator of v1 or v2, with extreme parameters."""
    size = draw(st.one_of(outputs, st.tuples(outputs, outputs)))
    fill: Any = draw(st.one_of(st.just(0), st.integers(0, 255)))
    if channels == 3 and draw(st.booleans()):
        fill = draw(st.tuples(*[st.integers(0, 255)] * 3))
    padding = draw(st.one_of(st.integers(0, 9), st.tuples(*[st.integers(0, 9)] * 2),
                             st.tuples(*[st.integers(0, 9)] * 4)))  # fmt: skip
    mode = draw(st.sampled_from(["constant", "edge", "reflect", "symmetric"]))
    interpolation = draw(st.sampled_from(MODES))
    names = ["CenterCrop", "RandomCrop", "Pad", "flip", "Resize", "RandomResizedCrop"]
    name = draw(st.sampled_from(names + ["container"] * (depth < 1)))
    if name == "CenterCrop":
        return module.CenterCrop(size)
    if name == "RandomCrop":
        given_padding = draw(st.one_of(st.none(), st.just(padding)))
        return module.RandomCrop(
            size, padding=given_padding, pad_if_needed=True, fill=fill, padding_mode=mode
        )
    if name == "Pad":
        return module.Pad(padding, fill=fill, padding_mode=mode)
    if name == "flip":
        kind = draw(st.sampled_from(["RandomHorizontalFlip", "RandomVerticalFlip"]))
        return getattr(module, kind)(draw(st.sampled_from([0.0, 0.5, 1.0])))
    if name == "Resize":
        limit = size + draw(st.integers(1, 30)) if isinstance(size, int) else None
        max_size = draw(st.sampled_from([None, limit]))
        return module.Resize(size, interpolation, max_size)
    if name == "RandomResizedCrop":
        low = draw(st.floats(0.01, 1.0))
        ratio = draw(st.sampled_from([(3 / 4, 4 / 3), (0.1, 10.0), (1.0, 1.0), (2.0, 3.0)]))
        return module.RandomResizedCrop(
            size, scale=(low, draw(st.floats(low, 1.5))), ratio=ratio, interpolation=interpolation
        )
    children = draw(st.lists(geometry(module, channels, depth + 1), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["RandomApply", "RandomChoice", "RandomOrder"]))
    return getattr(module, kind)(children)


@st.composite
def erasing(draw: st.DrawFn, module: Any, channels: int) -> Any:
    """Draw a RandomErasing."""
    values: list[Any] = [0, "random", 0.7]
    if channels > 1:
        values.append([0.1 * n for n in range(channels)])
    return module.RandomErasing(
        p=draw(st.sampled_from([0.5, 1.0])), scale=(0.02, draw(st.sampled_from([0.3, 0.9]))),
        value=draw(st.sampled_from(values)),
    )  # fmt: skip


@st.composite
def pipelines(draw: st.DrawFn, channels: int) -> Any:
    """Draw a Compose for PIL images: geometry, a tensor, perhaps erasing; v1 or v2."""
    module: Any = draw(st.sampled_from([v1, v2]))
    before = draw(st.lists(geometry(module, channels), max_size=4))
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    if module is v1:
        tensor: list[Any] = [v1.ToTensor()]
    else:
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    behind: list[Any] = []
    if draw(st.booleans()):
        behind.append(module.RandomHorizontalFlip(0.5))
    if draw(st.booleans()):
        behind.append(module.Normalize(mean, std))
    if draw(st.booleans()):
        behind.append(draw(erasing(module, channels)))
    return module.Compose([*before, *tensor, *behind])
