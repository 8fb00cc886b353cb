"""The CUDA source itself, compiled by g++ and run on CPU threads under sanitizers.

A pass here is no evidence from a GPU: it says that indices, alignment, tails and barriers are
right, and that the bits are those of torch's own indexing. See ``docs/gpu-status.md``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms

from tests.emulator import harness
from tests.emulator.harness import Case

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are tried on Linux only"),
]

SANITIZERS = {"address": "address,undefined", "thread": "thread"}
RGB = Case(
    element_size=4, channels=3, planar_in=False, planar_out=False, count=2, height=5, width=13,
    stored=2, has_rows=False, per_output=2, tile=64, threads=16, blocks=1, source_shift=0,
    output_shift=0,
)  # fmt: skip


def variant(**changes: Any) -> Case:
    """Return ``RGB`` with other values."""
    return Case(**{**vars(RGB), **changes})


@pytest.fixture(scope="session", params=SANITIZERS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator with every instantiation, once per sanitizer."""
    folder = tmp_path_factory.mktemp(request.param)
    return harness.build(folder, SANITIZERS[request.param])


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return harness.build(tmp_path_factory.mktemp("checked"), SANITIZERS["address"], only=True)


@pytest.mark.slow
def test_every_instantiation_gives_torchs_bits_and_no_report(
    runner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits equal torch's indexing for all sizes, layouts, rows, outputs and alignments."""
    ran = harness.check(runner, list(harness.cases()))
    with capsys.disabled():
        sys.stdout.write(f" [{ran} cases] ")
    assert ran > 1000


def test_float_rgb_gives_torchs_bits(checked: Path) -> None:
    """The quick part: one instantiation per layout pair at every size."""
    chosen = [c for c in harness.cases() if c.element_size == 4 and c.channels == 3]
    assert harness.check(checked, chosen) == 4 * len(harness.SIZES)


@pytest.mark.parametrize("planar_out", [True, False])
def test_bits_are_those_of_torchvision(checked: Path, *, planar_out: bool) -> None:
    """A table made from ToTensor and Normalize gives what they give for each PIL image."""
    pipeline = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    case = variant(planar_out=planar_out, height=33, width=31, count=3, stored=3, per_output=2)
    images, _, _ = case.arrays(seed=7)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    table = pipeline(transforms.ToPILImage()(ramp)).squeeze(2).numpy().view(np.uint32)
    wanted = torch.stack([pipeline(transforms.ToPILImage()(image)) for image in images])
    done = harness.run(checked, [harness.encode(case, images, None, table)])
    assert done.returncode == 0, done.stderr.decode()
    got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    got = got.view(3, 3, 33, 31) if planar_out else got.view(3, 33, 31, 3).permute(0, 3, 1, 2)
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


LOAD_CHECK = "if (is_aligned(source + head, V)) {"
STORE_CHECK = "is_aligned(output, VECTOR_BYTES) &&"
TAIL = "const int vectors = (length - head) / V;"
TABLE_BARRIER = "__syncthreads();\n    const T* lookup"
STAGED_BARRIER = "__syncthreads();\n            copy_run"
REUSE_BARRIER = "__syncthreads();  // before"
STAGED = variant(planar_in=True, tile=16)
ADDRESS_BUGS = {
    "misaligned load": (LOAD_CHECK, "if (true) {", variant(source_shift=1), "misaligned address"),
    "misaligned store": (
        STORE_CHECK, "", variant(planar_out=True, output_shift=1, width=16), "misaligned address",
    ),
    "vectors past the end": (
        TAIL, "const int vectors = (length - head + V - 1) / V;",
        variant(count=1, stored=1, tile=2048), "heap-buffer-overflow",
    ),
    "pixels past the end": (
        "groups * V, length, C, lookup", "groups * V, length + 1, C, lookup",
        variant(planar_out=True, count=1, stored=1), "heap-buffer-overflow",
    ),
    "tile as long as any": (
        "const int length = static_cast<int>(min(tile_pixels, pixels - begin));",
        "const int length = static_cast<int>(tile_pixels);", RGB, "heap-buffer-overflow",
    ),
}  # fmt: skip
RACES = {
    "table": (TABLE_BARRIER, "const T* lookup", RGB),
    "staged bytes": (STAGED_BARRIER, "copy_run", STAGED),
    "staged bytes of the next tile": (REUSE_BARRIER, "//", STAGED),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", ADDRESS_BUGS)
def test_planted_address_bug_is_reported(bug: str, checked: Path, tmp_path: Path) -> None:
    """A kernel with a bad address fails under ASan or UBSan, and without the bug it does not."""
    old, new, case, report = ADDRESS_BUGS[bug]
    assert harness.check(checked, [case]) == 1
    program = harness.build(tmp_path, SANITIZERS["address"], {old: new}, only=True)
    done = harness.run(program, [harness.encode(case, *case.arrays(0))])
    assert done.returncode != 0
    assert report in done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("barrier", RACES)
def test_missing_barrier_is_reported(barrier: str, tmp_path: Path) -> None:
    """A kernel without one of its barriers fails under TSan, and with it it does not."""
    old, new, case = RACES[barrier]
    good = harness.build(tmp_path / "good", SANITIZERS["thread"], only=True)
    assert harness.check(good, [case]) == 1
    program = harness.build(tmp_path / "bad", SANITIZERS["thread"], {old: new}, only=True)
    done = harness.run(program, [harness.encode(case, *case.arrays(0))])
    assert done.returncode != 0
    assert "data race" in done.stderr.decode()


def probe_last_tile(
    case: Case, *, row: int | None = None
) -> tuple[list[bytes], bytes, dict[str, int]]:
    """Return a sparse case that runs only the block of the last tile, and the bytes it must give.

    The source is all zeros but for the last pixels of the last image's last plane (or row), which
    are random. The output is compared where those pixels go.
    """
    c, pixels, size = case.channels, case.height * case.width, case.element_size
    rng = np.random.default_rng(1)
    planes = c if case.planar_in and case.planar_out else 1
    tiles = -(-pixels // case.tile)
    length = pixels - (tiles - 1) * case.tile
    _, _, table = variant(element_size=size, channels=c).arrays(0)
    last_image = case.count - 1 if row is None else row
    source_bytes = (last_image + 1) * c * pixels
    payload = rng.integers(0, 256, length * (1 if case.planar_in else c), np.uint8)
    levels = np.zeros((c, length), np.uint8)  # of the last tile, per channel
    if case.planar_in:
        levels[-1] = payload
    else:
        levels[:] = payload.reshape(length, c).T
    values = np.stack([table[i][levels[i]] for i in range(c)])
    wanted = values[-1] if case.planar_out else np.ascontiguousarray(values.T)
    output_bytes = case.count * c * pixels * size
    blocks = case.count * planes * tiles
    probe = (
        1, blocks - 1, source_bytes, output_bytes, source_bytes - payload.size, payload.size,
        output_bytes - wanted.nbytes, wanted.nbytes,
    )  # fmt: skip
    whole = Case(**{**vars(case), "blocks": blocks, "has_rows": row is not None})
    rows = None if row is None else np.array([row])
    sizes = {"source": source_bytes, "output": output_bytes // size}
    return [harness.encode(whole, payload, rows, table, probe)], wanted.tobytes(), sizes


HUGE = {
    "one image": {"height": 40_000, "width": 40_001, "count": 1, "per_output": 1, "tile": 2048},
    "many images": {"height": 31, "width": 33, "count": 3 << 20, "per_output": 3 << 20, "tile": 64},
    "far row": {"height": 31, "width": 33, "count": 1, "per_output": 1, "tile": 64},
}


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("planar_in", [True, False])
@pytest.mark.parametrize("planar_out", [True, False])
def test_more_than_2_to_the_31_elements(
    huge: str, checked: Path, *, planar_in: bool, planar_out: bool
) -> None:
    """The last tile of a launch over more than 2^31 elements reads and writes the right places.

    Source and output are sparse mappings of the whole size, and only one block of the grid runs.
    """
    case = variant(**HUGE[huge], planar_in=planar_in, planar_out=planar_out)
    row = 1_000_000 if huge == "far row" else None
    batch, wanted, sizes = probe_last_tile(case, row=row)
    assert sizes["source"] > 1 << 31
    assert sizes["output"] > 1 << 31 or row is not None
    done = harness.run(checked, batch)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == wanted


@pytest.mark.slow
def test_planted_32_bit_offset_is_noticed(tmp_path: Path) -> None:
    """A kernel that cuts the source offset to 32 bits crashes or gives other bits."""
    old = "const i64 source_start = (rows ? rows[n] : n) * channels * pixels;"
    patch = {old: old.replace("i64", "int", 1).replace("= ", "= static_cast<int>(")[:-1] + ");"}
    program = harness.build(tmp_path, SANITIZERS["address"], patch, only=True)
    batch, wanted, _ = probe_last_tile(variant(**HUGE["far row"]), row=1_000_000)
    done = harness.run(program, batch)
    assert done.returncode != 0 or done.stdout != wanted


def test_a_patch_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    """A planted bug must really be planted."""
    with pytest.raises(ValueError, match="0 times"):
        harness.build(tmp_path, SANITIZERS["address"], {"no such text": ""})
