"""What is read from the raw arrays is what ``dataset[i]`` and ``default_collate`` give."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    random_split,
)
from torchvision import datasets, tv_tensors

from gpupipe.array_dataset import ArrayDataset
from gpupipe.errors import IndexRangeError, SourceError
from gpupipe.sources import ArraySource, resolve
from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

COUNT, HEIGHT, WIDTH = 11, 9, 7


def pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random raw images."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def labels(count: int = COUNT, seed: int = 1) -> NDArray[np.int64]:
    """Random labels."""
    return np.random.default_rng(seed).integers(0, 10, count)


def without_files(kind: type, **attributes: Any) -> Any:
    """Build a dataset of torchvision's as its constructor leaves it, without its files."""
    dataset: Any = object.__new__(kind)
    for name, value in ({"transform": None, "target_transform": None} | attributes).items():
        setattr(dataset, name, value)
    return dataset


def mnist(kind: type = datasets.MNIST, **attributes: Any) -> Any:
    """Grey images in a tensor."""
    data = torch.from_numpy(pixels(COUNT, HEIGHT, WIDTH))
    own = {"data": data, "targets": torch.from_numpy(labels())}
    return without_files(kind, **(own | attributes))


def qmnist(**attributes: Any) -> Any:
    """Eight targets an image, of which the first is the label."""
    targets = torch.from_numpy(np.stack([labels(seed=s) for s in range(8)], axis=1))
    return mnist(datasets.QMNIST, **({"targets": targets, "compat": True} | attributes))


def cifar(kind: type = datasets.CIFAR10, **attributes: Any) -> Any:
    """RGB images as CIFAR's constructor makes them: [N, H, W, C], a view of [N, C, H, W]."""
    data = pixels(COUNT, 3, HEIGHT, WIDTH).transpose(0, 2, 3, 1)
    return without_files(kind, **({"data": data, "targets": labels().tolist()} | attributes))


def svhn(order: Any = "F", **attributes: Any) -> Any:
    """RGB images as SVHN's constructor makes them from MATLAB's [H, W, 3, N] in Fortran order."""
    loaded = np.asarray(pixels(HEIGHT, WIDTH, 3, COUNT), order=order)
    own = {"data": np.transpose(loaded, (3, 2, 0, 1)), "labels": labels()}
    return without_files(datasets.SVHN, **(own | attributes))


def tensors(*columns: torch.Tensor, channels: int | None = 3) -> TensorDataset:
    """A TensorDataset of uint8 images."""
    shape = (HEIGHT, WIDTH) if channels is None else (channels, HEIGHT, WIDTH)
    return TensorDataset(torch.from_numpy(pixels(COUNT, *shape)), *columns)


MAKE: dict[str, Callable[[], Any]] = {
    "MNIST": mnist,
    "FashionMNIST": lambda: mnist(datasets.FashionMNIST),
    "KMNIST": lambda: mnist(datasets.KMNIST),
    "EMNIST": lambda: mnist(datasets.EMNIST),
    "QMNIST": qmnist,
    "CIFAR10": cifar,
    "CIFAR100": lambda: cifar(datasets.CIFAR100),
    "CIFAR10 edited": lambda: cifar(data=pixels(COUNT, HEIGHT, WIDTH, 3)),
    "SVHN": svhn,
    "SVHN saved in C order": lambda: svhn("C"),
    "SVHN copied": lambda: svhn(data=pixels(COUNT, 3, HEIGHT, WIDTH)),
    "TensorDataset": lambda: tensors(torch.from_numpy(labels())),
    "TensorDataset of [N, H, W]": lambda: tensors(torch.from_numpy(labels()), channels=None),
    "TensorDataset, three columns": lambda: tensors(
        torch.arange(COUNT * 4.0).view(COUNT, 4), torch.arange(COUNT) > 3, torch.arange(COUNT)
    ),
    "TensorDataset, channels_last": lambda: TensorDataset(
        torch.from_numpy(pixels(COUNT, 3, HEIGHT, WIDTH)).to(memory_format=torch.channels_last),
        torch.from_numpy(labels()),
    ),
    "TensorDataset, no labels": tensors,
    "ArrayDataset": lambda: ArrayDataset(pixels(COUNT, HEIGHT, WIDTH, 3), labels()),
    "ArrayDataset of [N, H, W]": lambda: ArrayDataset(pixels(COUNT, HEIGHT, WIDTH), labels()),
    "ArrayDataset, strided": lambda: ArrayDataset(pixels(COUNT, HEIGHT, 2 * WIDTH, 3)[:, :, ::2]),
    "ArrayDataset, reversed": lambda: ArrayDataset(pixels(COUNT, HEIGHT, WIDTH)[::-1], labels()),
    "ArrayDataset, no labels": lambda: ArrayDataset(pixels(COUNT, HEIGHT, WIDTH, 4)),
    "ndarray": lambda: pixels(COUNT, HEIGHT, WIDTH, 3),
}


def split(dataset: Any) -> Any:
    """Return one half of ``random_split``."""
    return random_split(dataset, [6, len(dataset) - 6], torch.Generator().manual_seed(3))[0]


WRAP: dict[str, Callable[[Any], Any]] = {
    "itself": lambda d: d,
    "Subset": lambda d: Subset(d, [7, 3, 3, 0, 10]),
    "negative Subset": lambda d: Subset(d, [-1, 2, -11]),
    "Subset of a tensor": lambda d: Subset(d, torch.tensor([4, 1])),  # type: ignore[arg-type]
    "empty Subset": lambda d: Subset(d, []),
    "Subset of a Subset": lambda d: Subset(Subset(d, [9, 1, 4, 4, 2]), [-1, 0, 3]),
    "random_split": split,
    "ConcatDataset": lambda d: ConcatDataset([d, Subset(d, [5, 5]), d]),
    "ConcatDataset of halves": lambda d: ConcatDataset([split(d), Subset(d, [8, 1])]),
    "Subset of a ConcatDataset": lambda d: Subset(ConcatDataset([d, d]), [21, 0, 11, 10, -1]),
    "nested ConcatDataset": lambda d: ConcatDataset([ConcatDataset([d, d]), Subset(d, [1])]),
}


def array_source(dataset: Any) -> ArraySource:
    """Resolve a dataset that must have arrays."""
    source = resolve(dataset)
    assert isinstance(source, ArraySource), source
    return source


def reason(dataset: Any) -> str:
    """Resolve a dataset that must have none; say why."""
    source = resolve(dataset)
    assert isinstance(source, str)
    return source


def as_array(image: Any) -> NDArray[np.uint8]:
    """A sample's image as [H, W] or [H, W, C], by Pillow or NumPy itself."""
    if isinstance(image, torch.Tensor):
        array: NDArray[np.uint8] = image.numpy()
        return array.transpose(1, 2, 0) if array.ndim == 3 else array
    return np.asarray(image)


def assert_reads_as_samples(dataset: Any, indices: list[int] | None = None) -> ArraySource:
    """Images, columns and targets equal those of ``dataset[i]``, types included."""
    source = array_source(dataset)
    assert len(source) == len(dataset)
    indices = list(range(len(dataset))) if indices is None else indices
    rows = source.locate(np.array(indices, np.int64))
    out = np.full((len(rows), *source.first.images.shape[1:]), 77, np.uint8)
    source.read_images(rows, out)
    samples = [dataset[index] for index in indices]
    position = source.first.position
    assert all(isinstance(sample, tuple) == (position is not None) for sample in samples)
    parts = [sample if isinstance(sample, tuple) else (sample,) for sample in samples]
    for got, part in zip(out, parts, strict=True):
        got_hwc = got.transpose(1, 2, 0) if source.first.layout == "NCHW" else got
        np.testing.assert_array_equal(got_hwc, as_array(part[0]))
        container = type(part[0])
        assert source.first.kind.container == {
            Image.Image: "PIL",
            torch.Tensor: "tensor",
        }.get(container, "ndarray")
    for number in range(len(source.first.columns)):
        ours = torch.from_numpy(source.read_column(number, rows))
        if indices:
            collated = default_collate([part[1 + number] for part in parts])
            reference.assert_same_bits(ours, collated)
    if source.first.label is not None:
        for ours, part in zip(source.targets(np.array(indices, np.int64)), parts, strict=True):
            assert type(ours) is type(part[1])
            assert np.array_equal(ours, part[1])
    return source


@pytest.mark.parametrize("wrapper", WRAP)
@pytest.mark.parametrize("name", MAKE)
def test_reads_what_the_dataset_gives(name: str, wrapper: str) -> None:
    """Every dataset through every wrapper: each sample, and some out of order and twice."""
    dataset = WRAP[wrapper](MAKE[name]())
    assert_reads_as_samples(dataset)
    if len(dataset):
        assert_reads_as_samples(dataset, [len(dataset) - 1, 0, 0])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_nest_of_wrappers(data: st.DataObject) -> None:
    """Subsets and concatenations in any order lead to the same samples."""
    dataset: Any = data.draw(st.sampled_from(sorted(MAKE)).map(lambda name: MAKE[name]()))
    for _ in range(data.draw(st.integers(0, 4))):
        if data.draw(st.booleans()):
            size = len(dataset)
            inside = st.lists(st.integers(-size, size - 1), max_size=8) if size else st.just([])
            dataset = Subset(dataset, data.draw(inside))
        else:
            dataset = ConcatDataset([dataset] * data.draw(st.integers(1, 3)))
    assert_reads_as_samples(dataset)


@pytest.mark.parametrize("name", MAKE)
def test_nothing_is_copied(name: str) -> None:
    """The source's arrays are views of the dataset's own, labels in arrays included."""
    dataset = MAKE[name]()
    part = array_source(dataset).first
    raw = getattr(dataset, "data", getattr(dataset, "images", None))
    if isinstance(dataset, TensorDataset):
        raw = dataset.tensors[0]
    raw = dataset if isinstance(dataset, np.ndarray) else raw
    assert np.shares_memory(part.images, np.asarray(raw))
    own = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if isinstance(own, (np.ndarray, torch.Tensor)):
        assert np.shares_memory(part.columns[0], np.asarray(own))


def test_cifar_as_it_is_loaded_can_be_read_in_place() -> None:
    """CIFAR's transposed view is recognised as the contiguous [N, C, H, W] that it is."""
    source = array_source(cifar())
    assert source.first.layout == "NCHW"
    assert source.in_place
    assert not array_source(svhn()).in_place  # height and width are swapped: gathered first
    assert not array_source(ConcatDataset([cifar(), cifar()])).in_place


def test_place(tmp_path: Path) -> None:
    """A memmap, a view of one and one of several parts lie on disk; a memmap's copy does not."""
    np.save(tmp_path / "images.npy", pixels(COUNT, HEIGHT, WIDTH))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    read = mapped.copy()
    assert isinstance(read, np.memmap)
    disk, memory = "on disk (memmap)", "in memory"
    for images, place in (
        *((mapped, disk), (mapped[2:], disk), (np.asarray(mapped)[::2], disk)),
        *((read, memory), (mapped[[1, 2]], memory), (pixels(COUNT, HEIGHT, WIDTH), memory)),
    ):
        assert array_source(ArrayDataset(images)).place == place
    both: Any = ConcatDataset([ArrayDataset(read), ArrayDataset(mapped)])
    assert array_source(both).place == disk
    assert array_source(cifar()).place == array_source(mnist()).place == memory


def test_parts_of_different_layouts() -> None:
    """Loaded CIFAR beside edited CIFAR: one view, one contiguous array."""
    both: Any = ConcatDataset([cifar(), cifar(data=pixels(COUNT, HEIGHT, WIDTH, 3, seed=5))])
    assert_reads_as_samples(both)


def test_idx_files(tmp_path: Path) -> None:
    """FashionMNIST read by torchvision from IDX files."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, classes = pixels(COUNT, 28, 28), labels().astype(np.uint8)
    for split_name in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, COUNT, 28, 28)
        (raw / f"{split_name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, COUNT)
        (raw / f"{split_name}-labels-idx1-ubyte").write_bytes(header + classes.tobytes())
    source = assert_reads_as_samples(datasets.FashionMNIST(str(tmp_path), train=True))
    np.testing.assert_array_equal(source.first.images, images)


@pytest.mark.parametrize("with_labels", [False, True])
def test_npy_files_stay_on_disk(tmp_path: Path, with_labels: bool) -> None:
    """A .npy file is mapped, read-only, and what is read is what is in it."""
    images = pixels(COUNT, HEIGHT, WIDTH, 3)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels())
    beside = tmp_path / "labels.npy" if with_labels else None
    for path in (tmp_path / "images.npy", str(tmp_path / "images.npy")):
        dataset = ArrayDataset(path, beside)
        source = assert_reads_as_samples(dataset)
        assert isinstance(source.first.images, np.memmap)
        assert not source.first.images.flags.writeable
        assert source.in_place
    bare = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert isinstance(assert_reads_as_samples(bare).first.images, np.memmap)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("width", [None, 3])
def test_label_dtypes(dtype: Any, width: int | None) -> None:
    """Labels in an array have the dtype that default_collate gives them, and their shape."""
    values = np.random.default_rng(0).integers(0, 9, (COUNT, width or 1)).astype(dtype)
    values = values if width else values[:, 0]
    images = pixels(COUNT, HEIGHT, WIDTH)
    assert_reads_as_samples(ArrayDataset(images, values))
    assert_reads_as_samples(cifar(targets=values))
    assert_reads_as_samples(tensors(torch.from_numpy(values)))
    if width is None and values.dtype.kind in "iu":
        assert_reads_as_samples(mnist(targets=torch.from_numpy(values)))
        assert_reads_as_samples(svhn(labels=values))


@pytest.mark.parametrize(
    "values",
    [
        list(range(COUNT)),
        [float(i) for i in range(COUNT)],
        [i > 3 for i in range(COUNT)],
        list(np.arange(COUNT, dtype=np.int32)),
        torch.arange(COUNT),
        torch.arange(COUNT, dtype=torch.float32),
    ],
    ids=["ints", "floats", "bools", "int32s", "tensor", "float tensor"],
)
def test_labels_in_lists_and_tensors(values: Any) -> None:
    """CIFAR's targets may have been replaced by the user."""
    assert_reads_as_samples(cifar(targets=values))
    assert_reads_as_samples(ArrayDataset(pixels(COUNT, HEIGHT, WIDTH), values))


@pytest.mark.parametrize(
    "values",
    [
        [0.5, *range(COUNT - 1)],
        [*range(COUNT - 1), 0.5],
        [[i, i] for i in range(COUNT)],
        [[0] * (i + 1) for i in range(COUNT)],
        [(i, "a") for i in range(COUNT)],
        ["name"] * COUNT,
        [None] * COUNT,
        [2**70] * COUNT,
        [2**63 + i for i in range(COUNT)],
        [*range(COUNT - 1), 2**63],
        [*range(-1, COUNT - 2), 2**63],
        torch.arange(COUNT, dtype=torch.bfloat16),
        torch.arange(COUNT * 1.0).requires_grad_(),
    ],
    ids=[
        *("float first", "float last", "lists", "ragged", "tuples", "strings", "None", "large"),
        *("beyond int64", "last beyond int64", "one beyond int64", "bfloat16", "gradient"),
    ],
)
def test_labels_that_no_column_can_hold(values: Any) -> None:
    """They go through ``dataset[i]``, where default_collate decides, batch by batch."""
    assert "labels" in reason(cifar(targets=values))


def test_targets_of_mnist_that_int_changes() -> None:
    """Float and two-dimensional targets of MNIST go through ``dataset[i]``."""
    assert "labels" in reason(mnist(targets=torch.rand(COUNT)))
    assert "labels" in reason(mnist(targets=torch.zeros(COUNT, 1, dtype=torch.int64)))
    assert "labels" in reason(mnist(targets=[2**63 + i for i in range(COUNT)]))
    assert "labels" in reason(svhn(labels=np.full(COUNT, 2**63, np.uint64)))
    assert_reads_as_samples(svhn(labels=labels().astype(np.uint64)))
    assert "targets" in reason(mnist(datasets.QMNIST, compat=False))


@pytest.mark.parametrize("name", ["MNIST", "QMNIST", "CIFAR10", "SVHN", "ArrayDataset"])
def test_target_transform(name: str) -> None:
    """It gets what it gets from the dataset, type included, through wrappers, too."""
    seen: list[Any] = []

    def transform(target: Any) -> list[Any]:
        seen.append(target)
        return [target * 2, type(target).__name__]

    dataset = MAKE[name]()
    dataset.target_transform = transform
    both: Any = ConcatDataset([dataset, Subset(dataset, [4, 1])])
    indices = [0, 12, 3, 11, 11]
    ours = array_source(both).targets(np.array(indices))
    got, seen = seen, []
    expected = [both[index][1] for index in indices]
    assert ours == expected
    assert [(type(s), s) for s in got] == [(type(s), s) for s in seen]


def test_target_transform_without_labels() -> None:
    """The dataset never calls it, and neither does its part."""
    dataset = ArrayDataset(pixels(COUNT, 9, 7), None, target_transform=lambda _: 1 // 0)
    assert assert_reads_as_samples(dataset).first.target_transform is None


@pytest.mark.parametrize("replaced", [torch.arange(COUNT), np.arange(COUNT), list(range(COUNT))])
def test_target_transform_of_replaced_labels(replaced: Any) -> None:
    """A tensor's element reaches the target_transform as a tensor, an array's as a scalar."""
    dataset = cifar(targets=replaced, target_transform=lambda target: type(target).__name__)
    assert array_source(dataset).targets(np.arange(3)) == [dataset[i][1] for i in range(3)]


def overriding(base: Any) -> list[type]:
    """Subclasses that do something else at an index."""

    def item(self: Any, index: int) -> Any:
        return base.__getitem__(self, index)

    def items(self: Any, indices: list[int]) -> Any:
        return [base.__getitem__(self, index) for index in indices]

    return [
        type("Item", (base,), {"__getitem__": item}),
        type("Items", (base,), {"__getitems__": items}),
    ]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN", "TensorDataset", "ArrayDataset"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_overridden_getitem_is_never_short_cut(name: str, which: int) -> None:
    """Neither ``__getitem__`` nor ``__getitems__``, by itself or behind wrappers."""
    dataset = MAKE[name]()
    dataset.__class__ = overriding(type(dataset))[which]
    for wrap in WRAP.values():
        assert "its own __getitem__" in reason(wrap(dataset))
    plain = MAKE[name]()
    assert "its own __getitem__" in reason(ConcatDataset([plain, dataset]))


def test_wrappers_of_the_users_own_are_not_seen_through() -> None:
    """A subclass of Subset or ConcatDataset may do anything."""
    subset = type("MySubset", (Subset,), {})
    concat = type("MyConcat", (ConcatDataset,), {})
    assert "MySubset" in reason(subset(mnist(), [1]))
    assert "MyConcat" in reason(concat([mnist()]))


def test_other_datasets_have_no_arrays() -> None:
    """Lists, strangers and iterables go the general way."""

    class Own(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    for dataset in (Own(), [1, 2, 3], torch.zeros(3, 3, 3, dtype=torch.uint8), object()):
        assert "its own __getitem__" in reason(dataset)


def test_an_inherited_getitem_is_recognised() -> None:
    """A subclass that only changes how data is loaded keeps the fast way."""
    dataset = mnist()
    dataset.__class__ = type("Mine", (datasets.FashionMNIST,), {"classes": []})
    assert_reads_as_samples(dataset)


def test_an_overridden_length() -> None:
    """A ``__len__`` that is not the arrays' goes the general way, behind wrappers, too."""
    for length in (4, COUNT + 1):
        dataset = mnist()
        dataset.__class__ = type("Other", (datasets.MNIST,), {"__len__": lambda _, n=length: n})
        both: Any = ConcatDataset([mnist(), dataset])
        for wrapped in (dataset, Subset(dataset, [-1]), both):
            assert "another length" in reason(wrapped)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_concat_dataset_whose_member_changed(change: int) -> None:
    """It goes by the lengths that it saw when it was made, behind wrappers, too."""
    rows = list(range(5))
    both: Any = ConcatDataset([Subset(mnist(), rows), mnist()])
    assert len(array_source(both)) == 5 + COUNT
    rows[:] = range(5 + change)
    wrapped: Any
    for wrapped in (both, Subset(both, [0]), ConcatDataset([both])):
        assert "other lengths" in reason(wrapped)
    more: Any = ConcatDataset([mnist(), mnist()])
    more.datasets.append(mnist())
    assert "other lengths" in reason(more)


@pytest.mark.parametrize("indices", [[0, COUNT], [-COUNT - 1], np.array([3, 99])])
def test_subset_out_of_range(indices: Any) -> None:
    """The error names the index and how many samples there are."""
    with pytest.raises(IndexRangeError, match=rf"index (11|-12|99).* {COUNT} samples"):
        resolve(Subset(mnist(), indices))


def test_subset_with_strange_indices() -> None:
    """Indices that are no integers go through the Subset itself."""
    assert "indices" in reason(Subset(mnist(), [0.0, 1.0]))  # type: ignore[list-item]
    assert "indices" in reason(Subset(mnist(), ["a"]))  # type: ignore[list-item]
    assert "indices" in reason(Subset(mnist(), np.array([True, False])))  # type: ignore[arg-type]


def test_mixed_parts() -> None:
    """Parts of different shapes, kinds, or labels are not one source."""
    small = mnist(data=torch.zeros(COUNT, 3, 3, dtype=torch.uint8))
    assert "different shapes" in reason(ConcatDataset([mnist(), small]))
    assert "different shapes" in reason(ConcatDataset([mnist(), cifar()]))
    assert "different shapes" in reason(ConcatDataset([tensors(), tensors(torch.arange(COUNT))]))
    floats = cifar(targets=[0.5] * COUNT)
    assert "different types" in reason(ConcatDataset([cifar(), floats]))


def test_data_that_is_no_uint8_image() -> None:
    """Datasets say why; arrays handed to gpupipe itself are an error."""
    assert "float32" in reason(mnist(data=torch.rand(COUNT, 9, 7)))
    assert "float64" in reason(cifar(data=np.random.default_rng(0).random((COUNT, 9, 7, 3))))
    assert "4, 9, 7" in reason(svhn(data=pixels(COUNT, 4, 9, 7)))
    assert "9, 7, 4" in reason(cifar(data=pixels(COUNT, 9, 7, 4)))
    assert "float32" in reason(TensorDataset(torch.rand(COUNT, 3, 9, 7)))
    assert "(11, 9)" in reason(TensorDataset(torch.zeros(COUNT, 9, dtype=torch.uint8)))
    wrong: list[Any] = [np.zeros((3, 9, 7, 3), np.float32), pixels(9, 7), pixels(1, 2, 3, 4, 5)]
    for images in wrong:
        with pytest.raises(SourceError, match=r"images must be uint8 \[N, H, W, C\]"):
            ArrayDataset(images)
        with pytest.raises(SourceError, match=r"dataset must be uint8 \[N, H, W, C\]"):
            resolve(images)


@pytest.mark.parametrize("name", [*(name for name in MAKE if "MNIST" in name), "CIFAR10", "SVHN"])
def test_data_replaced_by_a_list(name: str) -> None:
    """``dataset.data = [dataset.data[i] for i in keep]`` goes through ``dataset[i]``."""
    dataset = MAKE[name]()
    keep = [0, 3, 4]
    dataset.data = [dataset.data[i] for i in keep]
    assert "its data is of type list" in reason(dataset)
    assert "its data is of type list" in reason(Subset(dataset, [1]))
    column = "labels" if name == "SVHN" else "targets"
    setattr(dataset, column, [getattr(dataset, column)[i] for i in keep])
    assert reason(dataset)
    assert len([dataset[i] for i in range(len(dataset))]) == len(keep)


def test_other_things_replaced_by_lists_and_strangers() -> None:
    """What the dataset's own ``__getitem__`` may refuse is left to it to refuse."""
    assert "type ndarray, not Tensor" in reason(mnist(data=pixels(COUNT, 9, 7)))
    assert "type Tensor, not ndarray" in reason(cifar(data=torch.from_numpy(pixels(5, 9, 7, 3))))
    assert "type Tensor, not ndarray" in reason(svhn(data=torch.from_numpy(pixels(5, 3, 9, 7))))
    assert "meta" in reason(mnist(data=torch.zeros(5, 9, 7, dtype=torch.uint8, device="meta")))
    assert "labels" in reason(cifar(targets=None))
    assert "labels" in reason(qmnist(targets=list(torch.zeros(COUNT, 8, dtype=torch.int64))))
    dataset: Any = ArrayDataset(pixels(COUNT, 9, 7), labels())
    dataset.labels = labels().tolist()
    assert_reads_as_samples(dataset)
    dataset.labels = ["name"] * COUNT
    assert "labels" in reason(dataset)
    dataset.images = list(dataset.images)
    assert "its images are of type list" in reason(dataset)


def test_tensors_that_numpy_cannot_view() -> None:
    """Subclasses, sparse tensors, gradients and bfloat16 go through ``dataset[i]``."""
    image = tv_tensors.Image(torch.zeros(COUNT, 3, 9, 7, dtype=torch.uint8))
    assert "class" in reason(TensorDataset(image))
    column = torch.zeros(COUNT)
    for odd in (column.to(torch.bfloat16), column.clone().requires_grad_(), column.to_sparse()):
        assert "cannot view" in reason(tensors(odd))
    assert "meta" in reason(tensors(column.to("meta"))) or "view" in reason(
        tensors(column.to("meta"))
    )


def test_fewer_labels_than_images() -> None:
    """They are not read beyond their end."""
    assert "another length" in reason(mnist(targets=torch.arange(3)))
    assert "another length" in reason(cifar(targets=[1, 2]))
    for wrong in (np.arange(3), np.int64(3), [1, 2]):
        with pytest.raises(SourceError, match="labels must be as many as images"):
            ArrayDataset(pixels(COUNT, 9, 7), wrong)  # type: ignore[arg-type]


def _truncated(path: Path) -> None:
    np.save(path, pixels(COUNT, HEIGHT, WIDTH))
    path.write_bytes(path.read_bytes()[:-100])


def _headless(path: Path) -> None:
    np.save(path, pixels(COUNT, HEIGHT, WIDTH))
    path.write_bytes(path.read_bytes()[:20])


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"not": "numbers"}], dtype=object), allow_pickle=True)


def _archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=pixels(3, 3, 3))


def _half_an_archive(path: Path) -> None:
    _archive(path)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "spoil",
    [
        *(_truncated, _headless, _pickled, _archive, _half_an_archive),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no array at all"),
    ],
)
def test_damaged_files(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Truncated, pickled and foreign files are one error that names the file; nothing is run."""
    path = tmp_path / "images.npy"
    spoil(path)
    with pytest.raises(SourceError, match=r"images must be .*images\.npy"):
        ArrayDataset(path)
    np.save(tmp_path / "good.npy", pixels(COUNT, HEIGHT, WIDTH))
    with pytest.raises(SourceError, match=r"labels must be .*images\.npy"):
        ArrayDataset(tmp_path / "good.npy", path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    """The system's own error says it best."""
    with pytest.raises(FileNotFoundError):
        ArrayDataset(tmp_path / "nothing.npy")


def test_an_empty_dataset() -> None:
    """No images are a source of length 0."""
    assert len(array_source(ArrayDataset(pixels(0, 9, 7)))) == 0
    assert len(array_source(pixels(0, 9, 7, 3))) == 0
    empty = TensorDataset(torch.zeros(0, 3, 9, 7, dtype=torch.uint8), torch.zeros(0))
    assert len(array_source(empty)) == 0
    assert len(array_source(ConcatDataset([empty, empty]))) == 0


@pytest.mark.parametrize("shape", [(0, 7, 3), (9, 0, 3), (0, 0, 3), (9, 0), (9, 7, 0)])
def test_images_without_pixels(shape: tuple[int, ...]) -> None:
    """They go through ``dataset[i]``: no kernel sees an image of no size."""
    images = pixels(COUNT, *shape)
    both: Any = ConcatDataset([ArrayDataset(images)] * 2)
    for dataset in (images, ArrayDataset(images), TensorDataset(torch.from_numpy(images)), both):
        assert reason(dataset) == "its images have no pixels"


def test_array_dataset_applies_its_transforms() -> None:
    """It is an ordinary dataset for any loader: image and label transforms, with and without."""
    images = pixels(COUNT, HEIGHT, WIDTH)
    dataset = ArrayDataset(
        images, labels(), transform=lambda i: i + 1, target_transform=lambda t: -t
    )
    image, label = dataset[3]
    np.testing.assert_array_equal(image, images[3] + 1)
    assert label == -labels()[3]
    np.testing.assert_array_equal(ArrayDataset(images)[-1], images[-1])
    assert len(dataset) == COUNT
