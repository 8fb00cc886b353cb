"""How fast do whole batches arrive: Fashion-MNIST, CIFAR's and ImageNet's shapes?

Against torchvision's loader and the best loop in plain torch, for the same batches in the same
order, with the limit of this machine's memory (or bus) measured in the same run. Also: Python per
batch, and the time to the first batch with empty and with warm caches.

    python -m benchmarks.bench_loader --json benchmarks/results/loader_cpu.json
    python -m benchmarks.bench_loader --device cuda --json benchmarks/results/loader_cuda.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision import transforms

import gpupipe
from benchmarks import harness, limits, loaders, material
from benchmarks.harness import Contender, Effort, Goal, Report
from benchmarks.loaders import Work

WORKLOADS = ("fashion", "cifar", "imagenet", "overhead", "start")
OVERHEAD_BATCH = 256
COPY_BYTES = 64 << 20
TUTORIAL = "torchvision, 0 workers"


class Bench:
    """The workloads, with what the command line asked for."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.report = report
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.effort: Effort = harness.effort(arguments)
        self.quick: bool = arguments.quick
        self.data: Path = arguments.data
        self.most: int = arguments.images or 1 << 30
        self.content: str = arguments.content

    def contest(
        self,
        title: str,
        work: Work,
        limited: int,
        forms: tuple[str, ...],
        goals: list[Goal],
        *,
        keep: bool = True,
    ) -> None:
        """Run all loaders over one dataset."""
        few = material.shortened(work.dataset, min(limited, len(work.dataset)))
        size = work.dtype.itemsize
        raw = np.ascontiguousarray(work.dataset.data)
        pixels = raw[0].size
        contenders = [loaders.torchvision(work, few, 0), loaders.torchvision(work, few, 2)]
        contenders += [loaders.plain_torch(work, form) for form in forms]
        contenders.append(loaders.ours(work))
        if self.cuda:
            ceilings = [pinned_copy(self.device, pixels)]
            ceilings += gather(raw, work.batch)
        else:
            if keep:
                contenders.append(loaders.ours(work, keep=True))
            ceilings = limits.widening(raw, size, len(raw))
        self.report.contest(
            f"{title}, shuffled, batch {work.batch}, to {str(work.dtype)[6:]} "
            f"{str(work.memory_format)[6:]} on {work.device.type}",
            [*contenders, *ceilings],
            loaders.reference(work),
            self.effort,
            item_bytes=pixels if self.cuda else pixels * (1 + size),
            limit=("pinned copy",) if self.cuda else limits.LIMITS,
            goals=goals,
        )

    def fashion(self) -> None:
        """Fashion-MNIST, an epoch in batches of 256, float32."""
        dataset, name = material.fashion(self.data, min(60_000, self.most))
        goals = [
            Goal("gpupipe", (TUTORIAL,), 900),
            Goal("gpupipe", ("plain torch, widen first",), 2.0),
        ]
        self.contest(
            f"{name}, {len(dataset):,} images",
            Work(dataset, 256, device=self.device),
            512 if self.quick else 4096,
            ("widen first",),
            [] if self.cuda else goals,
        )
        if self.cuda:
            self.resident(dataset, name)

    def resident(self, dataset: Any, name: str) -> None:
        """Keep the dataset on the GPU; 16 copies of it, for an epoch of an ordinary length."""
        for copies in (1, 16):
            many = material.shortened(dataset, len(dataset))
            many.data, many.targets = (
                dataset.data.repeat(copies, 1, 1),
                dataset.targets.repeat(copies),
            )
            work = Work(many, 2048, device=self.device)
            rates = self.report.contest(
                f"{name} x {copies}, on the device, shuffled, batch 2048, to float32",
                [loaders.ours(work, cache="device"), resident_torch(work)],
                loaders.reference(work),
                self.effort,
                item_bytes=many.data[0].numel() * 5,
            )
            reached = harness.quartiles(rates["gpupipe"])[1]
            goal = {"goal": "gpupipe >= 50e6 images/s", "wanted": 50e6, "reached": reached}
            self.report.goals([goal], largest=False)

    def cifar(self) -> None:
        """CIFAR-10's shape, batches of 512."""
        images = material.noise((min(50_000, self.most), 32, 32, 3))
        self.contest(
            f"noise of CIFAR-10's shape, {len(images):,} images",
            Work(material.rgb(images, material.CIFAR), 512, device=self.device),
            1024 if self.quick else 4096,
            ("widen first", "transpose last"),
            [],
        )

    def imagenet(self) -> None:
        """224x224x3, batches of 128, float32 planes and float16 channels_last."""
        count = min(512 if self.quick else 4096, self.most)
        images, name = None, "noise"
        if self.content == "photos":
            images, name = material.photos(self.data / "photos", count, 224), "crops of photos"
            if images is None:
                print("\nno photos below --data: noise takes their place")
        if images is None:
            images, name = material.noise((count, 224, 224, 3)), "noise"
        dataset = material.rgb(images, material.IMAGENET)
        styles = (
            (torch.float32, torch.contiguous_format, 18),
            (torch.float16, torch.channels_last, 25),
        )
        for dtype, memory_format, least in styles:
            goals = [Goal("gpupipe", (TUTORIAL,), least)]
            if self.cuda:
                goals = [Goal("gpupipe", ("pinned copy",), 0.95)]
            self.contest(
                f"{name}, {count:,} x 224x224x3",
                Work(dataset, 128, dtype, memory_format, self.device),
                128 if self.quick else 256,
                ("widen first", "transpose last"),
                goals,
                keep=False,
            )

    def overhead(self) -> None:
        """Python per batch: images of one pixel, so that nothing else costs."""
        count = OVERHEAD_BATCH * (200 if self.quick else 2000)
        images = torch.from_numpy(material.noise((count, 1, 1)))
        dataset = TensorDataset(images, torch.zeros(count, dtype=torch.int64))
        values: dict[str, list[float]] = {}
        for name, shuffle in (("shuffled epoch", True), ("sequential epoch", False)):
            loader = gpupipe.DataLoader(
                dataset, OVERHEAD_BATCH, shuffle=shuffle, device=self.device,
                transform=transforms.ConvertImageDtype(torch.float32),
            )  # fmt: skip
            next(iter(loader))
            if not loader.plan.fused:
                raise SystemExit(f"nothing was fused:\n{loader.plan}")
            for _ in range(self.effort.rounds + 1):
                wall, mine = time.perf_counter(), time.thread_time()
                for _batch in loader:
                    pass
                if self.cuda:
                    torch.cuda.synchronize(self.device)
                batches = count // OVERHEAD_BATCH / 1e6
                wall, mine = time.perf_counter() - wall, time.thread_time() - mine
                values.setdefault(f"{name}, wall clock", []).append(wall / batches)
                values.setdefault(f"{name}, main thread's CPU time", []).append(mine / batches)
        self.report.values(
            f"Python per batch, batch {OVERHEAD_BATCH} of 1x1 images with labels, on "
            f"{self.device.type}",
            {name: repetitions[1:] for name, repetitions in values.items()},  # one to warm up
            "us per batch",
            {"shuffled epoch, wall clock": 15},
        )

    def start(self) -> None:
        """Time to the first batch after the imports, in processes of their own."""
        values: dict[str, list[float]] = {}
        for kind in ("grey", "RGB"):
            for _ in range(1 if self.quick else 3):
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("empty caches", "warm caches", "warm caches"):
                        seconds = self.first_batch(kind, folder)
                        values.setdefault(f"{kind}, {state}", []).append(seconds)
        goals = {name: 6 if "empty" in name else 0.5 for name in values}
        title = f"time to the first batch after the imports, on {self.device.type}"
        self.report.values(title, values, "s", goals)

    def first_batch(self, kind: str, folder: str) -> float:
        """Run ``first_batch`` with ``folder`` for all caches."""
        variables = ("GPUPIPE_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
        environment = {**os.environ, **{v: str(Path(folder, v)) for v in variables}}
        module = [sys.executable, "-m", "benchmarks.first_batch"]
        done = subprocess.run(  # noqa: S603 # our own module
            [*module, "--device", str(self.device), "--kind", kind],
            env=environment, cwd=Path(__file__).parent.parent, check=True, capture_output=True,
        )  # fmt: skip
        return float(json.loads(done.stdout)["seconds"])


def pinned_copy(device: torch.device, pixels: int) -> Contender:
    """Return the bus's limit: copies of pinned memory, one after the other."""
    host = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device=device)

    def run() -> tuple[int, None]:
        for _ in range(8):
            target.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        return 8 * COPY_BYTES // pixels, None

    note = f"limit: host to device, {COPY_BYTES >> 20} MiB each"
    return Contender("pinned copy", run, None, note=note)


def gather(raw: np.ndarray[Any, np.dtype[np.uint8]], batch: int) -> list[Contender]:
    """Return what the host alone can gather, into pinned memory."""
    data = torch.from_numpy(raw)
    target = torch.empty((batch, *raw.shape[1:]), dtype=torch.uint8).pin_memory()
    plain = target.numpy()

    def by_torch() -> tuple[int, None]:
        for indices in torch.randperm(len(data)).split(batch):
            torch.index_select(data, 0, indices, out=target[: len(indices)])
        return len(data), None

    def by_numpy() -> tuple[int, None]:
        for indices in torch.randperm(len(data)).split(batch):
            np.take(raw, indices.numpy(), axis=0, out=plain[: len(indices)], mode="clip")
        return len(data), None

    note = "host alone, to pinned memory"
    return [
        Contender("gather by torch", by_torch, None, note=note),
        Contender("gather by NumPy", by_numpy, None, note=note + ", one thread"),
    ]


def resident_torch(work: Work) -> Contender:
    """Return plain torch with the dataset on the device."""
    data, targets = work.dataset.data.to(work.device), work.dataset.targets.to(work.device)
    constants = work.dataset.transform.transforms[1]
    mean, std = (torch.tensor(v, device=work.device) for v in (constants.mean, constants.std))

    def epoch() -> Any:
        for indices in loaders.order(len(data)).to(work.device).split(work.batch):
            x = data[indices].unsqueeze(1).to(torch.float32).div_(255)
            yield x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)), targets[indices]

    return Contender(
        "plain torch on the device",
        lambda: loaders.consume(epoch()),
        lambda: loaders.first(epoch),
        tolerance=loaders.ROUNDING[work.dtype],
        note="dataset on the device",
    )


def main() -> None:
    """Run the workloads that were asked for."""
    parser = harness.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--images", type=int, help="of each dataset, at most")
    parser.add_argument(
        "--content", choices=("photos", "noise"), default="photos", help="of 224x224"
    )
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device")
    report = Report("How fast do whole batches arrive?", harness.describe(arguments.device))
    report.begin()
    bench = Bench(arguments, report)
    for workload in arguments.only:
        getattr(bench, workload)()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
