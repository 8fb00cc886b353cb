"""What the benchmarks read: datasets that torchvision opens as PIL images, noise and photos."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets
from torchvision import transforms as T  # noqa: N812 # everybody's name for it

FASHION = ((0.2860,), (0.3530,))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Constants = tuple[tuple[float, ...], tuple[float, ...]]


def transform(constants: Constants) -> T.Compose:
    """Return the tutorial's transform."""
    return T.Compose([T.ToTensor(), T.Normalize(*constants)])


def noise(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return uniform bytes."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def fashion(root: Path, count: int) -> tuple[Any, str]:
    """Return Fashion-MNIST's first ``count`` images and what they are; noise where it is absent."""
    try:
        dataset: Any = datasets.FashionMNIST(str(root), transform=transform(FASHION))
        name = "Fashion-MNIST"
    except RuntimeError:  # torchvision: not found
        dataset = datasets.FashionMNIST.__new__(datasets.FashionMNIST)
        dataset.data = torch.from_numpy(noise((60_000, 28, 28)))
        dataset.targets = torch.arange(60_000) % 10
        dataset.transform, dataset.target_transform = transform(FASHION), None
        name = "noise of Fashion-MNIST's shape"
    return shortened(dataset, count), name


def rgb(images: NDArray[np.uint8], constants: Constants) -> Any:
    """Return a torchvision dataset [N, H, W, 3] whose samples go through PIL, as CIFAR10's do."""
    dataset = datasets.CIFAR10.__new__(datasets.CIFAR10)
    dataset.data = images
    dataset.targets = (np.arange(len(images)) % 10).tolist()
    dataset.transform, dataset.target_transform = transform(constants), None
    return dataset


def shortened(dataset: Any, count: int) -> Any:
    """Return a dataset of the first ``count`` images, for contenders that take long."""
    result = copy.copy(dataset)
    result.data, result.targets = dataset.data[:count], dataset.targets[:count]
    return result


def photos(root: Path, count: int, size: int) -> NDArray[np.uint8] | None:
    """Return ``count`` crops [N, size, size, 3] of the photos below ``root``, None without any.

    The shorter side is resized to ``size * 8 / 7``; the crops of one photo lie at random places.
    """
    paths = sorted(p for p in root.glob("*") if p.suffix.lower() in {".jpeg", ".jpg", ".png"})
    if not paths:
        return None
    rng = np.random.default_rng(0)
    result = np.empty((count, size, size, 3), np.uint8)
    paths = paths[:count]
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = size * 8 / 7 / min(image.size)
        shape = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        pixels = np.asarray(image.resize(shape, Image.Resampling.BILINEAR))
        for place in range(number, count, len(paths)):
            top, left = (int(rng.integers(0, n - size + 1)) for n in pixels.shape[:2])
            result[place] = pixels[top : top + size, left : left + size]
    return result
