"""Places, copies with recorders, and the probe; the oracle is what the user's dataset does."""

from __future__ import annotations

import collections
import copy
import ctypes
import dataclasses
import functools
import gzip
import os
import pickle
import random
import re
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.transforms import v2

from gpupipe import errors, places, probe
from gpupipe.fetching import LiftedFetcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def to_tensor() -> Any:
    """A usual transform: every operator of it is pointwise."""
    return v1.Compose([v1.ToTensor(), v1.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))])


def picture(index: int) -> Image.Image:
    """An RGB image, 9 wide and 5 high, of its own for every index."""
    pixels = np.random.default_rng(index).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Plain(Dataset[Any]):
    """Ten images with a label; subclasses change what is done with them."""

    def __init__(self, transform: Any = None) -> None:
        self.transform = transform or to_tensor()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return self.transform(picture(index)), index


def lifted_equals_own(dataset: Any, verdict: probe.Verdict, indices: list[int]) -> None:
    """Every sample is lifted, and completed it is the sample that the dataset itself gives."""
    assert verdict.ok, verdict.reason
    assert verdict.place is not None
    fetcher = LiftedFetcher(dataset, verdict.place, verdict.path)
    fetched = fetcher.fetch(indices)
    assert fetcher.deviations == 0, fetcher.reasons
    assert not fetcher.keeps_samples
    for index, (sample, raw) in zip(indices, fetched, strict=True):
        assert raw is not None
        own, ours = dataset[index], fetcher.complete(sample, raw)
        assert type(own) is type(ours)
        flat, _ = torch.utils._pytree.tree_flatten(own)
        flat_ours, _ = torch.utils._pytree.tree_flatten(ours)
        for expected, came in zip(flat, flat_ours, strict=True):
            assert type(expected) is type(came)
            if isinstance(expected, torch.Tensor):
                assert expected.dtype == came.dtype
                assert torch.equal(expected, came)
            else:
                assert expected == came


# ---- places ------------------------------------------------------------------------------------


def test_places_name_the_way_to_every_transform() -> None:
    """Wrappers, lists, dictionaries, class attributes and Sequential are looked into."""

    class Helper:
        def __init__(self) -> None:
            self.augment = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    class Held(Plain):
        fallback = v1.ToTensor()

        def __init__(self) -> None:
            super().__init__()
            self.by_class = {
                "a": v1.ToTensor(),
                3: nn.Sequential(v1.ConvertImageDtype(torch.float32)),
            }
            self.views = [to_tensor(), to_tensor()]
            self.helper = Helper()
            self.size = v1.InterpolationMode.BILINEAR
            self.target_transform = v1.ToTensor()
            self.nothing = nn.Sequential(nn.Linear(1, 1))
            self.marked = lambda image: image
            self.marked.__gpupipe_pointwise__ = True  # type: ignore[attr-defined]

    found = {str(place) for place in places.places(Subset(Held(), [0]))}
    assert found == {
        f".dataset{name}"
        for name in (
            ".transform", ".by_class['a']", ".by_class[3]", ".views[0]", ".views[1]",
            ".helper.augment", ".fallback", ".marked",
        )
    }  # fmt: skip


def test_standard_transform_is_the_same_place() -> None:
    """`.transform` and `.transforms.transform` of a VisionDataset hold one object: one place."""
    dataset = datasets.FakeData(4, (3, 5, 9), transform=to_tensor(), target_transform=str)
    assert [str(place) for place in places.places(dataset)] == [".transform"]
    place = places.places(dataset)[0]
    other = object()
    copied = places.install(dataset, {place: other})
    assert copied.transform is other
    assert copied.transforms.transform is other
    assert copied.transforms.target_transform is str


class Pair(NamedTuple):
    """Two datasets."""

    left: Any
    right: Any


def test_install_copies_the_way_and_shares_the_rest() -> None:
    """The user's objects keep every attribute, by identity; a diamond and a cycle stay closed."""

    class Ring(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, int] = {}
            self.me = [self]

    inner = Ring()
    pair = Pair(inner, inner)
    outer: Any = ConcatDataset([Subset(inner, [1, 2]), inner])
    outer.pair = pair
    before: list[Any] = [
        dict(vars(outer)), list(outer.datasets), dict(vars(outer.datasets[0])), dict(vars(inner)),
        list(inner.me),
    ]  # fmt: skip
    new = object()
    copied: Any = places.install(outer, {places.places(outer)[0]: new})
    after: list[Any] = [
        vars(outer), outer.datasets, vars(outer.datasets[0]), vars(inner), inner.me,
    ]  # fmt: skip
    for was, now in zip(before, after, strict=True):
        assert type(was) is type(now)
        items = was.items() if isinstance(was, dict) else enumerate(was)
        for key, value in items:
            assert now[key] is value
        assert len(was) == len(now)
    theirs = copied.datasets[1]
    assert theirs.transform is new
    assert type(theirs) is Ring
    assert theirs is not inner
    assert copied.datasets[0].dataset is theirs
    assert copied.pair == (theirs, theirs)
    assert type(copied.pair) is type(pair)
    assert theirs.me[0] is theirs
    assert theirs.cache is inner.cache
    assert copied.cumulative_sizes is outer.cumulative_sizes


def test_install_runs_no_code_of_the_users() -> None:
    """A `__getattr__` that forwards, `__getstate__` and `__copy__` are not called."""

    class Forwarding:
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __getattr__(self, name: str) -> Any:
            return getattr(self.dataset, name)

        def __getstate__(self) -> Any:
            raise AssertionError

        def __copy__(self) -> Any:
            raise AssertionError

        def __getitem__(self, index: int) -> Any:
            return self.dataset[index]

    dataset = Forwarding(Plain())
    copied = places.install(dataset, {places.places(dataset)[0]: (new := object())})
    assert copied.dataset.transform is new


def test_install_refuses_what_a_copy_would_close() -> None:
    """A class with `__del__` is not copied: the copy's end would release the original's files."""
    closed = []

    class Closing(Plain):
        def __del__(self) -> None:
            closed.append(self)

    dataset = Closing()
    with pytest.raises(errors.InputError, match="Closing defines __del__"):
        places.install(dataset, {places.places(dataset)[0]: None})
    assert not closed
    assert "Closing defines __del__" in probe.probe(dataset).reason


# ---- what is lifted ----------------------------------------------------------------------------


def image_folder(root: Path) -> Any:
    """An ImageFolder of six PNG files in two classes."""
    for index in range(6):
        folder = root / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    return datasets.ImageFolder(str(root), transform=to_tensor())


def cifar10(root: Path) -> Any:
    """A CIFAR10 read from files in its own format, five images each."""
    base = root / datasets.CIFAR10.base_folder
    base.mkdir()
    for name, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        pixels = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [1, 2, 3, 4, 5]}))
    (base / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": ["a"] * 9}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.CIFAR10, "_check_integrity", lambda _: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return datasets.CIFAR10(str(root), transform=to_tensor())


def mnist(root: Path) -> Any:
    """An MNIST read from IDX files, seven images of 28x28."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(2).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for kind in ("train", "t10k"):
        images = struct.pack(">IIII", 2051, 7, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, 7) + bytes(range(7))
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{kind}-{name}-ubyte").write_bytes(content)
            (raw / f"{kind}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return datasets.MNIST(str(root), transform=v1.ToTensor(), target_transform=lambda y: y * 10)


class Voc(datasets.VisionDataset):  # type: ignore[misc] # untyped
    """Calls `self.transforms(image, target)`, as torchvision's VOC, COCO and others do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return self.transforms(picture(index), {"boxes": index})


@pytest.mark.parametrize("make", [image_folder, cifar10, mnist])
def test_torchvision_datasets_are_lifted(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """Real torchvision datasets are proved, and samples equal the datasets' own."""
    dataset = make(tmp_path)
    verdict = probe.probe(dataset)
    assert verdict.path == (0,)
    assert verdict.views == 1
    lifted_equals_own(dataset, verdict, [0, 4, 2])


def test_verdict_tells_kind_and_size() -> None:
    """Height comes first, and mode and container are those of the image at the suffix."""
    verdict = probe.probe(Plain(), indices=[0, 7])
    assert [str(kind) for kind in verdict.kinds] == ["PIL RGB", "PIL RGB"]
    assert verdict.sizes == ((5, 9), (5, 9))
    splits = {(place := places.places(dataset := Plain())[0]): (v1.Resize((4, 6)), place.transform)}
    assert probe.probe(dataset, [place], [3], splits=splits).sizes == ((4, 6),)

    class Arrays(Plain):
        def __getitem__(self, index: int) -> Any:
            return self.transform(np.zeros((5, 9, 3), np.uint8)), index

    verdict = probe.probe(Arrays(v1.ToTensor()), indices=[1])
    assert str(verdict.kinds[0]) == "uint8 ndarray [H, W, 3]"
    assert verdict.sizes == ((5, 9),)


def test_standard_transform_datasets_are_lifted() -> None:
    """The joint call of StandardTransform reaches the recorder as a call with the image alone."""
    dataset = Voc(".", transform=to_tensor(), target_transform=lambda target: target["boxes"] + 1)
    lifted_equals_own(dataset, probe.probe(dataset), [0, 9])


def test_wrappers_are_lifted() -> None:
    """Subset, ConcatDataset, random_split and a wrapper of the user's, one in another."""

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> Any:
            image, label = self.inner[index]
            return {"pixels": image, "meta": [label, "name"]}

    base = Plain()
    first, second = random_split(base, [7, 3], torch.Generator().manual_seed(0))
    joined: Any = ConcatDataset([first, Subset(base, [3, 1])])
    lifted_equals_own(second, probe.probe(second), [2, 0])
    lifted_equals_own(joined, probe.probe(joined), [0, 8, 3])
    wrapped = Wrapper(joined)
    verdict = probe.probe(wrapped)
    assert verdict.path == ("pixels",)
    lifted_equals_own(wrapped, verdict, [0, 8, 3])


class Point(NamedTuple):
    """A namedtuple sample."""

    label: int
    image: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """A dataclass sample."""

    image: Any
    label: int


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda x, _: x, ()),
        (lambda x, i: Point(i, x), (1,)),
        (lambda x, i: [i, {"views": (x, i)}], (1, "views", 0)),
        (lambda x, i: collections.OrderedDict(a=i, b=x), ("b",)),
        (lambda x, i: collections.UserDict({"a": i, 5: x}), (5,)),
    ],
)
def test_sample_containers_keep_their_type(build: Callable[..., Any], path: Any) -> None:
    """Tuple, namedtuple, list, dict, OrderedDict, a Mapping, and a sample that is an image."""

    class Built(Plain):
        def __getitem__(self, index: int) -> Any:
            return build(self.transform(picture(index)), index)

    dataset = Built()
    verdict = probe.probe(dataset)
    assert verdict.path == path, verdict.reason
    if path != (5,):  # pytree knows no UserDict
        lifted_equals_own(dataset, verdict, [1, 8])


def test_dataclass_samples_are_lifted() -> None:
    """A frozen dataclass is rebuilt with the image in its field."""

    class Built(Plain):
        def __getitem__(self, index: int) -> Any:
            return Record(self.transform(picture(index)), index)

    dataset = Built()
    verdict = probe.probe(dataset)
    assert verdict.path == ("image",)
    assert verdict.place is not None
    fetcher = LiftedFetcher(dataset, verdict.place, verdict.path)
    ours = fetcher.complete(*fetcher.fetch([3])[0])
    assert type(ours) is Record
    assert torch.equal(ours.image, dataset[3].image)
    assert ours.label == 3


def test_batched_reads_go_the_way_of_torchs_loader() -> None:
    """A dataset with `__getitems__` is probed and read by it, whole batches at a time."""

    class Batched(Plain):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [(self.transform(picture(i)), len(indices)) for i in indices]

    dataset = Subset(Batched(), [5, 6, 7, 8])
    verdict = probe.probe(dataset)
    assert verdict.ok, verdict.reason
    assert verdict.place is not None
    fetcher = LiftedFetcher(dataset, verdict.place, verdict.path)
    fetched = fetcher.fetch([3, 0])
    for (sample, raw), own in zip(fetched, dataset.__getitems__([3, 0]), strict=True):
        image, count = fetcher.complete(sample, raw)
        assert torch.equal(image, own[0])
        assert count == 2
    assert fetcher.deviations == 0


# ---- what is refused, and why ------------------------------------------------------------------


class Cached(Plain):
    """Keeps what it has transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = self.transform(picture(index))
        return self.cache[index], index


class RememberedSample(Plain):
    """Keeps transformed samples outside of itself."""

    @functools.lru_cache  # noqa: B019 # that is the point
    def __getitem__(self, index: int) -> Any:
        return self.transform(picture(index)), index


class Halved(Plain):
    def __getitem__(self, index: int) -> Any:
        image = self.transform(picture(index))
        return (image.half() if isinstance(image, torch.Tensor) else image), index


class Swallowed(Plain):
    def __getitem__(self, index: int) -> Any:
        image = self.transform(picture(index))
        try:
            if image.shape[0] == 3:
                raise KeyError  # noqa: TRY301
        except Exception:  # noqa: BLE001, S110 # that is the point
            pass
        return image, index


class PerClass(Plain):
    def __init__(self) -> None:
        self.by_class = {0: to_tensor(), 1: v1.ToTensor()}

    def __getitem__(self, index: int) -> Any:
        return self.by_class[index % 2](picture(index)), index


class TwoCalls(Plain):
    def __getitem__(self, index: int) -> Any:
        return [self.transform(picture(index)), self.transform(picture(index))], index


class TwoPlaces(Plain):
    def __init__(self) -> None:
        self.t1, self.t2 = to_tensor(), to_tensor()

    def __getitem__(self, index: int) -> Any:
        return self.t1(picture(index)), self.t2(picture(index))


class Repeated(Plain):
    def __getitem__(self, index: int) -> Any:
        image = self.transform(picture(index))
        return image, image


class Chained(Plain):
    def __getitem__(self, index: int) -> Any:
        image = self.transform(picture(index))
        return v1.Normalize(0.0, 2.0)(self.transform.transforms[1](image)), index


class Again(Plain):
    def __init__(self) -> None:
        self.transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.transform(picture(index))), index


class Thrown(Plain):
    def __getitem__(self, index: int) -> Any:
        self.transform(picture(index))
        return torch.zeros(3), index


class Idle(Plain):
    def __getitem__(self, index: int) -> Any:
        return v1.functional.to_tensor(picture(index)), index


class Floats(Plain):
    def __init__(self) -> None:
        self.transform = v2.ToDtype(torch.float32, scale=True)

    def __getitem__(self, index: int) -> Any:
        return self.transform(torch.rand(3, 5, 9)), index


class Keyword(Plain):
    def __getitem__(self, index: int) -> Any:
        return self.transform(img=picture(index)), index


class Raising(Plain):
    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise FileNotFoundError("nine.png")
        return super().__getitem__(index)


class Wandering(Plain):
    def __getitem__(self, index: int) -> Any:
        image = self.transform(picture(index))
        return (image, index) if index < 5 else (index, image)


class Hidden(Plain):
    def __getitem__(self, index: int) -> Any:
        return {frozenset({1}): self.transform(picture(index))}, index


class Leaving(Plain):
    def __getitem__(self, index: int) -> Any:
        sys.exit("no data")


class Empty(Plain):
    def __len__(self) -> int:
        return 0


class OnlyOnce(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __getitem__(self, index: int) -> Any:
        if index in self.seen:
            return torch.zeros(3, 5, 9), index
        self.seen.add(index)
        return super().__getitem__(index)


class Threaded(Plain):
    def __getitem__(self, index: int) -> Any:
        images: list[Any] = []
        thread = threading.Thread(target=lambda: images.append(self.transform(picture(index))))
        thread.start()
        thread.join()
        return images[0], index


@pytest.mark.parametrize(
    ("make", "reason", "views"),
    [
        (Cached, r"^Cached keeps transformed samples \(in \.cache\)$", 1),
        (RememberedSample, "^RememberedSample keeps transformed samples$", 1),
        (Halved, r"^Halved .* touches the transformed image \(Tensor\.half\)$", 1),
        (Swallowed, r"^Swallowed .* touches the transformed image \(Tensor\.shape\)$", 1),
        (PerClass, r"^PerClass transforms samples at different places: \.by_class\[0\] for", 1),
        (TwoCalls, r"2 views per sample \(2 calls of the transform \.transform\)", 2),
        (TwoPlaces, r"2 views per sample \(the places \.t1, \.t2 each apply", 2),
        (Repeated, r"same image more than once: it appears at sample\[0\] and sample\[1\]$", 1),
        (Chained, "Chained .* touches the transformed image", 1),
        (Again, r"touches the transformed image \(\.transform called with its own result\)", 2),
        (Thrown, "does not return the transformed image", 1),
        (Idle, "returns a sample without calling the transform", 0),
        (Floats, r"calls the transform \.transform with Tensor of torch\.float32", 1),
        (
            Keyword,
            r"calls the transform \.transform with keyword arguments instead of one image$",
            1,
        ),
        (Raising, r"^Raising \(index 9\) raises FileNotFoundError: nine\.png$", 0),
        (Wandering, r"at sample\[0\] for index 0 and at sample\[1\] for index 6", 1),
        (Hidden, "does not return the transformed image itself", 1),
        (Leaving, "raises SystemExit: no data", 0),
        (Empty, "^Empty is empty$", 0),
        (OnlyOnce, "^OnlyOnce .* without calling the transform", 0),
        (Threaded, "without calling the transform", 0),
        (lambda: Plain(str), "^Plain holds no torchvision transform in any attribute$", 0),
        (
            lambda: Voc(".", transforms=v2.Compose([v2.ToImage()])),
            r"^Voc .* calls the transform \.transforms with 2 arguments instead of one image$",
            1,
        ),
    ],
)
def test_refusals_say_what_the_dataset_does(
    make: Callable[[], Any], reason: str, views: int
) -> None:
    """Whatever stands against lifting is refused with a sentence that names class and deed."""
    verdict = probe.probe(make())
    assert not verdict.ok
    assert re.search(reason, verdict.reason), verdict.reason
    assert verdict.place is None
    if views != 1:
        assert verdict.views == views


def test_touch_below_python_is_seen() -> None:
    """An operation with `__torch_function__` disabled reaches the sentinel's dispatch."""

    class Below(Plain):
        def __getitem__(self, index: int) -> Any:
            image = self.transform(picture(index))
            with torch._C.DisableTorchFunctionSubclass():
                return image, float(torch.sum(image))

    assert "touches the transformed image" in probe.probe(Below()).reason


def test_cycle_is_not_mistaken_for_a_cache() -> None:
    """A sample that only a reference cycle holds dies with the collector, and is lifted."""

    class Cyclic(Plain):
        def __getitem__(self, index: int) -> Any:
            held: list[Any] = [self.transform(picture(index))]
            held.append(held)
            return held[0], index

    dataset = Cyclic()
    lifted_equals_own(dataset, probe.probe(dataset), [2, 3])


# ---- the child ---------------------------------------------------------------------------------


def descriptors() -> int:
    """Number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


class Blocking(Plain):
    def __getitem__(self, index: int) -> Any:
        time.sleep(600)


class Exiting(Plain):
    def __getitem__(self, index: int) -> Any:
        os._exit(7)


class Crashing(Plain):
    def __getitem__(self, index: int) -> Any:
        ctypes.string_at(0)


class Spawning(Plain):
    """Leaves a grandchild behind that holds the pipe open."""

    def __getitem__(self, index: int) -> Any:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Plain, "5 samples, each read twice: the image is sample[0]"),
        (Blocking, "Blocking: reading a few samples took longer than 1.5 s"),
        (Exiting, "Exiting: reading a few samples ended the process with exit code 7"),
        (Crashing, "Crashing: reading a few samples was ended by SIGSEGV"),
        (Spawning, "Spawning: reading a few samples ended the process with exit code 3"),
    ],
)
def test_child_leaves_nothing_behind(make: type[Plain], reason: str) -> None:
    """Whatever the child does, it ends in time, is reaped, and no descriptor stays open."""
    dataset = make()
    before = descriptors()
    started = time.monotonic()
    assert probe.probe(dataset, timeout=1.5 if make is Blocking else 20.0).reason == reason
    assert time.monotonic() - started < 10
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_probe_works_beside_running_threads() -> None:
    """Python 3.12 warns of a fork beside threads; the probe keeps the warning to itself."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        torch.ones(1 << 20).sum()  # torch's own threads as well
        assert probe.probe(Plain()).ok
    finally:
        stop.set()
        thread.join()


def test_no_fork_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform without fork nothing is tried."""
    monkeypatch.delattr(os, "fork")
    verdict = probe.probe(Plain())
    assert not verdict.ok
    assert verdict.reason.startswith("no fork")


def test_parent_is_untouched(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Generators, the dataset's state, offsets of open files and the terminal stay as they were."""

    class Busy(Plain):
        def __init__(self) -> None:
            super().__init__()
            (tmp_path / "data").write_bytes(bytes(range(200)))
            self.file = (tmp_path / "data").open("rb", buffering=0)
            self.count = 0
            self.log: list[int] = []

        def __getitem__(self, index: int) -> Any:
            self.count += 1
            self.log.append(index)
            self.file.read(7)
            torch.manual_seed(index)
            random.seed(index)
            np.random.seed(index)  # noqa: NPY002 # what users' code does
            print("noise")  # noqa: T201
            sys.stderr.write("noise")
            os.write(2, b"noise")
            return super().__getitem__(index)

    dataset = Busy()
    dataset.file.seek(11)
    attributes = dict(vars(dataset))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert probe.probe(dataset).ok
    assert random.getstate() == states[0]
    for mine, theirs in zip(np.random.get_state(), states[1], strict=True):  # noqa: NPY002
        assert np.array_equal(mine, theirs)
    assert torch.equal(torch.get_rng_state(), states[2])
    assert {key: id(value) for key, value in vars(dataset).items()} == {
        key: id(value) for key, value in attributes.items()
    }
    assert dataset.count == 0
    assert dataset.log == []
    assert dataset.file.tell() == 11
    dataset.file.close()
    assert capfd.readouterr() == ("", "")


def test_transform_object_is_untouched() -> None:
    """After a probe the user's transform is the same object with the same state."""
    dataset = Plain()
    transform, state = dataset.transform, copy.deepcopy(vars(dataset.transform.transforms[1]))
    probe.probe(dataset)
    assert dataset.transform is transform
    assert vars(transform.transforms[1]) == state
