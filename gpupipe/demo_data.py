"""Data for the demo: Fashion-MNIST where it can be had, else garments that Pillow draws.

The drawn set is written as MNIST-layout files and read by torchvision, so both take the same way.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision import datasets

from gpupipe.errors import InputError, SourceError

IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}

TIMEOUT = 10.0
"""Seconds without a byte after which a download is given up."""

_UINT8 = 0x08
_SIZE = 28
_SCALE = 4

Sayer = Callable[[str], None]


class DrawnGarments(datasets.MNIST):  # type: ignore[misc] # torchvision has no types
    """Ten kinds of garments drawn by ``draw``, in the layout of torchvision's MNIST files."""

    classes = datasets.FashionMNIST.classes


@dataclass(frozen=True)
class DemoData:
    """What the demo runs on.

    Attributes:
        name: for headings; says so where the data is drawn.
        train: a torchvision dataset without a transform.
        test: likewise, of images that ``train`` does not have.
        drawn: whether it is the stand-in.
    """

    name: str
    train: datasets.MNIST
    test: datasets.MNIST
    drawn: bool


def load(
    directory: Path | None, say: Sayer, *, counts: tuple[int, int] = (12_000, 2_000)
) -> DemoData:
    """Find Fashion-MNIST, or download it, or draw a stand-in.

    Args:
        directory: holds ``FashionMNIST/raw``; None: ``$GPUPIPE_DATA``, else a cache folder, into
            which torchvision downloads it.
        say: is told what happens.
        counts: training and test images of the stand-in.

    Raises:
        InputError: ``directory`` does not hold Fashion-MNIST.
        SourceError: a damaged file.
    """
    root = find(directory, say)
    if root is not None:
        train, test = (datasets.FashionMNIST(str(root), train=part) for part in (True, False))
        return DemoData("Fashion-MNIST", train, test, drawn=False)
    say(
        "Fashion-MNIST is not here and cannot be downloaded. Going on with a small set of DRAWN "
        "garments: its figures are not Fashion-MNIST's. Pass --data DIR to use the real one."
    )
    with tempfile.TemporaryDirectory(prefix="gpupipe-drawn-") as scratch:
        write(Path(scratch, "DrawnGarments", "raw"), *counts)
        # torchvision reads the files into memory at once.
        train, test = (DrawnGarments(scratch, train=part) for part in (True, False))
    return DemoData("drawn garments (not Fashion-MNIST)", train, test, drawn=True)


def find(directory: Path | None, say: Sayer) -> Path | None:
    """Return a directory for ``torchvision.datasets.FashionMNIST``, or None; see ``load``.

    Raises:
        InputError: ``directory`` does not hold Fashion-MNIST.
        SourceError: a damaged file.
    """
    if directory is not None:
        if not _there(directory):
            raise InputError(
                f"--data must be the folder that holds FashionMNIST/raw/{IMAGES['train']} and its "
                f"three companions, unpacked, got {directory}; leave it out to download them"
            )
        return _checked(directory)
    named = os.environ.get("GPUPIPE_DATA")
    if named and _there(Path(named)):
        return _checked(Path(named))
    if named:
        say(f"$GPUPIPE_DATA is {named}, which has no FashionMNIST/raw; looking elsewhere.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpupipe", "data")
    if not _there(cache):
        say(f"Downloading Fashion-MNIST (30 MB) to {cache} ...")
        failure = _download(cache)
        if failure:
            say(f"The download failed: {failure}")
            return None
    return _checked(cache)


def _there(root: Path) -> bool:
    names = (*IMAGES.values(), *LABELS.values())
    return all((root / "FashionMNIST" / "raw" / name).is_file() for name in names)


def _download(root: Path) -> str:
    """Let torchvision download; return why it failed, or nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            datasets.FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        socket.setdefaulttimeout(before)
    return ""


def _checked(root: Path) -> Path:
    """Check the four files, so that damage is told with the file's name.

    Raises:
        SourceError: a damaged file, or labels of another number than images.
    """
    raw = root / "FashionMNIST" / "raw"
    for part in ("train", "test"):
        images, labels = raw / IMAGES[part], raw / LABELS[part]
        many, named = check_idx(images, 3)[0], check_idx(labels, 1)[0]
        if many != named:
            raise SourceError(
                f"{labels} must have a label for each image, got {named} labels for {many} images; "
                "delete both files and download them again"
            )
    return root


def check_idx(path: Path, axes: int) -> tuple[int, ...]:
    """Return the shape in an IDX file's header, once the file's size agrees with it.

    The header is two zero bytes, the dtype's code, the number of axes, and each axis as a
    big-endian uint32 (LeCun, Cortes, Burges: "The MNIST database").

    Args:
        path: of an unpacked file of uint8.
        axes: how many it must have.

    Raises:
        SourceError: not such a file, or not as long as its header promises.
    """
    found = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(4 + 4 * axes)
    mend = "delete it and download it again, or copy it again"
    if header[:4] != bytes((0, 0, _UINT8, axes))[: len(header)]:
        raise SourceError(
            f"{path} must be an IDX file of uint8 with {axes} axes, got one of {found:,} bytes "
            f"that begins with {header[:4]!r}; {mend}"
        )
    if len(header) < 4 + 4 * axes:
        raise SourceError(
            f"{path} is truncated: an IDX header has {4 + 4 * axes} bytes, found {found:,}; {mend}"
        )
    shape = struct.unpack(f">{axes}I", header[4:])
    promised = len(header) + math.prod(shape)
    if found != promised:
        what = "truncated" if found < promised else "too long"
        raise SourceError(
            f"{path} is {what}: found {found:,} bytes, its header promises {promised:,} "
            f"({len(header)} + {' x '.join(map(str, shape))}); {mend}"
        )
    return shape


def write(raw: Path, train: int, test: int) -> None:
    """Write drawn garments as the four files of an MNIST-layout dataset.

    Args:
        raw: the folder, made if need be.
        train: images to train on.
        test: images to test on, drawn from another seed.
    """
    raw.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", train), ("test", test))):
        images, labels = draw(count, seed)
        for name, array in ((IMAGES[part], images), (LABELS[part], labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, _UINT8, array.ndim, *array.shape)
            (raw / name).write_bytes(header + array.tobytes())


def draw(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw garments with random size, place, brightness and noise.

    Args:
        count: how many.
        seed: of all randomness.

    Returns:
        images uint8 [count, 28, 28] and labels uint8 [count], 0 to 9.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(_GARMENTS), count).astype(np.uint8)
    images = np.empty((count, _SIZE, _SIZE), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[...] = np.asarray(_garment(rng, _GARMENTS[label]))
    shade = rng.normal(1.0, 0.3, images.shape)
    return np.clip(images * shade, 0, 255).astype(np.uint8), labels


def _garment(rng: np.random.Generator, polygons: tuple[Any, ...]) -> Image.Image:
    """Draw one garment, four times as large, and shrink it."""
    side = _SIZE * _SCALE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    bright = rng.integers(90, 256)
    size = side / 100 * rng.uniform(0.75, 1.0, 2)
    shift = (side - 100 * size) / 2 + rng.uniform(-12, 12, 2)
    for polygon in polygons:
        points = np.array(polygon) * size + shift + rng.normal(0, 5, (len(polygon), 2))
        pen.polygon([(float(x), float(y)) for x, y in points], fill=int(bright))
    return canvas.resize((_SIZE, _SIZE), Image.Resampling.BOX)


def _mirrored(*half: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return an outline that is symmetrical about x = 50, from its left half."""
    return (*half, *((100 - x, y) for x, y in reversed(half)))


def _garments() -> Iterator[tuple[tuple[tuple[int, int], ...], ...]]:
    """Yield the outlines of each class, on a canvas of 100 by 100, in the order of ``classes``."""
    long_sleeve = ((40, 8), (26, 12), (10, 80), (20, 84), (30, 40))
    yield (_mirrored((40, 10), (25, 14), (4, 40), (16, 48), (28, 36), (28, 90)),)  # T-shirt
    yield (_mirrored((32, 5), (24, 96), (42, 96), (49, 35)),)  # trouser
    yield (_mirrored(*long_sleeve, (30, 76)),)  # pullover
    yield (_mirrored((42, 4), (36, 10), (42, 42), (24, 96)),)  # dress
    left = (*long_sleeve, (27, 97), (48, 97), (48, 14))
    yield (left, tuple((100 - x, y) for x, y in left))  # coat, open in front
    yield ((2, 78), (98, 62), (98, 70), (2, 86)), ((60, 40), (68, 40), (80, 66), (72, 68))  # sandal
    collar = _mirrored((44, 2), (36, 6), (48, 20))
    yield _mirrored((40, 10), (25, 14), (12, 56), (22, 60), (30, 42), (30, 96)), collar  # shirt
    yield (((2, 80), (2, 52), (20, 46), (40, 58), (66, 44), (92, 64), (98, 80)),)  # sneaker
    yield (
        _mirrored((12, 40), (8, 90)),
        ((30, 40), (36, 14), (64, 14), (70, 40), (62, 40), (58, 22), (42, 22), (38, 40)),
    )  # bag
    yield (((34, 6), (70, 6), (68, 54), (96, 74), (96, 92), (30, 92)),)  # ankle boot


_GARMENTS = tuple(_garments())
