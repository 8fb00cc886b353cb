"""The launcher of ``normalize``: what it hands to the device, and on a device what comes back.

Tests marked ``gpu`` run the emulator's cases on the device. The expected bits come from torch
indexing on the CPU.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpupipe import cpu_ops, cuda_ops, geometry, kernel_source
from gpupipe.errors import InputError
from gpupipe.tables import Layout, Lookup
from tests.emulator import harness

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DTYPES = {4: torch.float32, 2: torch.float16, 1: torch.uint8}
INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a device."""
    for mark in needs_gpu:
        test = mark(test)
    return test


def shifted(values: torch.Tensor, shift: int, device: str) -> torch.Tensor:
    """Copy a contiguous tensor to ``device``, ``shift`` elements behind an aligned address."""
    memory = torch.empty(shift + values.numel(), dtype=values.dtype, device=device)
    memory[shift:].copy_(values.reshape(-1))
    return memory[shift:].view(values.shape)


def run_case(
    case: harness.Case, seed: int, device: str, dtype: torch.dtype
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Launch one of the emulator's cases; return the bits that came and the bits expected."""
    images, rows, table = case.arrays(seed)
    integer = INTEGERS[case.element_size]
    lookup = Lookup(torch.from_numpy(table.copy()).view(dtype))
    outputs = []
    for begin in range(0, case.count, case.per_output):
        n = min(case.per_output, case.count - begin)
        c, h, w = case.channels, case.height, case.width
        shape = (n, c, h, w) if case.planar_out else (n, h, w, c)
        poison = torch.full(shape, 0x25, dtype=integer).view(dtype)
        output = shifted(poison, case.output_shift, device)
        outputs.append(output if case.planar_out else output.permute(0, 3, 1, 2))
    layout: Layout = "NCHW" if case.planar_in else "NHWC"
    cuda_ops.normalize(
        shifted(torch.from_numpy(images), case.source_shift, device),
        None if rows is None else torch.from_numpy(rows).to(device),
        outputs,
        lookup,
        layout=layout,
    )
    host = [o if case.planar_out else o.permute(0, 2, 3, 1) for o in outputs]
    got = torch.cat([o.cpu().contiguous() for o in host]).view(integer).numpy()
    return got, case.expected(images, rows, table).view(got.dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_bits_equal_torch_indexing(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """All sizes, layouts, rows, outputs and alignments that the emulator ran."""
    ran = 0
    for seed, case in enumerate(harness.cases()):
        if case.element_size == dtype.itemsize:
            got, expected = run_case(case, seed, "cuda", dtype)
            assert np.array_equal(got, expected), case
            ran += 1
    with capsys.disabled():
        sys.stdout.write(f" [{ran} cases of {dtype}] ")
    assert ran > 300


@on_gpu
@pytest.mark.parametrize("planar_out", [True, False])
@pytest.mark.parametrize("planar_in", [True, False])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (227, 227), (500, 375)])
def test_images_of_many_tiles(
    height: int, width: int, *, planar_in: bool, planar_out: bool
) -> None:
    """Photo sizes, even and odd, more tiles than blocks."""
    case = harness.Case(
        2, 3, planar_in, planar_out, 70, height, width, 40, True, 32, 0, 0, 0, 0, 0
    )  # fmt: skip
    got, expected = run_case(case, 1, "cuda", torch.float16)
    assert np.array_equal(got, expected)


def example(device: str, n: int = 64) -> tuple[torch.Tensor, Lookup, torch.Tensor]:
    """Return raw images [n, 31, 33, 3], a lookup and what it makes of them, NCHW on the CPU."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (n, 31, 33, 3), dtype=torch.uint8)
    values = torch.randn(3, 256)
    expected = torch.stack([values[c][images[..., c].long()] for c in range(3)], 1)
    return images.to(device), Lookup(values), expected


@on_gpu
def test_launches_on_the_current_stream() -> None:
    """On a side stream the kernel comes after what that stream was given before."""
    images, lookup, expected = example("cuda", 512)
    late = torch.zeros_like(images)
    output = torch.empty(expected.shape, device="cuda")
    cuda_ops.normalize(late, None, [output], lookup, layout="NHWC")  # compiled, table copied
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(images)
        cuda_ops.normalize(late, None, [output], lookup, layout="NHWC")
    assert not side.query(), "the launch waited for the device"
    side.synchronize()
    assert torch.equal(output.cpu(), expected)


@on_gpu
def test_more_outputs_than_one_launch_takes() -> None:
    """130 batches of 3 and a short one come out of three launches."""
    images, lookup, expected = example("cuda", 391)
    outputs = [torch.empty(3, 3, 31, 33, device="cuda") for _ in range(130)]
    outputs.append(torch.empty(1, 3, 31, 33, device="cuda"))
    rows = torch.randperm(391)
    cuda_ops.normalize(images, rows.cuda(), outputs, lookup, layout="NHWC")
    assert torch.equal(torch.cat(outputs).cpu(), expected[rows])


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_second_device_while_the_first_is_current() -> None:
    """The arguments decide the device, not the current one, which stays as it was."""
    images, lookup, expected = example("cuda:1")
    output = torch.empty(expected.shape, device="cuda:1")
    with torch.cuda.device(0):
        cuda_ops.normalize(images, None, [output], lookup, layout="NHWC")
        assert torch.cuda.current_device() == 0
    assert torch.equal(output.cpu(), expected)
    other = torch.empty(expected.shape, device="cuda:0")
    with pytest.raises(InputError, match="must lie on one device, got cuda:1 and cuda:0"):
        cuda_ops.normalize(images, None, [other], lookup, layout="NHWC")


@on_gpu
def test_more_than_2_to_the_31_elements() -> None:
    """The first and the last images of a batch of 2.3e9 elements are right."""
    n, h, w = 15_000, 225, 226
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * n * h * w * 3 // 2 + (4 << 30):
        pytest.skip(
            f"needs {3 * n * h * w * 3 / 2e9 + 4:.0f} GB on the device, {free / 1e9:.0f} free"
        )
    images = torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8, device="cuda")
    values = torch.randn(3, 256).half()
    output = torch.empty(n, 3, h, w, dtype=torch.float16, device="cuda")
    assert output.numel() > 1 << 31
    cuda_ops.normalize(images, None, [output], Lookup(values), layout="NHWC")
    for i in (0, n // 2, n - 1):
        raw = images[i].cpu()
        wanted = torch.stack([values[c][raw[..., c].long()] for c in range(3)])
        assert torch.equal(output[i].cpu(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_the_twin_passes_the_same_cases(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cpu_ops.normalize`` gives the bits that are expected of the device, case by case."""
    monkeypatch.setattr(cuda_ops, "normalize", cpu_ops.normalize)
    for seed, case in enumerate(harness.cases()):
        if case.element_size == dtype.itemsize:
            got, expected = run_case(case, seed, "cpu", dtype)
            assert np.array_equal(got, expected), case


def test_host_memory_is_refused() -> None:
    """Arguments on the CPU give one clear error, CuPy or not."""
    images, lookup, expected = example("cpu", 2)
    with pytest.raises(InputError, match="must be on cuda, got cpu"):
        cuda_ops.normalize(images, None, [torch.empty_like(expected)], lookup, layout="NHWC")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the device: launches are recorded, tensors lie on the CPU."""
    seen: list[tuple[Any, ...]] = []
    kernel = kernel_source.Kernel(lambda *arguments: seen.append(arguments), blocks=10)
    stream = SimpleNamespace(from_external=nullcontext)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=nullcontext, Stream=stream))
    monkeypatch.setattr(kernel_source, "require_cupy", lambda: cupy)
    monkeypatch.setattr(kernel_source, "kernel", lambda *_: kernel)
    check: Callable[..., geometry.Geometry] = geometry.check
    monkeypatch.setattr(cuda_ops, "check", lambda *arguments: check(*arguments[:-1], "cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return seen


@pytest.mark.parametrize("with_rows", [True, False])
def test_launches_cover_every_output_once(
    launches: list[tuple[Any, ...]], *, with_rows: bool
) -> None:
    """Chunks of 64 outputs continue in rows or images where the one before ended."""
    images, lookup, _ = example("cpu", 391)
    outputs = [torch.empty(min(3, 391 - i), 3, 31, 33) for i in range(0, 391, 3)]
    rows = torch.arange(391) if with_rows else None
    cuda_ops.normalize(images, rows, outputs, lookup, layout="NHWC")
    begin, pointers = 0, []
    for grid, block, arguments in launches:
        source, row, table_of_outputs, per_output, count, pixels, channels, tile, table = arguments
        offset = 0 if with_rows else begin * 31 * 33 * 3
        assert source == images.data_ptr() + offset
        assert row == (rows.data_ptr() + 8 * begin if rows is not None else 0)
        assert (per_output, pixels, channels, tile) == (3, 1023, 3, 1024)
        assert table == lookup.values.data_ptr()
        assert (grid, block) == ((min(count, 10),), (256,))
        assert table_of_outputs.size == 1
        assert table_of_outputs.nbytes == 512
        pointers += [int(p) for p in table_of_outputs["pointer"] if p]
        begin += count
    assert begin == 391
    assert pointers == [o.data_ptr() for o in outputs]


def test_no_images_is_no_launch(launches: list[tuple[Any, ...]]) -> None:
    """N of 0 does nothing, with rows and without."""
    images, lookup, _ = example("cpu", 2)
    empty = torch.empty(0, 3, 31, 33)
    none = torch.empty(0, dtype=torch.int64)
    cuda_ops.normalize(images, none, [empty], lookup, layout="NHWC")
    cuda_ops.normalize(images[:0], None, [empty], lookup, layout="NHWC")
    cuda_ops.normalize(images[:0], None, [], lookup, layout="NHWC")
    assert not launches
