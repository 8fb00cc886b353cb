"""Decoded pixels against Pillow's, for every kind of file; errors; fuzzing."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torchvision.datasets import folder

from gpupipe import decoding
from gpupipe.errors import DecodeError

DATA = Path(os.environ.get("GPUPIPE_DATA", Path(__file__).parents[2] / "shared" / "data"))
CASES = int(os.environ.get("GPUPIPE_FUZZ_CASES", "20000"))


def decoded(data: bytes) -> NDArray[np.uint8]:
    """Return what the loader's threads make of a file."""
    array = np.frombuffer(data, np.uint8)
    return decoding.decode(array, decoding.read_header(array))


def picture(mode: str, height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a picture with edges and shades."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEGS: list[tuple[str, dict[str, Any]]] = [
    ("L", {}), ("RGB", {"subsampling": 0}), ("RGB", {"subsampling": 1}),
    ("RGB", {"subsampling": 2}), ("RGB", {"progressive": True}), ("RGB", {"optimize": True}),
    ("RGB", {"restart_marker_blocks": 3}), ("RGB", {"quality": 5}), ("RGB", {"quality": 100}),
    ("CMYK", {}), ("RGB", {"keep_rgb": True, "subsampling": 0}),
]  # fmt: skip
SIZES = [(1, 1), (7, 5), (8, 16), (33, 17), (100, 3), (64, 81)]


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_jpegs_are_pillows(mode: str, options: dict[str, Any]) -> None:
    """Grey and colour, all subsamplings, progressive, restarts, CMYK; odd sizes."""
    for height, width in SIZES:
        data = saved(picture(mode, height, width), "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decoded(data), expected), (height, width)


def test_ordinary_jpegs_take_the_fast_decoder() -> None:
    """Otherwise the tests above would compare Pillow with itself."""
    data = np.frombuffer(saved(picture("RGB", 33, 17), "JPEG"), np.uint8)
    assert decoding.jpeg_agrees()
    assert decoding.read_header(data) == decoding.Header(33, 17, "jpeg")
    cmyk = np.frombuffer(saved(picture("CMYK", 33, 17), "JPEG"), np.uint8)
    assert decoding.read_header(cmyk).kind == "pillow"


def others() -> dict[str, bytes]:
    """Return files of the other formats, in all modes that matter."""
    rgb, grey = picture("RGB", 21, 34), picture("L", 21, 34)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(grey)
    palette = rgb.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees; torchvision's loader does not turn it back
    wide = Image.fromarray(np.arange(21 * 34, dtype=np.uint16).reshape(21, 34) * 91)
    return {
        "png": saved(rgb, "PNG"), "png grey": saved(grey, "PNG"), "png rgba": saved(alpha, "PNG"),
        "png la": saved(alpha.convert("LA"), "PNG"), "png palette": saved(palette, "PNG"),
        "png transparent palette": saved(palette, "PNG", transparency=3),
        "png 1 bit": saved(grey.convert("1"), "PNG"), "png 16 bit": saved(wide, "PNG"),
        "webp": saved(rgb, "WEBP", lossless=True), "webp alpha": saved(alpha, "WEBP"),
        "bmp": saved(rgb, "BMP"), "gif": saved(palette, "GIF"), "tiff": saved(rgb, "TIFF"),
        "tiff cmyk": saved(rgb.convert("CMYK"), "TIFF"), "ppm": saved(rgb, "PPM"),
        "jpeg turned": saved(rgb, "JPEG", exif=exif),
        "jpeg with rubbish behind": saved(rgb, "JPEG") + b"rubbish" * 5,
    }  # fmt: skip


@pytest.mark.parametrize("name", others())
def test_other_files_are_the_default_loaders(name: str, tmp_path: Path) -> None:
    """The same bits as ``torchvision.datasets.folder.default_loader``."""
    data = others()[name]
    path = tmp_path / "file"
    path.write_bytes(data)
    assert np.array_equal(decoded(data), np.asarray(folder.default_loader(str(path))))


def test_real_photographs() -> None:
    """Every photograph at hand."""
    if not (DATA / "photos").is_dir():
        pytest.skip(f"needs photographs in {DATA / 'photos'}; set GPUPIPE_DATA")
    paths = sorted((DATA / "photos").iterdir())
    for path in paths:
        data = path.read_bytes()
        assert np.array_equal(decoded(data), np.asarray(folder.default_loader(str(path)))), path
    sys.stdout.write(f" [{len(paths)} photographs] ")


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_smaller_scales(scale: int) -> None:
    """A fraction of the size, rounded up, as Pillow's ``draft`` decodes it."""
    for height, width in ((64, 96), (101, 67), (240, 17)):
        data = saved(picture("RGB", height, width), "JPEG", quality=90)
        array = np.frombuffer(data, np.uint8)
        made = decoding.decode(array, decoding.read_header(array), scale=scale)
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (width // scale, height // scale))
        assert made.shape == (-(-height // scale), -(-width // scale), 3)
        assert np.array_equal(made, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes that begin with b''"),
        (b"no picture at all, but text", "no image format that Pillow knows"),
        (saved(picture("RGB", 60, 60), "JPEG")[:900], "truncated"),
        (saved(picture("RGB", 60, 60), "PNG")[:900], "Pillow cannot read it"),
        (b"\xff\xd8\xff\xd9", "Pillow"),
    ],
)
def test_damaged_files(data: bytes, words: str) -> None:
    """One kind of error, with Pillow's words and what to do."""
    with pytest.raises(DecodeError, match=words):
        decoded(data)


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit holds for the fast decoder: a warning above it, an error above twice it."""
    jpeg, png = (saved(picture("RGB", 40, 50), kind) for kind in ("JPEG", "PNG"))
    for data in (jpeg, png):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
        with pytest.warns(Image.DecompressionBombWarning):
            decoded(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
        with pytest.raises(DecodeError, match="bomb"):
            decoded(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert decoded(data).shape == (40, 50, 3)


def test_truncated_files_that_pillow_is_told_to_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ImageFile.LOAD_TRUNCATED_IMAGES`` means what it means to torchvision's loader."""
    data = saved(picture("RGB", 60, 60), "JPEG")[:1500]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded(data), expected)


def mutants(count: int, seed: int) -> Any:
    """Yield damaged files: bits flipped, bytes overwritten, cut off, spliced."""
    rng = random.Random(seed)  # noqa: S311 # damage, no secrets
    originals = [saved(picture("RGB", 40, 31, n), "JPEG", progressive=n % 2 == 1) for n in range(6)]
    originals += [saved(picture("L", 17, 64), "JPEG"), *others().values()]
    for _ in range(count):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice([1, 1, 2, 5])):
            style, place = rng.random(), rng.randrange(max(len(data), 1))
            if style < 0.45 and data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            elif style < 0.65:
                data[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            elif style < 0.85:
                del data[place:]
            else:
                other = rng.choice(originals)
                data[place:] = other[rng.randrange(len(other)) :]
        yield bytes(data)


def outcome(data: bytes, decode: Any) -> Any:
    """Return pixels, or None for an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode(data)
        except Exception:  # noqa: BLE001 # Pillow's plugins raise many kinds
            return None


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """Return what torchvision's loader would."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def disagreements(count: int, seed: int, decode: Any = decoded) -> list[bytes]:
    """Return the damaged files whose outcome is not Pillow's: other pixels, or other success."""
    bad = []
    for data in mutants(count, seed):
        mine, theirs = outcome(data, decode), outcome(data, by_pillow)
        both = mine is not None and theirs is not None
        if not (np.array_equal(mine, theirs) if both else mine is theirs):
            bad.append(data)
    return bad


@pytest.mark.slow
def test_damaged_files_have_pillows_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, which must neither crash nor hang: pixels or error as Pillow's."""
    script = textwrap.dedent("""
        import sys
        from tests.test_decoding import disagreements
        bad = disagreements(int(sys.argv[1]), int(sys.argv[2]))
        print(len(bad), [data.hex() for data in bad[:2]])
    """)
    share = CASES // 8
    for seed in range(8):
        done = subprocess.run(
            [sys.executable, "-c", script, str(share), str(seed)],
            capture_output=True, text=True, check=False, timeout=280, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 0, (seed, done.stderr[-2000:])
        assert done.stdout.startswith("0 "), (seed, done.stdout)
    with capsys.disabled():
        sys.stdout.write(f" [{share * 8} damaged files] ")


def test_a_decoder_that_bears_truncation_is_seen() -> None:
    """A planted bug: the end marker is put back where it is missing."""

    def patient(data: bytes) -> NDArray[np.uint8]:
        return decoded(data if data.endswith(b"\xff\xd9") else data + b"\xff\xd9")

    assert disagreements(400, 1, patient)
    assert not disagreements(200, 2)
