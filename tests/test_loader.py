"""``DataLoader`` and ``lift``: torch's loader is the oracle for order, bits, types and draws."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets
from torchvision import transforms as T  # noqa: N812 # torchvision's own habit
from torchvision.transforms import v2

import gpupipe
from tests.simulated import SimulatedDevice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = T.Compose([T.ToTensor(), T.Normalize((0.286,), (0.353,))])
RGB = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
RGB_V2 = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
)


def mnist(n: int = 53, transform: Any = GREY, **extra: Any) -> Any:
    """Return a FashionMNIST of random images [9, 13] without any files."""
    dataset = object.__new__(datasets.FashionMNIST)
    rng = np.random.default_rng(n)
    dataset.data = torch.from_numpy(rng.integers(0, 256, (n, 9, 13), np.uint8))
    dataset.targets = torch.from_numpy(rng.integers(0, 10, n))
    dataset.transform, dataset.target_transform = transform, extra.get("target_transform")
    dataset.transforms, dataset.root = None, ""
    return dataset


def cifar(n: int = 53, transform: Any = RGB) -> Any:
    """Return a CIFAR10 of random images [7, 11, 3] without any files."""
    dataset = object.__new__(datasets.CIFAR10)
    rng = np.random.default_rng(n)
    dataset.data = rng.integers(0, 256, (n, 7, 11, 3), np.uint8)
    dataset.targets = rng.integers(0, 10, n).tolist()
    dataset.transform, dataset.target_transform, dataset.transforms = transform, None, None
    return dataset


class Plain(Dataset[Any]):
    """A user's dataset: its own ``__getitem__``, a transform in an attribute, samples as dicts."""

    def __init__(self, n: int = 23, transform: Any = RGB) -> None:
        self.pixels = np.random.default_rng(n).integers(0, 256, (n, 6, 10, 3), np.uint8)
        self.augment = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.augment(self.pixels[index]), "id": index, "name": f"no {index}"}


def seed_all(seed: int) -> None:
    """Seed everything a transform may draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # transforms draw from it
    torch.manual_seed(seed)


def assert_same(mine: Any, their: Any) -> None:
    """Assert that two batches are equal in structure, types, layout and every bit."""
    assert type(mine) is type(their)
    if isinstance(their, torch.Tensor):
        assert mine.dtype == their.dtype
        assert torch.equal(mine, their)
    elif isinstance(their, (list, tuple)):
        assert len(mine) == len(their)
        for a, b in zip(mine, their, strict=True):
            assert_same(a, b)
    elif isinstance(their, dict):
        assert mine.keys() == their.keys()
        for key in their:
            assert_same(mine[key], their[key])
    else:
        assert mine == their


def run(loader: Any, epochs: int = 2, seed: int = 3) -> list[Any]:
    """Return all batches of some epochs, and what torch draws next."""
    seed_all(seed)
    batches = [batch for _ in range(epochs) for batch in loader]
    return [*batches, torch.rand(3), random.random()]  # noqa: S311 # to see what was drawn


def assert_like_torch(
    dataset: Callable[[], Any], *, fused: bool = True, **arguments: Any
) -> gpupipe.DataLoader[Any]:
    """Assert that both loaders give the same for the same arguments; return ours."""
    extra = {"transform": arguments.pop("transform")} if "transform" in arguments else {}
    make = dict(arguments)
    reference = TorchDataLoader(
        dataset(), **{k: v() if k == "sampler" else v for k, v in make.items()}
    )
    loader = gpupipe.DataLoader(
        dataset(), **{k: v() if k == "sampler" else v for k, v in make.items()}, **extra
    )
    assert_same(run(loader), run(reference))
    assert loader.plan.fused is fused, loader.plan
    return loader


CASES: dict[str, Callable[[], Any]] = {
    "mnist": mnist,
    "cifar": cifar,
    "cifar v2": lambda: cifar(transform=RGB_V2),
    "subset": lambda: Subset(cifar(), [3, 3, 9, 50, -1, 7]),
    "nested subset": lambda: Subset(Subset(mnist(), range(5, 40)), [1, 0, 30]),
    "concat": lambda: ConcatDataset([mnist(20), Subset(mnist(31), [4, 30])]),
    "random split": lambda: random_split(
        cifar(), [30, 23], generator=torch.Generator().manual_seed(0)
    )[1],
    "target transform": lambda: mnist(target_transform=lambda y: {"y": y + 0.5, "s": str(y)}),
    "array": lambda: gpupipe.ArrayDataset(
        np.random.default_rng(0).integers(0, 256, (31, 5, 9, 3), np.uint8),
        np.random.default_rng(1).random((31, 4), np.float32),
        transform=RGB,
    ),
    "array grey, no labels": lambda: gpupipe.ArrayDataset(
        np.random.default_rng(0).integers(0, 256, (31, 5, 9), np.uint8), transform=GREY
    ),
    "own getitem": Plain,
    "own getitem v2": lambda: Plain(transform=RGB_V2),
    "pil prefix": lambda: mnist(transform=T.Compose([T.RandomRotation(20), *GREY.transforms])),
    "random before": lambda: Plain(
        transform=v2.Compose([v2.ToImage(), v2.RandomRotation(20), *RGB_V2.transforms[1:]])
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_equal_torch(name: str, shuffle: bool, drop_last: bool) -> None:
    """Every route gives torch's batches in torch's order and draws what torch draws."""
    assert_like_torch(CASES[name], batch_size=8, shuffle=shuffle, drop_last=drop_last)


@pytest.mark.parametrize("batch_size", [1, 5, 53, 60])
@pytest.mark.parametrize(
    "sampler",
    [
        lambda: WeightedRandomSampler([float(i) for i in range(1, 54)], 40),
        lambda: RandomSampler(range(53), replacement=True, num_samples=70),
        lambda: iter_twice([5, 4, 52]),
    ],
    ids=["weighted", "replacement", "the user's"],
)
def test_samplers(batch_size: int, sampler: Callable[[], Any]) -> None:
    """Any sampler gives torch's order, for batches of one and larger than the dataset too."""
    assert_like_torch(mnist, batch_size=batch_size, sampler=sampler)


def iter_twice(indices: list[int]) -> Any:
    """Return a sampler of the user's."""

    class Own:
        def __iter__(self) -> Iterator[int]:
            return iter(indices)

        def __len__(self) -> int:
            return len(indices)

    return Own()


def test_explicit_transform_equals_a_dataset_that_has_it() -> None:
    """``transform=`` on raw data is the transform applied to the image of each sample."""
    for raw in (mnist(transform=None), cifar(transform=None)):
        transform = GREY if raw.data.ndim == 3 else RGB
        done = copy.copy(raw)
        done.transform = transform
        mine = run(gpupipe.DataLoader(raw, batch_size=7, transform=transform))
        assert_same(mine, run(TorchDataLoader(done, batch_size=7)))


def test_tensor_dataset_with_a_v2_transform() -> None:
    """A uint8 TensorDataset [N, C, H, W] is gathered plane by plane, all other tensors with it."""
    pixels = torch.randint(0, 256, (21, 3, 5, 8), dtype=torch.uint8)
    rest = [torch.arange(21), torch.rand(21, 2), torch.arange(21) % 2 == 0]
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    loader = gpupipe.DataLoader(TensorDataset(pixels, *rest), batch_size=8, transform=transform)
    done = TensorDataset(torch.stack([transform(image) for image in pixels]), *rest)
    assert_same(run(loader), run(TorchDataLoader(done, batch_size=8)))
    assert loader.plan.fused


def test_a_bare_array_is_a_dataset() -> None:
    """A NumPy array needs no wrapper: its batches are images alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (17, 4, 6, 3), np.uint8)
    loader: Any = gpupipe.DataLoader(pixels, batch_size=5, transform=RGB)  # type: ignore[arg-type]
    done: Any = [RGB(x) for x in pixels]
    assert_same(list(loader), list(TorchDataLoader(done, batch_size=5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dataset", [cifar, Plain], ids=["array", "own getitem"])
def test_dtype_and_memory_format(
    dataset: Callable[[], Any], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """The images are torchvision's, rounded once, in the layout that was asked for."""
    loader = gpupipe.DataLoader(dataset(), batch_size=8, dtype=dtype, memory_format=memory_format)
    for mine, their in zip(loader, TorchDataLoader(dataset(), batch_size=8), strict=True):
        image = mine["image"] if isinstance(mine, dict) else mine[0]
        expected = their["image"] if isinstance(their, dict) else their[0]
        assert image.is_contiguous(memory_format=memory_format)
        assert torch.equal(image, expected.to(dtype))


def test_what_is_not_fused_has_dtype_and_layout_too() -> None:
    """The path of torch's own honours ``dtype`` and ``memory_format``, and warns once."""
    transform = T.Compose([T.ToTensor(), T.RandomInvert(p=0.0), T.Normalize(MEAN, STD)])
    loader = gpupipe.DataLoader(
        cifar(transform=transform),
        batch_size=8,
        dtype=torch.float16,
        memory_format=torch.channels_last,
    )
    with pytest.warns(gpupipe.GpupipeWarning, match="RandomInvert") as caught:
        batches = list(loader) + list(loader)
    assert len(caught) == 1
    assert batches[0][0].dtype == torch.float16
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert not loader.plan.fused


def test_strict_raises_where_nothing_is_fused() -> None:
    """``strict=True`` turns the warning into an error that names the operator."""
    transform = T.Compose([T.ToTensor(), T.RandomInvert(), T.Normalize(MEAN, STD)])
    with pytest.raises(gpupipe.PlanError, match="RandomInvert"):
        iter(gpupipe.DataLoader(cifar(transform=transform), strict=True))


def test_transform_none_is_torch_without_a_word() -> None:
    """``transform=None`` lifts nothing and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = gpupipe.DataLoader(cifar(), batch_size=8, transform=None)
        assert_same(run(loader), run(TorchDataLoader(cifar(), batch_size=8)))
    assert not loader.plan.fused


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_for_datasets_with_their_own_python(workers: int) -> None:
    """With worker processes torch's own path gives torch's batches; an array needs no workers."""
    if not workers:
        assert_like_torch(Plain, batch_size=4, shuffle=True)
        return
    with pytest.warns(gpupipe.GpupipeWarning, match="worker"):
        assert_like_torch(Plain, fused=False, batch_size=4, shuffle=True, num_workers=workers)
    assert_like_torch(mnist, batch_size=4, shuffle=True, num_workers=workers)


def test_persistent_workers_draw_as_torch_does() -> None:
    """From the second epoch on torch draws no base seed with persistent workers."""
    assert_like_torch(mnist, batch_size=9, shuffle=True, num_workers=1, persistent_workers=True)


class Counting(IterableDataset[Any]):
    """An iterable dataset with a transform."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        for i in range(11):
            yield self.transform(rng.integers(0, 256, (4, 6, 3), np.uint8)), i


@pytest.mark.filterwarnings("ignore:nothing was fused:gpupipe.GpupipeWarning")
def test_iterable_datasets_and_no_batching_are_torch() -> None:
    """What torch alone can do is torch's, bit by bit."""
    assert_like_torch(lambda: Counting(RGB), fused=False, batch_size=4)
    assert_like_torch(cifar, fused=False, batch_size=None)


def test_return_indices_on_every_route() -> None:
    """``return_indices`` adds the dataset indices of each batch, whatever made it."""
    for dataset in (mnist(), Plain()):
        loader = gpupipe.DataLoader(dataset, batch_size=6, shuffle=True, return_indices=True)
        for batch, indices in loader:
            expected = [dataset[int(i)] for i in indices]
            assert_same(batch, torch.utils.data.default_collate(expected))
    unfused = cifar(
        transform=T.Compose([T.ToTensor(), T.RandomInvert(p=0), T.Normalize(MEAN, STD)])
    )
    loader = gpupipe.DataLoader(unfused, batch_size=6, shuffle=True, return_indices=True)
    with pytest.warns(gpupipe.GpupipeWarning):
        batches = list(loader)
    for (_, labels), indices in batches:
        assert labels.tolist() == [unfused.targets[int(i)] for i in indices]


def test_the_dataset_is_read_again_at_each_epoch() -> None:
    """A transform, pixels or labels that the user replaces hold from the next epoch on."""
    dataset = mnist()
    loader = gpupipe.DataLoader(dataset, batch_size=60)
    list(loader)
    dataset.transform = T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.1,))])
    dataset.data = dataset.data.flip(0).contiguous()
    dataset.targets = dataset.targets.flip(0)
    assert_same(list(loader), list(TorchDataLoader(dataset, batch_size=60)))
    dataset.transform.transforms[1].mean = (0.25,)
    assert_same(list(loader), list(TorchDataLoader(dataset, batch_size=60)))


def test_collate_functions() -> None:
    """A collate that stacks is lifted where ``dataset[i]`` runs; one that mixes is torch's."""

    def stack(samples: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([s["image"] for s in samples]), "n": [s["name"] for s in samples]}

    def mix(samples: list[Any]) -> torch.Tensor:
        images = torch.stack([s["image"] for s in samples])
        return images * 0.25 + images.flip(0) * 0.75

    assert_like_torch(Plain, batch_size=5, collate_fn=stack)
    loader = gpupipe.DataLoader(Plain(), batch_size=5, collate_fn=mix)
    with pytest.warns(gpupipe.GpupipeWarning, match="mixes"):
        mine = run(loader)
    assert_same(mine, run(TorchDataLoader(Plain(), batch_size=5, collate_fn=mix)))


def test_a_sample_that_deviates_is_torchvisions_and_counted() -> None:
    """A dataset that treats one sample otherwise keeps its bits; the plan counts it."""

    class Odd(Plain):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            if index == 13:
                sample["image"] = sample["image"] * 2
            return sample

    loader = assert_like_torch(Odd, batch_size=4)
    assert loader.plan.deviations == 2
    assert loader.stats.deviations == 2


def test_keeping_batches_keeps_their_values() -> None:
    """Memory is used again only after its tensors, views and arrays are gone."""
    loader = gpupipe.DataLoader(mnist(200), batch_size=8, shuffle=True)
    kept = [batch[0][2:5] for _ in range(3) for batch in loader]
    copies = [view.clone() for view in kept]
    list(loader)
    for view, was in zip(kept, copies, strict=True):
        assert torch.equal(view, was)
    assert len({view.untyped_storage().data_ptr() for view in kept}) == len(kept)


def test_lift_takes_a_torch_loader_whole() -> None:
    """``lift`` keeps dataset, order and arguments of a loader that exists."""
    generator = torch.Generator().manual_seed(5)
    theirs = TorchDataLoader(mnist(), 7, shuffle=True, generator=generator, drop_last=True)
    expected = [batch for _ in range(2) for batch in theirs]
    generator.manual_seed(5)
    lifted = gpupipe.lift(theirs)
    assert_same([batch for _ in range(2) for batch in lifted], expected)
    assert lifted.dataset is theirs.dataset
    assert len(lifted) == len(theirs)
    batches = [[1, 2], [5], [0, 3, 9]]
    lifted = gpupipe.lift(TorchDataLoader(mnist(), batch_sampler=batches))
    assert_same(list(lifted), list(TorchDataLoader(mnist(), batch_sampler=batches)))


def test_lift_refuses_what_it_would_lose() -> None:
    """Datasets, subclasses and lifted loaders get an error that says what to do."""

    class Special(TorchDataLoader[Any]):
        pass

    for wrong in (mnist(), Special(mnist()), gpupipe.DataLoader(mnist())):
        with pytest.raises(gpupipe.InputError, match=r"gpupipe.DataLoader\(dataset"):
            gpupipe.lift(wrong)


def test_a_loader_can_be_copied_and_pickled() -> None:
    """Copies iterate on their own; compiled state stays behind."""
    loader = gpupipe.DataLoader(cifar(), batch_size=8)
    list(loader)
    for other in (copy.copy(loader), pickle.loads(pickle.dumps(loader))):  # noqa: S301 # our own
        assert_same(list(other), list(loader))


def test_set_epoch_reaches_the_sampler() -> None:
    """``set_epoch`` is what a DistributedSampler shuffles by."""

    def sampler() -> Any:
        return torch.utils.data.DistributedSampler(range(53), num_replicas=2, rank=1)  # type: ignore[arg-type]

    loader = gpupipe.DataLoader(mnist(), batch_size=8, sampler=sampler())
    theirs: Any = TorchDataLoader(mnist(), batch_size=8, sampler=sampler())
    for epoch in (0, 1, 7):
        loader.set_epoch(epoch)
        theirs.sampler.set_epoch(epoch)
        assert_same(list(loader), list(theirs))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dataset", [mnist, Plain], ids=["array", "own getitem"])
def test_the_staged_path_on_a_simulated_device(dataset: Callable[[], Any], seed: int) -> None:
    """The whole loader over the stream protocol gives torch's batches (no evidence about GPUs)."""
    device = SimulatedDevice(seed)
    try:
        loader = gpupipe.DataLoader(dataset(), batch_size=7, shuffle=True, device=device)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        mine = []
        for batch in loader:
            device.synchronize()
            mine.append(copy.deepcopy(batch))
        torch.manual_seed(seed)
        assert_same(mine, list(TorchDataLoader(dataset(), batch_size=7, shuffle=True)))
        next(iter(loader))  # and leave
        del loader, batch
    finally:
        assert not device.shut()


BAD_LOADERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty dataset": (lambda: gpupipe.DataLoader(mnist(0)), gpupipe.InputError, "samples"),
    "index out of range": (
        lambda: list(gpupipe.DataLoader(mnist(), batch_sampler=[[1, 53]])),
        gpupipe.IndexRangeError,
        "53",
    ),
    "negative index": (
        lambda: list(gpupipe.DataLoader(mnist(), sampler=[0, -1])),
        gpupipe.IndexRangeError,
        "-1",
    ),
    "float images": (
        lambda: gpupipe.ArrayDataset(np.zeros((3, 4, 5, 3), np.float32)),
        gpupipe.SourceError,
        r"uint8.*float32 \(3, 4, 5, 3\)",
    ),
    "labels of another length": (
        lambda: gpupipe.ArrayDataset(np.zeros((3, 4, 5), np.uint8), [1, 2]),
        gpupipe.SourceError,
        r"shape \(2,\) for 3 images",
    ),
    "wrong channel count": (
        lambda: list(gpupipe.DataLoader(mnist(transform=RGB))),
        gpupipe.PlanError,
        "3 channels",
    ),
    "NaN in mean": (
        lambda: list(
            gpupipe.DataLoader(
                mnist(transform=T.Compose([T.ToTensor(), T.Normalize((float("nan"),), (1,))]))
            )
        ),
        gpupipe.PlanError,
        "not finite",
    ),
    "CUDA without CUDA": (
        lambda: list(gpupipe.DataLoader(mnist(), device="cuda")),
        gpupipe.DeviceError,
        "cuda",
    ),
    "targets that cannot collate": (
        lambda: list(gpupipe.DataLoader(mnist(target_transform=lambda _: object()))),
        gpupipe.InputError,
        "object",
    ),
    "mixed shapes": (
        lambda: list(gpupipe.DataLoader(Ragged(), batch_size=4)),
        gpupipe.SourceError,
        r"\(4, 6, 3\).*\(5, 6, 3\)",
    ),
    "dtype": (
        lambda: gpupipe.DataLoader(mnist(), dtype=torch.float64),
        gpupipe.InputError,
        "float64",
    ),
    "memory format": (
        lambda: gpupipe.DataLoader(mnist(), memory_format=torch.preserve_format),
        gpupipe.InputError,
        "channels_last",
    ),
    "cache": (lambda: gpupipe.DataLoader(mnist(), cache="disk"), gpupipe.InputError, "disk"),  # type: ignore[arg-type]
    "transform": (
        lambda: gpupipe.DataLoader(mnist(), transform="resize"),  # type: ignore[arg-type]
        gpupipe.InputError,
        "resize",
    ),
}


class Ragged(Plain):
    """Images of two heights."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.augment(self.pixels[index, : 4 + (index == 2)][:, :6])}


@pytest.mark.skipif(torch.cuda.is_available(), reason="one case needs a machine without CUDA")
@pytest.mark.parametrize("name", BAD_LOADERS)
def test_bad_input(name: str) -> None:
    """Each gives one error of our tree that says what came."""
    act, error, match = BAD_LOADERS[name]
    with pytest.raises(error, match=match) as caught:
        act()
    assert isinstance(caught.value, gpupipe.GpupipeError)
