"""Train a small CNN on Fashion-MNIST: the usual script, with one line of gpupipe.

python examples/train_fashion_mnist.py --data data --epochs 2
"""

import argparse
import os
import time

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import gpupipe


def main() -> None:
    """Train, and print the test accuracy after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("GPUPIPE_DATA", "data"))
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.2860, 0.3530)])
    train = datasets.FashionMNIST(args.data, train=True, transform=transform, download=True)
    test = datasets.FashionMNIST(args.data, train=False, transform=transform, download=True)
    # gpupipe: batches arrive on the device, with torchvision's bits and torch's order.
    train_loader = gpupipe.lift(DataLoader(train, batch_size=64, shuffle=True))
    test_loader = gpupipe.lift(DataLoader(test, batch_size=1000))

    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    for epoch in range(args.epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in train_loader:
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start

        model.eval()
        with torch.inference_mode():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test_loader)
        print(f"epoch {epoch + 1}: {seconds:.1f} s, test accuracy {right / len(test):.1%}")


if __name__ == "__main__":
    main()
