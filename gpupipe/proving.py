"""The proof of a plan's geometry: a device's kernel against the installed torchvision and Pillow.

Before the first batch the program kernel runs on a few synthetic images with drawn parameters, and
torchvision's functionals run on the same images with the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe.device import Device
from gpupipe.images import ImageKind, raw_bytes
from gpupipe.operators.pointwise import same_bits
from gpupipe.plan import Pipeline
from gpupipe.program_chunks import GivenChunk, ProgramSpec
from gpupipe.rendering import Picks, Renderer, Stream, raw_sizes
from gpupipe.tables import Lookup
from gpupipe.transfer import StagedFeed

_SIZES = ((61, 47), (38, 90), (150, 203), (301, 260), (32, 32))
"""Heights and widths of the images: below and beyond usual crops, none of them alike."""

_DRAWS = 3
"""Parameters that are tried on each of them."""


def prove_program(
    device: Device,
    pipeline: Pipeline,
    kind: ImageKind,
    lookup: Lookup,
    memory_format: torch.memory_format,
) -> bool:
    """Return whether the kernel gives torchvision's bits (``Pipeline.levels_off`` says how close).

    Sizes that torchvision itself refuses, such as images smaller than a crop, prove nothing.
    """
    renderer = Renderer(pipeline, kind, lookup, Stream(seed=0, epoch=0))
    off = pipeline.levels_off(kind)
    return all(
        agree(made, expected, lookup, off)
        for made, expected in _pairs(device, renderer, memory_format)
    )


def _pairs(
    device: Device, renderer: Renderer, memory_format: torch.memory_format
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the kernel's image and torchvision's, one after the other."""
    for number, size in enumerate(_SIZES):
        image = renderer.kind.build(pixels(size, renderer.kind.channels, number))
        for draw in range(_DRAWS):
            index = np.array([number * _DRAWS + draw])
            picks = Picks(index, index, index, np.zeros(1, bool))
            try:
                expected = renderer.reference(
                    renderer.tape(picks, *raw_sizes([raw_bytes(image)], renderer.kind.layout)),
                    0,
                    image,
                )
            except (ValueError, RuntimeError):
                continue
            yield render(device, renderer, picks, [raw_bytes(image)], memory_format)[0], expected


def render(
    device: Device,
    renderer: Renderer,
    picks: Picks,
    images: list[NDArray[np.uint8]],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Return the batch that a device's kernel makes of raw images, on the CPU."""
    spec = ProgramSpec(renderer, memory_format)
    feed = StagedFeed(device, spec, partial(GivenChunk, images), depth=1, threaded=False)
    try:
        feed.submit([picks])
        made, _ = feed.next()
        device.current_stream().synchronize()
        return made.cpu()
    finally:
        feed.close()


def pixels(size: tuple[int, int], channels: int, seed: int) -> NDArray[np.uint8]:
    """Return an image [H, W, C]: noise beside smooth shades, which a resize treats differently."""
    rng = np.random.default_rng(seed)
    result = rng.integers(0, 256, (*size, channels), np.uint8)
    height, width = size
    rows = np.linspace(0, 255, height)[:, None, None]
    result[:, width // 2 :] = (rows * np.linspace(1, 0.3, channels)).astype(np.uint8)
    return result


def agree(made: torch.Tensor, expected: torch.Tensor, lookup: Lookup, levels_off: int) -> bool:
    """Whether two images [C, h, w] are equal, or closer than ``levels_off`` steps of the table."""
    expected = expected.as_subclass(torch.Tensor).to(lookup.dtype).reshape(made.shape)
    if same_bits(made, expected):
        return True
    if not levels_off:
        return False
    steps = lookup.values.double().diff(dim=1).abs().amax(1)
    allowed = steps * levels_off * (1 + 1e-3)  # rounding of the values themselves
    gap = (made.double() - expected.double()).abs()
    return bool((gap <= allowed.reshape(-1, 1, 1)).all())
