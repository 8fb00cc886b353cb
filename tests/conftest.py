"""Data that some tests read, where this machine has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _data(folder: str) -> Path:
    """Return a folder below ``$GPUPIPE_DATA``, or below ``../shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("GPUPIPE_DATA") or beside)
    if not (root / folder).is_dir():
        pytest.skip(f"no {folder} in {root}; set GPUPIPE_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="session")
def fashion_root() -> Path:
    """The ``root`` for ``torchvision.datasets.FashionMNIST``."""
    return _data("FashionMNIST")


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Photographs in JPEG files, of many sizes, most of them RGB."""
    return sorted(path for path in (_data("photos") / "photos").iterdir() if path.is_file())
