"""Where compiled kernels are kept: one directory per user, readable by nobody else."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path

from gpupipe import notices
from gpupipe._version import __version__


def _private(path: Path) -> bool:
    """Make ``path``, or say that it cannot be trusted: not ours, open to others, not writable."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError:
        return False
    ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    closed = os.name == "nt" or not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return ours and closed and os.access(path, os.W_OK | os.X_OK)


def _remove(scratch: Path, owner: int) -> None:
    """Remove a directory at exit, but not at that of a forked child."""
    if os.getpid() == owner:
        shutil.rmtree(scratch, ignore_errors=True)


@cache
def cache_dir(name: str) -> Path:
    """Return the directory for compiled kernels of one kind, made with mode 0700.

    ``$GPUPIPE_CACHE_DIR``, else ``$XDG_CACHE_HOME/gpupipe``, else ``~/.cache/gpupipe``. Where that
    cannot be written, belongs to another user or is open to others, a fresh private temporary
    directory takes its place: kernels are then compiled again in the next process.

    Args:
        name: what is kept there, such as ``"numba"``.
    """
    chosen = os.environ.get("GPUPIPE_CACHE_DIR")
    if chosen:
        root = Path(chosen)
    else:
        home = os.path.expanduser("~")  # noqa: PTH111 # Path.expanduser raises where there is no home
        base = os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache")
        root = Path(base, "gpupipe")
    path = root / f"{__version__}-{name}"
    if _private(root) and _private(path):
        return path
    if chosen:
        notices.warn(
            f"GPUPIPE_CACHE_DIR={chosen} is not used: it must be writable, your own and closed to "
            f"others (chmod 700 {chosen}); kernels are compiled again in every process"
        )
    scratch = Path(tempfile.mkdtemp(prefix=f"gpupipe-{name}-"))
    atexit.register(_remove, scratch, os.getpid())
    return scratch
