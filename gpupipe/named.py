"""``MODULE:NAME``: an object of the user's, imported for the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from gpupipe.errors import GpupipeError, InputError

_LISTED = 12
"""Names that a message offers at most."""


def load(target: str) -> Any:
    """Return the object that ``MODULE:NAME`` names; a callable without arguments is called.

    Args:
        target: ``train.py:loader``, ``package.module:loader`` or ``train.py:object.attribute``.
            The current directory, and a file's own, are put on ``sys.path``.

    Raises:
        InputError: not of that form, no such module or name, or the user's code raises.
    """
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise InputError(f"expected MODULE:NAME such as train.py:loader, got {target!r}")
    module = _module(where)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise InputError(f"{where} has no {name!r}; {_offer(module, name)}")
        value = getattr(value, part)
    if isinstance(value, (Dataset, DataLoader)) or not callable(value):
        return value
    if not _needs_nothing(value):
        raise InputError(f"{target} needs arguments; name an object, or a function that takes none")
    return _run(target, value)


def _module(where: str) -> ModuleType:
    """Import a module by its file or by its name."""
    here = os.getcwd()  # noqa: PTH109 # sys.path holds strings
    if where.endswith(".py"):
        return _file(where, here)
    _add_paths(here)
    try:
        known = importlib.util.find_spec(where) is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        raise InputError(f"there is no module {where!r}; of a file, say path/to/file.py:NAME")
    module: ModuleType = _run(where, lambda: importlib.import_module(where))
    return module


def _file(where: str, here: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise InputError(f"there is no file {where} in {here}; check the path")
    _add_paths(str(path.parent), here)
    name = path.stem if path.stem not in sys.modules else f"gpupipe_named_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    loader = None if spec is None else spec.loader
    if spec is None or loader is None:
        raise InputError(f"{where} is no Python file; expected one")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled for worker processes
    _run(where, lambda: loader.exec_module(module))
    return module


def _add_paths(*folders: str) -> None:
    sys.path[:0] = [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


def _run(what: str, code: Callable[[], Any]) -> Any:
    """Run the user's code; what it raises becomes one message with its line."""
    arguments, sys.argv = sys.argv, [what.partition(":")[0]]  # ours are not the script's
    try:
        return code()
    except GpupipeError:
        raise
    except SystemExit as error:
        raise InputError(
            f"{what} ended itself with exit code {error.code} when it was imported; put what runs "
            'the script below if __name__ == "__main__":'
        ) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{what} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno}); "
            "it must run without that first"
        ) from error
    finally:
        sys.argv = arguments


def _needs_nothing(call: Callable[..., Any]) -> bool:
    try:
        inspect.signature(call).bind()
    except (TypeError, ValueError):
        return False
    return True


def _offer(module: ModuleType, name: str) -> str:
    """Say which names of a module could have been meant."""
    usable = []
    for key, value in vars(module).items():
        made_here = getattr(value, "__module__", None) == module.__name__
        if isinstance(value, (DataLoader, Dataset)):
            usable.append(f"{key} ({type(value).__name__})")
        elif inspect.isfunction(value) and made_here and _needs_nothing(value):
            usable.append(f"{key}()")
    close = difflib.get_close_matches(name, vars(module), n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    if not usable:
        return f"{meant}it has no DataLoader, dataset or function without arguments at its top"
    return f"{meant}it has {', '.join(usable[:_LISTED])}"
