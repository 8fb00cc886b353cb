"""Every kernel instantiation compiles for every target, with the options of a real run.

Compiling is no evidence that a kernel runs; see ``docs/gpu-status.md``.
"""

from __future__ import annotations

import re
import sys

import pytest

from gpupipe import kernel_source
from tests.emulator import nvrtc

EXPRESSIONS = tuple(i.expression for i in kernel_source.INSTANTIATIONS)
TARGETS = [(13, "75"), (13, "80"), (13, "90"), (13, "100"), (12, "70")]
# What CuPy adds to our options; registers and spills are ptxas's report, not a code option.
OPTIONS = (*kernel_source.OPTIONS, "-ftz=true", "--device-as-default-execution-space")


def compiled(major: int, arch: str, *options: str) -> nvrtc.Compiled:
    """Compile all instantiations, or skip where this NVRTC is not installed."""
    library = nvrtc.library(major)
    if library is None:
        pytest.skip(
            f"NVRTC {major} is not installed: pip install nvidia-cuda-nvrtc for CUDA {major}"
        )
    source = kernel_source.source("normalize")
    return nvrtc.compile_source(library, source, (*OPTIONS, f"-arch={arch}", *options), EXPRESSIONS)


def test_there_is_one_instantiation_per_case() -> None:
    """Three element sizes, four layout pairs for C of 3, 4 and any, one pair for C of 1."""
    assert len(set(EXPRESSIONS)) == 3 * (3 * 4 + 1)


@pytest.mark.parametrize(("major", "arch"), TARGETS)
def test_every_instantiation_compiles_without_a_warning(
    major: int, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVRTC accepts each, warns of nothing, and ptxas spills nothing that matters."""
    result = compiled(major, f"sm_{arch}", "--ptxas-options=-v")
    warnings = [line for line in result.log.splitlines() if "warning" in line.lower()]
    if arch == "70":  # CUDA 12 announces that it will go; CUDA 13 has already refused it
        warnings = [line for line in warnings if "are deprecated and may be removed" not in line]
    assert not warnings
    assert len(set(result.lowered.values())) == len(EXPRESSIONS)
    assert all(name.encode() in result.code for name in result.lowered.values())
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", result.log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.log)]
    assert len(spills) == len(registers) == len(EXPRESSIONS)
    # ptxas trades a register or two for one more block in places, differently per target.
    assert max(spills) <= (0 if arch == "90" else 16)
    assert max(registers) <= 72  # three blocks of 256 threads, 37% of the threads, at the least
    report = f"at most {max(registers)} registers, spills of at most {max(spills)} bytes"
    with capsys.disabled():
        sys.stdout.write(f" [sm_{arch}: {len(EXPRESSIONS)} instantiations, {report}] ")


@pytest.mark.parametrize("instance", kernel_source.INSTANTIATIONS, ids=lambda i: i.expression)
def test_vectors_are_loaded_and_stored_whole(
    instance: kernel_source.Normalize, ptx: dict[str, str]
) -> None:
    """The PTX has 16-byte stores, and loads as wide as 16 bytes of output need."""
    planes = instance.planar_in and instance.planar_out
    if instance.channels == 0 and not planes:
        return  # any number of channels in another layout: element by element
    code = ptx[instance.expression]
    assert "st.global.cg.v4.u32" in code
    needed = 16 // instance.element_size
    if instance.planar_in and not planes:
        # Planar to interleaved: 4 pixels at a time into shared memory, from there whole vectors.
        wide = {4: "ld.shared.u32", 8: "ld.shared.v2.u32", 16: "ld.shared.v4.u32"}[needed]
        assert "ld.global.nc.u32" in code
    else:
        if instance.planar_out and not planes:
            needed *= instance.channels
        width = next(w for w in (16, 8, 4) if needed % w == 0)
        wide = {4: "ld.global.nc.u32", 8: "ld.global.nc.v2.u32", 16: "ld.global.nc.v4.u32"}[width]
    assert wide in code


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """The PTX of each instantiation for sm_90."""
    result = compiled(13, "compute_90")
    parts = re.split(r"(?=\.entry)", result.code.decode())[1:]
    by_name = {match[1]: part for part in parts if (match := re.match(r"\.entry (\w+)", part))}
    return {expression: by_name[name] for expression, name in result.lowered.items()}
