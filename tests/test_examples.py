"""The examples and the README's code run as a user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpupipe import demo_data

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def _blocks() -> list[str]:
    readme = ROOT / "README.md"
    return _BLOCK.findall(readme.read_text(encoding="utf-8")) if readme.is_file() else []


BLOCKS = _blocks()


def _real() -> Path | None:
    """Return where the real Fashion-MNIST is, if it is on this machine."""
    for place in (os.environ.get("GPUPIPE_DATA"), ROOT / "data", ROOT.parent / "shared" / "data"):
        if place and Path(place, "FashionMNIST", "raw", demo_data.IMAGES["train"]).is_file():
            return Path(place)
    return None


def _run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
    environment.pop("GPUPIPE_DATA", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _train(data: Path, folder: Path) -> float:
    """Train for an epoch; return the accuracy that was printed last."""
    script = str(ROOT / "examples" / "train_fashion_mnist.py")
    text = _run([script, "--data", str(data), "--epochs", "1"], folder)
    found = re.search(r"test accuracy ([\d.]+)%", text)
    assert found is not None, text
    return float(found[1])


def test_example_on_drawn_files(tmp_path: Path) -> None:
    """The example learns from any MNIST-layout files."""
    demo_data.write(tmp_path / "data" / "FashionMNIST" / "raw", 4000, 500)
    assert _train(tmp_path / "data", tmp_path) > 60


@pytest.mark.slow
def test_example_on_fashion_mnist(tmp_path: Path) -> None:
    """An epoch on the real data gives what such a network gives."""
    data = _real()
    if data is None:
        pytest.skip("Fashion-MNIST is not on this machine")
    assert _train(data, tmp_path) > 84


def test_imagefolder_example_on_drawn_files(tmp_path: Path) -> None:
    """Training and validation run over JPEGs, and stripes are told apart."""
    script = str(ROOT / "examples" / "train_imagefolder.py")
    options = [
        "--generate",
        "160",
        "--size",
        "48",
        "--batch",
        "8",
        "--epochs",
        "3",
        "--lr",
        "0.005",
    ]
    text = _run([script, *options], tmp_path)
    found = re.findall(r"validation accuracy ([\d.]+)%", text)
    assert len(found) == 3, text
    assert max(map(float, found)) > 70


def test_example_is_short() -> None:
    """The example stays one screen long."""
    script = ROOT / "examples" / "train_fashion_mnist.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.skipif(not BLOCKS, reason="README.md has no python block")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme(number: int, tmp_path: Path) -> None:
    """Each python block of the README runs in a folder with a data set in ``data``."""
    demo_data.write(tmp_path / "data" / "FashionMNIST" / "raw", 600, 100)
    (tmp_path / "block.py").write_text(BLOCKS[number], encoding="utf-8")
    _run(["block.py"], tmp_path)
