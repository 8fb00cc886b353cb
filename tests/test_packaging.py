"""The wheel and the sdist carry what they must, and installing them leaves torch alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("build", reason="pip install build")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(version("setuptools").split(".")[0]) < 77,
        reason="the build needs setuptools 77 or newer: pip install -U setuptools",
    ),
]

KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.cu*"))
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "data"
)


@dataclass(frozen=True)
class Built:
    """A clean copy of the tree and what was built from it."""

    tree: Path
    wheel: Path
    sdist: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; its errors are the test's message."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the sdist from a copy of the tree, and the wheel from the sdist."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree.parent, cwd=tree)
    (wheel,) = tree.parent.glob("*.whl")
    (sdist,) = tree.parent.glob("*.tar.gz")
    return Built(tree, wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, built.wheel, cwd=target)
    return target


def test_wheel_holds_the_package_the_kernels_and_the_licence(built: Built) -> None:
    """One wheel for every platform, with nothing beside ``gpupipe``."""
    names = zipfile.ZipFile(built.wheel).namelist()
    assert built.wheel.name == f"gpupipe-{version('gpupipe')}-py3-none-any.whl"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpupipe"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "gpupipe").rglob("*.py")}
    assert modules <= set(names)
    assert "gpupipe/py.typed" in names
    assert sorted(Path(n).name for n in names if n.startswith("gpupipe/kernels/")) == KERNELS
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_pins_no_torch(built: Built) -> None:
    """Lower bounds only, so that an installed torch that is new enough can stay."""
    archive = zipfile.ZipFile(built.wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_string(archive.read(name).decode())
    required = metadata.get_all("Requires-Dist", [])
    ours = [line for line in required if re.match(r"torch(vision)?\b", line)]
    assert len(ours) == 2
    assert all(re.fullmatch(r"torch(vision)?>=[\d.]+", line) for line in ours)
    assert set(metadata.get_all("Provides-Extra", [])) == {"cuda12", "cuda13", "dev"}
    assert metadata["License-Expression"] == "BSD-3-Clause"


def test_sdist_is_complete(built: Built) -> None:
    """Whoever has the sdist can run the tests, the benchmarks and the Makefile."""
    with tarfile.open(built.sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("gpupipe", "kernels", "tests", "benchmarks", "examples", "docs", "tools", ".ci")
    expected = {
        str(path.relative_to(built.tree))
        for folder in folders
        for path in (built.tree / folder).rglob("*")
        if path.is_file()
    }
    alone = (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "pyproject.toml",
    )
    assert expected | set(alone) <= packed


def test_installed_wheel_finds_its_kernels(installed: Path) -> None:
    """Away from the checkout, the kernels are those in the wheel."""
    code = (
        "import gpupipe; from gpupipe import kernel_source as k;"
        "k.source('normalize'); print(gpupipe.__file__); print(k.folder())"
    )
    shown = run(sys.executable, "-c", code, cwd=installed, PYTHONPATH=str(installed))
    package = installed / "gpupipe"
    assert shown.split() == [str(package / "__init__.py"), str(package / "kernels")]


def test_installed_command_runs(installed: Path) -> None:
    """``gpupipe --help`` lists its commands."""
    shown = run(
        installed / "bin" / "gpupipe", "--help", cwd=installed, PYTHONPATH=str(installed),
        NO_COLOR="1", COLUMNS="100",
    )  # fmt: skip
    assert "demo" in shown


def test_pip_would_leave_torch_alone(built: Built) -> None:
    """Where the requirements are met, ``pip install .`` installs gpupipe and nothing else."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-index"]
    report = json.loads(run(*pip, "--dry-run", "--report", "-", ".", cwd=built.tree))
    names = [item["metadata"]["name"] for item in report["install"]]
    assert names == ["gpupipe"], f"pip would also install these, beside torch {torch.__version__}"
