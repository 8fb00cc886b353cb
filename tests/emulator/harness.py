"""Cases for the kernel ``normalize`` and the machinery that runs them on the CPU.

The expected bits come from torch indexing alone: ``table[c][x]``. Nothing of gpupipe decides them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Bits = NDArray[np.unsignedinteger[Any]]

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
BITS: dict[int, type[np.unsignedinteger[Any]]] = {4: np.uint32, 2: np.uint16, 1: np.uint8}
FLAGS = (
    "-std=c++20", "-O1", "-g", "-pthread", "-fno-strict-aliasing", "-fno-omit-frame-pointer",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare",
)  # fmt: skip

# 1 pixel, sizes on both sides of 4-, 8- and 16-element vectors, odd planes, more than one tile and
# more than one round of the unrolled loops; never square, so that a swapped axis shows.
SIZES = (
    (1, 1), (1, 2), (3, 1), (1, 4), (1, 5), (7, 1), (2, 4), (3, 3), (1, 15), (2, 8), (17, 1),
    (31, 1), (4, 8), (3, 11), (5, 13), (9, 7), (4, 16), (5, 17), (19, 7), (8, 32), (23, 29),
    (45, 46),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One launch of ``normalize``; the names are the kernel's and the emulator's.

    Attributes:
        element_size: bytes of an output element.
        channels: C.
        planar_in: the source is [N, C, H, W].
        planar_out: the output is [N, C, H, W].
        count: images of the launch.
        height: H.
        width: W.
        stored: images in the source; with rows, any number.
        has_rows: whether rows are given (repeats among them), else image n is row n.
        per_output: images per output allocation.
        tile: pixels per tile.
        threads: threads per block.
        blocks: blocks of the grid.
        source_shift: bytes by which the source misses the allocator's alignment.
        output_shift: elements by which each output misses it.
    """

    element_size: int
    channels: int
    planar_in: bool
    planar_out: bool
    count: int
    height: int
    width: int
    stored: int
    has_rows: bool
    per_output: int
    tile: int
    threads: int
    blocks: int
    source_shift: int
    output_shift: int

    def arrays(self, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, Bits]:
        """Draw source [stored, ...] in its layout, rows, and a table [C, 256] of random bits."""
        rng = np.random.default_rng(seed)
        logical = (self.stored, self.height, self.width, self.channels)
        images = rng.integers(0, 256, logical, np.uint8)
        if self.planar_in:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        rows = rng.integers(0, self.stored, self.count) if self.has_rows else None
        random = rng.bytes(self.channels * 256 * self.element_size)
        table = np.frombuffer(random, BITS[self.element_size]).reshape(self.channels, 256)
        return images, rows, table

    def expected(
        self,
        images: NDArray[np.uint8],
        rows: NDArray[np.int64] | None,
        table: NDArray,  # type: ignore[type-arg]
    ) -> Bits:
        """Index the table by torch: bits [N, C, H, W], or [N, H, W, C] for interleaved output."""
        pixels = torch.from_numpy(images)
        if not self.planar_in:
            pixels = pixels.permute(0, 3, 1, 2)
        pixels = pixels[: self.count] if rows is None else pixels[torch.from_numpy(rows)]
        levels = torch.from_numpy(table.astype(np.int64))
        result = torch.stack([levels[c][pixels[:, c].long()] for c in range(self.channels)], 1)
        result = result if self.planar_out else result.permute(0, 2, 3, 1)
        return result.contiguous().numpy().astype(table.dtype)


def cases() -> Iterator[Case]:
    """Every instantiation at every size, the other arguments drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    layouts = list(itertools.product((True, False), repeat=2))
    for size, c, (planar_in, planar_out), (h, w) in itertools.product(
        BITS, (1, 2, 3, 4, 5), layouts, SIZES
    ):
        if c == 1 and not (planar_in and planar_out):
            continue
        count = int(rng.integers(1, 4))
        has_rows = bool(rng.integers(2))
        tiles = [t for t in (5, 16, 48, 64, 2048) if t * 40 >= h * w]
        yield Case(
            size, c, planar_in, planar_out, count, h, w,
            stored=int(rng.integers(1, 5)) if has_rows else count,
            has_rows=has_rows,
            per_output=int(rng.integers(1, count + 1)),
            tile=int(rng.choice(tiles)),
            threads=int(rng.choice((1, 16, 24, 64), p=(0.1, 0.5, 0.3, 0.1))),
            blocks=int(rng.integers(1, 4)),
            source_shift=int(rng.choice((0, 0, 0, 1, 2, 4, 8))),
            output_shift=int(rng.choice((0, 0, 0, 1, 3))),
        )  # fmt: skip
    for size in BITS:  # a table too large for shared memory
        yield Case(size, 70, False, True, 1, 2, 3, 1, False, 1, 16, 16, 2, 0, 0)
        yield Case(size, 70, True, True, 2, 3, 7, 3, True, 1, 16, 16, 2, 0, 0)


def encode(case: Case, images: NDArray[np.uint8], rows: NDArray[np.int64] | None,
           table: Bits, probe: Sequence[int] = (0,) * 8) -> bytes:  # fmt: skip
    """Pack one case as ``run_normalize.cpp`` reads it; ``probe`` is for sparse cases only."""
    templated = case.channels if case.channels in {1, 3, 4} else 0
    header = np.array(
        [
            case.element_size, templated, case.planar_in, case.planar_out, case.channels,
            case.count, case.height * case.width, case.stored, case.has_rows,
            -(-case.count // case.per_output), case.per_output, case.tile, case.threads,
            case.blocks, case.source_shift, case.output_shift, *probe,
        ],
        np.int64,
    )  # fmt: skip
    picked = b"" if rows is None else rows.tobytes()
    return header.tobytes() + images.tobytes() + picked + table.tobytes()


def build(
    folder: Path, sanitizers: str, patches: Mapping[str, str] | None = None, *, only: bool = False
) -> Path:
    """Compile the runner with g++ and return the executable.

    Args:
        folder: for the executable and a copy of the kernels.
        sanitizers: value of ``-fsanitize``.
        patches: text of ``normalize.cu`` to replace, each found exactly once.
        only: leave out all instantiations but float-sized RGB, for a short compilation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = (KERNELS / "normalize.cu").read_text(encoding="utf-8")
    for old, new in (patches or {}).items():
        if text.count(old) != 1:
            raise ValueError(f"the kernel must have {old!r} once, has it {text.count(old)} times")
        text = text.replace(old, new)
    (folder / "normalize.cu").write_text(text, encoding="utf-8")
    program = folder / "run_normalize"
    # Headers first from the copy, so that a patched kernel is the one that is compiled.
    command = [
        os.environ.get("CXX", "g++"), *FLAGS, f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all", *(["-DONLY_RGB_FLOAT"] if only else []),
        f"-I{folder}", f"-I{HERE}", f"-I{KERNELS}",
        str(HERE / "run_normalize.cpp"), "-o", str(program),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stderr}")
    return program


def run(program: Path, batch: Sequence[bytes]) -> subprocess.CompletedProcess[bytes]:
    """Run encoded cases; the results are one after another on its standard output."""
    return subprocess.run(
        [str(program)],
        input=np.int64(len(batch)).tobytes() + b"".join(batch),
        capture_output=True,
        check=False,
        timeout=240,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"},
    )


def check(program: Path, chosen: Sequence[Case]) -> int:
    """Run cases and compare every bit; return how many ran.

    Raises:
        RuntimeError: the emulator failed, or a sanitizer reported something.
        AssertionError: a result differs.
    """
    drawn = [(case, *case.arrays(seed)) for seed, case in enumerate(chosen)]
    done = run(program, [encode(*each) for each in drawn])
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-4000:])
    offset = 0
    for case, images, rows, table in drawn:
        expected = case.expected(images, rows, table).tobytes()
        got = done.stdout[offset : offset + len(expected)]
        if got != expected:
            raise AssertionError(f"bits differ in {case}")
        offset += len(expected)
    if offset != len(done.stdout):
        raise AssertionError("the emulator wrote more than was expected")
    return len(drawn)
