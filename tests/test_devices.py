"""Which device a value means, and what a device does where CUDA is or is not."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpupipe import devices, kernel_source
from gpupipe.devices import CpuDevice, CudaDevice, resolve
from gpupipe.errors import DeviceError, GpupipeWarning, InputError
from gpupipe.transfer import StagedFeed
from tests.feeding import Source, chunks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpupipe.tables import Layout


@pytest.fixture(autouse=True)
def _nothing_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_warned", set())


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see two CUDA devices, the second one current, and CuPy fit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(kernel_source, "require_cupy", object)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see no CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu(device: Any) -> None:
    """Without CUDA, None is the CPU, as if it had been named."""
    resolved = resolve(device)
    assert isinstance(resolved, CpuDevice)
    assert resolved.torch_device == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "index"),
    [(None, 1), ("cuda", 1), ("cuda:0", 0), (0, 0), (1, 1), (torch.device("cuda", 1), 1)],
)
def test_a_cuda_device(device: Any, index: int) -> None:
    """An index counts CUDA devices; without one it is torch's current device."""
    resolved = resolve(device)
    assert isinstance(resolved, CudaDevice)
    assert resolved.torch_device == torch.device("cuda", index)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda")])
def test_cuda_without_cuda(device: Any) -> None:
    """CUDA asked for where there is none: what came, what was expected, what to do."""
    with pytest.raises(DeviceError, match=r"sees no CUDA device; expected .*pass device='cpu'"):
        resolve(device)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["cuda:2", 7])
def test_index_out_of_range(device: Any) -> None:
    """A device that is not there: the error says which are."""
    with pytest.raises(DeviceError, match=r"sees 2 CUDA device.*expected an index in 0\.\.1"):
        resolve(device)


@pytest.mark.parametrize("device", ["cudaa", 1.5, True, [], "cuda:x"])
def test_no_device_at_all(device: Any) -> None:
    """What is no device is an InputError."""
    with pytest.raises(InputError, match="device must be None, 'cpu', 'cuda'"):
        resolve(device)


def lacking() -> None:
    """Stand in for ``require_cupy`` where CuPy is missing."""
    raise DeviceError('CuPy is not installed; pip install "gpupipe[cuda13]"')


@pytest.mark.usefixtures("two_gpus")
def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CuPy: an error for a GPU by name, else the CPU's kernel and one warning."""
    monkeypatch.setattr(kernel_source, "require_cupy", lacking)
    with pytest.raises(DeviceError, match=r"gpupipe\[cuda13\]"):
        resolve("cuda")
    with pytest.warns(GpupipeWarning, match=r"made on the CPU.*gpupipe\[cuda13\]"):
        resolved = resolve(None)
    assert isinstance(resolved, CpuDevice)
    assert resolved.torch_device == torch.device("cuda", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(None)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("device", "name"), [("xpu", "xpu"), ("mps", "mps"), ("cuda:1", "ROCm")])
def test_devices_without_a_kernel(monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
    """On mps, xpu and ROCm: the CPU's kernel and one copy, with one warning."""
    monkeypatch.setattr(devices, "_try", lambda _: None)
    if name == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(GpupipeWarning, match=f"no kernel for {name}"):
        resolved = resolve(device)
    assert isinstance(resolved, CpuDevice)
    assert resolved.torch_device == torch.device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(device)


def test_a_device_that_torch_cannot_use() -> None:
    """A device type without memory or backend is an error, not a later surprise."""
    with pytest.raises(DeviceError, match="torch cannot use it here"):
        resolve("meta")


def test_batches_are_copied_to_the_final_device() -> None:
    """With a final device, images and columns arrive there."""
    source = Source()
    feed = StagedFeed(CpuDevice(final=torch.device("meta")), source.spec, source.read)
    feed.submit([np.arange(4)] * 2)
    for _ in range(2):
        images, columns = feed.next()
        assert {tensor.device.type for tensor in (images, *columns)} == {"meta"}
    feed.close()


def test_pinning_that_fails() -> None:
    """Where pinning fails, memory is had without, after one warning; other errors are raised."""
    tried: list[int] = []

    def fails(nbytes: int) -> torch.Tensor:
        tried.append(nbytes)
        raise RuntimeError("the limit is 64 KiB")

    device = CudaDevice(0, pinned=fails)
    with pytest.warns(GpupipeWarning, match="could not be pinned.*the limit is 64 KiB") as said:
        buffers = [device.host_buffer(1000), device.host_buffer(10)]
    assert (len(said), tried) == (1, [1000])
    assert [buffer.numel() for buffer in buffers] == [1000, 10]

    def breaks(_: int) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        CudaDevice(0, pinned=breaks).host_buffer(1)


def test_buffers_ignore_the_default_device() -> None:
    """``torch.set_default_device`` does not move the host's buffers."""
    with torch.device("meta"):
        assert CpuDevice().host_buffer(8).device.type == "cpu"


def test_imports_stay_light() -> None:
    """The stream protocol imports neither numba nor CuPy, and starts no CUDA."""
    script = (
        "import sys, torch\n"
        "from gpupipe import transfer, devices\n"
        "device = devices.resolve('cpu')\n"
        "heavy = {'numba', 'cupy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def cuda_devices() -> Sequence[int]:
    """Return what there is; collected without touching CUDA where there is none."""
    return range(torch.cuda.device_count()) if torch.cuda.is_available() else [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", cuda_devices())
@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_cuda_batches_are_whole(index: int, layout: Layout, threaded: bool) -> None:
    """On a GPU, with a slow consumer that changes streams, every batch is torchvision's."""
    source = Source(257, layout, h=31, w=33)
    device = CudaDevice(index)
    sizes = [[64, 64, 7], [3], *[[96, 96]] * 8, [200], [250, 250]]
    chunks = chunks_of(source, sizes)
    streams = [torch.cuda.default_stream(index), device.new_stream()]
    feed = StagedFeed(device, source.spec, source.read, depth=2, threaded=threaded)
    for chunk in chunks:
        feed.submit(chunk)
    seen = []
    for step, rows in enumerate(rows for chunk in chunks for rows in chunk):
        with torch.cuda.stream(streams[step % 2]):
            images, columns = feed.next()
            torch.cuda._sleep(2_000_000)
            seen.append((rows, [tensor.clone() for tensor in (images, *columns)]))
            del images, columns
    torch.cuda.synchronize(index)
    feed.close()
    for rows, tensors in seen:
        assert all(map(torch.equal, (tensor.cpu() for tensor in tensors), source.expected(rows)))
