"""Find, read, compile and cache the CUDA kernels in ``kernels/``.

CuPy compiles with NVRTC and keeps the result on disk. Its cache key covers the source text but not
``#include``d files, so headers are joined into the source here.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpupipe.caches import cache_dir
from gpupipe.errors import DeviceError

OPTIONS = ("-std=c++17",)
"""Options of every compilation; CuPy adds ``-ftz=true``, the architecture and
``--device-as-default-execution-space``."""

THREADS = 256
"""Threads per block of every launch, ``THREADS`` in ``common.cuh``."""

EXTRAS = (12, 13)
"""CUDA majors that gpupipe has an extra for."""

_CARRIERS = {4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}
_INCLUDE = re.compile(r'^#include "(?P<name>[\w.]+)"$', re.MULTILINE)
_lock = threading.Lock()


@dataclass(frozen=True)
class Normalize:
    """One instantiation of ``normalize`` in ``kernels/normalize.cu``.

    Attributes:
        element_size: bytes of an output element: 4, 2 or 1.
        channels: 1, 3 or 4; 0 for any other number, then an argument of the kernel.
        planar_in: the source is [N, C, H, W].
        planar_out: the output is [N, C, H, W], not channels_last.
    """

    element_size: int
    channels: int
    planar_in: bool
    planar_out: bool

    @property
    def expression(self) -> str:
        """The template instance, as NVRTC wants it named."""
        layouts = f"{self.planar_in}, {self.planar_out}".lower()
        return f"normalize<{_CARRIERS[self.element_size]}, {self.channels}, {layouts}>"


INSTANTIATIONS = tuple(
    Normalize(size, channels, planar_in, planar_out)
    for size, channels, planar_in, planar_out in itertools.product(
        _CARRIERS, (0, 1, 3, 4), (True, False), (True, False)
    )
    if channels != 1 or (planar_in and planar_out)
)
"""Everything a plan can ask for; with one channel the layouts coincide."""


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on one device.

    Attributes:
        function: what CuPy launches: ``function(grid, block, arguments)``.
        blocks: how many blocks the whole device holds at a time.
    """

    function: Any
    blocks: int


def folder() -> Path:
    """Return the folder of the kernels: in a wheel beside the modules, else in the checkout.

    Raises:
        DeviceError: the installation has no kernels.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "kernels", package.parent / "kernels")
    for candidate in candidates:
        if (candidate / "common.cuh").is_file():
            return candidate
    raise DeviceError(
        f"kernels must lie in {candidates[0]} or {candidates[1]}, neither has common.cuh; "
        "reinstall gpupipe"
    )


@cache
def source(name: str) -> str:
    """Return ``kernels/<name>.cu`` with our headers joined in, each once.

    ``#line`` directives keep the compiler's messages on the right file and line. An include of a
    file that ``kernels/`` does not have stays as it is.

    Raises:
        DeviceError: there is no such kernel.
    """
    path = folder() / f"{name}.cu"
    if not path.is_file():
        raise DeviceError(f"name must be a kernel in {folder()}, got {name!r}; reinstall gpupipe")
    return _joined(path, set())


def _joined(path: Path, seen: set[str]) -> str:
    """Return the text of one file, its includes replaced by their text."""
    seen.add(path.name)
    text = path.read_text(encoding="utf-8").replace("#pragma once\n", "\n")

    def include(match: re.Match[str]) -> str:
        name = match["name"]
        if not (path.parent / name).is_file():
            return match[0]
        following = text.count("\n", 0, match.start()) + 2
        body = "" if name in seen else _joined(path.parent / name, seen)
        return f'{body}#line {following} "{path.name}"'

    return f'#line 1 "{path.name}"\n{_INCLUDE.sub(include, text)}'


def require_cupy() -> Any:
    """Return the module ``cupy``, once it is known to fit the installed torch.

    Raises:
        DeviceError: CuPy is missing, broken or built for another CUDA major than torch.
    """
    if torch.version.cuda is None:
        raise DeviceError(
            "CUDA was asked for, but this torch was built without it; install a CUDA build of torch"
        )
    wanted = int(torch.version.cuda.split(".", maxsplit=1)[0])
    install = f'pip install "gpupipe[cuda{wanted}]"'
    if wanted not in EXTRAS:
        install = f"a torch for CUDA {' or '.join(map(str, EXTRAS))}, then gpupipe[cudaNN]"
    if "cupy" not in sys.modules and "CUPY_CACHE_DIR" not in os.environ:
        # CuPy makes its folder when it is imported, and fails where the home is read-only.
        os.environ["CUPY_CACHE_DIR"] = str(cache_dir("cupy"))
    try:
        cupy = importlib.import_module("cupy")
        found = int(cupy.cuda.runtime.runtimeGetVersion()) // 1000
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"CUDA kernels need CuPy, which is not installed ({error}); {install}"
        ) from error
    except Exception as error:  # whatever a broken installation raises
        raise DeviceError(
            f"CUDA kernels need CuPy, which does not load ({error}); {install}"
        ) from error
    if found != wanted:
        raise DeviceError(
            f"CuPy must be built for CUDA {wanted}, as torch {torch.__version__} is, got CuPy "
            f"{cupy.__version__} for CUDA {found}; pip uninstall cupy-cuda{found}x, then {install}"
        )
    return cupy


@cache
def _module(name: str, expression: str) -> Any:
    """Return the CuPy module of one instantiation; nothing is compiled yet."""
    return require_cupy().RawModule(
        code=source(name), options=OPTIONS, name_expressions=(expression,)
    )


def _compiled(name: str, expression: str) -> Any:
    """Return the kernel, loaded on the current device, from CuPy's cache where it has it."""
    function = _module(name, expression).get_function(expression)
    try:
        _ = function.num_regs  # the attribute loads the module
    except OSError:  # a cache folder that exists and cannot be written
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        _module.cache_clear()
        function = _module(name, expression).get_function(expression)
    return function


_kernels: dict[tuple[str, str, int], Kernel] = {}


def kernel(name: str, expression: str, device: int) -> Kernel:
    """Return one instantiation on one device, compiled at first use.

    Args:
        name: of the file in ``kernels/``, without its ending.
        expression: the template instance, such as ``Normalize.expression``.
        device: index of the CUDA device.

    Raises:
        DeviceError: CuPy does not fit, or the kernel does not compile.
    """
    key = (name, expression, device)
    found = _kernels.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _kernels:
            cupy = require_cupy()
            with torch.cuda.device(device), cupy.cuda.Device(device):
                try:
                    function = _compiled(name, expression)
                    blocks = resident_blocks(
                        function.num_regs,
                        function.shared_size_bytes,
                        torch.cuda.get_device_properties(device),
                    )
                except cupy.cuda.compiler.CompileException as error:
                    raise DeviceError(
                        f"{expression} does not compile for cuda:{device}; report this: {error}"
                    ) from error
                _kernels[key] = Kernel(function, blocks)
        return _kernels[key]


def resident_blocks(registers: int, shared: int, properties: Any) -> int:
    """Return how many blocks of ``THREADS`` threads a device holds at a time.

    Args:
        registers: per thread.
        shared: bytes of shared memory per block.
        properties: of the device, as torch gives them.
    """
    per_block = -(-registers // 8) * 8 * THREADS
    per_multiprocessor = min(
        properties.max_threads_per_multi_processor // THREADS,
        properties.regs_per_multiprocessor // max(per_block, 1),
        properties.shared_memory_per_multiprocessor // (shared + 1024),  # 1 KB is the system's
    )
    return int(properties.multi_processor_count) * max(int(per_multiprocessor), 1)
