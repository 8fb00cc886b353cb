"""Finding, joining and compiling kernels; what is said when CuPy does not fit. No GPU needed."""

from __future__ import annotations

import importlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpupipe import cuda_ops, kernel_source
from gpupipe.errors import DeviceError

CHECKOUT = Path(__file__).resolve().parent.parent


def test_source_is_one_text_with_true_line_numbers() -> None:
    """Every joined line is the line that its #line directive says it is."""
    text = kernel_source.source("normalize")
    assert '#include "common.cuh"' not in text
    assert "#pragma once" not in text
    files = {p.name: p.read_text().splitlines() for p in kernel_source.folder().glob("*.cu*")}
    name, number, seen = "", 0, set()
    for line in text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            number, name = int(directive[1]), directive[2]
            continue
        original = files[name][number - 1]
        assert line == original or (original == "#pragma once" and not line)
        seen.add(name)
        number += 1
    assert seen == {"normalize.cu", "common.cuh"}


def test_the_emulator_header_is_behind_the_only_ifdef() -> None:
    """Device and emulator differ in one place."""
    text = kernel_source.source("normalize")
    assert len(re.findall(r"^#\s*if", text, re.MULTILINE)) == 1
    assert "#ifdef GPUPIPE_EMULATOR" in text


def test_limits_are_those_of_the_source() -> None:
    """Python and C++ agree on the constants that both state."""
    text = kernel_source.source("normalize")
    for name, value in (("THREADS", kernel_source.THREADS), ("MAX_OUTPUTS", cuda_ops.MAX_OUTPUTS)):
        assert re.search(rf"constexpr int {name} = {value};", text)


def test_unknown_kernel_names_the_folder() -> None:
    """A kernel that is not there gives one clear error."""
    with pytest.raises(DeviceError, match=r"got 'nothing'; reinstall gpupipe"):
        kernel_source.source("nothing")


def test_kernels_of_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels/ beside the modules is found before the checkout's, and neither is an error."""
    package = tmp_path / "gpupipe"
    package.mkdir()
    monkeypatch.setattr(kernel_source, "__file__", str(package / "kernel_source.py"))
    with pytest.raises(DeviceError, match=r"neither has common\.cuh; reinstall gpupipe"):
        kernel_source.folder()
    for place in (tmp_path / "kernels", package / "kernels"):
        place.mkdir()
        (place / "common.cuh").touch()
        assert kernel_source.folder() == place


def test_missing_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is that of torch's CUDA major."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    for version, extra in (("12.8", "cuda12"), ("13.2", "cuda13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(DeviceError, match=re.escape(f'pip install "gpupipe[{extra}]"')):
            kernel_source.require_cupy()


def test_cupy_of_another_major_names_both_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what torch has, what CuPy has, and what to install."""
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), __version__="14.2.0")
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match=r"CUDA 13.*CUDA 12;.*gpupipe\[cuda13\]"):
        kernel_source.require_cupy()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert kernel_source.require_cupy() is fake


def test_broken_cupy_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CuPy itself reported stays in the message."""

    def broken(_: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match=r"libcudart.so.13.*gpupipe\[cuda13\]"):
        kernel_source.require_cupy()


def test_torch_without_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build of torch is the user's first problem, not CuPy."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="install a CUDA build of torch"):
        kernel_source.require_cupy()


@pytest.mark.parametrize("readable", [True, False])
def test_cache_is_private_and_a_read_only_home_works(tmp_path: Path, *, readable: bool) -> None:
    """CuPy's cache folder has mode 0700; where the home cannot be used it is a temporary one."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    home = tmp_path / "home"
    if readable:
        home.mkdir()
    else:
        home.touch()  # a file: no folder can be made below it, not even by root
    program = (
        "import os, torch; torch.version.cuda = torch.version.cuda or '13.0'\n"
        "from gpupipe import kernel_source\n"
        "try: kernel_source.require_cupy()\n"
        "except Exception: pass\n"
        "path = os.environ['CUPY_CACHE_DIR']\n"
        "print(path, oct(os.stat(path).st_mode & 0o777), os.access(path, os.W_OK))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CUPY_", "XDG_", "GPUPIPE_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "HOME": str(home), "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, mode, writable = done.stdout.split()
    assert (mode, writable) == (oct(stat.S_IRWXU), "True")
    assert Path(path).is_relative_to(home) == readable


def test_importing_needs_no_cupy() -> None:
    """Both modules can be imported where CuPy is missing."""
    program = (
        "import sys; sys.modules['cupy'] = None; import gpupipe.cuda_ops, gpupipe.kernel_source"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=CHECKOUT)


@pytest.mark.parametrize("pixels", [1, 15, 16, 784, 1024, 2047, 2049, 50_176, 187_500, 12_000_000])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_tiles_share_an_image_and_keep_alignment(pixels: int, size: int) -> None:
    """Tiles are multiples of 16 pixels, within the kernel's limit, and even."""
    limit = 2 * 256 * 16 // size
    tile = cuda_ops.tile_pixels(pixels, size)
    assert tile % 16 == 0
    assert 0 < tile <= limit
    tiles = -(-pixels // tile)
    assert tiles == -(-pixels // limit)
    assert tile - pixels / tiles < 16


def test_resident_blocks_respect_each_limit() -> None:
    """Threads, registers and shared memory each bound the blocks; at least one is launched."""
    h100 = SimpleNamespace(
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=233472,
    )
    assert kernel_source.resident_blocks(32, 3072, h100) == 132 * 8
    assert kernel_source.resident_blocks(40, 3072, h100) == 132 * 6
    assert kernel_source.resident_blocks(33, 3072, h100) == 132 * 6
    assert kernel_source.resident_blocks(32, 50_000, h100) == 132 * 4
    assert kernel_source.resident_blocks(255, 500_000, h100) == 132


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel still compiles, in memory, where CuPy's folder exists and is read-only."""
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setitem(os.environ, "CUPY_CACHE_IN_MEMORY", "")

    class Function:
        @property
        def num_regs(self) -> int:
            if not os.environ["CUPY_CACHE_IN_MEMORY"]:
                raise PermissionError("kernel_cache")
            return 32

    module = SimpleNamespace(get_function=lambda _: Function())
    fake = SimpleNamespace(RawModule=lambda **_: module)
    monkeypatch.setattr(kernel_source, "require_cupy", lambda: fake)
    kernel_source._module.cache_clear()
    assert kernel_source._compiled("normalize", "normalize<int>").num_regs == 32
    assert os.environ["CUPY_CACHE_IN_MEMORY"] == "1"
    kernel_source._module.cache_clear()
