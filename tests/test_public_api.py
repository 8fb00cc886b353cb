"""What ``gpupipe`` shows the world: the names in ``__all__``, documented, and nothing else."""

from __future__ import annotations

from types import ModuleType

import pytest

import gpupipe

PUBLIC = [name for name in gpupipe.__all__ if not name.startswith("_")]


def test_all_is_sorted_and_has_no_repeats() -> None:
    """A reader finds a name where the alphabet puts it."""
    assert list(gpupipe.__all__) == sorted(set(gpupipe.__all__))


def test_nothing_else_is_public() -> None:
    """Apart from submodules, which Python adds as they are imported."""
    submodules = {
        name
        for name, value in vars(gpupipe).items()
        if isinstance(value, ModuleType) and value.__name__ == f"gpupipe.{name}"
    }
    found = {name for name in vars(gpupipe) if not name.startswith("_")}
    assert found - submodules == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_and_says_gpupipe(name: str) -> None:
    """``help`` and tracebacks show ``gpupipe.<name>``, not the file that holds it."""
    value = getattr(gpupipe, name)
    assert not isinstance(value, ModuleType)
    assert (value.__doc__ or "").strip()
    assert value.__module__ == "gpupipe"
    assert value.__qualname__ == name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_documented(name: str) -> None:
    """Those that the class defines itself; the rest is torch's."""
    members = vars(getattr(gpupipe, name)) if isinstance(getattr(gpupipe, name), type) else {}
    bare = [
        method
        for method, value in members.items()
        if not method.startswith("_")
        and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
        and not value.__doc__
    ]
    assert bare == []


def test_star_import_gives_what_all_names() -> None:
    """``from gpupipe import *`` works: every name in ``__all__`` is there."""
    names: dict[str, object] = {}
    exec("from gpupipe import *", names)  # noqa: S102 # a star import is allowed at module level only
    assert set(gpupipe.__all__) <= set(names)
