"""NVRTC by ctypes, any major: CuPy's binding has one, and sm_70 needs CUDA 12."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    Attributes:
        log: the compiler's messages.
        lowered: the mangled name of each name expression.
        code: the machine code, or PTX where the architecture is virtual.
    """

    log: str
    lowered: dict[str, str]
    code: bytes


def library(major: int) -> ctypes.CDLL | None:
    """Return libnvrtc of one CUDA major from its wheel, or None where that is not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}")):
            return ctypes.CDLL(str(path))
    return None


def compile_source(
    nvrtc: ctypes.CDLL, source: str, options: tuple[str, ...], expressions: tuple[str, ...]
) -> Compiled:
    """Compile a source and return machine code and messages.

    Raises:
        RuntimeError: it does not compile; the message is the log.
    """
    program = ctypes.c_void_p()

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvrtc, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with {status}:\n{text('ProgramLog')}")

    def raw(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]

    def text(what: str) -> str:
        return raw(what).rstrip(b"\0").decode()

    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
    try:
        for expression in expressions:
            call("nvrtcAddNameExpression", program, expression.encode())
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        call("nvrtcCompileProgram", program, len(options), encoded)
        lowered = {}
        for expression in expressions:
            name = ctypes.c_char_p()
            call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(name))
            lowered[expression] = (name.value or b"").decode()
        virtual = any(option.startswith("-arch=compute") for option in options)
        return Compiled(text("ProgramLog"), lowered, raw("PTX" if virtual else "CUBIN"))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
