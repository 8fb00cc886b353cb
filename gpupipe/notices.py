"""Warnings that point at the user's line, not at ours."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from gpupipe.errors import GpupipeWarning

_HERE = str(Path(__file__).parent)


def warn(message: str) -> None:
    """Warn with ``GpupipeWarning`` at the nearest caller outside this package."""
    level, frame = 1, sys._getframe(0)  # noqa: SLF001 # warnings.warn itself counts frames so
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment] # None ends the loop
    warnings.warn(message, GpupipeWarning, stacklevel=level)
