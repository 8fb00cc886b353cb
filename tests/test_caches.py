"""Compiled kernels lie in a directory that is the user's alone, or in none that lasts."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from gpupipe import caches
from gpupipe.errors import GpupipeWarning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RENDER = """
import numpy as np, torch
from torchvision import transforms as T
from gpupipe import cpu_ops
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import tabulate
pixels = np.random.default_rng(0).integers(0, 256, (4, 17, 19, 3), np.uint8)
transform = T.Compose([T.ToTensor(), T.Normalize((.485, .456, .406), (.229, .224, .225))])
lookup = tabulate(transform.transforms, ImageKind("PIL", 3, "NHWC", "RGB"))
expected = torch.stack([transform(image) for image in pixels])
for format in (torch.contiguous_format, torch.channels_last):
    output = torch.full(expected.shape, torch.nan).to(memory_format=format)
    cpu_ops.normalize(pixels, None, [output], lookup, layout="NHWC")
    assert torch.equal(output, expected)
print("equal")
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GPUPIPE_CACHE_DIR", raising=False)
    caches.cache_dir.cache_clear()
    yield
    caches.cache_dir.cache_clear()


def mode(path: Path) -> int:
    """Permissions alone."""
    return stat.S_IMODE(path.stat().st_mode)


def is_temporary(path: Path) -> bool:
    """Whether a private directory for this process was made."""
    return path.name.startswith("gpupipe-test-") and mode(path) == 0o700


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python with more environment variables."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_directories_are_made_for_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Mode 0700 whatever the umask, for each kind of kernel, and the same at the next call."""
    before = os.umask(umask)
    try:
        monkeypatch.setenv("GPUPIPE_CACHE_DIR", str(tmp_path / "cache"))
        path = caches.cache_dir("test")
    finally:
        os.umask(before)
    assert path.parent == tmp_path / "cache"
    assert mode(path) == mode(path.parent) == 0o700
    assert caches.cache_dir("test") is path
    assert caches.cache_dir("other") != path
    caches.cache_dir.cache_clear()
    assert caches.cache_dir("test") == path


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUPIPE_CACHE_DIR before XDG_CACHE_HOME before ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert caches.cache_dir("test").is_relative_to(tmp_path / "home/.cache/gpupipe")
    caches.cache_dir.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.cache_dir("test").is_relative_to(tmp_path / "xdg/gpupipe")
    caches.cache_dir.cache_clear()
    monkeypatch.setenv("GPUPIPE_CACHE_DIR", str(tmp_path / "own"))
    assert caches.cache_dir("test").is_relative_to(tmp_path / "own")


@pytest.mark.parametrize("permissions", [0o777, 0o770, 0o755, 0o701])
@pytest.mark.parametrize("inner", [False, True])
def test_a_directory_open_to_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permissions: int, inner: bool
) -> None:
    """Somebody could put a kernel there: a private temporary directory takes its place."""
    monkeypatch.setenv("GPUPIPE_CACHE_DIR", str(tmp_path / "cache"))
    made = caches.cache_dir("test")
    caches.cache_dir.cache_clear()
    (made if inner else made.parent).chmod(permissions)
    with pytest.warns(GpupipeWarning, match="GPUPIPE_CACHE_DIR"):
        assert is_temporary(caches.cache_dir("test"))


def test_a_foreign_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that belongs to another user, however private it looks."""
    monkeypatch.setenv("GPUPIPE_CACHE_DIR", str(tmp_path / "cache"))
    caches.cache_dir("test")
    caches.cache_dir.cache_clear()
    owner = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: owner)
    with pytest.warns(GpupipeWarning, match="GPUPIPE_CACHE_DIR"):
        assert is_temporary(caches.cache_dir("test"))


@pytest.mark.parametrize("place", ["under a file", "a file", "a dangling link"])
def test_a_place_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It works all the same."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/at/all")
    where = {"under a file": "file/cache", "a file": "file", "a dangling link": "link"}[place]
    monkeypatch.setenv("GPUPIPE_CACHE_DIR", str(tmp_path / where))
    with pytest.warns(GpupipeWarning, match="GPUPIPE_CACHE_DIR"):
        assert is_temporary(caches.cache_dir("test"))


def test_temporary_directories_go_with_their_process(tmp_path: Path) -> None:
    """Removed at exit, but not at that of a forked child."""
    (tmp_path / "file").write_text("")
    code = """
        import os, sys
        from gpupipe import caches
        path = caches.cache_dir("test")
        if not os.fork():
            sys.exit()
        os.wait()
        print(path.is_dir())
    """
    process = run(textwrap.dedent(code), HOME=str(tmp_path / "file/home"), TMPDIR=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert out.strip() == "True", err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_home_works(tmp_path: Path) -> None:
    """A whole process whose home cannot be written: kernels compile, bits are right, no warning."""
    (tmp_path / "file").write_text("")
    process = run(RENDER, HOME=str(tmp_path / "file/home"), PYTHONWARNINGS="error")
    out, err = process.communicate(timeout=120)
    assert out.strip() == "equal", err


@pytest.mark.slow
def test_eight_processes_at_once(tmp_path: Path) -> None:
    """All compile into one empty directory at the same time; all are right, and so is the next."""
    environment = {"GPUPIPE_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for count in (8, 1):
        processes = [run(RENDER, **environment) for _ in range(count)]
        results = [process.communicate(timeout=250) for process in processes]
        assert [out.strip() for out, _ in results] == ["equal"] * count, results
    assert list((tmp_path / "cache").rglob("*.nbi"))
    assert mode(tmp_path / "cache") == 0o700
