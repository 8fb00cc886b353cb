"""Print the seconds from the imports' end to the first batch, as JSON; for ``bench_loader``."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

import gpupipe
from benchmarks.material import CIFAR, FASHION, rgb, transform

SHAPES = {"grey": (28, 28), "RGB": (32, 32, 3)}


def main() -> None:
    """Build a loader over a small array and take one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", choices=SHAPES, default="grey")
    arguments = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (512, *SHAPES[arguments.kind]), np.uint8)
    if arguments.device != "cpu":
        torch.zeros(1, device=arguments.device)  # the context is torch's own cost
    start = time.perf_counter()
    dataset = (
        rgb(images, CIFAR)
        if arguments.kind == "RGB"
        else gpupipe.ArrayDataset(images, np.zeros(512, int), transform=transform(FASHION))
    )
    loader = gpupipe.DataLoader(dataset, batch_size=256, shuffle=True, device=arguments.device)
    batch = next(iter(loader))[0]
    if batch.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if not loader.plan.fused:
        raise SystemExit(f"nothing was fused:\n{loader.plan}")
    print(json.dumps({"seconds": seconds, "shape": list(batch.shape)}))


if __name__ == "__main__":
    main()
