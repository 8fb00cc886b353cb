"""Collates with and without the images; the oracle is the user's collate on real tensors."""

from __future__ import annotations

import collections
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torchvision.transforms import v2

from gpupipe import collate
from gpupipe.fetching import HOLE

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (3, 5, 9)


def real(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Transformed images, not square."""
    generator = torch.Generator().manual_seed(count)
    return list(torch.randn(count, *SHAPE, generator=generator).to(dtype))


def recognised(collate_fn: Callable[..., Any], **kwargs: Any) -> collate.CollatePlan:
    """The plan for samples (image, label), which must be there."""
    samples = [(HOLE, label) for label in (4, 5, 6)]
    plan = collate.recognise(collate_fn, samples, (0,), shape=SHAPE, **kwargs)
    assert isinstance(plan, collate.CollatePlan), plan
    return plan


def refused(collate_fn: Callable[..., Any]) -> str:
    """The reason why it cannot be run without the images."""
    outcome = collate.recognise(
        collate_fn, [(HOLE, label) for label in (4, 5, 6)], (0,), shape=SHAPE
    )
    assert isinstance(outcome, collate.CollateRefusal), outcome
    return outcome.reason


def assert_same(ours: Any, own: Any) -> None:
    """Two batches are equal: types, keys, dtypes and every bit."""
    assert type(ours) is type(own)
    if isinstance(own, torch.Tensor):
        assert ours.dtype == own.dtype
        assert torch.equal(ours, own)
    elif isinstance(own, (dict, collections.UserDict)):
        assert list(ours) == list(own)
        for key in own:
            assert_same(ours[key], own[key])
    elif isinstance(own, (list, tuple)):
        assert len(ours) == len(own)
        for mine, theirs in zip(ours, own, strict=True):
            assert_same(mine, theirs)
    else:
        assert ours == own


class Batch(NamedTuple):
    """A namedtuple batch."""

    labels: Any
    images: Any


@dataclass(frozen=True)
class Frozen:
    """A dataclass batch."""

    images: torch.Tensor
    labels: tuple[int, ...]


def as_tuple(samples: list[Any]) -> Any:
    """Stack into a tuple."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def as_dict(samples: list[Any]) -> Any:
    """Stack into nested containers, labels padded and named."""
    images, labels = zip(*samples, strict=True)
    return {"x": {"pixels": torch.stack(images)}, "y": list(labels), "n": len(samples), "s": "s"}


def as_mapping(samples: list[Any]) -> Any:
    """Stack into a Mapping that is no dict, as a tokenizer's batch is."""
    return collections.UserDict(as_dict(samples))


def as_namedtuple(samples: list[Any]) -> Any:
    """Stack into a namedtuple; the labels have a NaN and draw random numbers."""
    images, labels = as_tuple(samples)
    noise = torch.rand(len(samples)) + random.random()  # noqa: S311 # no secret
    return Batch((labels, torch.tensor([float("nan")]).isnan(), noise), images)


def as_channels_last(samples: list[Any]) -> Any:
    """Stack into another memory format, equal values."""
    images, labels = as_tuple(samples)
    return [images.contiguous(memory_format=torch.channels_last), labels]


@pytest.mark.parametrize(
    ("collate_fn", "path"),
    [
        (default_collate, (0,)),
        (as_tuple, (0,)),
        (as_dict, ("x", "pixels")),
        (as_mapping, ("x", "pixels")),
        (as_namedtuple, (1,)),
        (as_channels_last, (0,)),
        (lambda samples: default_collate(list(samples)), (0,)),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_batch_equals_the_users_own(collate_fn: Callable[..., Any], path: Any, count: int) -> None:
    """Collated without the images and filled, a batch is what the user's collate gives."""
    plan = recognised(collate_fn)
    assert plan.path == path
    images, labels = real(count), list(range(count))
    torch.manual_seed(3)
    random.seed(3)
    own = collate_fn(list(zip(images, labels, strict=True)))
    torch.manual_seed(3)
    random.seed(3)
    tree, where = plan.apply([(HOLE, label) for label in labels])
    assert_same(collate.fill(tree, where, torch.stack(images)), own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The placeholders have the dtype of the images, so a collate that keeps it is lifted."""
    plan = recognised(as_tuple, dtype=dtype)
    tree, where = plan.apply([(HOLE, 1), (HOLE, 2)])
    own = as_tuple(list(zip(real(2, dtype), (1, 2), strict=True)))
    assert_same(collate.fill(tree, where, own[0]), own)


def test_containers_are_set_in_place_or_rebuilt() -> None:
    """Lists, mappings and dataclasses stay the same object; a tuple is made anew."""
    image = torch.ones(1)
    for tree, path in (
        ([1, 2], (0,)), ({"a": 1}, ("a",)), (collections.UserDict(a=1), ("a",)),
        (Frozen(image * 0, ()), ("images",)),
    ):  # fmt: skip
        assert collate.fill(tree, path, image) is tree
    inner = {"a": 1}
    filled = collate.fill((inner, 2), (0, "a"), image)
    assert filled[0] is inner
    assert inner["a"] is image
    assert collate.fill(Batch(1, 2), (1,), image) == Batch(1, image)
    assert collate.fill("anything", (), image) is image


def test_dataclass_and_bare_image_batches() -> None:
    """A batch that is a dataclass, and one that is nothing but the tensor."""
    plan = recognised(lambda s: Frozen(torch.stack([x for x, _ in s]), tuple(y for _, y in s)))
    tree, where = plan.apply([(HOLE, 8)])
    images = torch.stack(real(1))
    assert collate.fill(tree, where, images).images is images
    assert tree.labels == (8,)
    bare = collate.recognise(torch.stack, [HOLE, HOLE], (), shape=SHAPE)
    assert isinstance(bare, collate.CollatePlan)
    assert bare.path == ()


def mixup(samples: list[Any]) -> Any:
    """The documented recipe for MixUp in a collate."""
    return v2.MixUp(num_classes=10)(*default_collate(samples))


def cutmix(samples: list[Any]) -> Any:
    """The documented recipe for CutMix in a collate."""
    return v2.CutMix(num_classes=10)(*default_collate(samples))


def by_length(samples: list[Any]) -> Any:
    """Sorts by label, as collates of sequences do."""
    return default_collate(sorted(samples, key=lambda sample: -sample[1]))


def as_list(samples: list[Any]) -> Any:
    """Keeps the images apart, as detection recipes do."""
    return tuple(zip(*samples, strict=True))


def broken(samples: list[Any]) -> Any:
    """Raises."""
    raise ValueError(f"{len(samples)} samples")


@pytest.mark.parametrize(
    ("collate_fn", "reason"),
    [
        (mixup, "MixUp or CutMix"),
        (cutmix, "MixUp or CutMix"),
        (by_length, "reorders the images"),
        (as_list, r"keeps the images as a tuple at batch[0]"),
        (lambda s: [list(column) for column in as_list(s)], "keeps the images as a list"),
        (broken, "collate_fn raises ValueError: 3 samples"),
        (lambda s: torch.stack([x.flip(-1) for x, _ in s]), "changes or mixes the pixels"),
        (lambda s: torch.stack([x.clamp(0, 1) for x, _ in s]), "changes or mixes the pixels"),
        (lambda s: torch.stack([x.half() for x, _ in s]), "dtype"),
        (lambda s: torch.cat([x for x, _ in s]), "shape"),
        (lambda s: torch.stack([x for x, _ in s])[:, :, None], "shape"),
        (lambda s: [y for _, y in s], "without the images"),
        (lambda s: (as_tuple(s)[0],) * 2, "more than once: batch[0] and batch[1]"),
        (lambda s: (*as_tuple(s), as_tuple(s)[0].mean()), "makes batch[2] from the images"),
        (lambda s: (*as_tuple(s), s[0][0].shape[-1]), "makes batch[2] from the images"),
        (lambda s: (*as_tuple(s), time.perf_counter_ns()), "differently each time"),
        (lambda s: (as_tuple(s)[0], torch.rand(as_tuple(s)[0].shape).shape[0]), "random numbers"),
        (lambda s: torch.stack([x.reshape(SHAPE) for x, _ in s]), "depends on their size"),
    ],
)
def test_refusals_say_why(collate_fn: Callable[..., Any], reason: str) -> None:
    """What cannot be collated without the images is refused with a sentence that says why."""
    assert reason in refused(collate_fn)


def test_spatial_changes_that_keep_the_shape_are_refused() -> None:
    """On a square image a transposition keeps the shape; the pixels are unique, so it shows."""
    outcome = collate.recognise(
        lambda s: torch.stack([x.mT for x, _ in s]), [(HOLE, 1)] * 2, (0,), shape=(3, 6, 6)
    )
    assert isinstance(outcome, collate.CollateRefusal)


def states() -> list[Any]:
    """The states of the three generators."""
    return [random.getstate()[1], *np.random.get_state(), torch.get_rng_state().tolist()]  # noqa: NPY002


@pytest.mark.parametrize("collate_fn", [as_namedtuple, mixup, broken])
def test_recognition_leaves_generators_and_samples_alone(collate_fn: Callable[..., Any]) -> None:
    """Whatever the outcome, the generators and the samples are as they were."""
    samples: list[Any] = [[HOLE, 1], [HOLE, 2]]
    before = states()
    collate.recognise(collate_fn, samples, (0,), shape=SHAPE)
    for was, now in zip(before, states(), strict=True):
        assert np.array_equal(was, now)
    assert samples == [[HOLE, 1], [HOLE, 2]]


@pytest.mark.parametrize("deed", ["flip", "swap", "mix", "raise", "elsewhere"])
def test_change_after_the_proof_is_signalled(deed: str) -> None:
    """A collate that does otherwise later is caught in that batch, its draws taken back."""
    changed: list[bool] = []

    def moody(samples: list[Any]) -> Any:
        torch.rand(3)
        images, labels = as_tuple(samples)
        if not changed:
            return images, labels
        if deed == "raise":
            raise RuntimeError("now")
        if deed == "elsewhere":
            return labels, images
        return {
            "flip": images.flip(-1), "swap": images.roll(1, 0), "mix": images.mean(0) + images,
        }[deed], labels  # fmt: skip

    plan = recognised(moody)
    samples = [(HOLE, 1), (HOLE, 2)]
    plan.apply(samples)
    changed.append(True)
    before = states()
    with pytest.raises(collate.CollateChanged):
        plan.apply(samples)
    for was, now in zip(before, states(), strict=True):
        assert np.array_equal(was, now)


def test_default_collate_raises_as_it_does() -> None:
    """What cannot be collated is default_collate's own error, not a signal."""
    plan = recognised(default_collate)
    with pytest.raises(RuntimeError, match="equal size"):
        plan.apply([(HOLE, [1]), (HOLE, [1, 2])])
