"""Pillow's weights and the order of its passes, against the installed Pillow."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from gpupipe import resampling
from gpupipe.resampling import Filter, Weights, coefficients, vertical_first

ROOT = Path(__file__).parents[1]
OLD_PILLOWS = Path(os.environ.get("GPUPIPE_PILLOWS", ROOT / ".venv"))


def one_pass(
    image: NDArray[np.uint8], start: NDArray[np.int32], weights: NDArray[np.int32], axis: int
) -> NDArray[np.uint8]:
    """Apply the weights along an axis, in integers."""
    moved = np.moveaxis(image, axis, 0).astype(np.int64)
    taps = moved[start[:, None] + np.arange(weights.shape[1])]
    scaled = taps * weights.reshape(*weights.shape, *([1] * (image.ndim - 1)))
    total = scaled.sum(1) + (1 << 21) >> 22
    return np.moveaxis(np.clip(total, 0, 255).astype(np.uint8), 0, axis)


def resized(
    image: NDArray[np.uint8], height: int, width: int, kind: Filter, *, wrong: bool = False
) -> NDArray[np.uint8]:
    """Resize in two passes; ``wrong`` exchanges them."""
    in_h, in_w = image.shape[:2]
    passes = [(1, in_w, width)] * (in_w != width) + [(0, in_h, height)] * (in_h != height)
    if bool(vertical_first(*map(np.array, (in_h, in_w, height, width)))) != wrong:
        passes.reverse()
    for axis, before, after in passes:
        image = one_pass(image, *coefficients(before, after, kind), axis)
    return image


def shapes(count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Draw sizes: ordinary, thin, and near the threshold of the order."""
    rng = random.Random(seed)  # noqa: S311 # sizes, no secrets
    found = []
    for _ in range(count):
        style = rng.random()
        in_h, in_w = rng.randint(1, 60), rng.randint(1, 60)
        if style < 0.25:
            in_h, in_w = rng.choice(
                [(rng.randint(1, 350), rng.randint(1, 3)), (2, in_w), (in_h, 1)]
            )
        height, width = rng.randint(1, 60), rng.randint(1, 60)
        if style > 0.8 and in_h > height:
            width = max(1, in_w - (in_h - height) // 2 + rng.randint(-1, 1))
        found.append((in_h, in_w, height, width))
    return found


def differences(count: int, seed: int, *, wrong: bool = False) -> int:
    """Count the shapes whose resize differs from Pillow's in any byte."""
    rng = np.random.default_rng(seed)
    different = 0
    for number, (in_h, in_w, height, width) in enumerate(shapes(count, seed)):
        colours = (3,) if number % 2 else ()
        image = rng.integers(0, 256, (in_h, in_w, *colours), np.uint8)
        kind = Filter(number % 6)
        expected = np.asarray(Image.fromarray(image).resize((width, height), int(kind)))
        different += not np.array_equal(resized(image, height, width, kind, wrong=wrong), expected)
    return different


@pytest.mark.slow
def test_twenty_thousand_shapes_are_pillows(capsys: pytest.CaptureFixture[str]) -> None:
    """All filters, L and RGB, thin images and those at the threshold of the order: every byte."""
    assert differences(20_000, seed=0) == 0
    with capsys.disabled():
        sys.stdout.write(" [20000 shapes] ")


def test_a_thousand_shapes_are_pillows() -> None:
    """The same, in a second."""
    assert differences(1_000, seed=1) == 0


def test_the_wrong_order_of_the_passes_is_seen() -> None:
    """A planted bug: the passes exchanged."""
    assert differences(500, seed=2, wrong=True) > 100


@pytest.mark.slow
@pytest.mark.parametrize("version", ["11.3.0", "12.3.0"])
def test_older_pillows_order_is_theirs(version: str) -> None:
    """The same check under another Pillow, in a process of its own."""
    folder = OLD_PILLOWS / f"pillow-{version}"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which tools/pillows.sh makes")
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]
        import PIL
        assert PIL.__version__ == {version!r}, PIL.__version__
        from tests.test_resampling import differences
        print(differences(4_000, seed=3), differences(300, seed=4, wrong=True))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    right, wrong = map(int, done.stdout.split())
    assert right == 0
    assert wrong > 50


def test_the_order_by_version() -> None:
    """The rule of each Pillow, at its thresholds."""
    tall, even = (300, 2, 100, 2), (100, 60, 60, 40)  # even: by 40 and 20, not more than twice
    for sizes, version, expected in (
        (tall, (13, 0), True),
        (tall, (12, 2), True),
        (tall, (11, 3), False),
        (even, (13, 0), False),
        ((101, 60, 60, 40), (13, 0), True),
    ):
        in_h, in_w, out_h, out_w = map(np.array, sizes)
        assert bool(vertical_first(in_h, in_w, out_h, out_w, version=version)) is expected
    installed = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    assert installed == resampling._VERSION


def test_weights_are_kept_and_found_again() -> None:
    """Offsets are stable while the array grows, 0 means no pass, and a new generation is new."""
    pool = Weights(limit=5_000)
    before = np.array([50, 30, 50, 20])
    offsets = pool.find(before, np.array([20, 30, 20, 40]), Filter.BILINEAR)
    assert offsets[0] == offsets[2] != 0
    assert offsets[1] == 0
    old = pool.data
    for size in range(2, 400):
        pool.find(np.array([size]), np.array([size // 2]), Filter.BICUBIC)
    assert np.array_equal(pool.data[1 : int(old[0])], old[1 : int(old[0])])
    start, weights = coefficients(50, 20, Filter.BILINEAR)
    entry = pool.data[offsets[0] :]
    assert entry[:2].tolist() == [weights.shape[1], 20]
    assert np.array_equal(entry[2:22], start)
    assert np.array_equal(entry[22 : 22 + weights.size], weights.ravel())
    pool.begin()
    assert pool.find(np.array([50]), np.array([20]), Filter.BILINEAR).tolist() == [1]
    assert int(old[0]) > 1  # the old array still holds what it held
