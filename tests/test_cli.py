"""The command: what it prints, and that every error is one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gpupipe import __version__, cli, demo_data

TRAIN = """
    import argparse, sys
    import numpy as np, torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    import gpupipe

    argparse.ArgumentParser().parse_args()

    class Shouted(T.Normalize):
        pass

    class Own(torch.utils.data.Dataset):
        def __init__(self, transform):
            self.transform = transform
        def __len__(self):
            return 40
        def __getitem__(self, index):
            return self.transform(images[index]), index

    class Sly:
        calls = 0
        def __call__(self, image):
            Sly.calls += 1
            return image + Sly.calls

    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5), np.uint8)
    fused = T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.25,))])
    train = gpupipe.ArrayDataset(images, np.arange(40), transform=fused)
    loader = DataLoader(train, batch_size=8, shuffle=True)
    ours = gpupipe.DataLoader(train, batch_size=8)
    part = DataLoader(Own(T.Compose([T.ToPILImage(), T.RandomRotation(9), *fused.transforms])))
    custom = DataLoader(Own(T.Compose([T.ToTensor(), Shouted(0.5, 0.25), lambda x: x])))
    sly = DataLoader(Own(T.Compose([T.ToTensor(), Sly()])), batch_size=8)
    wrong = DataLoader(Own(T.Compose([T.ToTensor(), T.Normalize(0.5, 0.0)])))
    unscaled = DataLoader(Own(T.Compose([T.ToTensor(), T.Normalize(128.0, 64.0)])))
    number = 3

    def make_loader():
        return loader

    def with_argument(batch_size):
        return loader

    def broken():
        raise FileNotFoundError("no such folder: /data")
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with a training script and a package."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "data.py").write_text(textwrap.dedent(TRAIN), encoding="utf-8")
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN), encoding="utf-8")
    (tmp_path / "plain.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("GPUPIPE_DATA", raising=False)
    for name in ("train", "plain", "package", "package.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


class Command:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit code, output and errors, white space and borders squeezed."""
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        out, errors = self._capsys.readouterr()
        code = end.value.code or 0
        assert isinstance(code, int)
        return code, squeezed(out), squeezed(errors)


def squeezed(text: str) -> str:
    """Join what a terminal's width has parted."""
    return re.sub(r"[\s│┃╭╮╰╯─━┏┓┗┛┡┩├┤┼┴┬╇╈┳└┘]+", " ", text)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Give the command."""
    return Command(capsys)


def test_version_and_help(command: Command) -> None:
    """The version is the package's; the help names every command."""
    assert command("--version")[:2] == (0, f"gpupipe {__version__} ")
    code, out, _ = command("--help")
    assert code == 0
    assert all(name in out for name in ("demo", "stats", "verify", "explain"))
    assert command("nonsense")[0] == 2


@pytest.mark.parametrize(
    "target",
    ["train.py:loader", "train.py:train", "train.py:make_loader", "train:loader", "train.py:ours",
     "package.data:loader", "package/data.py:loader", "train.py:loader.dataset"],
)  # fmt: skip
def test_explain_finds(command: Command, target: str) -> None:
    """A loader or dataset is found in a file or module, or made by a function."""
    code, out, errors = command("explain", target)
    assert (code, errors) == (0, "")
    assert re.search(r"0 ToTensor\(\) fused pointwise", out)
    assert re.search(r"1 Normalize\(.*\) fused pointwise", out)
    assert "delivery: gather and normalize in one kernel" in out


def test_explain_says_why_not(command: Command) -> None:
    """What stays on the CPU or is refused has its reason beside it."""
    _, out, _ = command("explain", "train.py:part")
    assert "on the CPU no kernel yet" in out
    assert "fused pointwise" in out
    _, out, _ = command("explain", "train.py:custom")
    assert "on the CPU a subclass of Normalize may do something else" in out
    assert "on the CPU not a torchvision operator" in out
    assert "not lifted: " in out


def test_warnings_are_one_line(command: Command) -> None:
    """A warning is told once, without the place in our source that gave it."""
    code, out, errors = command("explain", "train.py:unscaled")
    assert code == 0
    assert "fused" in out
    assert errors.startswith("warning: Normalize(")
    assert errors.count("a mean on the scale 0..255") == 1
    assert ".py" not in errors


def test_verify(command: Command) -> None:
    """Equal bits end with 0, other bits with 1."""
    code, out, errors = command("verify", "train.py:loader", "--samples", "17")
    assert (code, errors) == (0, "")
    assert "batch[0] float32 (1, 6, 5) 17 0 0" in out
    assert "images made by the fused kernel" in out
    assert out.endswith("same bits ")
    code, out, errors = command("verify", "train.py:sly")
    assert (code, errors) == (1, "")
    assert out.endswith("DIFFERENT ")


def test_stats(command: Command, project: Path) -> None:
    """Datasets, loaders, .npy files and Fashion-MNIST by name are counted."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5), np.uint8)
    mean, std = (images / 255).mean(), (images / 255).std()
    expected = f"0 {mean:.6f} {std:.6f} 40 images, 1,200 pixels"
    for target in ("train.py:train", "train.py:loader"):
        code, out, errors = command("stats", target)
        assert (code, errors) == (0, "")
        assert expected in out
        assert f"Normalize(mean=({mean:.4f},), std=({std:.4f},))" in out
    np.save(project / "raw.npy", images)
    assert expected in command("stats", "raw.npy")[1]
    demo_data.write(project / "FashionMNIST" / "raw", 50, 20)
    assert "50 images, 39,200 pixels" in command("stats", "fashion-mnist", "--data", ".")[1]


ERRORS = {
    ("explain", "train.py"): "expected MODULE:NAME",
    ("explain", "train.py:"): "expected MODULE:NAME",
    ("explain", "nowhere.py:loader"): "there is no file nowhere.py",
    ("explain", "nowhere:loader"): "there is no module 'nowhere'",
    ("explain", "no.where:loader"): "there is no module 'no.where'",
    ("explain", "train.py:loadr"): "did you mean 'loader'? it has train (ArrayDataset), loader",
    ("explain", "train.py:loader.datset"): "train.py has no 'loader.datset'",
    ("explain", "train.py:number"): "got int",
    ("explain", "train.py:with_argument"): "needs arguments",
    ("explain", "train.py:broken"): "FileNotFoundError: no such folder: /data",
    ("explain", "plain.py:loader"): "ended itself with exit code 3",
    ("explain", "train.py:wrong"): "std",
    ("verify", "train.py:loader", "--samples", "0"): "samples must be 1 or more",
    ("stats", "gone.npy"): "there is no file gone.npy",
    ("stats", "fashion-mnist", "--data", "."): "--data must be the folder",
    ("demo", "--data", "."): "--data must be the folder",
    ("demo", "--out", "no/where.png"): "--out must lie in a folder",
}


@pytest.mark.parametrize("arguments", sorted(ERRORS), ids=" ".join)
def test_errors(command: Command, arguments: tuple[str, ...]) -> None:
    """Every error is one message on stderr, without a traceback, and exit code 2."""
    code, _, errors = command(*arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert ERRORS[arguments] in errors
    assert "Traceback" not in errors


def test_damaged_npy(command: Command, project: Path) -> None:
    """A truncated and a pickled .npy are told with their names."""
    np.save(project / "cut.npy", np.zeros((9, 8, 8), np.uint8))
    whole = (project / "cut.npy").read_bytes()
    (project / "cut.npy").write_bytes(whole[:-30])
    np.save(project / "pickled.npy", np.array([{}], dtype=object))
    for name in ("cut.npy", "pickled.npy"):
        code, _, errors = command("stats", name)
        assert code == 2
        assert f"got {name}" in errors


def test_as_a_process(project: Path) -> None:
    """The installed command runs where there is no GPU, and imports typer only then."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", "from gpupipe.cli import main; main()", "explain", "train.py:part"],
        capture_output=True, text=True, env=environment, cwd=project, check=True,
    )  # fmt: skip
    assert "on the CPU" in done.stdout
    code = "import gpupipe, sys; sys.exit(bool({'typer', 'rich'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
