"""Loaders over image files: torchvision's bits, torch's order, any threads, bad files."""

from __future__ import annotations

import gc
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, WeightedRandomSampler
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets
from torchvision import transforms as T  # noqa: N812 # as everybody calls them
from torchvision.transforms import v2

import gpupipe
from gpupipe.errors import DecodeError, SourceError
from tests.feeding import simulated_devices

make_device = pytest.fixture(simulated_devices)

NORMALIZE = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRAIN = T.Compose([T.RandomResizedCrop(32), T.RandomHorizontalFlip(), T.ToTensor(), NORMALIZE])
EVAL = T.Compose([T.Resize(40), T.CenterCrop(32), T.ToTensor(), NORMALIZE])
COUNT = 41


load: Any = gpupipe.DataLoader
"""For datasets that torch's types do not know: lists."""


def picture(number: int) -> Image.Image:
    """Return a picture of its own size; every seventh is grey."""
    rng = np.random.default_rng(number)
    height, width = 45 + 7 * (number % 9), 90 - 5 * (number % 7)
    small = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("L") if number % 7 == 3 else image


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of JPEGs of many kinds, with a PNG and a WebP among them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        name = folder / f"class{number % 3}" / f"{number:03}"
        name.parent.mkdir(exist_ok=True)
        if number == 5:
            picture(number).save(name.with_suffix(".png"))
        elif number == 8:
            picture(number).save(name.with_suffix(".webp"))
        else:
            options: dict[str, Any] = {"quality": 60 + number, "progressive": number % 2 == 0}
            picture(number).save(name.with_suffix(".jpg"), **options)
    return folder


def folder(root: Path, transform: Any = TRAIN) -> datasets.ImageFolder:
    """Return the folder as a dataset."""
    return datasets.ImageFolder(str(root), transform=transform)


def settle(loader: gpupipe.DataLoader[Any]) -> None:
    """Wait for a simulated device, as ``.cpu()`` would for a real one."""
    synchronize: Any = getattr(loader.device, "synchronize", None)
    if synchronize is not None:
        synchronize()


def by_index(loader: gpupipe.DataLoader[Any]) -> dict[int, torch.Tensor]:
    """Return the images of an epoch, by dataset index."""
    seen: dict[int, torch.Tensor] = {}
    for (images, _), indices in loader:
        settle(loader)
        for image, index in zip(images, indices.tolist(), strict=True):
            seen[index] = image.cpu().clone()
    return seen


def same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    """Whether two epochs showed the same bits for every index."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("num_workers", [0, 2, None])
def test_evaluation_is_torchs_own(root: Path, num_workers: int | None) -> None:
    """Nothing is drawn: batches equal torch's DataLoader over the same folder, in its order."""
    torch.manual_seed(3)
    theirs = list(TorchDataLoader(folder(root, EVAL), batch_size=8, shuffle=True))
    torch.manual_seed(3)
    loader = gpupipe.DataLoader(
        folder(root, EVAL), batch_size=8, shuffle=True, num_workers=num_workers
    )
    ours = list(loader)
    assert loader.plan.fused, loader.plan
    assert len(ours) == len(theirs) == 6
    for mine, their in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], their[0])
        assert torch.equal(mine[1], their[1])


def test_training_is_torchvisions_functionals(root: Path) -> None:
    """``verify`` replays every drawn parameter by torchvision itself."""
    loader = gpupipe.DataLoader(folder(root), batch_size=7, shuffle=True, seed=1, num_workers=2)
    result = gpupipe.verify(loader, samples=COUNT)
    assert result.ok, result
    assert result.fused


def test_parameters_depend_on_seed_epoch_and_index_alone(root: Path, make_device: Any) -> None:
    """Batch size, order, threads and device change nothing; seed and epoch do."""

    def epoch(**options: Any) -> dict[int, torch.Tensor]:
        arguments: dict[str, Any] = {"batch_size": 7, "seed": 5, "num_workers": 2} | options
        loader = gpupipe.DataLoader(folder(root), return_indices=True, **arguments)
        return by_index(loader)

    first = epoch()
    for options in (
        {"batch_size": 1}, {"batch_size": 64}, {"shuffle": True}, {"num_workers": 0},
        {"device": make_device(0)}, {"device": make_device(1), "num_workers": 0, "shuffle": True},
    ):  # fmt: skip
        assert same(epoch(**options), first), options
    assert not same(epoch(seed=6), first)
    loader = gpupipe.DataLoader(folder(root), batch_size=9, seed=5, return_indices=True)
    assert same(by_index(loader), first)
    second = by_index(loader)
    assert not any(torch.equal(second[k], first[k]) for k in first)
    loader.set_epoch(0)
    assert same(by_index(loader), first)


def test_repeats_differ_and_torchs_seed_rules(root: Path) -> None:
    """An index that is drawn twice in an epoch is augmented twice; manual_seed repeats all."""

    def epoch(seed: int | None) -> list[torch.Tensor]:
        torch.manual_seed(11)
        sampler = WeightedRandomSampler([1.0, 1.0], 12)
        dataset = Subset(folder(root), [4, 6])
        loader = gpupipe.DataLoader(dataset, batch_size=5, sampler=sampler, seed=seed)
        return [image for images, _ in loader for image in images]

    for seed in (None, 3):
        images = epoch(seed)
        assert len({tuple(image.flatten()[:40].tolist()) for image in images}) == 12
        assert all(map(torch.equal, images, epoch(seed)))


SOURCES: dict[str, Any] = {
    "paths": lambda root: sorted(map(str, root.glob("*/*.jpg"))),
    "bytes": lambda root: [path.read_bytes() for path in sorted(root.glob("*/*.jpg"))],
}


@pytest.mark.parametrize("name", SOURCES)
def test_plain_lists(root: Path, name: str) -> None:
    """A list of paths, or of encoded images, is a dataset; the sample is the image."""
    items = SOURCES[name](root)
    reference = gpupipe.ImageFiles(items, transform=EVAL)
    loader = load(items, batch_size=4, transform=EVAL)
    assert torch.equal(
        torch.cat(list(loader)), torch.stack([reference[i] for i in range(len(items))])
    )
    assert loader.plan.fused


def test_one_packed_array(root: Path, tmp_path: Path) -> None:
    """Encoded images in a memmap with offsets, with labels, through Subset and ConcatDataset."""
    items = SOURCES["bytes"](root)
    offsets = np.cumsum([0, *map(len, items)])
    packed = tmp_path / "packed.bin"
    packed.write_bytes(b"".join(items))
    memory = np.memmap(packed, np.uint8, "r")
    labels = list(range(len(items)))
    dataset = gpupipe.ImageFiles(memory, labels, offsets=offsets, transform=EVAL)
    both: Any = ConcatDataset([Subset(dataset, [3, 1, 2]), dataset])
    theirs = list(TorchDataLoader(both, batch_size=5))
    loader = gpupipe.DataLoader(both, batch_size=5, num_workers=2)
    for mine, their in zip(loader, theirs, strict=True):
        assert torch.equal(mine[0], their[0])
        assert torch.equal(mine[1], their[1])
    assert loader.plan.fused


def test_images_of_two_sizes(root: Path) -> None:
    """Without a fixed size the error names both, and what to add; a batch of one is fine."""
    transform = T.Compose([T.Resize(40), T.ToTensor()])
    loader = gpupipe.DataLoader(folder(root, transform), batch_size=6)
    with pytest.raises(SourceError, match=r"got \d+x\d+ .* at index 0 and \d+x\d+ at index .*crop"):
        list(loader)
    singles = gpupipe.DataLoader(folder(root, transform), batch_size=1)
    theirs = TorchDataLoader(folder(root, transform), batch_size=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(singles, theirs, strict=True))


def copied(loader: gpupipe.DataLoader[Any], images: torch.Tensor) -> torch.Tensor:
    """Return a copy of a batch, once the device has made it."""
    settle(loader)
    return images.clone()


def broken(root: Path, tmp_path: Path) -> tuple[list[str], set[int]]:
    """Return paths, some of them bad in all the ways a file can be, and which."""
    good = sorted(map(str, root.glob("*/*.jpg")))
    data = Path(good[0]).read_bytes()
    bad: dict[str, bytes | None] = {
        "truncated.jpg": data[: len(data) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture\n" * 9,
        "gone.jpg": None,
    }
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    paths = [*good[:10], *(str(tmp_path / name) for name in bad), str(tmp_path / "folder.jpg")]
    paths += good[10:20]
    return paths, set(range(10, 15))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_file_is_one_error_and_the_next_batch_comes(
    root: Path, tmp_path: Path, num_workers: int
) -> None:
    """The error names index and path; the epoch goes on behind it."""
    paths, bad = broken(root, tmp_path)
    loader = load(paths, transform=TRAIN, seed=0, num_workers=num_workers)
    iterator = iter(loader)
    for index, path in enumerate(paths):
        if index in bad:
            with pytest.raises(DecodeError, match=f"index {index}, .*{Path(path).name}"):
                next(iterator)
        else:
            assert next(iterator).shape == (1, 3, 32, 32)
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("on_error", ["skip", "substitute"])
@pytest.mark.parametrize("simulated", [False, True])
def test_bad_files_leave_sizes_and_counts_as_they_are(
    root: Path, tmp_path: Path, make_device: Any, on_error: Any, simulated: bool
) -> None:
    """Others stand in their places, the same ones every time; counted, and written down."""
    paths, bad = broken(root, tmp_path)
    log = tmp_path / f"bad-{simulated}.jsonl"

    def epoch(num_workers: int) -> tuple[list[torch.Tensor], list[int], Any]:
        loader = load(
            paths, batch_size=6, transform=TRAIN, seed=4, num_workers=num_workers,
            on_error=on_error, error_log=log, return_indices=True,
            device=make_device(2) if simulated else "cpu",
        )  # fmt: skip
        with pytest.warns(gpupipe.GpupipeWarning, match="left out"):
            batches = [(copied(loader, images), indices) for images, indices in loader]
        return [b for b, _ in batches], [i for _, x in batches for i in x.tolist()], loader.stats

    images, indices, stats = epoch(2)
    assert [len(batch) for batch in images] == [6, 6, 6, 6, 1]
    assert stats.errors == len(bad)
    assert not bad & set(indices)
    assert [i for i in range(25) if i not in bad] == [
        i for n, i in enumerate(indices) if n not in bad
    ]
    again, same_indices, _ = epoch(0)
    assert same_indices == indices
    assert all(map(torch.equal, images, again))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["index"] for line in lines} == bad
    assert all(line["name"] and line["error"] and line["message"] for line in lines)
    if on_error == "skip":  # from the same batch, drawn anew
        batch = np.array(indices[6:12])
        first, second = np.flatnonzero(batch == batch[-1])[:2] if 11 not in bad else (0, 1)
        if batch[first] == batch[second]:
            assert not torch.equal(images[1][first], images[1][second])


def test_too_many_bad_files(root: Path, tmp_path: Path) -> None:
    """``max_errors`` ends the patience."""
    paths, _ = broken(root, tmp_path)
    loader = load(
        paths, batch_size=6, transform=TRAIN, on_error="skip", max_errors=2, num_workers=1
    )
    with (
        pytest.warns(gpupipe.GpupipeWarning, match="left out"),
        pytest.raises(DecodeError, match=r"3 samples could not be read, max_errors=2"),
    ):
        list(loader)


def test_a_whole_batch_of_bad_files(tmp_path: Path) -> None:
    """Nothing good is left to fill the batch with."""
    (tmp_path / "a.jpg").write_bytes(b"")
    loader = load([str(tmp_path / "a.jpg")] * 3, batch_size=3, transform=EVAL, on_error="skip")
    with (
        pytest.warns(gpupipe.GpupipeWarning, match="left out"),
        pytest.raises(DecodeError, match="no sample of a batch of 3"),
    ):
        list(loader)


def wait_for_decoders(count: int) -> None:
    """Wait until so many decode threads are alive."""
    for _ in range(500):
        gc.collect()
        alive = sum(t.name.startswith("gpupipe-decode") for t in threading.enumerate())
        if alive == count:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{alive} decode threads, not {count}")


def test_an_interrupted_loop_leaves_nothing_running(root: Path) -> None:
    """Break, an exception, two loaders at once, a loader dropped: no thread stays busy."""
    wait_for_decoders(0)  # those of earlier tests end with their loaders
    loader = gpupipe.DataLoader(folder(root), batch_size=4, seed=0, num_workers=2)
    reference = [images.clone() for images, _ in loader]
    for _ in range(3):
        loader.set_epoch(0)
        for images, _ in loader:
            assert torch.equal(images, reference[0])
            break
    other = gpupipe.DataLoader(folder(root), batch_size=4, seed=0, num_workers=2)
    loader.set_epoch(0)
    for (mine, _), (their, _) in zip(loader, other, strict=True):
        assert torch.equal(mine, their)
    wait_for_decoders(4)
    del loader, other
    wait_for_decoders(0)


def test_only_what_crops_read_is_copied(root: Path, make_device: Any) -> None:
    """A slot holds the crops, not the images: bytes are counted."""
    from gpupipe.file_chunk import FileChunk

    sizes: list[int] = []
    own = FileChunk.lay_out

    def noted(self: Any, program: Any, recipe: Any, pixel_bytes: int) -> None:
        sizes.append(pixel_bytes)
        own(self, program, recipe, pixel_bytes)

    transform = T.Compose([T.RandomCrop(20), T.ToTensor()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileChunk, "lay_out", noted)
        loader = gpupipe.DataLoader(
            folder(root, transform), batch_size=10, device=make_device(0), num_workers=0
        )
        list(loader)
    assert sizes == [10 * 20 * 20 * 3] * 4 + [20 * 20 * 3]


def test_an_enormous_image_takes_the_side_path(
    root: Path, make_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its geometry is made on the CPU; the bits are the same, erasing included."""
    transform = T.Compose([*TRAIN.transforms, T.RandomErasing(1.0)])
    arguments: dict[str, Any] = {"batch_size": 9, "seed": 2, "return_indices": True}
    expected = by_index(gpupipe.DataLoader(folder(root, transform), **arguments))
    monkeypatch.setattr("gpupipe.file_chunk.ENORMOUS_BYTES", 6_000)
    device = make_device(1)
    loader = gpupipe.DataLoader(folder(root, transform), device=device, **arguments)
    assert same(by_index(loader), expected)


def test_replay_tells_what_was_drawn(root: Path) -> None:
    """One sample again, by torchvision, with its parameters in words."""
    loader = gpupipe.DataLoader(folder(root), batch_size=8, seed=9, return_indices=True)
    list(loader)
    second = by_index(loader)
    told = gpupipe.replay(loader, epoch=1, index=17)
    assert torch.equal(told.image, second[17])
    assert str(told).startswith("crop ")
    assert told.sample[1] == folder(root).targets[17]
    with pytest.raises(gpupipe.InputError, match=r"0\.\.40, got 41"):
        gpupipe.replay(loader, epoch=0, index=41)
    with pytest.raises(gpupipe.InputError, match="seed=None"):
        gpupipe.replay(gpupipe.DataLoader(folder(root)), epoch=0, index=0)


def test_fast_decoding_is_near(tmp_path: Path) -> None:
    """``decode="fast"`` reads large JPEGs smaller: close to the exact pixels, and the same size."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 12, 3), np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=92)
    transform = T.Compose([T.RandomResizedCrop(64, scale=(0.3, 1.0)), T.ToTensor()])
    exact, fast = (
        next(iter(load([str(path)] * 8, batch_size=8, transform=transform, seed=1,
                                     decode=decode)))
        for decode in ("exact", "fast")
    )  # fmt: skip
    assert exact.shape == fast.shape
    gap = (exact - fast).abs() * 255
    assert 0 < gap.mean() < 4


def test_v2_presets_and_named_functions(root: Path) -> None:
    """Torchvision's recommended v2 chain, its preset object, and CLIP's RGB function are fused."""
    from torchvision.transforms._presets import ImageClassification

    def to_rgb(image: Any) -> Any:
        return image.convert("RGB")

    chains: list[Any] = [
        ImageClassification(crop_size=32, resize_size=40),
        T.Compose([T.Resize(36, T.InterpolationMode.BICUBIC), T.CenterCrop(32), to_rgb,
                   T.ToTensor(), NORMALIZE]),
        v2.Compose([v2.RGB(), v2.Resize((33, 31)), v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True)]),
    ]  # fmt: skip
    for transform in chains:
        dataset = folder(root, transform)
        loader = gpupipe.DataLoader(dataset, batch_size=11)
        assert loader.plan.fused, loader.plan
        for mine, their in zip(loader, TorchDataLoader(dataset, batch_size=11), strict=True):
            assert torch.equal(mine[0], their[0])


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def test_one_pixel_and_very_thin_images() -> None:
    """1x1, 1x900 and 900x1 pixels go through crops, resizes and flips."""
    rng = np.random.default_rng(0)
    items = [
        encoded(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((1, 1), (1, 900), (900, 1))
    ]
    loader = load(items, batch_size=3, transform=TRAIN, seed=0)
    assert gpupipe.verify(loader).ok


def test_a_forked_child_iterates_anew(root: Path) -> None:
    """The parent's iterator is refused there, a loader works, and the child ends."""
    import os

    loader = gpupipe.DataLoader(folder(root), batch_size=8, seed=0, num_workers=2)
    iterator = iter(loader)
    expected = next(iterator)[0].clone()
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                next(iterator)
                refused = b"0"
            except gpupipe.GpupipeError:
                refused = b"1"
            loader.set_epoch(0)
            same_bits = torch.equal(next(iter(loader))[0], expected)
            os.write(sending, refused + (b"1" if same_bits else b"0"))
        finally:
            os._exit(0)
    os.close(sending)
    assert os.read(receiving, 2) == b"11"
    os.close(receiving)
    os.waitpid(pid, 0)
    assert len(list(iterator)) == 5
