"""``compile``: whole batches with the bits of torchvision's, image by image."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

import gpupipe
from gpupipe import cpu_ops, devices
from gpupipe.devices import CpuDevice
from gpupipe.errors import InputError, PlanError
from tests import reference, strategies
from tests.strategies import levels

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
V1 = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
V2 = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
PIL_ONLY = v1.Compose(
    [v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), v1.Normalize(MEAN, STD)]
)
GREY = v1.Compose([v1.ToTensor(), v1.Normalize([0.286], [0.353])])
FLAT = v2.Compose([v2.ToDtype(torch.float32, scale=True)])  # a tensor [H, W] stays one


def compiled(transform: Any, **arguments: Any) -> gpupipe.Preprocess:
    """Return the module on the CPU."""
    return gpupipe.compile(transform, **{"device": "cpu", **arguments})


def planes(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return pixels [N, H, W, C] as a tensor [N, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


# The bits.


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (9, 13), (17, 16), (31, 33)])
@pytest.mark.parametrize("transform", [V1, V2, PIL_ONLY], ids=["v1", "v2", "PIL only"])
def test_colour(transform: Any, size: tuple[int, int]) -> None:
    """Arrays [N, H, W, C] and tensors [N, C, H, W] give torchvision's bits."""
    pixels = levels(4, *size, 3)
    module = compiled(transform)
    expected = reference.images(transform, pixels)
    reference.assert_same_bits(module(pixels), expected)
    reference.assert_same_bits(module(planes(pixels)), expected)
    reference.assert_same_bits(module(tv_tensors.Image(planes(pixels))), expected)
    assert module.plan.fused
    assert "normalize in one kernel on cpu" in str(module.plan)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (28, 28), (17, 31)])
def test_grey(size: tuple[int, int]) -> None:
    """[N, H, W] is an image of one channel, as an array and as a tensor."""
    pixels = levels(4, *size, 1)
    expected = reference.images(GREY, pixels)
    for images in (pixels, pixels[..., 0], planes(pixels), torch.from_numpy(pixels[..., 0])):
        reference.assert_same_bits(compiled(GREY)(images), expected)


def test_flat_results_stay_flat() -> None:
    """A transform that keeps tensors [H, W] keeps batches [N, H, W]."""
    images = torch.from_numpy(levels(4, 5, 3, 1)[..., 0])
    module = compiled(FLAT, memory_format=torch.channels_last)
    expected = torch.stack([FLAT(image) for image in images])
    reference.assert_same_bits(module(images), expected)
    reference.assert_same_bits(module(images, out=torch.empty(4, 5, 3)), expected)
    assert module(images[:, :0]).shape == (4, 0, 3)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), channels=st.integers(1, 5))
def test_any_pipeline(data: st.DataObject, channels: int) -> None:
    """Pipelines of v1 and v2, in every dtype and format, of any size."""
    case = data.draw(strategies.pointwise_cases(channels))
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    pixels = levels(data.draw(st.integers(1, 4)), height, width, channels)
    expected = reference.images(case.transform, pixels, None, case.make)
    dtype = data.draw(
        st.sampled_from((None, torch.float32, torch.float16, torch.bfloat16))
        if expected.is_floating_point()
        else st.none()
    )
    memory_format = data.draw(st.sampled_from((torch.contiguous_format, torch.channels_last)))
    module = compiled(case.transform, dtype=dtype, memory_format=memory_format)
    as_planes = case.container == "tensor" or data.draw(st.booleans())
    made = module(planes(pixels) if as_planes else pixels)
    reference.assert_same_bits(made, expected.to(dtype or expected.dtype))
    assert made.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The result is rounded once and laid out as asked."""
    pixels = levels(3, 9, 13, 3)
    made = compiled(V1, dtype=dtype, memory_format=memory_format)(pixels)
    reference.assert_same_bits(made, reference.images(V1, pixels, dtype))
    assert made.is_contiguous(memory_format=memory_format)


def test_images_that_are_views() -> None:
    """Strided, reversed and read-only images are read as they are."""
    pixels = levels(6, 9, 13, 3)
    module = compiled(V1)
    expected = reference.images(V1, pixels)
    reference.assert_same_bits(module(pixels[::-1, :, ::2]), expected.flip(0)[..., ::2])
    reference.assert_same_bits(module(torch.from_numpy(pixels).permute(0, 3, 1, 2)), expected)
    pixels.flags.writeable = False
    reference.assert_same_bits(module(pixels), expected)


def test_marked_pointwise() -> None:
    """A callable with the mark is compiled, for every size anew."""

    @gpupipe.pointwise
    def negative(image: torch.Tensor) -> torch.Tensor:
        return 1 - image

    transform = v1.Compose([v1.ToTensor(), negative])
    module = compiled(transform)
    for size in ((5, 3), (9, 13)):
        pixels = levels(3, *size, 3)
        reference.assert_same_bits(module(pixels), reference.images(transform, pixels))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("with_out", [False, True])
def test_empty(shape: tuple[int, int, int], *, with_out: bool) -> None:
    """No images and images without pixels give an empty result, as torch does."""
    n, h, w = shape
    out = torch.empty(n, 1, h, w) if with_out else None
    for images in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        made = compiled(GREY)(images, out=out)
        assert (made.shape, made.dtype) == ((n, 1, h, w), torch.float32)
    module = compiled(V2, memory_format=torch.channels_last)
    images = torch.zeros(n, 3, h, w, dtype=torch.uint8)
    assert module(images).shape == V2(images).shape


def test_in_a_model() -> None:
    """The module is a part of models: no parameters, copied, pickled, moved without a change."""
    pixels = levels(4, 5, 3, 3)
    expected = reference.images(V1, pixels)
    module = compiled(V1)
    assert list(module.parameters()) == []
    reference.assert_same_bits(nn.Sequential(module, nn.Flatten())(pixels), expected.flatten(1))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):  # noqa: S301 # our own
        reference.assert_same_bits(twin(pixels), expected)


def test_a_changed_transform_is_not_seen() -> None:
    """The transform is read once, as the documentation says."""
    transform = v1.Compose([v1.ToTensor(), v1.Normalize([0.5], [0.5])])
    pixels = levels(4, 5, 3, 1)
    module = compiled(transform)
    before = module(pixels).clone()
    transform.transforms[1].mean = [0.25]
    reference.assert_same_bits(module(pixels), before)
    assert "Compile\n    it again" in str(gpupipe.compile.__doc__)


# Memory.


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_out(memory_format: torch.memory_format) -> None:
    """``out`` is written and returned, in its own format, and views of larger memory will do."""
    pixels = levels(4, 9, 13, 3)
    expected = reference.images(V1, pixels)
    module = compiled(V1)
    buffer = torch.full((6, 3, 9, 13), 7.0).contiguous(memory_format=memory_format)
    made = module(pixels, out=buffer[1:5])
    assert made.data_ptr() == buffer[1:].data_ptr()
    reference.assert_same_bits(buffer[1:5], expected)
    assert (buffer[0] == 7).all()
    assert (buffer[5] == 7).all()


def test_out_proves_its_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that the module was not compiled for is proved before it is written."""
    module = compiled(V1)
    module(levels(4, 5, 3, 3))
    calls: list[bool] = []
    right = cpu_ops.normalize

    def wrong(*arguments: Any, **options: Any) -> None:
        right(*arguments, **options)
        calls.append(True)
        for output in arguments[2]:
            if not output.is_contiguous():
                output.zero_()

    monkeypatch.setattr(cpu_ops, "normalize", wrong)
    out = torch.empty(4, 3, 5, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(PlanError, match="differs from the installed torchvision"):
        module(levels(4, 5, 3, 3), out=out)
    assert calls


def test_autograd_sees_out() -> None:
    """What autograd has saved and ``out`` overwrites is an error in backward, as for torch."""
    pixels = levels(2, 5, 3, 3)
    module = compiled(V1)
    out = module(pixels).clone()
    weight = torch.ones((), requires_grad=True)
    loss = (weight * out).sum()
    version = out._version
    module(pixels, out=out)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kept = torch.empty_like(out)
        reference.assert_same_bits(module(pixels, out=kept), reference.images(V1, pixels))


@pytest.mark.parametrize("n", [0, 4])
def test_out_errors(n: int) -> None:
    """What ``out`` must be is checked, with and without images."""
    images = levels(n, 5, 3, 3)
    module = compiled(V1)
    cases: dict[str, Any] = {
        "must be torch.float32 of shape": torch.empty(n + 1, 3, 5, 3),
        r"shape \(., 3, 5, 3\) on cpu": torch.empty(n, 5, 3, 3),
        "got torch.float16": torch.empty(n, 3, 5, 3, dtype=torch.float16),
        "on meta": torch.empty(n, 3, 5, 3, device="meta"),
        "must not require grad": torch.empty(n, 3, 5, 3, requires_grad=True),
        "must be a dense tensor, got ndarray": np.empty((n, 3, 5, 3), np.float32),
        "must be a dense tensor": torch.zeros(n, 3, 5, 3).to_sparse(),
    }
    if n:
        cases["contiguous or channels_last"] = torch.empty(n, 3, 5, 6)[..., ::2]
    for message, out in cases.items():
        with pytest.raises(InputError, match=message):
            module(images, out=out)


def test_memory_is_used_again() -> None:
    """A result that was dropped gives its memory to the next; one that is kept keeps it."""
    pixels = levels(4, 33, 31, 3)
    module = compiled(V1)
    first = module(pixels)
    second = module(pixels)
    addresses = first.data_ptr(), second.data_ptr()
    assert addresses[0] != addresses[1]
    del first
    third = module(pixels)
    assert third.data_ptr() == addresses[0]
    reference.assert_same_bits(third, second)


class Elsewhere(CpuDevice):
    """A device that copies, as for GPUs without a kernel of ours; it stays on the CPU."""

    finished = 0

    def __init__(self) -> None:
        super().__init__(final=torch.device("cpu"))

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        type(self).finished += 1
        return tensor.clone()


def test_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is resolved at each call, and one is kept per place."""
    made: list[CpuDevice] = []

    def resolve(_: Any) -> CpuDevice:
        made.append(Elsewhere())
        return made[-1]

    monkeypatch.setattr(devices, "resolve", resolve)
    module = gpupipe.compile(V1)
    assert made == []
    pixels = levels(4, 5, 3, 3)
    for _ in range(2):
        reference.assert_same_bits(module(pixels), reference.images(V1, pixels))
    assert len(made) == 2
    assert list(module._devices.values()) == made[:1]
    assert Elsewhere.finished >= 2


def test_device_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU makes the batch, it is copied to ``out`` on the device."""
    final = torch.device("meta")  # the one other device that every machine has
    monkeypatch.setattr(devices, "resolve", lambda _: CpuDevice(final=final))
    monkeypatch.setattr("gpupipe.preprocess.proved", lambda _device, _pipe, lookup, *_: lookup)
    module = gpupipe.compile(V1)
    pixels = levels(4, 5, 3, 3)
    assert module(pixels).device == final
    out = torch.empty(4, 3, 5, 3, device=final)
    assert module(pixels, out=out) is out
    with pytest.raises(InputError, match=r"on meta, got .* on cpu"):
        module(pixels, out=torch.empty(4, 3, 5, 3))


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype must be .* got 'float16'"),
        ({"dtype": torch.float64}, "dtype must be .* got torch.float64"),
        ({"dtype": torch.uint8}, "dtype must be .* got torch.uint8"),
        ({"memory_format": torch.preserve_format}, "memory_format must be .*preserve_format"),
        ({"memory_format": torch.channels_last_3d}, "memory_format must be .*channels_last_3d"),
        ({"memory_format": "channels_last"}, "memory_format must be .* got 'channels_last'"),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    """What no kernel writes is an error before the first batch."""
    with pytest.raises(InputError, match=message):
        compiled(V1, **arguments)


def test_device_is_refused_at_the_first_call() -> None:
    """It is resolved there, so that a module can be made where it does not run."""
    with pytest.raises(InputError, match="device must be"):
        gpupipe.compile(V1, device="nonsense")(levels(1, 5, 3, 3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 5, 3, 3), np.float32), r"uint8 \[N, H, W, C\].* got float32 \(4, 5, 3, 3\)"),
        (torch.zeros(4, 3, 5, 3), r"uint8 \[N, C, H, W\] .* got float32 \(4, 3, 5, 3\)"),
        (np.zeros((5, 3), np.uint8), r"got uint8 \(5, 3\)"),
        (torch.zeros(1, 4, 3, 5, 3, dtype=torch.uint8), r"got uint8 \(1, 4, 3, 5, 3\)"),
        (np.zeros((4, 5, 3, 0), np.uint8), r"got uint8 \(4, 5, 3, 0\)"),
        (torch.zeros(4, 0, 5, 3, dtype=torch.uint8), r"got uint8 \(4, 0, 5, 3\)"),
        ([np.zeros((5, 3), np.uint8)], "ndarray or tensor, got list; stack"),
        (None, "got NoneType"),
    ],
)
def test_images_are_refused(images: Any, message: str) -> None:
    """Float images, other shapes and other types; the message says what came."""
    with pytest.raises(InputError, match=message):
        compiled(V1)(images)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_are_refused(channels: int) -> None:
    """Three constants do not fit another number of channels."""
    with pytest.raises(PlanError, match=rf"for 3 channels, but .* with {channels};"):
        compiled(V1)(levels(2, 5, 3, channels))


def test_transforms_are_refused() -> None:
    """What is not pointwise, nothing at all, and what torchvision itself refuses."""
    with pytest.raises(PlanError, match="takes pointwise transforms, got RandomHorizontalFlip"):
        compiled(v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()]))
    with pytest.raises(PlanError, match="takes pointwise transforms"):
        compiled(v1.Compose([v1.ToTensor(), v1.RandomErasing()]))
    with pytest.raises(PlanError, match="empty transform"):
        compiled(v1.Compose([]))
    double = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float64, scale=True)])
    with pytest.raises(PlanError, match=r"cannot be compiled: the result is torch.float64"):
        compiled(double)(levels(2, 5, 3, 3))
    with pytest.raises(PlanError, match=r"which dtype=torch.float16 cannot mean"):
        compiled(v1.PILToTensor(), dtype=torch.float16)(levels(2, 5, 3, 3))


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before the first batch finds a kernel that is wrong on this machine."""
    right = cpu_ops.normalize

    def wrong(*arguments: Any, **options: Any) -> None:
        right(*arguments, **options)
        arguments[2][-1].view(torch.int32)[-1] ^= 1

    monkeypatch.setattr(cpu_ops, "normalize", wrong)
    with pytest.raises(PlanError, match="the kernel on cpu differs"):
        compiled(V1)(levels(2, 5, 3, 3))


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("transform", [V1, V2, PIL_ONLY], ids=["v1", "v2", "PIL only"])
def test_on_a_gpu(transform: Any) -> None:
    """The same bits, from host memory and from the device's, into fresh memory and ``out``."""
    pixels = levels(4, 33, 31, 3)
    expected = reference.images(transform, pixels)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = gpupipe.compile(transform, device="cuda", memory_format=memory_format)
        out = torch.empty(4, 3, 33, 31, device="cuda")
        for images in (pixels, planes(pixels), planes(pixels).cuda()):
            reference.assert_same_bits(module(images).cpu(), expected)
            reference.assert_same_bits(module(images, out=out).cpu(), expected)
    on_host = compiled(transform)(planes(pixels).cuda())
    reference.assert_same_bits(on_host, expected)


@pytest.mark.gpu
@needs_cuda
def test_pinned_images_may_be_filled_again() -> None:
    """The copy is over when the call returns, however long the stream's work before it takes."""
    module = gpupipe.compile(GREY, device="cuda")
    pinned = torch.zeros(64, 256, 256, dtype=torch.uint8).pin_memory()
    expected = module(pinned).cpu()
    torch.cuda._sleep(200_000_000)
    made = module(pinned)
    pinned.fill_(255)
    reference.assert_same_bits(made.cpu(), expected)
