"""What ``import gpupipe`` may cost: little time, no numba, no CuPy, no CUDA."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

# torch comes first and once: what is measured is what gpupipe adds to it. Forked children then
# import gpupipe, each for the first time.
IMPORTS = """
import gc, json, os, sys, time
import torch, torchvision

initialised = []
torch.cuda._lazy_init = lambda: initialised.append("torch.cuda._lazy_init")

results = []
for _ in range(7):
    reader, writer = os.pipe()
    if os.fork() == 0:
        begin = time.process_time()
        import gpupipe
        seconds = time.process_time() - begin
        foreign = sorted({"numba", "llvmlite", "cupy"} & set(sys.modules))
        assert gc.isenabled()
        cuda = initialised + ["a CUDA context"] * torch.cuda.is_initialized()
        os.write(writer, json.dumps([seconds, foreign, cuda]).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    results.append(json.loads(os.read(reader, 65536)))
    os.close(reader)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def imports() -> list[tuple[float, list[str], list[str]]]:
    """Per import: CPU seconds, modules that must not be there, signs of CUDA."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has its bytecode
    output = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return [(seconds, foreign, cuda) for seconds, foreign, cuda in json.loads(output)]


def test_import_brings_neither_numba_nor_cupy(
    imports: list[tuple[float, list[str], list[str]]],
) -> None:
    """Both wait until a kernel is needed: numba alone costs 0.3 s."""
    assert imports[0][1] == []


def test_import_leaves_cuda_alone(imports: list[tuple[float, list[str], list[str]]]) -> None:
    """A process that imports gpupipe can still be forked and can still choose its device."""
    assert imports[0][2] == []


def test_import_costs_at_most_150_ms(imports: list[tuple[float, list[str], list[str]]]) -> None:
    """On top of ``import torch, torchvision``, as the README promises.

    CPU time, since wall time on a busy machine measures the neighbours; the median, since the
    first import may also compile bytecode.
    """
    median = statistics.median(seconds for seconds, _, _ in imports)
    assert median <= 0.150, f"import gpupipe took {1e3 * median:.0f} ms of CPU time"
