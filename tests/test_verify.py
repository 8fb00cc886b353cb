"""``verify``: equal bits are found equal, every planted difference is found, nothing is left."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision import transforms as T  # noqa: N812 # torchvision's own habit

import gpupipe
from gpupipe import cpu_ops, devices
from gpupipe.devices import CpuDevice
from gpupipe.errors import GpupipeWarning, InputError, VerificationError
from gpupipe.tables import Layout, Lookup
from gpupipe.verify import Row, Verification

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RGB = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
FLIPPED = T.Compose([T.RandomRotation(30), *RGB.transforms])


def pixels(n: int = 37) -> NDArray[np.uint8]:
    """Return random raw images [N, 7, 11, 3]."""
    return np.random.default_rng(n).integers(0, 256, (n, 7, 11, 3), np.uint8)


def arrays(n: int = 37, transform: Any = RGB) -> gpupipe.ArrayDataset:
    """Return a dataset that takes the array route: every image is fused."""
    return gpupipe.ArrayDataset(pixels(n), np.arange(n), transform=transform)


class Recorded(Dataset[Any]):
    """A user's own dataset; ``extra`` gives more items of a sample, by index and name."""

    def __init__(
        self, transform: Any = FLIPPED, n: int = 23, **extra: Callable[[int], Any]
    ) -> None:
        self.pixels = pixels(n)
        self.transform = transform
        self.extra = extra

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.transform(T.functional.to_pil_image(self.pixels[index]))
        return {"image": image, **{name: make(index) for name, make in self.extra.items()}}


class Stream(IterableDataset[Any]):
    """Samples without an end, or ``n``; the first draw is made before the first sample is asked."""

    def __init__(self, n: int | None = None) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        shift = random.random()  # noqa: S311 # a user's shuffle
        numbers = count() if self.n is None else iter(range(self.n))
        return ((torch.full((2,), number + shift), number) for number in numbers)


def collate_arrays(samples: list[Any]) -> dict[str, Any]:
    """Collate as torch does, with one item left a NumPy array."""
    batch: dict[str, Any] = default_collate(samples)
    return {**batch, "array": batch["array"].numpy()}


def loader(dataset: Any, **arguments: Any) -> gpupipe.DataLoader[Any]:
    """Return a loader on the CPU."""
    return gpupipe.DataLoader(dataset, **{"batch_size": 8, "device": "cpu", **arguments})


def rows(result: Verification) -> dict[str, Row]:
    """Return the rows by path."""
    return {row.path: row for row in result.rows}


# What is equal.


def test_fused() -> None:
    """The array route is fused and equal, over as many samples as were asked for."""
    result = gpupipe.verify(loader(arrays()), samples=21)
    assert result.ok
    assert result.fused
    assert result.rows == (
        Row("batch[0]", "float32", (3, 7, 11), 21, 0, 0.0),
        Row("batch[1]", "int64", (), 21, 0, 0.0),
    )
    result.check()
    assert rows(gpupipe.verify(loader(arrays())))["batch[0]"].samples == 37


def test_recorded_with_a_random_prefix() -> None:
    """What draws at random before the kernel draws the same on both sides."""
    result = gpupipe.verify(loader(Recorded()), samples=20)
    assert result.ok, result
    assert result.fused, result
    assert result.rows == (Row("batch['image']", "float32", (3, 7, 11), 20, 0, 0.0),)


def test_not_fused() -> None:
    """Samples that torch makes are compared too, and the reason is told."""
    last = T.Compose([*RGB.transforms, T.RandomInvert(p=0.5)])
    result = gpupipe.verify(loader(Recorded(last)), samples=20)
    assert result.ok, result
    assert not result.fused
    assert "RandomInvert" in result.reason
    assert f"images made by torch: {result.reason}" in str(result)


def test_batches_of_the_users_own() -> None:
    """A batch sampler, and no batches at all, stay as they are and are compared."""
    sampler = [[0, 1], [2], [3, 4, 5]]
    result = gpupipe.verify(
        gpupipe.DataLoader(arrays(), batch_sampler=sampler, device="cpu"), samples=33
    )
    assert result.ok
    assert rows(result)["batch[1]"].samples == 33
    assert gpupipe.verify(loader(arrays(), batch_size=None), samples=5).ok


@pytest.mark.parametrize("batch_size", [4, None])
def test_iterable_dataset(batch_size: int | None) -> None:
    """Of a dataset without an end the first samples are compared; what it draws, it draws alike."""
    result = gpupipe.verify(loader(Stream(), batch_size=batch_size), samples=10)
    assert result.ok, result
    assert not result.fused
    assert [row.path for row in result.rows] == ["batch[0]", "batch[1]"]
    if batch_size:
        assert rows(result)["batch[1]"].samples == 12  # in whole batches
    assert rows(gpupipe.verify(loader(Stream(5)), samples=10))["batch[1]"].samples == 5


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dataset", [arrays, Recorded, lambda: Stream(9)])
def test_dtype_and_channels_last(dataset: Callable[[], Any], dtype: torch.dtype | None) -> None:
    """The reference is rounded and laid out as the loader was asked to."""
    asked = loader(dataset(), dtype=dtype, memory_format=torch.channels_last)
    result = gpupipe.verify(asked, samples=12)
    assert result.ok, result
    if not isinstance(asked.dataset, Stream):
        wanted = str(dtype or torch.float32).removeprefix("torch.")
        assert result.rows[0].dtype == wanted


def test_explicit_transform() -> None:
    """A transform that the loader was given is the reference's, too."""
    raw = gpupipe.ArrayDataset(pixels(), np.arange(37))
    result = gpupipe.verify(loader(raw, transform=RGB), samples=12)
    assert result.ok, result
    assert result.fused


# What is compared.


def test_arrays_strings_and_numbers() -> None:
    """Arrays and lists of strings are one row of many samples.

    The order is the batch's, whatever the hash seed is.
    """
    dataset = Recorded(
        name=lambda i: f"no {i}",
        array=lambda i: np.array([i, np.nan], np.float32),
        nested=lambda i: {"b": (f"{i}", i), "a": 0.5},
    )
    result = gpupipe.verify(loader(dataset, collate_fn=collate_arrays), samples=20)
    assert result.ok, result
    assert result.rows == (
        Row("batch['image']", "float32", (3, 7, 11), 20, 0, 0.0),
        Row("batch['name']", "str", (), 20, 0, 0.0),
        Row("batch['array']", "float32", (2,), 20, 0, 0.0),
        Row("batch['nested']['b'][0]", "str", (), 20, 0, 0.0),
        Row("batch['nested']['b'][1]", "int64", (), 20, 0, 0.0),
        Row("batch['nested']['a']", "float64", (), 20, 0, 0.0),
    )


class Opaque:
    """A user's object whose ``==`` says nothing."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> Any:
        return np.array([True, False])

    __hash__ = None  # type: ignore[assignment] # nobody needs it


ODD: dict[str, Callable[[int], Any]] = {
    "object array": lambda i: np.array([i, None, "x"], object),
    "string array": lambda i: np.array(["a", str(i)]),
    "complex": lambda i: np.array([i + 1j]),
    "bool": lambda i: np.array([i % 2 == 0]),
    "empty": lambda _: np.empty((0, 3)),
    "scalar": np.float64,
    "nan": lambda _: float("nan"),
    "opaque": Opaque,
    "none": lambda _: None,
    "read-only": lambda i: np.broadcast_to(np.int16(i), (2, 3)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_leaves(kind: str) -> None:
    """Whatever a collate_fn leaves in a batch is equal to itself, and differs from another."""
    make = ODD[kind]

    def collate(samples: list[Any]) -> dict[str, Any]:
        return {"image": torch.stack([s["image"] for s in samples]), "odd": samples[0]["odd"]}

    result = gpupipe.verify(loader(Recorded(odd=make), collate_fn=collate), samples=9)
    assert result.ok, result
    if kind in ("nan", "none", "empty"):
        return
    calls = count()
    changing = Recorded(odd=lambda _: make(next(calls)))
    result = gpupipe.verify(loader(changing, collate_fn=collate), samples=9)
    assert rows(result)["batch['odd']"].different, result


# What is found.


def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU kernel flip the lowest bit of one value of large batches; the proof is small."""
    right = cpu_ops.normalize

    def normalize(*arguments: Any, **options: Any) -> None:
        right(*arguments, **options)
        outputs = arguments[2]
        if sum(len(output) for output in outputs) > 3:
            outputs[0][2, 1].view(torch.int32)[4, 5] ^= 1

    monkeypatch.setattr(cpu_ops, "normalize", normalize)


def test_finds_one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit in one pixel of one image is a difference, and check() says where."""
    wrong_kernel(monkeypatch)
    result = gpupipe.verify(loader(arrays()), samples=8)
    images, labels = result.rows
    assert (images.different, labels.different) == (1, 0)
    assert 0 < images.worst < 1e-5  # one unit in the last place of a number of size 2
    assert not result.ok
    assert str(result).endswith("DIFFERENT")
    with pytest.raises(VerificationError, match=r"(?s)batch\[0\].*DIFFERENT"):
        result.check()


def test_finds_a_wrong_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that changed after it was proved is found, whatever evaluates it."""
    right = cpu_ops.normalize

    def normalize(images: Any, rows: Any, outputs: Any, lookup: Lookup, *, layout: Layout) -> None:
        values = lookup.values.clone()
        if sum(len(output) for output in outputs) > 3:
            values[2, 200] = 0
        right(images, rows, outputs, Lookup(values), layout=layout)

    monkeypatch.setattr(cpu_ops, "normalize", normalize)
    found = rows(gpupipe.verify(loader(arrays()), samples=37))["batch[0]"]
    expected = (pixels()[..., 2] == 200).any((1, 2)).sum()
    assert found.different == expected > 0


def test_finds_a_wrong_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is gathered from another row is found."""
    right = gpupipe.DataLoader.__iter__

    def swapped(self: Any) -> Any:
        for images, labels in right(self):
            yield [images, labels.index_add(0, torch.tensor([1]), torch.tensor([2]))]

    monkeypatch.setattr(gpupipe.DataLoader, "__iter__", swapped)
    images, labels = gpupipe.verify(loader(arrays()), samples=8).rows
    assert (images.different, labels.different, labels.worst) == (0, 1, 2.0)


def planted(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Verification:
    """Verify a loader whose batches are changed before they are compared."""
    right = gpupipe.DataLoader.__iter__
    monkeypatch.setattr(
        gpupipe.DataLoader, "__iter__", lambda self: (change(batch) for batch in right(self))
    )
    dataset = Recorded(name=lambda i: f"no {i}", number=lambda i: i + 0.0)
    return gpupipe.verify(loader(dataset), samples=8)


def test_finds_other_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtype, shape, minus zero, NaN, strings, and what is missing or too much."""
    cases: list[tuple[Callable[[Any], Any], str, int]] = [
        (lambda b: b | {"number": b["number"].float()}, "batch['number']", 8),
        (lambda b: b | {"number": b["number"][:, None]}, "batch['number']", 8),
        (lambda b: b | {"number": b["number"].tolist()}, "batch['number']", 1),
        (lambda b: b | {"number": -b["number"] * 0}, "batch['number']", 8),
        (lambda b: b | {"number": b["number"] * float("nan")}, "batch['number']", 8),
        (lambda b: b | {"name": [*b["name"][:6], "x", "y"]}, "batch['name']", 2),
        (lambda b: b | {"name": b["name"][:7]}, "batch['name']", 1),
        (lambda b: b | {"more": 1}, "batch['more']", 1),
        (lambda b: {"image": b["image"], "name": b["name"]}, "batch['number']", 1),
    ]
    for change, path, different in cases:
        with monkeypatch.context() as patch:
            result = planted(change, patch)
        assert rows(result)[path].different == different, result
        assert sum(row.different for row in result.rows) >= different


def test_finds_missing_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that ends early differs."""
    right = gpupipe.DataLoader.__iter__

    def ends(self: Any) -> Any:
        yield next(right(self))

    monkeypatch.setattr(gpupipe.DataLoader, "__iter__", ends)
    assert not gpupipe.verify(loader(arrays()), samples=16).ok


def test_table() -> None:
    """The text has a line per item and says what made the images."""
    table = Verification(
        (
            Row("batch[0]", "float32", (3, 7, 11), 256, 3, 0.25),
            Row("batch[1]", "int64", (), 256, 0, 0),
        ),
        fused=True,
        reason="",
        deviations=2,
    )
    assert str(table).splitlines() == [
        "item             dtype      shape             samples  differ       max",
        "batch[0]         float32    (3, 7, 11)            256       3      0.25",
        "batch[1]         int64      ()                    256       0         0",
        "images made by the fused kernel; 2 samples went through the original transform",
        "DIFFERENT",
    ]


# What is left behind.


class Point(NamedTuple):
    """All generators' next draws."""

    python: float
    numpy: float
    torch: float


def draw() -> Point:
    """Draw from each global generator; this is what a caller would get next."""
    return Point(
        random.random(),  # noqa: S311 # to see what was drawn
        float(np.random.standard_normal()),  # noqa: NPY002 # likewise
        float(torch.rand(())),
    )


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # transforms draw from it
    torch.manual_seed(seed)


@pytest.mark.parametrize("dataset", [arrays, Recorded, lambda: Stream(9)])
def test_generators_end_as_they_began(
    dataset: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller draws what it would have drawn; CUDA's generators are not touched."""
    seed_all(5)
    draw()
    expected = draw()
    seed_all(5)
    draw()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeds CUDA, too"))
        gpupipe.verify(loader(dataset()), samples=9)
    assert draw() == expected


def test_generators_end_as_they_began_after_an_error() -> None:
    """An exception of the dataset's changes nothing of it."""

    def fails(index: int) -> int:
        draw()
        raise KeyError(index)

    seed_all(5)
    expected = draw()
    seed_all(5)
    with pytest.raises(KeyError):
        gpupipe.verify(loader(Recorded(bad=fails)), samples=9)
    assert draw() == expected


def test_silent() -> None:
    """The plan's warnings are the loader's to say; verify repeats none, and hides no other."""

    def warns(_: int) -> int:
        warnings.warn("the user's", UserWarning, stacklevel=1)
        return 0

    unscaled = T.Compose([T.ToTensor(), T.Normalize((120.0, 110.0, 100.0), (60.0, 60.0, 60.0))])
    not_lifted = T.Compose([*RGB.transforms, T.RandomInvert()])
    for transform in (unscaled, not_lifted):
        asked = loader(arrays(transform=transform))
        assert gpupipe.verify(asked, samples=9).ok  # warnings are errors here
        with pytest.warns(GpupipeWarning):
            next(iter(asked))
    with pytest.warns(UserWarning, match="the user's"):
        gpupipe.verify(loader(Recorded(bad=warns)), samples=9)


def test_a_device_warns_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process says only once is not lost in the silence."""

    def resolve(_: Any) -> CpuDevice:
        devices._warn_once("only once, for test_verify")
        return CpuDevice()

    monkeypatch.setattr(devices, "_warned", set[str]())
    monkeypatch.setattr(devices, "resolve", resolve)
    with pytest.warns(GpupipeWarning, match="only once"):
        gpupipe.verify(loader(arrays()), samples=9)


def test_the_loader_is_left_alone() -> None:
    """Its sampler is not drawn from and its counters stay."""
    asked = loader(arrays(), sampler=iter([1, 2]))
    gpupipe.verify(asked, samples=9)
    assert (asked.stats.epochs, asked.stats.batches) == (0, 0)
    assert list(asked.sampler) == [1, 2]


# What is refused.


def test_errors() -> None:
    """Another loader, or no samples."""
    with pytest.raises(InputError, match=r"takes a gpupipe.DataLoader, got DataLoader; lift"):
        gpupipe.verify(torch.utils.data.DataLoader(arrays()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="samples must be 1 or more, got 0"):
        gpupipe.verify(loader(arrays()), samples=0)
