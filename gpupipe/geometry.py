"""What the launchers of both devices ask before any native code runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpupipe.errors import IndexRangeError, InputError
from gpupipe.program import FIELDS, FRAME, Frame
from gpupipe.tables import DTYPES, Images, Layout, Lookup, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpupipe.program import Program, Recipe

_RANK = {"NHWC": 4, "NCHW": 4, "NHW": 3}


@dataclass(frozen=True)
class Geometry:
    """The sizes of one launch.

    Attributes:
        count: images in all, N.
        per_output: images per output, of all outputs but the last.
        pixels: H * W.
        channels: C.
        planar_in: the raw image lies plane by plane (always so for one channel).
        planar_out: the result is contiguous [N, C, H, W], not channels_last.
    """

    count: int
    per_output: int
    pixels: int
    channels: int
    planar_in: bool
    planar_out: bool


def check(  # a launcher's arguments, and the device
    images: Images,
    rows: Rows | None,
    outputs: Sequence[torch.Tensor],
    lookup: Lookup,
    layout: Layout,
    device: str,
) -> Geometry:
    """Check the arguments of ``normalize`` and return its sizes.

    Args:
        images: raw images, see ``tables.Images``.
        rows: int64 [N] or None.
        outputs: one tensor per batch.
        lookup: the pipeline.
        layout: of ``images``.
        device: the device type that all of it must lie on, ``"cpu"`` or ``"cuda"``.

    Raises:
        InputError: a dtype, shape, layout or device that does not fit.
        IndexRangeError: a row that ``images`` does not have (checked on the CPU only).
    """
    h, w, c = _image_shape(images, lookup, layout)
    count = int(images.shape[0]) if rows is None else _row_count(rows, int(images.shape[0]))
    planar_out = _check_outputs(outputs, lookup, (c, h, w), flat=layout == "NHW")
    for name, value in (("images", images), ("rows", rows), *(("outputs", o) for o in outputs)):
        where = value.device.type if isinstance(value, torch.Tensor) else "cpu"
        if value is not None and where != device:
            raise InputError(
                f"{name} must be on {device}, got {where}; move it there or use the other launcher"
            )
    sizes = _even(outputs, count)
    return Geometry(
        count=count,
        per_output=max(sizes[0] if sizes else 1, 1),
        pixels=h * w,
        channels=c,
        planar_in=c == 1 or layout == "NCHW",
        planar_out=c == 1 or planar_out,
    )


def check_program(
    images: Images,
    program: Program,
    outputs: Sequence[torch.Tensor],
    recipe: Recipe,
    device: str,
) -> Geometry:
    """Check the arguments of ``resample`` and return its sizes; ``pixels`` are of the output.

    Raises:
        InputError: a dtype, shape, layout or device that does not fit.
    """
    memory = images.shape if len(images.shape) == 1 else None
    if memory is None or str(images.dtype).removeprefix("torch.") != "uint8":
        raise InputError(
            f"images must be uint8 [n], got {images.dtype} {tuple(images.shape)}; pass the memory "
            "that the frames point into"
        )
    count = len(program.frames)
    shapes = tuple(program.frames.shape), tuple(program.steps.shape[::2]), len(program.steps)
    if shapes != ((count, FRAME), (count, FIELDS), count):
        raise InputError(
            f"program must have frames [N, {FRAME}] and steps [N, S, {FIELDS}], got "
            f"{tuple(program.frames.shape)} and {tuple(program.steps.shape)}"
        )
    for name, value in (("images", images), *(("outputs", output) for output in outputs)):
        where = value.device.type if isinstance(value, torch.Tensor) else "cpu"
        if where != device:
            raise InputError(
                f"{name} must be on {device}, got {where}; move it there or use the other launcher"
            )
    channels = recipe.lookup.channels
    flat = bool(outputs) and outputs[0].ndim == 3  # noqa: PLR2004 # [B, h, w]
    shape = (channels, *recipe.size)
    planar_out = _check_outputs(outputs, recipe.lookup, shape, flat=flat)
    sizes = _even(outputs, count)
    pixel = int(program.frames[0, Frame.PIXEL_STRIDE]) if count and device == "cpu" else 1
    return Geometry(
        count=count,
        per_output=max(sizes[0] if sizes else 1, 1),
        pixels=recipe.size[0] * recipe.size[1],
        channels=channels,
        planar_in=channels == 1 or pixel == 1,
        planar_out=channels == 1 or planar_out,
    )


def _even(outputs: Sequence[torch.Tensor], count: int) -> list[int]:
    """Check how many images the outputs hold; return it for each."""
    sizes = [int(output.shape[0]) for output in outputs]
    uneven = any(size != sizes[0] for size in sizes[:-1]) or (sizes and sizes[-1] > sizes[0])
    if sum(sizes) != count or uneven:
        raise InputError(
            f"outputs must hold {count} images, all equally many but the last, which may hold "
            f"fewer, got {sizes}; allocate one output per batch"
        )
    return sizes


def _image_shape(images: Images, lookup: Lookup, layout: Layout) -> tuple[int, int, int]:
    """Check the raw images; return H, W, C."""
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    wanted = ", ".join(layout)
    if dtype != "uint8" or len(shape) != _RANK[layout]:
        raise InputError(
            f"images must be uint8 [{wanted}], got {dtype} {shape}; pass the raw batch"
        )
    contiguous = (
        images.is_contiguous() if isinstance(images, torch.Tensor) else images.flags.c_contiguous
    )
    if not contiguous:
        raise InputError(
            f"images must be contiguous in {wanted} order, got a strided view of shape {shape}; "
            "call .contiguous() or np.ascontiguousarray"
        )
    sizes = dict(zip(layout, shape, strict=True)) | ({"C": 1} if layout == "NHW" else {})
    if sizes["C"] != lookup.channels:
        raise InputError(
            f"images must have {lookup.channels} channels, as the transform was compiled for, "
            f"got {sizes['C']} in shape {shape}; compile the transform for these images"
        )
    return sizes["H"], sizes["W"], sizes["C"]


def _row_count(rows: Rows, images: int) -> int:
    """Check the rows; return how many there are."""
    if len(rows.shape) != 1 or str(rows.dtype).removeprefix("torch.") != "int64":
        raise InputError(
            f"rows must be int64 [N], got {rows.dtype} {tuple(rows.shape)}; pass indices of images"
        )
    on_host = isinstance(rows, np.ndarray) or rows.device.type == "cpu"
    if on_host and len(rows):
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= images:
            bad = low if low < 0 else high
            raise IndexRangeError(
                f"rows must lie in 0..{images - 1}, got {bad}; the dataset has {images} images"
            )
    return int(rows.shape[0])


def _check_outputs(
    outputs: Sequence[torch.Tensor], lookup: Lookup, image: tuple[int, int, int], *, flat: bool
) -> bool:
    """Check the outputs; return whether they are planar (contiguous)."""
    c, h, w = image
    planar = True
    for position, output in enumerate(outputs):
        shape = tuple(output.shape[1:])
        if output.dtype != lookup.dtype or lookup.dtype not in DTYPES:
            raise InputError(
                f"outputs must be {lookup.dtype}, one of {DTYPES}, got {output.dtype}; "
                "allocate them with the lookup's dtype"
            )
        if shape != image and not (flat and shape == (h, w)):
            raise InputError(
                f"outputs must be [N, {c}, {h}, {w}], got {tuple(output.shape)}; "
                "allocate them for these images"
            )
        here = output.is_contiguous()
        if not here and not output.is_contiguous(memory_format=torch.channels_last):
            raise InputError(
                "outputs must be contiguous or channels_last, "
                f"got strides {output.stride()} for shape {tuple(output.shape)}"
            )
        if position and here != planar and prod(output.shape):
            raise InputError("outputs must share one memory format, got both; allocate them alike")
        planar = here if prod(output.shape) else planar
    return planar
