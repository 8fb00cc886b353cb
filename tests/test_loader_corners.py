"""Corners of ``DataLoader`` that once were wrong; torch's loader and torchvision are the oracle."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DistributedSampler, SequentialSampler
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import transforms as T  # noqa: N812 # torchvision's own habit
from torchvision.transforms import v2

import gpupipe
from gpupipe import epochs
from gpupipe.memory import OutputPool
from gpupipe.resident import ResidentFeed
from tests.test_loader import GREY, MEAN, RGB, STD, Plain, assert_same, cifar, mnist, run


def equal_torch(dataset: Any, **arguments: Any) -> gpupipe.DataLoader[Any]:
    """Assert that one more epoch equals torch's; return the loader."""
    loader = gpupipe.DataLoader(dataset, batch_size=9, **arguments)
    assert_same(list(loader), list(TorchDataLoader(dataset, batch_size=9)))
    return loader


class Gain:
    """A pointwise callable with state and no telling repr."""

    def __init__(self) -> None:
        self.gain = 2.0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.gain


@pytest.mark.parametrize("make", [mnist, Plain], ids=["array", "own getitem"])
def test_operators_changed_between_epochs_hold(make: Any) -> None:
    """State that no repr shows is seen: a marked object's, tensor constants, v2's dtype."""
    gain = gpupipe.pointwise(Gain())
    mean = torch.tensor([0.28601])
    normalize = T.Normalize(mean, torch.tensor([0.353]))
    to_dtype = v2.ToDtype(torch.float32, scale=True)
    cases: list[tuple[Any, Any]] = [
        (T.Compose([T.ToTensor(), gain]), lambda: setattr(gain, "gain", 3.0)),
        (
            T.Compose([T.ToTensor(), normalize]),
            lambda: setattr(normalize, "mean", torch.tensor([0.286012])),
        ),
        (
            v2.Compose([v2.ToImage(), to_dtype]),
            lambda: setattr(to_dtype, "dtype", torch.float16),
        ),
    ]
    for transform, change in cases:
        dataset = make(transform=transform)
        loader = gpupipe.DataLoader(dataset, batch_size=9)
        for _ in range(2):
            assert_same(list(loader), list(TorchDataLoader(dataset, batch_size=9)))
            assert loader.plan.fused
            change()


def test_new_transforms_do_not_pile_up() -> None:
    """A transform that is made anew for each epoch leaves a bounded trace."""
    dataset = mnist()
    loader = gpupipe.DataLoader(dataset, batch_size=60)
    for epoch in range(40):
        dataset.transform = T.Compose([T.ToTensor(), T.Normalize((0.01 * epoch,), (0.353,))])
        list(loader)
    assert len(loader._state.tables) <= 16


@pytest.mark.parametrize("container", [v2.Compose, nn.Sequential], ids=["Compose", "Sequential"])
@pytest.mark.filterwarnings("ignore:nothing was fused:gpupipe.GpupipeWarning")
def test_hooks_and_instance_forwards_are_not_fused(container: Any) -> None:
    """What a hook or an instance's own forward does is never lost."""

    def build() -> Any:
        parts = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        return container(parts) if container is v2.Compose else container(*parts)

    def double(_module: Any, _inputs: Any, output: Any) -> Any:
        return output * 2

    hooked, before, own, leaf = build(), build(), build(), build()
    hooked.register_forward_hook(double)
    before.register_forward_pre_hook(lambda _module, inputs: (255 - np.asarray(inputs[0]),))
    own.forward = lambda image: v2.functional.to_image(image).float() * 3
    parts: Any = leaf.transforms if container is v2.Compose else list(leaf)
    parts[1].register_forward_hook(double)
    for transform in (hooked, before, own, leaf):
        assert not equal_torch(mnist(transform=transform)).plan.fused


@pytest.mark.parametrize("make", [mnist, Plain], ids=["array", "own getitem"])
def test_a_marked_callable_is_tried_at_the_size_of_the_images(make: Any) -> None:
    """One that is pointwise at every size but the dataset's is refused with an error."""
    size = (9, 13) if make is mnist else (6, 10)

    def at_home(image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1) if tuple(image.shape[-2:]) == size else image

    transform = T.Compose([T.ToTensor(), gpupipe.pointwise(at_home)])
    with pytest.raises(gpupipe.PlanError, match="marked pointwise"):
        iter(gpupipe.DataLoader(make(transform=transform)))


def test_a_marked_compose_is_taken_whole() -> None:
    """The mark on a Compose of plain functions holds for all of it."""
    whole = gpupipe.pointwise(T.Compose([T.ToTensor(), lambda image: image * 2 - 1]))
    assert equal_torch(mnist(transform=whole)).plan.fused


def test_a_transform_that_cannot_be_hashed() -> None:
    """A marked dataclass is a transform like any other."""

    @dataclasses.dataclass
    class Power:
        exponent: float = 3.0

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return image * image * image

    transform = gpupipe.pointwise(T.Compose([T.ToTensor(), Power()]))
    loader = gpupipe.DataLoader(mnist(transform=None), batch_size=60, transform=transform)
    assert loader.plan.fused
    list(loader)


def test_indices_of_tensor_samplers_and_failed_batches() -> None:
    """``return_indices`` holds for tensor indices, and after a sample that failed."""

    class Fails(Plain):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 8:
                raise KeyError("no eight")
            return super().__getitem__(int(index))

    batches: Any = [torch.tensor([3, 1]), torch.tensor([2, 0])]
    loader = gpupipe.DataLoader(Plain(), batch_sampler=batches, return_indices=True)
    for (batch, indices), wanted in zip(loader, batches, strict=True):
        assert indices.tolist() == wanted.tolist() == batch["id"].tolist()
    for workers in (0, 1):
        unfused: Any = {"transform": None} if workers else {}
        made = gpupipe.DataLoader(
            Fails(), batch_size=2, num_workers=workers, return_indices=True, **unfused
        )
        iterator, seen = iter(made), []
        while True:
            try:
                batch, indices = next(iterator)
            except KeyError:
                continue
            except StopIteration:
                break
            assert indices.tolist() == batch["id"].tolist()
            seen += indices.tolist()
        assert seen == [i for i in range(23) if i not in (8, 9)]


def test_indices_that_are_not_there() -> None:
    """``return_indices`` without integer indices is an error, at once where it can be."""

    class Keys(Plain):
        def __getitem__(self, index: Any) -> dict[str, Any]:
            return super().__getitem__(int(index))

    loader = gpupipe.DataLoader(Keys(), batch_sampler=[["1", "2"]], return_indices=True)
    with pytest.raises(gpupipe.InputError, match="integer indices"):
        list(loader)
    with pytest.raises(gpupipe.InputError, match="return_indices"):
        iter(gpupipe.DataLoader(cifar(), batch_size=None, transform=None, return_indices=True))


def test_samplers_without_length_and_bad_batches() -> None:
    """An infinite sampler works on every route; a bad batch is an error once, then it goes on."""

    class Endless:
        def __iter__(self) -> Iterator[int]:
            while True:
                yield from (1, 2, 3)

    for dataset in (mnist(), Plain()):
        iterator = iter(gpupipe.DataLoader(dataset, batch_size=2, sampler=Endless()))
        for _ in range(5):
            next(iterator)
    loader = gpupipe.DataLoader(mnist(), batch_sampler=[[1], [99], [2], []])
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(gpupipe.IndexRangeError):
        next(iterator)
    assert len(next(iterator)[0]) == 1
    with pytest.raises(gpupipe.InputError, match="empty batch"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    begun: Any = iter(loader)
    assert len(begun) == 4


def test_random_target_transforms_and_workers() -> None:
    """With workers a target_transform runs in them, on their random numbers, as torch's."""

    def noisy(label: int) -> int:
        return label + random.randrange(1000)  # noqa: S311 # label noise

    dataset = mnist(target_transform=noisy)
    arguments: Any = {"batch_size": 9, "num_workers": 1}
    loader = gpupipe.DataLoader(dataset, **arguments)
    with pytest.warns(gpupipe.GpupipeWarning, match="num_workers"):
        mine = run(loader)
    assert_same(mine, run(TorchDataLoader(dataset, **arguments)))


def test_equal_transforms_of_parts_are_one() -> None:
    """Parts of a ConcatDataset with equal but distinct Composes are fused; others are torch's."""

    def again() -> Any:
        return T.Compose([T.ToTensor(), T.Normalize((0.286,), (0.353,))])

    assert equal_torch(ConcatDataset([mnist(20), mnist(21, again())])).plan.fused
    other: Any = ConcatDataset([mnist(20), mnist(21, T.ToTensor())])
    with pytest.warns(gpupipe.GpupipeWarning):
        assert not equal_torch(other).plan.fused


def test_one_launch_stays_small_with_a_batch_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a launch follows the batches that come, not an argument."""
    monkeypatch.setattr(epochs, "CHUNK_BYTES", 40 * 9 * 13 * 4)
    sizes: list[int] = []
    submit = ResidentFeed.submit

    def noted(self: Any, batches: Any) -> None:
        sizes.append(sum(map(len, batches)))
        submit(self, batches)

    monkeypatch.setattr(ResidentFeed, "submit", noted)
    sampler = BatchSampler(SequentialSampler(range(530)), 10, drop_last=False)
    list(gpupipe.DataLoader(mnist(530), batch_sampler=sampler))
    assert max(sizes) == 40
    assert sum(sizes) == 530


def test_the_plan_is_what_holds_now() -> None:
    """``loader.plan`` shows the transform of this moment, before, between and after epochs."""
    dataset = mnist()
    loader = gpupipe.DataLoader(dataset, batch_size=60)
    assert "0.286" in str(loader.plan)
    list(loader)
    assert loader.plan.batches == 1
    dataset.transform = T.Compose([T.ToTensor(), T.Normalize((0.125,), (0.5,))])
    assert "0.125" in str(loader.plan)


def test_strict_wants_all_of_it_fused() -> None:
    """``strict=True`` refuses a CPU prefix and a collate that has to be torch's."""
    prefix = mnist(transform=T.Compose([T.RandomRotation(8), *GREY.transforms]))
    with pytest.raises(gpupipe.PlanError, match="RandomRotation"):
        iter(gpupipe.DataLoader(prefix, strict=True))

    def mix(samples: list[Any]) -> Any:
        return torch.stack([s["image"] for s in samples]).mean(0)

    with pytest.raises(gpupipe.PlanError, match="collate"):
        list(gpupipe.DataLoader(Plain(), batch_size=4, collate_fn=mix, strict=True))


def test_set_epoch_reaches_a_sampler_inside_a_batch_sampler() -> None:
    """A DistributedSampler in a BatchSampler of the user's is told too."""
    sampler: Any = DistributedSampler(range(53), num_replicas=2, rank=0)  # type: ignore[arg-type]
    loader = gpupipe.DataLoader(mnist(), batch_sampler=BatchSampler(sampler, 9, drop_last=False))
    loader.set_epoch(5)
    assert sampler.epoch == 5


def test_warnings_point_here() -> None:
    """A warning names the user's file, whatever route it came by."""
    wrong = T.Compose([T.ToTensor(), T.Normalize((33.3,), (78.6,))])
    unfused = T.Compose([T.ToTensor(), T.RandomInvert(), T.Normalize(MEAN, STD)])
    for dataset in (mnist(transform=wrong), cifar(transform=unfused)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            iter(gpupipe.DataLoader(dataset))
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.filterwarnings("ignore:nothing was fused:gpupipe.GpupipeWarning")
def test_only_images_are_restyled() -> None:
    """A float target of the images' rank keeps its dtype on every route."""

    class Pairs(Plain):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)["image"], torch.ones(2, 3, 4)

    erasing = T.Compose([T.ToTensor(), T.RandomInvert(p=0), T.Normalize(MEAN, STD)])
    for transform in (RGB, erasing):
        loader = gpupipe.DataLoader(Pairs(transform=transform), batch_size=4, dtype=torch.float16)
        images, targets = next(iter(loader))
        assert (images.dtype, targets.dtype) == (torch.float16, torch.float32)
        assert gpupipe.verify(loader).ok


def test_targets_that_cannot_collate_on_the_recorded_route() -> None:
    """``None`` as a label is an error of our tree where torch's default collate is ours to call."""

    class Nothing(Plain):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)["image"], None

    with pytest.raises(gpupipe.InputError, match="NoneType"):
        list(gpupipe.DataLoader(Nothing(), batch_size=4))


@pytest.mark.parametrize("device", [1.5, object()])
def test_devices_that_are_none(device: Any) -> None:
    """What is no device gets an InputError."""
    with pytest.raises(gpupipe.InputError):
        iter(gpupipe.DataLoader(mnist(), device=device))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_thread_allocates() -> None:
    """A child forked while another thread holds the pool's lock can use the loader."""
    pool = OutputPool()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        pool.empty((3, 4), torch.float32)
        os._exit(0)
    deadline = time.monotonic() + 20
    done = (0, 0)
    while done[0] == 0 and time.monotonic() < deadline:
        done = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    release.set()
    thread.join()
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


def test_epochs_leave_no_garbage_cycle() -> None:
    """Dropping the last batch and the loader frees their memory without the collector."""
    gc.collect()
    gc.disable()
    try:
        loader = gpupipe.DataLoader(cifar(), batch_size=9)
        list(loader)
        pool = loader._state.devices[0]._pool  # type: ignore[attr-defined]
        assert pool.idle_bytes() > 0
        gone = weakref.ref(pool)
        del loader, pool
        assert gone() is None
    finally:
        gc.enable()
