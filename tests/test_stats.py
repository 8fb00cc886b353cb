"""``channel_stats`` equals float64 NumPy on ``x / 255``, however the pixels are reached.

The tolerance of 1e-12 is NumPy's: it rounds every pixel and every partial sum. Where two ways to
the same pixels are compared, the results must be equal.
"""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)
from torchvision import datasets
from torchvision.transforms import Normalize, ToTensor

from gpupipe import stats
from gpupipe.array_dataset import ArrayDataset
from gpupipe.errors import IndexRangeError, InputError, SourceError
from gpupipe.stats import ChannelStats, channel_stats

Pixels = NDArray[np.uint8]
TOLERANCE = 1e-12


class Samples(Dataset[Any]):
    """A dataset of ready samples, which nothing can look behind."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        return sample() if callable(sample) else sample


class Stream(IterableDataset[Any]):
    """The same without a length."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def draw(*shape: int, seed: int = 0) -> Pixels:
    """Draw pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def check(result: ChannelStats, pixels: Pixels) -> None:
    """Compare with NumPy on pixels [..., C]."""
    for channel, (mean, std) in enumerate(zip(result.mean, result.std, strict=True)):
        # One contiguous row: only there does NumPy add pairwise and keep its own error this small.
        scaled = pixels[..., channel].ravel() / np.float64(255)
        assert mean == pytest.approx(scaled.mean(), rel=TOLERANCE, abs=0)
        assert std == pytest.approx(scaled.std(), rel=TOLERANCE, abs=1e-15)
    assert result.pixels == pixels[..., 0].size
    assert len(result.mean) == pixels.shape[-1]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 9), st.integers(1, 19), st.integers(1, 19), st.sampled_from([1, 2, 3, 4, 7])
    ),
    seed=st.integers(0, 2**32 - 1),
    batch_size=st.none() | st.integers(1, 11),
    levels=st.integers(1, 255),
)
def test_equal_to_numpy(
    shape: tuple[int, int, int, int], seed: int, batch_size: int | None, levels: int
) -> None:
    """Any shape, block and layout gives NumPy's numbers, and both ways the same."""
    images = np.random.default_rng(seed).integers(0, levels + 1, shape, dtype=np.uint8)
    result = channel_stats(images, batch_size=batch_size)
    check(result, images)
    assert result.images == shape[0]
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    assert channel_stats(TensorDataset(tensors), batch_size=batch_size) == result
    assert channel_stats(Samples(list(images)), batch_size=batch_size) == result
    assert channel_stats(Samples(list(tensors)), batch_size=batch_size) == result
    assert channel_stats(Stream(list(images)), batch_size=batch_size) == result
    if shape[3] == 1:
        assert channel_stats(images[..., 0], batch_size=batch_size) == result


def test_counts_beyond_32_and_63_bits() -> None:
    """No sum overflows: the result is that of rational arithmetic, rounded once."""
    counts = np.zeros((2, 256), np.int64)
    counts[0, [0, 3, 255]] = [2**40 + 1, 7, 2**41]
    counts[1, 255] = 2**40 + 7 + 1 + 2**41
    result = stats._stats(counts, 5)
    n = 2**40 + 2**41 + 8
    mean = Fraction(21 + 255 * 2**41, 255 * n)
    variance = Fraction(63 + 255**2 * 2**41, 255**2 * n) - mean**2
    assert result.mean == (float(mean), 1.0)
    assert result.std == (float(variance) ** 0.5, 0.0)
    assert result.pixels == n


def test_more_than_2_31_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks add up beyond 32 bits; one block is counted and taken 513 times."""
    block = np.full((1, 2**22), 255, np.uint8)
    counted = stats._histograms(block)
    monkeypatch.setattr(stats, "_histograms", lambda _: counted)
    monkeypatch.setattr(stats, "_array_blocks", lambda *_: [(1, block)] * 513)
    assert channel_stats(draw(1, 1, 1)) == ChannelStats((1.0,), (0.0,), 513 * 2**22, 513)


def test_one_odd_pixel_in_many() -> None:
    """The difference of two large, almost equal sums is exact."""
    images = np.full((64, 64, 64), 255, np.uint8)
    images[7, 8, 9] = 254
    n = images.size
    expected = (Fraction(n - 1, n * n) / 255**2).limit_denominator(10**30)
    assert channel_stats(images).std == (float(expected) ** 0.5,)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_constant_images(value: int) -> None:
    """The std of constant images is 0, not what rounding leaves."""
    result = channel_stats(np.full((5, 7, 3, 3), value, np.uint8))
    assert result.mean == (value / 255,) * 3
    assert result.std == (0.0,) * 3


def test_published_constants(fashion_root: Path) -> None:
    """The training images of Fashion-MNIST give the constants that everybody pastes, quickly."""
    dataset = datasets.FashionMNIST(str(fashion_root), transform=ToTensor())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = channel_stats(dataset)
        seconds.append(time.perf_counter() - start)
    assert str(result) == "Normalize(mean=(0.2860,), std=(0.3530,))"
    assert (result.pixels, result.images) == (60000 * 28 * 28, 60000)
    check(result, dataset.data.numpy()[..., np.newaxis])
    assert min(seconds) < 1.0  # it takes a few hundredths; a busy machine may take longer


def test_own_getitem_is_respected(fashion_root: Path) -> None:
    """A subclass that changes the image is read by its own ``__getitem__``."""

    class Inverted(datasets.FashionMNIST):  # type: ignore[misc,unused-ignore] # untyped base
        __module__ = datasets.FashionMNIST.__module__

        @property
        def raw_folder(self) -> str:
            return str(fashion_root / "FashionMNIST" / "raw")

        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return Image.fromarray(255 - np.asarray(image)), label

    dataset = Inverted(str(fashion_root), train=False)
    result = channel_stats(Subset(dataset, range(40)))
    check(result, 255 - dataset.data.numpy()[:40, ..., np.newaxis])


def test_transform_of_an_array_dataset_is_not_run() -> None:
    """Raw pixels are counted, the dataset's transform is neither run nor taken off."""

    def refuse(_: Any) -> Any:
        raise AssertionError

    images = draw(4, 5, 6, 3)
    dataset = ArrayDataset(images, np.arange(4), transform=refuse)
    check(channel_stats(dataset), images)
    assert dataset.transform is refuse


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_subset_concat_split(batch_size: int | None) -> None:
    """Only the rows that are there count, each as often as it is there."""
    first, second = draw(11, 6, 5, 3), draw(8, 6, 5, 3, seed=1)
    both: ConcatDataset[Any] = ConcatDataset([ArrayDataset(first), ArrayDataset(second)])
    images = np.concatenate([first, second])
    check(channel_stats(both, batch_size=batch_size), images)
    rows = [18, 3, 3, -1, 0]
    result = channel_stats(Subset(both, rows), batch_size=batch_size)
    check(result, images[rows])
    assert result.images == len(rows)
    generator = torch.Generator().manual_seed(0)
    for part in random_split(both, [0.4, 0.6], generator):
        check(channel_stats(part, batch_size=batch_size), images[part.indices])
        slow = Samples([images[row] for row in part.indices])
        assert channel_stats(slow) == channel_stats(part)


@pytest.mark.parametrize("rows", [None, range(0, 2000, 3)])
def test_a_memmap_stays_on_disk(tmp_path: Path, rows: range | None) -> None:
    """No array anywhere near the size of the file is made."""
    path = tmp_path / "images.npy"
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (2000, 96, 96, 3))
    images[:] = draw(1, 96, 96, 3)
    images[1::2, :50] //= 3
    images.flush()
    size = images.nbytes
    del images
    dataset: Dataset[Any] = ArrayDataset(path)
    if rows is not None:
        dataset = Subset(dataset, rows)
    channel_stats(np.zeros((1, 2, 2, 3), np.uint8))  # what is imported late is imported
    tracemalloc.start()
    try:
        result = channel_stats(dataset)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * stats.BLOCK_BYTES < size / 8
    images = np.load(path, mmap_mode="r")
    taken = images[slice(None) if rows is None else slice(rows.start, rows.stop, rows.step)]
    scale = 255.0 * taken[..., 0].size
    assert result.mean == tuple(taken.sum(axis=(0, 1, 2), dtype=np.int64) / scale)


def test_pil_images_of_mixed_sizes() -> None:
    """Every pixel counts once, so large images weigh more."""
    arrays = [draw(height, width, 3, seed=height) for height, width in ((5, 9), (31, 2), (1, 1))]
    samples = [(Image.fromarray(array), 0) for array in arrays]
    result = channel_stats(Samples(samples), batch_size=2)
    check(result, np.concatenate([array.reshape(-1, 3) for array in arrays]))
    assert result.images == 3
    assert channel_stats([{"image": image, "label": label} for image, label in samples]) == result


def test_photos(photos: list[Path]) -> None:
    """Files decoded one by one give what NumPy gives for all pixels together."""
    paths = photos[:6]
    decoded = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    lazy = Samples([lambda path=path: Image.open(path).convert("RGB") for path in paths])
    check(channel_stats(lazy), np.concatenate([array.reshape(-1, 3) for array in decoded]))


def test_blocks_of_a_slow_dataset_are_small() -> None:
    """Samples are counted before they fill more than a block."""
    numbers = [number for number, _ in stats._sample_blocks([draw(2, 2)] * 600, None)]
    assert numbers == [256, 256, 88]
    big = [draw(1, stats.BLOCK_BYTES // 2)] * 5
    assert [number for number, _ in stats._sample_blocks(big, None)] == [2, 2, 1]
    assert [number for number, _ in stats._sample_blocks(big, 3)] == [3, 2]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (np.empty((0, 28, 28), np.uint8), "at least one pixel, got 0 images"),
        (Samples([]), "at least one pixel, got 0 images"),
        (Stream([]), "at least one pixel, got 0 images"),
        (Subset(ArrayDataset(draw(3, 4, 4)), []), "at least one pixel, got 0 images"),
        (draw(3, 0, 4, 3), "at least one pixel, got 3 images"),
        (draw(3, 4, 4, 0), "at least one pixel, got 3 images"),
        (np.zeros((3, 4, 4)), "uint8 .* got float64"),
        (
            Samples([(torch.zeros(3, 4, 5), 0)]),
            r"dataset\[0\] .* got float32 \(3, 4, 5\) on cpu; pass the dataset without its trans",
        ),
        (Samples([draw(4, 4), np.zeros((4, 4))]), r"dataset\[1\] .* got float64 \(4, 4\); pass"),
        (Samples([Image.new("P", (4, 4))]), "got PIL P; convert"),
        (Samples([Image.new("F", (4, 4))]), "got PIL F; convert"),
        (Samples([(3, Image.new("L", (4, 4)))]), "got a int; return the image"),
        (Samples([()]), "got a tuple; return the image"),
        (
            Samples([Image.new("RGB", (4, 4)), Image.new("L", (4, 4))]),
            r"dataset\[1\] must be PIL RGB as dataset\[0\] is, got PIL L; convert",
        ),
        (
            Samples([Image.new("RGB", (4, 4)), Image.new("YCbCr", (4, 4))]),
            "must be PIL RGB .* got PIL YCbCr",
        ),
        (Samples([draw(4, 4, 3), draw(4, 4)]), "must be uint8 ndarray .*H, W, 3.* got .*H, W]"),
    ],
)
def test_bad_images(dataset: Any, message: str) -> None:
    """What cannot be counted is refused with what came, what was expected and what to do."""
    with pytest.raises(SourceError, match=message):
        channel_stats(dataset)


def test_bad_arguments() -> None:
    """Other things than datasets, and blocks of no images, are refused."""
    images = draw(3, 4, 4)
    with pytest.raises(InputError, match=r"got DataLoader; of a loader, pass loader.dataset"):
        channel_stats(DataLoader(ArrayDataset(images)))
    for wrong in (0, -1, 2.5, "8", True, np.True_, np.int64(0), np.arange(3)):
        with pytest.raises(InputError, match="batch_size must be a positive int or None, got"):
            channel_stats(images, batch_size=wrong)  # type: ignore[arg-type] # that is the point
    with pytest.raises(IndexRangeError, match="index 3"):
        channel_stats(Subset(ArrayDataset(images), [3]))


def test_any_integer_is_a_batch_size() -> None:
    """NumPy's integers are integers."""
    images = draw(5, 4, 4)
    for dataset in (images, Samples(list(images))):
        assert channel_stats(dataset, batch_size=np.int64(4)) == channel_stats(images)  # type: ignore[arg-type] # no int to mypy


def test_data_replaced_by_a_list() -> None:
    """Images picked into a list are counted one by one."""
    images = draw(5, 4, 4, 3)
    dataset: Any = ArrayDataset(images, np.arange(5))
    dataset.images = [images[i] for i in (0, 3)]
    check(channel_stats(dataset), images[[0, 3]])


def test_a_sample_that_cannot_be_read(tmp_path: Path) -> None:
    """The index and the cause are named, also where Pillow reads the file only when it must."""
    path = tmp_path / "cut.png"
    Image.fromarray(draw(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])

    def read() -> Pixels:
        with Image.open(path) as image:
            return np.asarray(image)

    dataset = Samples([draw(3, 3), read])
    with pytest.raises(SourceError, match=r"dataset\[1\] must give .* got OSError") as caught:
        channel_stats(dataset)
    assert isinstance(caught.value.__cause__, OSError)
    with Image.open(path) as lazy, pytest.raises(SourceError, match=r"dataset\[0\] .* got OSError"):
        channel_stats(Samples([lazy]))


def test_damaged_files(tmp_path: Path) -> None:
    """A truncated or pickled ``.npy`` is refused before anything is counted."""
    whole, cut, pickled = (tmp_path / f"{name}.npy" for name in ("whole", "cut", "pickled"))
    np.save(whole, draw(9, 5, 5))
    cut.write_bytes(whole.read_bytes()[:-7])
    np.save(pickled, np.array([draw(2, 2), None], dtype=object), allow_pickle=True)
    assert channel_stats(ArrayDataset(whole)).images == 9
    for path in (cut, pickled):
        with pytest.raises(SourceError, match=path.name):
            channel_stats(ArrayDataset(path))


def test_the_line_can_be_pasted() -> None:
    """``str`` is a call of torchvision's ``Normalize`` for one channel and for several."""
    grey = ChannelStats((0.28604,), (0.35302,), 1, 1)
    assert str(grey) == "Normalize(mean=(0.2860,), std=(0.3530,))"
    rgb = ChannelStats((0.5, 0.25, 1.0), (0.1, 0.2, 0.3), 1, 1)
    assert str(rgb) == "Normalize(mean=(0.5000, 0.2500, 1.0000), std=(0.1000, 0.2000, 0.3000))"
    pasted = eval(str(rgb), {"Normalize": Normalize})  # noqa: S307 # our own text
    assert tuple(pasted.mean) == rgb.mean
    assert tuple(pasted.std) == rgb.std


@pytest.mark.parametrize(
    ("progress", "terminal", "patience", "shown"),
    [
        (True, False, 60.0, True),
        (False, True, 0.0, False),
        (None, False, 0.0, False),
        (None, True, 60.0, False),
        (None, True, 0.0, True),
    ],
)
def test_progress(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool | None,
    terminal: bool,
    patience: float,
    shown: bool,
) -> None:
    """The bar is on stderr, and only if it was asked for, or on a terminal after a while."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(stats, "PATIENCE", patience)
    channel_stats(draw(30, 4, 4), batch_size=7, progress=progress)
    captured = capsys.readouterr()
    assert ("30/30" in captured.err) == shown
    assert bool(captured.err) == shown
    assert not captured.out


def _fail() -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("last", [_fail, lambda: torch.zeros(3, 4, 4)])
def test_the_bar_ends_with_an_error(
    last: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """An error or Ctrl-C leaves no thread of the bar's behind."""
    before = threading.active_count()
    with pytest.raises((KeyboardInterrupt, SourceError)):
        channel_stats(Samples([draw(4, 4), last]), batch_size=1, progress=True)
    assert threading.active_count() == before
    assert "1/2" in capsys.readouterr().err
