"""How fast are crops, resizes and flips, from decoded images and from files?

``decoded``: one core makes 224x224 training and validation images out of 500x375 ones.
``cifar``: whole batches of 32x32 images with a random crop and flip.
``files``: batches of 224x224 training images out of JPEG files, on as many threads as cores.

    python -m benchmarks.bench_augment --json benchmarks/results/augment_cpu.json
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import transforms as T  # noqa: N812 # everybody's name for it

import gpupipe
from benchmarks import harness, material
from benchmarks.harness import Contender, Goal, Report
from gpupipe import cpu_ops, decoding
from gpupipe.file_sources import FileSource, resolve
from gpupipe.images import ImageKind
from gpupipe.plan import specify
from gpupipe.planning import fitting
from gpupipe.rendering import Picks, Renderer, Stream, array_frames
from gpupipe.threads import cpu_count

WORKLOADS = ("decoded", "cifar", "files")
RGB = ImageKind("PIL", 3, "NHWC", "RGB")
TENSOR = [T.ToTensor(), T.Normalize(*material.IMAGENET)]
TRAIN = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *TENSOR])
EVAL = T.Compose([T.Resize(256), T.CenterCrop(224), *TENSOR])
CROP = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *TENSOR])


class Bench:
    """The workloads."""

    def __init__(self, arguments: Any, report: Report) -> None:
        self.report = report
        self.effort = harness.effort(arguments)
        self.quick = arguments.quick
        self.root = Path(arguments.data) / "photos"

    def decoded(self) -> None:
        """One core, images already decoded."""
        torch.set_num_threads(1)
        count = 4 if self.quick else 64
        paths = photographs(self.root)[:count]
        if paths:
            images = [Image.open(p).convert("RGB").resize((500, 375)) for p in paths]
        else:
            images = [Image.fromarray(material.noise((375, 500, 3))) for _ in range(count)]
        content = "photos" if paths else "noise"
        for name, transform, goal in (
            ("RandomResizedCrop(224) + flip", TRAIN, 3.0),
            ("Resize(256) + CenterCrop(224)", EVAL, 3.0),
        ):
            self._one_core(f"{name}, 500x375 {content}, one core", transform, images, goal)

    def _one_core(self, title: str, transform: Any, images: list[Any], goal: float) -> None:
        pixels = np.stack([np.asarray(image) for image in images])
        where = np.arange(len(images))
        pipeline = fitting(transform, RGB)
        renderer = Renderer(pipeline, RGB, specify(pipeline, RGB), Stream(0, 0))
        picks = Picks(where, where, where, np.zeros(len(where), bool))
        frames = array_frames(where, pixels.shape, "NHWC")
        sizes = frames[:, 1].copy(), frames[:, 2].copy()
        tape = renderer.tape(picks, *sizes)
        wanted = [torch.stack([renderer.reference(tape, n, images[n]) for n in range(len(where))])]
        output = torch.empty(wanted[0].shape)

        def ours() -> tuple[int, Any]:
            drawn = renderer.tape(picks, *sizes)
            recipe = renderer.recipe(drawn, (224, 224))
            program = renderer.program(drawn, frames)
            cpu_ops.resample(pixels.reshape(-1), program, [output], recipe, threads=1)
            return len(where), output

        self.report.contest(
            title,
            [
                Contender("gpupipe", ours, lambda: [ours()[1].clone()]),
                Contender(
                    "torchvision on PIL",
                    lambda: (len(images), [transform(image) for image in images]),
                    lambda: wanted,
                    note="draws its own parameters; compared with ours",
                ),
            ],
            wanted,
            self.effort,
            item_bytes=500 * 375 * 3 + 224 * 224 * 12,
            goals=[Goal("gpupipe", ("torchvision on PIL",), goal)],
        )

    def cifar(self) -> None:
        """Whole epochs of small images."""
        count = 600 if self.quick else 50_000
        planes = material.noise((count, 3, 32, 32))
        dataset = material.rgb(planes.transpose(0, 2, 3, 1), material.CIFAR)
        dataset.transform = CROP
        some = material.shortened(dataset, min(count, 5_000))
        loader = gpupipe.DataLoader(dataset, batch_size=512, shuffle=True, seed=0)
        still = _with(dataset, T.Compose(TENSOR))
        plain = gpupipe.DataLoader(still, batch_size=512, shuffle=True)
        theirs = TorchDataLoader(some, batch_size=512, shuffle=True)
        fixed = gpupipe.DataLoader(_with(some, EVAL32), batch_size=512)
        wanted = next(iter(TorchDataLoader(_with(some, EVAL32), batch_size=512)))
        self.report.contest(
            f"{count} x 32x32x3, RandomCrop(32, padding=4) + flip, batch 512, float32",
            [
                Contender("gpupipe", lambda: epoch(loader), lambda: next(iter(fixed))),
                Contender(
                    "torchvision, 0 workers", lambda: epoch(theirs), lambda: wanted,
                    note="on 5,000 of the images",
                ),
                Contender("gpupipe without crop and flip", lambda: epoch(plain), None),
            ],
            wanted,
            self.effort,
            item_bytes=32 * 32 * 3 * 5,
            limit=["gpupipe without crop and flip"],
            goals=[Goal("gpupipe", ("torchvision, 0 workers",), 180.0)],
        )  # fmt: skip

    def files(self) -> None:
        """JPEG files to training batches."""
        with TemporaryDirectory() as folder:
            paths = list(map(str, photographs(self.root)))
            content = "photos"
            if not paths:
                paths, content = _generated(Path(folder), 8 if self.quick else 200), "generated"
            paths = paths[:8] if self.quick else paths * 5
            self._files(paths, content)

    def _files(self, paths: list[str], content: str) -> None:
        cores = cpu_count()
        torch.set_num_threads(cores)
        dataset = gpupipe.ImageFiles(paths, [0] * len(paths), transform=TRAIN)
        options: dict[str, Any] = {"batch_size": 64, "shuffle": True}
        exact = gpupipe.DataLoader(dataset, **options, seed=0, num_workers=cores)
        fast = gpupipe.DataLoader(dataset, **options, seed=0, num_workers=cores, decode="fast")
        theirs = TorchDataLoader(dataset, **options, num_workers=cores)
        fixed = gpupipe.ImageFiles(paths[:8], [0] * 8, transform=EVAL)
        wanted = next(iter(TorchDataLoader(fixed, batch_size=8)))
        source = resolve(dataset)
        if not isinstance(source, FileSource):
            raise SystemExit(source)
        self.report.contest(
            f"{len(paths)} JPEG files ({content}), RandomResizedCrop(224) + flip, batch 64, "
            f"{cores} threads or workers",
            [
                Contender(
                    "gpupipe", lambda: epoch(exact),
                    lambda: next(iter(gpupipe.DataLoader(fixed, batch_size=8))),
                ),
                Contender(
                    'gpupipe, decode="fast"', lambda: epoch(fast), None,
                    note="smaller decoding where the crop allows; small errors",
                ),
                Contender(
                    f"torchvision, {cores} workers", lambda: epoch(theirs), lambda: wanted,
                ),
                Contender(
                    "decoding alone", lambda: decode_all(source, cores), None
                ),
            ],
            wanted,
            self.effort,
            item_bytes=224 * 224 * 12,
            limit=["decoding alone"],
            goals=[Goal("gpupipe", (f"torchvision, {cores} workers",), 2.0)],
        )  # fmt: skip


EVAL32 = T.Compose([T.Pad(4), T.CenterCrop(32), *TENSOR])


def photographs(root: Path) -> list[Path]:
    """Return the JPEG files of a folder."""
    return sorted(p for p in root.glob("*") if p.suffix.lower() in {".jpeg", ".jpg"})


def _with(dataset: Any, transform: Any) -> Any:
    """Return a dataset with another transform."""
    result = material.shortened(dataset, len(dataset.data))
    result.transform = transform
    return result


def epoch(loader: Any) -> tuple[int, Any]:
    """Run an epoch; return how many images it had."""
    count, last = 0, None
    for images, _ in loader:
        count, last = count + len(images), images
    return count, last


def decode_all(source: FileSource, threads: int) -> tuple[int, None]:
    """Read and decode every file, and drop the pixels; return how many there were."""
    rows: Iterator[int] = iter(range(len(source)))
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                row = next(rows, None)
            if row is None:
                return
            data = source.read(row)
            decoding.decode(data, decoding.read_header(data))

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return len(source), None


def _generated(folder: Path, count: int) -> list[str]:
    """Write pictures of mixed sizes as JPEGs."""
    rng = np.random.default_rng(0)
    paths = []
    for number, size in zip(range(count), itertools.cycle([(500, 375), (333, 500), (640, 480)])):
        small = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return paths


def main() -> None:
    """Run the workloads that were asked for."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    arguments = parser.parse_args()
    report = Report("How fast are crops, resizes and flips?", harness.describe("cpu"))
    report.begin()
    bench = Bench(arguments, report)
    for workload in arguments.only:
        getattr(bench, workload)()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
