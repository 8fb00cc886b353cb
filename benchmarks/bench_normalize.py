"""How close is the CPU kernel ``normalize`` to the memory's limit, and to its peers?

A batch of raw images [N, H, W, C] becomes a normalised one, for C of 1, 3 and 4, three dtypes, two
memory formats, noise and photos. Inputs and outputs rotate through more memory than the cache
holds. The limit is a kernel that moves the same bytes and does nothing else.

    python -m benchmarks.bench_normalize --json benchmarks/results/normalize_cpu.json
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

import gpupipe
from benchmarks import harness, limits, material
from benchmarks.harness import Contender, Report
from benchmarks.loaders import ROUNDING

MEAN = (0.485, 0.456, 0.406, 0.5)
STD = (0.229, 0.224, 0.225, 0.25)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BEYOND_CACHE = 4
"""Times the last-level cache that inputs and outputs take together."""

CHECKED = 4
"""Images of a batch that are compared with torchvision's."""


class Contest:
    """The contenders of one C, dtype, memory format and content."""

    def __init__(self, sets: list[NDArray[np.uint8]], dtype: torch.dtype, style: str) -> None:
        self.sets = sets
        self.dtype, self.format = dtype, FORMATS[style]
        n, h, w, c = sets[0].shape
        self.count = n
        self.constants = (MEAN[:c], STD[:c])
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in self.constants)
        self.planes = [torch.from_numpy(s).permute(0, 3, 1, 2) for s in sets]
        options: Any = {"memory_format": self.format}
        self.outputs = [torch.empty((n, c, h, w), dtype=dtype, **options) for _ in sets]
        wide = torch.float32 != dtype
        self.wide = torch.empty((n, c, h, w), **options) if wide else torch.empty(0)

    def wanted(self) -> list[torch.Tensor]:
        """Return what torchvision gives, image by image."""
        transform = material.transform(self.constants)
        batch = torch.stack([transform(image) for image in self.sets[0][:CHECKED]])
        return [batch.to(self.dtype).contiguous(memory_format=self.format)]

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a training script writes."""
        x = (x.to(torch.float32) / 255 - self.mean) / self.std
        return x.to(self.dtype).contiguous(memory_format=self.format)

    def in_place(self, k: int) -> torch.Tensor:
        """Return the same, without an allocation."""
        output = self.outputs[k]
        wide = self.wide if self.wide.numel() else output
        wide.copy_(self.planes[k]).div_(255).sub_(self.mean).div_(self.std)
        return wide if wide is output else output.copy_(wide)

    def numpy(self) -> Callable[[int], torch.Tensor]:
        """Return the same in NumPy, on one thread."""
        mean, std = (np.array(v, np.float32) for v in self.constants)

        def run(k: int) -> torch.Tensor:
            x = self.sets[k].astype(np.float32)
            x /= np.float32(255)
            x -= mean
            x /= std
            batch = torch.from_numpy(x).permute(0, 3, 1, 2)
            return batch.to(self.dtype).contiguous(memory_format=self.format)

        return run

    def torchvision(self) -> Callable[[int], torch.Tensor]:
        """Return torchvision's v2 transforms on the whole batch."""
        mean, std = map(list, self.constants)
        pipeline = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

        def run(k: int) -> torch.Tensor:
            batch: torch.Tensor = pipeline(self.planes[k])
            return batch.to(self.dtype).contiguous(memory_format=self.format)

        return run

    def ours(self) -> Callable[[int], torch.Tensor]:
        """Return gpupipe's, into memory that is there."""
        preprocess = gpupipe.compile(
            material.transform(self.constants), device="cpu", dtype=self.dtype,
            memory_format=self.format,
        )  # fmt: skip

        def run(k: int) -> torch.Tensor:
            result: torch.Tensor = preprocess(self.sets[k], out=self.outputs[k])
            return result

        return run

    def contenders(self, *, compiled: bool) -> Iterator[Contender]:
        """List the contenders, torch's own operators first, the limits last."""
        rounding, same = ROUNDING[self.dtype], 0.0
        calls: list[tuple[str, Callable[[int], torch.Tensor], float, str]] = [
            ("torch ops", lambda k: self.plain(self.planes[k]), same, "fresh outputs"),
            ("torch ops in place", self.in_place, same, "into outputs that are there"),
            ("torchvision v2", self.torchvision(), rounding, "on the batch, fresh outputs"),
            ("NumPy", self.numpy(), same, "one thread, fresh outputs"),
            ("gpupipe", self.ours(), same, "into outputs that are there"),
        ]
        if compiled:
            fused = torch.compile(self.plain, dynamic=False)
            calls.append(
                ("torch.compile", lambda k: fused(self.planes[k]), rounding, "fresh outputs")
            )
        for name, call, tolerance, note in calls:
            yield self._contender(name, call, tolerance, note)
        yield from limits.widening(self.sets[0], self.dtype.itemsize, self.count)

    def _contender(
        self, name: str, call: Callable[[int], torch.Tensor], tolerance: float, note: str
    ) -> Contender:
        turns = itertools.cycle(range(len(self.sets)))

        def answer() -> list[torch.Tensor]:
            self.outputs[0].fill_(float("nan"))
            return [call(0)[:CHECKED].clone(memory_format=torch.preserve_format)]

        return Contender(
            name, lambda: (self.count, call(next(turns))), answer, tolerance=tolerance, note=note
        )


def inputs(content: str, sets: int, shape: tuple[int, ...], data: Any) -> list[NDArray[np.uint8]]:
    """Return ``sets`` batches [N, H, W, C], or none where there are no photos."""
    n, h, w, c = shape
    if content == "noise":
        return list(material.noise((sets, *shape)))
    found = material.photos(data / "photos", sets * n, max(h, w))
    if found is None:
        return []
    found = found[:, :h, :w]
    # One channel: the green one; a fourth: red again, as an alpha channel that is not constant.
    picked = found[..., {1: [1], 3: [0, 1, 2], 4: [0, 1, 2, 0]}[c]]
    return list(np.ascontiguousarray(picked).reshape(sets, *shape))


def main() -> None:
    """Run the contests that were asked for."""
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--channels", type=int, nargs="+", choices=(1, 3, 4))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    report = Report("How close is the CPU kernel to the memory's limit?", harness.describe("cpu"))
    report.begin()
    effort = harness.effort(arguments)
    speeds = limits.memory_speeds(effort)
    report.values("this machine's memory, all CPUs", speeds, "GB/s", {})
    compiled = not arguments.no_compile
    if compiled and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("\ntorch.compile is left out: there is no C++ compiler")
        compiled = False
    channels = arguments.channels or ((3,) if arguments.quick else (1, 3, 4))
    for c, content in itertools.product(channels, ("noise", "photos")):
        shape = (arguments.batch, arguments.height, arguments.width, c)
        pixels = int(np.prod(shape))
        need = BEYOND_CACHE * harness.cache_bytes()
        # Two bytes is the smallest output, so all dtypes share the inputs.
        sets = inputs(content, min(max(2, -(-need // (3 * pixels))), 64), shape, arguments.data)
        if not sets:
            print("\nphotos are left out: there are none below --data")
            continue
        for dtype, style in itertools.product(arguments.dtypes, FORMATS):
            if c == 1 and style == "channels_last":
                continue  # the same memory
            contest = Contest(sets, DTYPES[dtype], style)
            kind = f"{content}, {len(sets)} sets of [{', '.join(map(str, shape))}]"
            report.contest(
                f"{kind} to {dtype} {style}",
                list(contest.contenders(compiled=compiled)),
                contest.wanted(),
                effort,
                item_bytes=pixels / arguments.batch * (1 + DTYPES[dtype].itemsize),
                limit=limits.LIMITS,
            )
            torch.compiler.reset()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
