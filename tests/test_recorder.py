"""Sentinel, recorder and fetcher; the oracle is the user's dataset and transform themselves."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from gpupipe import trees
from gpupipe.fetching import HOLE, LiftedFetcher
from gpupipe.places import Place, places
from gpupipe.recorder import Recorder, Session
from gpupipe.rng import RngState
from gpupipe.sentinel import Call, Sentinel

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


def recorder(transform: Any, prefix: Any = None, suffix: Any = None) -> tuple[Any, Session]:
    """A recorder in the place of ``transform``, and its session."""
    session = Session()
    return Recorder(Place(transform, (("attribute", "t"),), "D"), session, prefix, suffix), session


def sentinel() -> tuple[Any, Call, torch.Tensor]:
    """A sentinel, its call, and the tensor that it stands for."""
    transform = to_tensor()
    recorded, session = recorder(transform)
    with session.recording() as calls:
        made = recorded(picture(1))
    assert type(made) is Sentinel
    return made, calls[0], transform(picture(1))


def fetcher(dataset: Any, path: trees.Path = (0,), **split: Any) -> LiftedFetcher:
    """A fetcher at the dataset's first place."""
    return LiftedFetcher(dataset, places(dataset)[0], path, **split)


def same(ours: Any, own: Any) -> bool:
    """Whether two (image, label) samples are equal in every bit, and no sentinel is in ours."""
    assert type(ours[0]) is type(own[0])
    return torch.equal(ours[0], own[0]) and ours[1:] == own[1:]


# ---- sentinel ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.shape, lambda x: x.dtype, lambda x: x.device, len, list,
        lambda x: bool(x.any()), np.asarray, lambda x: x.numpy(),
        lambda x: x.to(torch.float64), lambda x: x.half(), lambda x: x + 1, lambda x: 1 - x,
        lambda x: x[0], lambda x: x == 0, lambda x: torch.stack([torch.ones(3, 5, 9), x]),
        lambda x: torch.add(torch.ones(()), other=x), pickle.dumps, copy.copy, copy.deepcopy, repr,
        lambda x: f"{x}", dir, lambda x: hasattr(x, "anything"), lambda x: x.mul_(1),
        lambda x: setattr(x, "tag", 1), torch.numel, lambda x: x.data_ptr(),
        lambda x: x.__dict__, lambda x: 3.0 in x, np.from_dlpack,
        lambda x: [*x], lambda x: v1.functional.normalize(x, [0.0], [1.0]), lambda x: x @ x.mT,
    ],
)  # fmt: skip
def test_every_touch_is_flagged_and_finds_the_real_tensor(op: Callable[[Any], Any]) -> None:
    """Reading, computing, converting, copying: noted, and the very object is torchvision's."""
    made, call, own = sentinel()
    reference = weakref.ref(made)
    op(made)
    assert call.touched
    assert reference() is made
    assert type(made) is torch.Tensor
    assert torch.equal(made, own)
    assert call.alive() is None


def test_touch_in_truth_value_is_flagged() -> None:
    """`if x:` raises as for any tensor of several values, and is noted."""
    made, call, _ = sentinel()
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(made)
    assert call.touched


def test_touch_below_python_is_flagged() -> None:
    """With `__torch_function__` disabled, the dispatcher notes it and computes with the real."""
    made, call, own = sentinel()
    with torch._C.DisableTorchFunctionSubclass():
        total = torch.sum(made)
    assert call.touched
    assert torch.equal(total, own.sum())


def test_handing_on_is_no_touch() -> None:
    """Containers, isinstance, type, identity and weak references leave no trace."""
    made: Any
    made, call, _ = sentinel()
    held = [made, (made, {"a": made})]
    for kind in (torch.Tensor, np.ndarray, dict, str, Mapping):
        assert isinstance(made, kind) == (kind is torch.Tensor)
    assert torch.is_tensor(made)
    assert made is held[0]
    assert weakref.ref(made)() is made
    assert any(node is made for _, node in trees.walk(held))
    assert not call.touched
    assert call.alive() is made


def test_sentinel_dies_with_its_last_holder() -> None:
    """Nothing of ours holds the sentinel: without a collection it is gone at once."""
    made, call, _ = sentinel()
    gc.disable()
    try:
        del made
        assert call.alive() is None
        assert call.sentinel() is None
    finally:
        gc.enable()


def test_type_check_fools_it() -> None:
    """The documented limit: `type(x) is torch.Tensor` is false and not seen."""
    made, call, _ = sentinel()
    assert type(made) is not torch.Tensor
    assert not call.touched


def test_tv_tensor_results_keep_their_class() -> None:
    """A suffix that gives a tv_tensors.Image heals the sentinel to one."""
    recorded, session = recorder(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    with session.recording():
        made = recorded(picture(2))
    assert made.sum() > 0
    assert type(made) is tv_tensors.Image


# ---- recorder ----------------------------------------------------------------------------------


def test_recorder_passes_for_the_original() -> None:
    """Class, attributes, length, items, iteration, text, truth, copies and pickles are its."""
    transform = torch.nn.Sequential(v1.ConvertImageDtype(torch.float32), v1.Normalize(0.5, 0.5))
    recorded, _ = recorder(transform)
    assert isinstance(recorded, torch.nn.Sequential)
    assert len(recorded) == 2
    assert recorded[1] is transform[1]
    assert list(recorded) == list(transform)
    assert repr(recorded) == repr(transform)
    assert type(copy.deepcopy(recorded)) is torch.nn.Sequential
    assert type(copy.copy(recorded)) is torch.nn.Sequential
    assert type(pickle.loads(pickle.dumps(recorded))) is torch.nn.Sequential  # noqa: S301 # own
    assert not recorder(torch.nn.Sequential())[0]
    compose, _ = recorder(composed := to_tensor())
    assert isinstance(compose, v1.Compose)
    assert compose.transforms is composed.transforms
    compose.note = 5
    assert composed.note == 5
    del compose.note
    assert not hasattr(composed, "note")
    assert not hasattr(compose, "nothing")


def test_recorder_outside_a_recording_is_the_original() -> None:
    """Outside, and in a thread that does not record, the original's own result comes back."""
    recorded, session = recorder(transform := to_tensor())
    own = transform(picture(3))
    assert torch.equal(recorded(picture(3)), own)
    elsewhere: list[Any] = []
    with session.recording() as calls:
        thread = threading.Thread(target=lambda: elsewhere.append(recorded(picture(3))))
        thread.start()
        thread.join()
    assert not calls
    assert type(elsewhere[0]) is torch.Tensor
    assert torch.equal(elsewhere[0], own)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 5, 9), np.zeros((5, 9, 3), np.float32), tv_tensors.Mask(torch.ones(5, 9)),
        tv_tensors.Mask(torch.ones(5, 9, dtype=torch.uint8)), ("image", 1), "path.png", None,
        np.ma.masked_array(np.zeros((5, 9, 3), np.uint8)), Image.new("1", (9, 5)),
        torch.zeros(2, 3, 5, 9, dtype=torch.uint8),
    ],
)  # fmt: skip
def test_what_is_no_image_goes_to_the_original_once(image: Any) -> None:
    """Anything but PIL or uint8 is given to the original before the prefix has run."""
    came: list[Any] = []

    def refuse(_: Any) -> Any:
        raise AssertionError

    def original(given: Any) -> str:
        came.append(given)
        return "own"

    recorded, session = recorder(original, refuse, refuse)
    with session.recording() as calls:
        assert recorded(image) == "own"
    assert len(came) == 1
    assert came[0] is image
    assert calls[0].passed
    assert calls[0].raw is None


def test_joint_call_goes_to_the_original() -> None:
    """Two arguments, or a keyword, are none of ours."""
    recorded, session = recorder(lambda *args, **kwargs: (args, kwargs))
    with session.recording() as calls:
        assert recorded("image", 2) == (("image", 2), {})
        assert recorded(img="image") == ((), {"img": "image"})
    assert [call.passed for call in calls] == [
        "2 arguments instead of one image",
        "keyword arguments instead of one image",
    ]


def test_prefix_runs_once_also_where_it_gives_no_image() -> None:
    """After a prefix that gives no image the suffix goes on from there: no draw is made twice."""
    draws: list[float] = []

    def prefix(image: Any) -> Any:
        draws.append(random.random())  # noqa: S311 # no secret
        return v1.functional.to_tensor(image)

    recorded, session = recorder(None, prefix, lambda x: x * 2)
    with session.recording() as calls:
        made = recorded(picture(1))
    assert len(draws) == 1
    assert torch.equal(made, v1.functional.to_tensor(picture(1)) * 2)
    assert "after the part kept on the CPU" in calls[0].passed


def test_raw_image_is_a_copy_of_its_own() -> None:
    """A reused buffer, a painted image and a closed file do not change what was recorded."""
    recorded, session = recorder(to_tensor())
    buffer, tensor = np.full((5, 9, 3), 7, np.uint8), torch.full((3, 5, 9), 7, dtype=torch.uint8)
    image = picture(4)
    own = np.array(image)
    with session.recording() as calls:
        held = [recorded(buffer), recorded(tensor), recorded(image)]
    buffer[:], tensor[:] = 0, 0
    image.paste((1, 2, 3), (0, 0, 9, 5))
    assert len(held) == 3
    assert np.array_equal(np.asarray(calls[0].raw), np.full((5, 9, 3), 7))
    assert np.array_equal(np.asarray(calls[1].raw), np.full((3, 5, 9), 7))
    assert np.array_equal(np.asarray(calls[2].raw), own)


def test_file_that_is_closed_after_the_call(tmp_path: Path) -> None:
    """`with Image.open(...)` around the transform leaves a readable raw image."""
    picture(1).save(tmp_path / "1.png")

    class Opening(Plain):
        def __getitem__(self, index: int) -> Any:
            with Image.open(tmp_path / "1.png") as image:
                return self.transform(image), index

    dataset = Opening()
    fetch = fetcher(dataset)
    ((sample, raw),) = fetch.fetch([0])
    assert raw is not None
    assert same(fetch.complete(sample, raw), dataset[0])


# ---- fetcher -----------------------------------------------------------------------------------


def test_samples_are_lifted_in_order_with_a_hole() -> None:
    """The sample keeps its other parts, the raw image is the one that the transform was given."""
    fetched = fetcher(Plain()).fetch([7, 0, 7])
    assert [sample for sample, _ in fetched] == [(HOLE, 7), (HOLE, 0), (HOLE, 7)]
    for (_, raw), index in zip(fetched, [7, 0, 7], strict=True):
        assert np.array_equal(np.asarray(raw), np.asarray(picture(index)))


class Jittered(Plain):
    """Draws from all three generators around the transform; odd indices are read otherwise."""

    def __init__(self, deviate: Callable[[Any], Any]) -> None:
        flip = v1.RandomHorizontalFlip()
        super().__init__(v1.Compose([flip, v1.RandomCrop((4, 6)), *to_tensor().transforms]))
        self.deviate = deviate

    def __getitem__(self, index: int) -> Any:
        noise = random.random(), float(np.random.rand())  # noqa: S311, NPY002 # what users do
        image = self.transform(picture(index))
        if index % 2:
            image = self.deviate(image)
        return image, index, noise, float(torch.rand(()))


@pytest.mark.parametrize(
    "deviate",
    [
        lambda x: x.half(), lambda x: x * 2, lambda _: torch.zeros(2), lambda x: x if x.ndim else 0,
        lambda x: x.clone(),
    ],
)  # fmt: skip
def test_deviating_samples_are_the_datasets_own(deviate: Callable[[Any], Any]) -> None:
    """Lifted or not, samples equal those of a plain loop, augmentation included; all counted."""
    dataset, order = Jittered(deviate), [2, 3, 5, 4, 1, 6]

    def seeded() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 # likewise

    seeded()
    own = [dataset[index] for index in order]
    after = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: S311, NPY002
    fetch = fetcher(
        dataset, prefix=v1.Compose(dataset.transform.transforms[:2]), suffix=to_tensor()
    )
    seeded()
    fetched = fetch.fetch(order)
    assert after == (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: S311, NPY002
    assert [raw is None for _, raw in fetched] == [False, True, True, False, True, False]
    for (sample, raw), expected in zip(fetched, own, strict=True):
        assert same(fetch.complete(sample, raw), expected)
    assert fetch.deviations == 3
    assert sum(fetch.reasons.values()) == 3
    assert not fetch.keeps_samples


def test_samples_that_the_original_answered_are_not_read_twice() -> None:
    """Where the recorder was given no image, the sample is complete, and counted."""
    reads: list[int] = []

    class Mixed(Plain):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            image: Any = picture(index)
            if index == 4:
                image = v1.functional.pil_to_tensor(image).float()
            return self.transform(image), index

    dataset = Mixed(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    fetch = fetcher(dataset)
    fetched = fetch.fetch([3, 4])
    assert reads == [3, 4]
    assert fetched[0][1] is not None
    assert fetched[1][1] is None
    assert same(fetched[1][0], dataset[4])
    assert fetch.deviations == 1


@pytest.mark.parametrize("twice", ["calls", "same", "none", "elsewhere"])
def test_shapes_of_samples_that_were_not_proved(twice: str) -> None:
    """Two calls, an image that comes twice, no call, another path: the dataset's own sample."""

    class Odd(Plain):
        def __getitem__(self, index: int) -> Any:
            image = picture(index)
            if twice == "none":
                return v1.functional.to_tensor(image), index
            if twice == "calls":
                return self.transform(image), float(self.transform(image).sum())
            if twice == "same":
                return (made := self.transform(image)), [made]
            return [index], {"x": self.transform(image)}

    dataset = Odd()
    fetch = fetcher(dataset)
    ((sample, raw),) = fetch.fetch([5])
    assert raw is None
    assert not any(type(node) is Sentinel for _, node in trees.walk(sample))
    flat, own = (torch.utils._pytree.tree_leaves(s) for s in (sample, dataset[5]))
    for ours, theirs in zip(flat, own, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert fetch.deviations == 1


def test_errors_are_the_datasets_own() -> None:
    """What `dataset[i]` raises, fetch raises; nothing of the batch stays behind."""

    class Raising(Plain):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise KeyError("three")
            return super().__getitem__(index)

    fetch = fetcher(Raising())
    with pytest.raises(KeyError, match="three"):
        fetch.fetch([1, 3])
    assert fetch.fetch([1])[0][1] is not None


class Late(Plain):
    """Begins to cache only when it is told to, after the probe."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}
        self.caching: list[bool] = []

    def __getitem__(self, index: int) -> Any:
        if index in self.cache:
            return self.cache[index], index
        image = self.transform(picture(index))
        if self.caching:
            self.cache[index] = image
        return image, index


def test_cache_that_begins_after_the_probe_holds_real_tensors() -> None:
    """What a dataset keeps is torchvision's tensor when fetch returns, and lifting should stop."""
    dataset = Late()
    fetch = fetcher(dataset)
    fetch.fetch([0, 1])
    assert not fetch.keeps_samples
    dataset.caching.append(True)
    fetched = fetch.fetch([2, 3, 2])  # 2 comes back out of the cache within one batch
    stopped: bool = fetch.keeps_samples
    assert stopped
    own = Plain()
    for index, image in dataset.cache.items():
        assert type(image) is torch.Tensor
        assert torch.equal(image, own[index][0])
    for (sample, raw), index in zip(fetched, [2, 3, 2], strict=True):
        assert same(fetch.complete(sample, raw), own[index])
    assert same(dataset[3], own[3])
    assert same(fetch.fetch([3])[0][0], own[3])


def test_kept_samples_are_real_also_when_a_batch_fails() -> None:
    """A cache filled before another sample of the batch raised holds no sentinel either."""
    dataset = Late()
    dataset.caching.append(True)
    fetch = fetcher(dataset)
    with pytest.raises(TypeError):
        fetch.fetch([2, "no index"])
    assert type(dataset.cache[2]) is torch.Tensor


def test_users_dataset_is_unchanged_by_fetching() -> None:
    """The user's object keeps its attributes; what `__getitem__` writes stays in the copy."""

    class Counting(Plain):
        count = 0

        def __getitem__(self, index: int) -> Any:
            self.count += 1
            return super().__getitem__(index)

    dataset = Counting()
    attributes = dict(vars(dataset))
    fetcher(dataset).fetch([1, 2])
    assert vars(dataset) == attributes
    assert dataset.transform is attributes["transform"]


def test_threads_do_not_mix_samples() -> None:
    """Eight threads on one fetcher: every raw image is that of its own index."""
    fetch = fetcher(Plain())
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            ((sample, raw),) = fetch.fetch([index])
            if sample[1] != index or not np.array_equal(np.asarray(raw), own[index]):
                wrong.append(index)

    own = [np.asarray(picture(index)) for index in range(8)]
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fetch.deviations == 0


def test_generator_states_are_taken_afresh() -> None:
    """NumPy's state is never an old one, also where a normal deviate is held back or used up."""
    np.random.seed(1)  # noqa: NPY002 # the global generator is the subject
    draws: list[Callable[[], Any]] = [
        np.random.rand, np.random.randn, np.random.randn, np.random.randn, lambda: None,
        np.random.randn, lambda: np.random.seed(1), lambda: None,  # noqa: NPY002
    ]  # fmt: skip
    for draw in draws:
        draw()
        state = RngState.now()
        own = np.random.get_state(), random.random(), torch.rand(2)  # noqa: NPY002, S311
        deviates = np.random.randn(3)  # noqa: NPY002
        state.restore()
        for mine, theirs in zip(np.random.get_state(), own[0], strict=True):  # noqa: NPY002
            assert np.array_equal(mine, theirs)
        assert random.random() == own[1]  # noqa: S311
        assert torch.equal(torch.rand(2), own[2])
        assert np.array_equal(np.random.randn(3), deviates)  # noqa: NPY002
        state.restore()
