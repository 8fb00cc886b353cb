"""A picture of one batch: raw images as they lie in memory, and what the model receives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

ZOOM = 3
GAP = 6
LINE = 14
COLUMNS = 8
_INK = (30, 30, 30)
_PAPER = (250, 250, 248)

Picture = NDArray[np.uint8]
"""uint8 [H, W, 3]."""


def save(
    path: Path,
    raw: NDArray[np.uint8],
    made: NDArray[np.float32],
    names: Sequence[str],
    title: str,
) -> None:
    """Write a PNG with the raw images on the left and the normalised ones on the right.

    Args:
        path: of the PNG.
        raw: uint8 [N, H, W].
        made: float32 [N, H, W], the same images after the transform; shown in false colour.
        names: of the N images.
        title: stands above all.
    """
    most = float(np.abs(made).max()) or 1.0
    left = _grid([np.repeat(image[..., None], 3, axis=2) for image in raw], names)
    right = _grid([false_colour(image, most) for image in made], names)
    margin, top = 2 * GAP, 4 * LINE
    width = left.width + right.width + 4 * margin
    sheet = Image.new("RGB", (width, left.height + top + 2 * LINE + margin), _PAPER)
    pen = ImageDraw.Draw(sheet)
    second = left.width + 3 * margin
    pen.text((margin, GAP), title, _INK, _font(14))
    before = f"before: {raw.dtype}, {raw.min()} to {raw.max()}"
    after = f"after: {made.dtype}, {made.min():+.2f} to {made.max():+.2f}"
    pen.text((margin, 2 * LINE + GAP), before, _INK, _font(12))
    pen.text((second, 2 * LINE + GAP), after, _INK, _font(12))
    sheet.paste(left, (margin, top))
    sheet.paste(right, (second, top))
    _legend(sheet, pen, second, top + right.height + GAP, most)
    sheet.save(path, "PNG")


def false_colour(image: NDArray[np.float32], most: float) -> Picture:
    """Return an image [H, W] as colours: -most is blue, 0 white, +most red."""
    share = np.clip(image / most, -1, 1)[..., None]
    cold, warm = np.array([33, 102, 172.0]), np.array([178, 24, 43.0])
    mixed = 255 + np.where(share < 0, -share * (cold - 255), share * (warm - 255))
    colours: Picture = np.rint(mixed).astype(np.uint8)
    return colours


def _grid(pictures: Sequence[Picture], names: Sequence[str]) -> Image.Image:
    """Lay pictures out in rows, each above its name."""
    height, width = (ZOOM * size for size in pictures[0].shape[:2])
    rows = -(-len(pictures) // COLUMNS)
    grid = Image.new(
        "RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + LINE + GAP) - GAP), _PAPER
    )
    pen = ImageDraw.Draw(grid)
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x, y = number % COLUMNS * (width + GAP), number // COLUMNS * (height + LINE + GAP)
        image = Image.fromarray(picture)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + height), name, _INK, _font(10))
    return grid


def _legend(sheet: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, most: float) -> None:
    """Draw the scale of the false colours."""
    ramp = np.tile(np.linspace(-most, most, 201, dtype=np.float32), (LINE - 4, 1))
    low, high = f"{-most:+.2f}", f"{most:+.2f}"
    pen.text((x, y), low, _INK, _font(10))
    sheet.paste(Image.fromarray(false_colour(ramp, most)), (x + 36, y))
    pen.text((x + 36 + 205, y), high, _INK, _font(10))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return Pillow's own font; its bitmap one where Pillow has no FreeType."""
    return ImageFont.load_default(size)
