"""Train a ResNet on folders of images, one a class: the ImageNet recipe, with one line of gpupipe.

python examples/train_imagefolder.py --data path/with/train/and/val --epochs 2
python examples/train_imagefolder.py --generate 96 --size 64    # on pictures drawn for the occasion
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import gpupipe


def draw(root: Path, count: int) -> None:
    """Write ``count`` JPEGs of two classes, horizontal and vertical stripes, as train and val."""
    rng = np.random.default_rng(0)
    for number in range(count):
        part = ("train", "train", "train", "val")[number % 4]
        folder = root / part / ("horizontal", "vertical")[number // 4 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(100, 300, 2).tolist()
        y, x = np.mgrid[:height, :width]
        wave = np.sin((y if folder.name == "horizontal" else x) / rng.uniform(3, 9))
        colours = rng.uniform(40, 120, 3)
        pixels = 128 + wave[:, :, None] * colours + rng.normal(0, 20, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:04}.jpg")


def loaders(root: Path, size: int, batch: int, workers: int, device: str) -> list[Any]:
    """Return the training and the validation loader."""
    tail = [
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *tail]
    )
    plain = transforms.Compose(
        [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *tail]
    )
    train = datasets.ImageFolder(root / "train", transform=augment)
    val = datasets.ImageFolder(root / "val", transform=plain)
    both = (
        DataLoader(train, batch, shuffle=True, num_workers=workers, drop_last=True),
        DataLoader(val, batch, num_workers=workers),
    )
    # gpupipe: the same loaders, decoded on threads; seed makes every epoch repeatable.
    style = torch.channels_last
    return [gpupipe.lift(x, device=device, memory_format=style, seed=0) for x in both]


def run(root: Path, args: argparse.Namespace) -> None:
    """Train, and print the validation accuracy after each epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, val = loaders(root, args.size, args.batch, args.workers, device)
    classes = len(train.dataset.classes)
    model = models.get_model(args.model, num_classes=classes)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    for epoch in range(args.epochs):
        start = time.perf_counter()
        train.set_epoch(epoch)
        model.train()
        for images, labels in train:
            with autocast:
                loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start

        model.eval()
        with torch.inference_mode(), autocast:
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in val)
        share = right / len(val.dataset)
        print(f"epoch {epoch + 1}: {seconds:.1f} s, validation accuracy {share:.1%}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="holds train/ and val/, a folder for each class")
    parser.add_argument("--generate", type=int, metavar="N", help="draw N pictures instead")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2, help="decode threads")
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    if args.data is None and args.generate is None:
        parser.error("give --data, or --generate N")
    if args.generate is None:
        run(args.data, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.generate)
        run(Path(folder), args)


if __name__ == "__main__":
    main()
