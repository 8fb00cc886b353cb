"""``cpu_ops.normalize`` gives the bits of torchvision, whatever the sizes and addresses are."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision import transforms as v1
from torchvision.transforms import v2

from gpupipe import cpu_ops, cuda_ops, threads
from gpupipe.errors import IndexRangeError, InputError
from gpupipe.images import ImageKind
from gpupipe.operators import pointwise
from gpupipe.tables import Layout, Lookup
from tests import reference, strategies
from tests.strategies import levels, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MEAN = (0.485, 0.456, 0.406, 0.5, 0.2860, 0.1307, 0.25)
STD = (0.229, 0.224, 0.225, 0.5, 0.3530, 0.3081, 0.2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS: tuple[Layout, ...] = ("NHWC", "NCHW")


def standard(channels: int) -> v1.Compose:
    """``ToTensor`` and ``Normalize`` for tensors of any number of channels."""
    return v1.Compose(
        [v1.ConvertImageDtype(torch.float32), v1.Normalize(MEAN[:channels], STD[:channels])]
    )


def lookup_of(
    transform: Any,
    channels: int,
    dtype: torch.dtype | None = None,
    container: str = "tensor",
) -> Lookup:
    """What the pipeline is compiled to."""
    operators = getattr(transform, "transforms", [transform])
    if container == "PIL":
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        kind = ImageKind("PIL", channels, "NHW" if channels == 1 else "NHWC", mode)
    else:
        kind = ImageKind("tensor", channels, "NCHW")
    return pointwise.tabulate(operators, kind, dtype)


def poisoned(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    poison: int = 0xFF,
    offset: int = 0,
) -> torch.Tensor:
    """A tensor full of ``poison`` bytes, ``offset`` elements beyond a multiple of 64 bytes."""
    n, c, h, w = shape
    size = n * c * h * w * dtype.itemsize
    memory = np.full(size + 64 + offset * dtype.itemsize, poison, np.uint8)
    start = -memory.ctypes.data % 64 + offset * dtype.itemsize
    flat = torch.from_numpy(memory[start : start + size]).view(dtype)
    if memory_format is torch.channels_last:
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


def render(
    images: Any,
    rows: Any,
    lookup: Lookup,
    layout: Layout,
    shape: tuple[int, ...],
    *,
    sizes: Sequence[int] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Run the kernel on outputs of the given sizes; return them joined."""
    count, *image = shape
    outputs = [
        poisoned((size, *image), lookup.dtype, **options)
        for size in ([count] if sizes is None else sizes)
    ]
    cpu_ops.normalize(images, rows, outputs, lookup, layout=layout)
    return torch.cat([output.contiguous() for output in outputs])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
def test_all_levels_have_torchvisions_bits(
    channels: int, dtype: torch.dtype, layout: Layout, memory_format: torch.memory_format
) -> None:
    """All 256 values of every channel, gathered and not, for every dtype, layout and format."""
    pixels = levels(4, 19, 27, channels, seed=channels)  # 513 pixels: 32 vectors and a tail of 1
    images, lookup = raw(pixels, layout), lookup_of(standard(channels), channels, dtype)
    expected = reference.images(standard(channels), pixels, dtype, reference.tensor)
    rows = np.array([3, 0, 0, 2, 1, 3], np.int64)
    for poison in (0x00, 0xFF):
        options: dict[str, Any] = {"memory_format": memory_format, "poison": poison}
        every = render(images, None, lookup, layout, tuple(expected.shape), **options)
        reference.assert_same_bits(every, expected)
        shape = (len(rows), *expected.shape[1:])
        picked = render(images, rows, lookup, layout, shape, **options)
        reference.assert_same_bits(picked, expected[torch.from_numpy(rows)])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_uint8_stays_uint8(
    channels: int, layout: Layout, memory_format: torch.memory_format
) -> None:
    """``PILToTensor`` alone is a gather and a change of layout."""
    pixels = levels(3, 17, 19, channels)
    lookup = lookup_of(v1.PILToTensor(), channels, container="PIL")
    expected = reference.images(v1.PILToTensor(), pixels)
    shape = tuple(expected.shape)
    ours = render(raw(pixels, layout), None, lookup, layout, shape, memory_format=memory_format)
    reference.assert_same_bits(ours, expected)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), batch=strategies.raw_batches())
def test_any_batch_any_pipeline(data: st.DataObject, batch: strategies.RawBatch) -> None:
    """Any pointwise pipeline on any batch gives what torchvision gives sample by sample."""
    channels = batch.pixels.shape[3]
    case = data.draw(strategies.pointwise_cases(channels))
    dtype = data.draw(st.sampled_from((None, *FLOATS)))
    if case.transform(case.make(levels(1, 1, 1, channels)[0])).dtype == torch.uint8:
        dtype = None
    memory_format = data.draw(st.sampled_from(FORMATS))
    offset = data.draw(st.integers(0, 63))
    lookup = lookup_of(case.transform, channels, dtype, case.container)
    if not len(batch.pixels):
        cpu_ops.normalize(batch.images, batch.rows, [], lookup, layout=batch.layout)
        return
    expected = reference.images(case.transform, batch.pixels, dtype, case.make)
    per_output = data.draw(st.integers(1, len(expected)))
    whole, rest = divmod(len(expected), per_output)
    ours = render(
        batch.images,
        batch.rows,
        lookup,
        batch.layout,
        tuple(expected.shape),
        sizes=[per_output] * whole + [rest] * (rest > 0),
        memory_format=memory_format,
        offset=offset,
    )
    reference.assert_same_bits(ours, expected)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 1000), (1000, 1), (3, 5), (4, 4), (16, 1)]
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_extreme_sizes(height: int, width: int, channels: int) -> None:
    """One pixel, one row, one column; fewer pixels than a vector and exactly one."""
    pixels = levels(3, height, width, channels)
    expected = reference.images(standard(channels), pixels, None, reference.tensor)
    lookup = lookup_of(standard(channels), channels)
    for layout in LAYOUTS:
        for memory_format in FORMATS:
            ours = render(
                raw(pixels, layout, 1),
                None,
                lookup,
                layout,
                tuple(expected.shape),
                memory_format=memory_format,
            )
            reference.assert_same_bits(ours, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_empty_batches(count: int) -> None:
    """No rows, no images and images without pixels are no error and touch nothing."""
    lookup = lookup_of(standard(3), 3)
    none = np.empty(0, np.int64)
    images = np.zeros((count, 4, 6, 3), np.uint8)
    cpu_ops.normalize(images, none, [], lookup, layout="NHWC")
    cpu_ops.normalize(images, none, [torch.empty(0, 3, 4, 6)], lookup, layout="NHWC")
    flat = np.zeros((count, 0, 6, 3), np.uint8)
    cpu_ops.normalize(flat, None, [torch.empty(count, 3, 0, 6)], lookup, layout="NHWC")


def test_several_outputs_with_an_odd_last_one() -> None:
    """Batches of one launch are separate outputs; the last may be shorter."""
    pixels = levels(11, 9, 7, 3)
    expected = reference.images(standard(3), pixels, None, reference.tensor)
    lookup = lookup_of(standard(3), 3)
    for sizes in ([11], [4, 4, 3], [1] * 11, [10, 1], [11, 0]):
        ours = render(raw(pixels, "NHWC"), None, lookup, "NHWC", (11, 3, 9, 7), sizes=sizes)
        reference.assert_same_bits(ours, expected)


def test_grey_images_without_a_channel_axis() -> None:
    """[N, H, W] goes to [N, 1, H, W] and to [N, H, W]."""
    pixels = levels(3, 16, 17, 1)
    lookup = lookup_of(standard(1), 1)
    expected = reference.images(standard(1), pixels, None, reference.tensor)
    for shape in ((3, 1, 16, 17), (3, 16, 17)):
        output = torch.full(shape, torch.nan)
        cpu_ops.normalize(raw(pixels, "NHW", 3), None, [output], lookup, layout="NHW")
        reference.assert_same_bits(output.view(3, 1, 16, 17), expected)


@pytest.mark.parametrize("kind", ["float16 by the transform", "bfloat16 by the transform", "table"])
def test_what_has_no_arithmetic_form_is_looked_up(kind: str) -> None:
    """Divisions in half precision and a curve of the user's own: exact, too."""
    if kind == "table":
        curve = pointwise.pointwise(lambda image: (image * image).sqrt() * image)
        transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), curve])
    else:
        dtype = torch.float16 if kind.startswith("float16") else torch.bfloat16
        transform = v2.Compose([v2.ToDtype(dtype, scale=True), v2.Normalize(MEAN[:3], STD[:3])])
    pixels = levels(2, 17, 19, 3)
    expected = reference.images(transform, pixels, None, reference.tensor)
    lookup = lookup_of(transform, 3)
    for memory_format in FORMATS:
        ours = render(
            raw(pixels, "NHWC"), None, lookup, "NHWC", (2, 3, 17, 19), memory_format=memory_format
        )
        reference.assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_ties_round_to_even(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Values half-way between two of the output type, and just below: as torch rounds them."""
    step = 0.5 if dtype is torch.bfloat16 else 0.0625  # half the spacing from 128 to 256
    means = [-step, -step * (1 - 2**-15), -step * (1 + 2**-14)]
    transform = v2.Compose([v2.ToDtype(torch.float32), v2.Normalize(means, [1.0])])
    pixels = levels(2, 19, 27, 3)
    lookup = lookup_of(transform, 3, dtype)
    assert lookup.constants is not None
    expected = reference.images(transform, pixels, dtype, reference.tensor)
    shape = tuple(expected.shape)
    ours = render(raw(pixels, "NHWC"), None, lookup, "NHWC", shape, memory_format=memory_format)
    reference.assert_same_bits(ours, expected)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Small outputs count as large; which kernels were chosen is recorded."""
    monkeypatch.setattr(cpu_ops, "STREAMING_BYTES", 0)
    chosen: list[bool] = []
    original = cpu_ops._compiled_vector

    def compiled(*variant: Any) -> Callable[..., None]:
        chosen.append(variant[-1])
        return original(*variant)

    monkeypatch.setattr(cpu_ops, "_compiled_vector", compiled)
    return chosen


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_streaming_stores(
    channels: int, dtype: torch.dtype, memory_format: torch.memory_format, streaming: list[bool]
) -> None:
    """Stores around the cache give the same bits; several outputs, gathered rows."""
    pixels = levels(5, 16, 19, channels)  # 304 pixels: a multiple of 16
    rows = np.array([4, 4, 0, 1, 3], np.int64)
    expected = reference.images(standard(channels), pixels[rows], dtype, reference.tensor)
    ours = render(
        raw(pixels, "NHWC", 5),
        rows,
        lookup_of(standard(channels), channels, dtype),
        "NHWC",
        tuple(expected.shape),
        sizes=[2, 2, 1],
        memory_format=memory_format,
    )
    assert streaming == [True]
    reference.assert_same_bits(ours, expected)


@pytest.mark.parametrize("offset", [1, 8, 15])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_streaming_to_unaligned_outputs(
    offset: int, dtype: torch.dtype, streaming: list[bool]
) -> None:
    """An output that begins within a cache line, or images of odd size, take plain stores."""
    lookup = lookup_of(standard(3), 3, dtype)
    for height, moved in ((16, offset), (17, 0)):
        pixels = levels(2, height, 19, 3)
        expected = reference.images(standard(3), pixels, dtype, reference.tensor)
        shape = tuple(expected.shape)
        ours = render(raw(pixels, "NHWC"), None, lookup, "NHWC", shape, offset=moved)
        reference.assert_same_bits(ours, expected)
    assert streaming == [False, False]


def test_large_outputs_stream_by_themselves() -> None:
    """The limit counts the bytes of one call, all outputs together."""
    assert cpu_ops._streams(16, np.array([64, 128]), cpu_ops.STREAMING_BYTES + 1)
    assert not cpu_ops._streams(16, np.array([64, 128]), cpu_ops.STREAMING_BYTES)
    assert not cpu_ops._streams(16, np.array([64, 96]), cpu_ops.STREAMING_BYTES + 1)
    assert not cpu_ops._streams(17, np.array([64, 128]), cpu_ops.STREAMING_BYTES + 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_beside_the_output_is_written(
    memory_format: torch.memory_format, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes before and after every output keep their values."""
    if stream:
        monkeypatch.setattr(cpu_ops, "STREAMING_BYTES", 0)
    for channels in (1, 2, 3, 4, 5):
        for height in (1, 5, 16):
            pixels = levels(3, height, 19 if not stream else 16, channels)
            n, h, w, c = pixels.shape
            size = n * h * w * c
            memory = torch.full((size + 64,), torch.nan)
            start = -memory.data_ptr() % 64 // 4 + 16 if stream else 17
            inner = memory[start : start + size]
            output = (
                inner.view(n, c, h, w)
                if memory_format is torch.contiguous_format
                else inner.view(n, h, w, c).permute(0, 3, 1, 2)
            )
            lookup = lookup_of(standard(c), c)
            cpu_ops.normalize(raw(pixels, "NHWC"), None, [output], lookup, layout="NHWC")
            assert memory[:start].isnan().all()
            assert memory[start + size :].isnan().all()
            assert not output.isnan().any()


def test_memmap_at_an_odd_offset(tmp_path: Path) -> None:
    """A memmap that begins at an odd byte of its file is read where it lies."""
    pixels = levels(4, 13, 11, 3)
    path = tmp_path / "images.bin"
    path.write_bytes(b"header!" + pixels.tobytes())
    images = np.memmap(path, np.uint8, "r", offset=7, shape=pixels.shape)
    rows = np.array([3, 1], np.int64)
    expected = reference.images(standard(3), pixels[rows], None, reference.tensor)
    ours = render(images, rows, lookup_of(standard(3), 3), "NHWC", (2, 3, 13, 11))
    reference.assert_same_bits(ours, expected)


def test_sizes_beyond_32_bits(tmp_path: Path) -> None:
    """Images more than 2^32 bytes into a file; the file is sparse and takes no room."""
    count, side = 1500, 1024
    path = tmp_path / "sparse.bin"
    images = np.memmap(path, np.uint8, "w+", shape=(count, side, side, 3))
    assert images.nbytes > 2**32
    rows = np.array([count - 1, 0, 700], np.int64)  # 700: beyond 2^31
    images[rows] = levels(3, side, side, 3)
    expected = reference.images(standard(3), images[rows], None, reference.tensor)
    ours = render(images, rows, lookup_of(standard(3), 3), "NHWC", tuple(expected.shape))
    reference.assert_same_bits(ours, expected)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_any_number_of_threads(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the images are split between threads cannot be seen in the result."""
    monkeypatch.setattr(cpu_ops, "split", lambda run, count, _: threads.split(run, count, parts))
    pixels = levels(7, 20, 23, 3)
    rows = np.array([6, 5, 4, 3, 2, 1, 0, 0, 6, 3, 3], np.int64)
    expected = reference.images(standard(3), pixels[rows], None, reference.tensor)
    shape = tuple(expected.shape)
    lookup = lookup_of(standard(3), 3)
    ours = render(raw(pixels, "NHWC"), rows, lookup, "NHWC", shape, sizes=[4, 4, 3])
    reference.assert_same_bits(ours, expected)


def test_calls_from_several_threads_at_once() -> None:
    """Two threads that make batches do not disturb each other."""
    pixels = levels(64, 32, 33, 3)
    images, lookup = raw(pixels, "NHWC"), lookup_of(standard(3), 3)
    expected = reference.images(standard(3), pixels, None, reference.tensor)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            rows = np.random.default_rng(seed).integers(0, 64, 64)
            ours = render(images, rows, lookup, "NHWC", tuple(expected.shape))
            if not torch.equal(ours, expected[torch.from_numpy(rows)]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_rows_may_be_strided_or_a_tensor() -> None:
    """Rows are taken as they are: a strided view, a CPU tensor, read-only."""
    pixels = levels(6, 5, 7, 3)
    lookup = lookup_of(standard(3), 3)
    rows = np.arange(12)[::-2] // 2
    read_only = rows.copy()
    read_only.flags.writeable = False
    expected = reference.images(standard(3), pixels[rows], None, reference.tensor)
    for given_rows in (rows, torch.from_numpy(rows.copy()), read_only):
        ours = render(raw(pixels, "NHWC"), given_rows, lookup, "NHWC", (6, 3, 5, 7))
        reference.assert_same_bits(ours, expected)


def _images(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape or (4, 5, 7, 3), np.uint8)


def _output(*shape: int) -> torch.Tensor:
    return torch.empty(shape or (4, 3, 5, 7))


@pytest.mark.parametrize(
    ("images", "rows", "outputs", "message"),
    [
        (_images().astype(np.float32), None, [_output()], "images must be uint8"),
        (_images(4, 5, 7), None, [_output()], "images must be uint8"),
        (_images(4, 5, 7, 4), None, [_output()], "images must have 3 channels"),
        (_images(8, 5, 7, 3)[::2], None, [_output()], "images must be contiguous"),
        (_images(4, 5, 14, 3)[:, :, ::2], None, [_output()], "images must be contiguous"),
        (_images(), np.zeros((4, 1), np.int64), [_output()], "rows must be int64"),
        (_images(), np.zeros(4, np.int32), [_output()], "rows must be int64"),
        (_images(), None, [_output(3, 3, 5, 7)], "outputs must hold 4 images"),
        (_images(), None, [_output(1, 3, 5, 7), _output(3, 3, 5, 7)], "outputs must hold 4 images"),
        (_images(), None, [_output(0, 3, 5, 7), _output()], "outputs must hold 4 images"),
        (_images(), None, [], "outputs must hold 4 images"),
        (_images(), None, [_output(4, 3, 7, 5)], "outputs must be"),
        (_images(), None, [_output().double()], "outputs must be torch.float32"),
        (_images(), None, [_output(4, 3, 5, 14)[..., ::2]], "contiguous or channels_last"),
        (
            _images(),
            None,
            [_output(2, 3, 5, 7), _output(2, 3, 5, 7).to(memory_format=torch.channels_last)],
            "one memory format",
        ),
        (_images(), None, [torch.empty(4, 3, 5, 7, device="meta")], "outputs must be on cpu"),
    ],
)
def test_arguments_that_do_not_fit(images: Any, rows: Any, outputs: Any, message: str) -> None:
    """Nothing that would read or write beyond its memory reaches native code."""
    with pytest.raises(InputError, match=message):
        cpu_ops.normalize(images, rows, outputs, lookup_of(standard(3), 3), layout="NHWC")


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_out_of_range(bad: int, as_tensor: bool) -> None:
    """A row that the images do not have is an IndexError that names it."""
    rows: Any = np.array([0, bad, 1, 2], np.int64)
    rows = torch.from_numpy(rows) if as_tensor else rows
    with pytest.raises(IndexRangeError, match=str(bad)):
        cpu_ops.normalize(_images(), rows, [_output()], lookup_of(standard(3), 3), layout="NHWC")


def test_launchers_have_one_signature() -> None:
    """Names, order, kinds, defaults and annotations of both launchers are the same."""
    assert inspect.signature(cuda_ops.normalize) == inspect.signature(cpu_ops.normalize)


def test_launchers_import_neither_cupy_nor_numba() -> None:
    """Both are imported when a kernel is needed first."""
    code = (
        "import sys, gpupipe.cuda_ops, gpupipe.cpu_ops;"
        "print({'cupy', 'numba', 'llvmlite'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
