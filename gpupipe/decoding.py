"""Encoded bytes to pixels, with the bits of ``Image.open(file).convert("RGB")``.

Ordinary JPEGs (8 bit, grey or colour) go through ``torchvision.io.decode_jpeg``: libjpeg-turbo as
in Pillow, without Pillow's intermediate copies, and with the GIL released. Everything else, and
whatever that decoder refuses, is Pillow's. ``docs/decoding.md`` has the measurements.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torchvision.io import ImageReadMode

from gpupipe.errors import DecodeError

Bytes = NDArray[np.uint8]

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended sequential and progressive; Huffman coded."""
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_STANDALONE = {0x01, *range(0xD0, 0xD8)}


@dataclass(frozen=True)
class Header:
    """What is known of an encoded image before it is decoded.

    Attributes:
        height: pixels.
        width: pixels.
        kind: ``"jpeg"``: the fast decoder takes it; ``"pillow"``: Pillow.
    """

    height: int
    width: int
    kind: Literal["jpeg", "pillow"]


def read_header(data: Bytes) -> Header:
    """Find the size of an encoded image.

    Args:
        data: uint8 [n], the whole file.

    Raises:
        DecodeError: no image that Pillow knows, or one larger than Pillow's limit allows.
    """
    size = _jpeg_size(data)
    if size is not None and not ImageFile.LOAD_TRUNCATED_IMAGES and jpeg_agrees():
        _check_bomb(*size)
        return Header(*size, "jpeg")
    with _opened(data) as image:
        return Header(image.height, image.width, "pillow")


def decode(data: Bytes, header: Header, scale: int = 1) -> Bytes:
    """Decode to RGB.

    Args:
        data: uint8 [n], the whole file.
        header: from ``read_header``.
        scale: 1, or 2, 4, 8 for a JPEG that is decoded at that fraction of its size, rounded up.

    Returns:
        uint8 [H, W, 3], contiguous.

    Raises:
        DecodeError: damaged, or of another size than its header says.
    """
    pixels = None
    if scale > 1:
        pixels = _decode_smaller(data, header, scale)
    elif header.kind == "jpeg":
        pixels = _decode_jpeg(data)
    if pixels is None:
        with _opened(data) as image:
            pixels = _converted(image)
    expected = (-(-header.height // scale), -(-header.width // scale), 3)
    if pixels.shape != expected:
        raise DecodeError(
            f"the image decodes to {pixels.shape}, its header says {expected}; write the file anew"
        )
    return pixels


def _decode_jpeg(data: Bytes) -> Bytes | None:
    """Return the pixels, or None where Pillow has to say what is wrong."""
    try:
        # The operator behind torchvision.io.decode_jpeg, whose Python wrapper warns of its end.
        planes = torch.ops.image.decode_jpeg(
            torch.from_numpy(_writable(data)), ImageReadMode.RGB.value, False
        )
    except (RuntimeError, AttributeError):
        return None
    result: Bytes = planes.permute(1, 2, 0).contiguous().numpy()  # interleaved already
    return result


def _decode_smaller(data: Bytes, header: Header, scale: int) -> Bytes:
    """Decode a JPEG at a fraction of its size, by the inverse transform of fewer coefficients."""
    with _opened(data) as image:
        # draft() divides each side by what is asked for, and takes the smaller quotient.
        image.draft("RGB", (max(1, header.width // scale), max(1, header.height // scale)))
        return _converted(image)


def _converted(image: Image.Image) -> Bytes:
    try:
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise _refusal(error) from error


class _opened:  # noqa: N801 # reads as a verb
    """Open bytes with Pillow; the context closes the image."""

    def __init__(self, data: Bytes) -> None:
        try:
            self._image = Image.open(io.BytesIO(data.tobytes()))
        except Exception as error:
            first = bytes(data[:8])
            if isinstance(error, UnidentifiedImageError):
                raise DecodeError(
                    f"no image format that Pillow knows: {len(data)} bytes that begin with "
                    f"{first!r}; expected a JPEG, PNG or the like; take the file out, or write it "
                    "anew"
                ) from error
            raise _refusal(error) from error

    def __enter__(self) -> Image.Image:
        return self._image

    def __exit__(self, *_: object) -> None:
        self._image.close()


def _refusal(error: Exception) -> Exception:
    """Return what to raise for an error of Pillow's; a warning that is an error stays one."""
    if isinstance(error, Warning | MemoryError):
        return error
    return DecodeError(
        f"Pillow cannot read it ({type(error).__name__}: {error}); expected a whole image; take "
        "the file out, or write it anew"
    )


def _check_bomb(height: int, width: int) -> None:
    """Apply Pillow's limit to what does not pass through Pillow."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or height * width <= limit:
        return
    text = (
        f"Image size ({height * width} pixels) exceeds limit of {limit} pixels, could be "
        "decompression bomb DOS attack."
    )
    if height * width > 2 * limit:
        raise DecodeError(
            f"{text} Raise PIL.Image.MAX_IMAGE_PIXELS if the image is meant"
        ) from Image.DecompressionBombError(text)
    warnings.warn(text, Image.DecompressionBombWarning, stacklevel=2)


def _writable(data: Bytes) -> Bytes:
    """Return bytes that torch takes without a warning; nothing writes to them."""
    return data if data.flags.writeable and data.flags.c_contiguous else data.copy()


def _jpeg_size(data: Bytes) -> tuple[int, int] | None:  # noqa: C901 # one branch a marker
    """Return height and width of a JPEG that the fast decoder may take, else None.

    Markers are followed to the start of the pixels. A file without an end marker is Pillow's: it
    may be truncated.
    """
    view = data.data
    end = len(view)
    if end < 4 or view[0] != 0xFF or view[1] != _SOI:  # noqa: PLR2004 # marker and its length
        return None
    if view[end - 2] != 0xFF or view[end - 1] != _EOI:  # noqa: PLR2004 # likewise
        return None
    at, size, channels = 2, None, 0
    while at + 4 <= end:
        if view[at] != 0xFF:  # noqa: PLR2004 # every marker begins with it
            return None
        marker = view[at + 1]
        if marker == 0xFF or marker in _STANDALONE:  # noqa: PLR2004 # fill bytes
            at += 1 if marker == 0xFF else 2  # noqa: PLR2004
            continue
        length = view[at + 2] << 8 | view[at + 3]
        if marker in _FRAMES and length >= 8 and at + 10 <= end:  # noqa: PLR2004 # its fields
            if size is not None or view[at + 4] != 8:  # noqa: PLR2004 # bits
                return None
            size = (view[at + 5] << 8 | view[at + 6], view[at + 7] << 8 | view[at + 8])
            channels = view[at + 9]
        elif marker == _SOS:
            break
        elif marker in _OTHER_FRAMES or marker in (_SOI, _EOI):
            return None
        at += 2 + length
    else:
        return None
    if size is None or 0 in size or channels not in (1, 3):
        return None
    return size


@cache
def jpeg_agrees() -> bool:
    """Whether the fast decoder gives Pillow's pixels here, tried on a few JPEGs; asked once."""
    rng = np.random.default_rng(0)
    for height, width, options in (
        (33, 47, {"quality": 75}),
        (64, 41, {"quality": 90, "subsampling": 0}),
        (57, 64, {"quality": 60, "progressive": True}),
        (17, 20, {"quality": 80, "subsampling": 1}),
    ):
        small = rng.integers(0, 256, (5, 7, 3), np.uint8)
        for mode in ("RGB", "L"):
            image = Image.fromarray(small).resize((width, height)).convert(mode)
            file = io.BytesIO()
            image.save(file, "JPEG", **options)
            data = np.frombuffer(file.getvalue(), np.uint8)
            with _opened(data) as opened:
                expected = _converted(opened)
            made = _decode_jpeg(data)
            if made is None or not np.array_equal(made, expected):
                return False
    return True
