"""Where something lies in a sample or a batch, and how to put something else there.

A tree is made of tuples, lists, mappings, namedtuples and dataclasses; everything else is a leaf. A
path is the tuple of indices, keys and field names that leads from the root to a node: the image of
``(image, label)`` lies at ``(0,)``, that of ``{"pixels": image}`` at ``("pixels",)``, and a sample
that is nothing but an image has it at ``()``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[int | str, ...]
"""Indices, keys (int or str only) and field names, from the root inwards."""

_LEAVES = frozenset({int, float, str, bytes, bool, type(None)})


def children(node: Any) -> list[tuple[int | str, Any]]:
    """Return the keys and values directly under ``node``; none for a leaf.

    Args:
        node: Any object. Only its type is looked at, unless it is a container.

    Raises:
        Exception: What a user's mapping raises while it is listed.
    """
    if type(node) in _LEAVES:
        return []
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, Mapping):
        return [(key, node[key]) for key in node if isinstance(key, (int, str))]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return [(name, getattr(node, name)) for name in names if hasattr(node, name)]
    return []


def walk(
    tree: Any, path: Path = (), above: frozenset[int] = frozenset()
) -> Iterator[tuple[Path, Any]]:
    """Yield every node of ``tree`` with its path, parents first, each way that leads to it.

    Args:
        tree: The root.
        path: Where the root lies in what the caller has.
        above: ``id`` of the containers that are open, so that a cycle ends.

    Raises:
        Exception: What a user's mapping raises while it is listed.
    """
    yield path, tree
    if id(tree) not in above:
        for key, child in children(tree):
            yield from walk(child, (*path, key), above | {id(tree)})


def get(tree: Any, path: Path) -> Any:
    """Return the node at ``path``.

    Args:
        tree: The root.
        path: Keys from the root inwards; ``()`` is the root itself.

    Raises:
        LookupError: No such key or index.
        AttributeError: No such field.
        TypeError: The tree ends before the path does.
    """
    for key in path:
        indexed = isinstance(tree, (list, tuple, Mapping)) or not isinstance(key, str)
        tree = tree[key] if indexed else getattr(tree, str(key))
    return tree


def fill(tree: Any, path: Path, value: Any, *, copied: bool = False) -> Any:
    """Put ``value`` at ``path`` and return the tree; every container keeps its type.

    Lists, mappings and dataclasses are set in place, tuples and namedtuples are made anew.

    Args:
        tree: The root.
        path: Where to; ``()`` returns ``value`` itself.
        value: What to put there.
        copied: Work on shallow copies of the containers along the path and leave ``tree`` as it is.

    Raises:
        LookupError: No such key or index.
        AttributeError: No such field.
        TypeError: A container along the path cannot be set, rebuilt or copied.
    """
    if not path:
        return value
    key, *rest = path
    inner = fill(get(tree, (key,)), tuple(rest), value, copied=copied)
    if isinstance(tree, tuple):
        items = [inner if position == key else item for position, item in enumerate(tree)]
        make: Any = tuple.__new__  # a namedtuple's own takes the fields one by one
        return make(type(tree), items)
    if copied:
        tree = copy.copy(tree)
    if isinstance(tree, (list, Mapping)):
        tree[key] = inner  # type: ignore[index]  # a read-only mapping raises TypeError here
    else:
        object.__setattr__(tree, str(key), inner)  # also where the dataclass is frozen
    return tree


def show(path: Path, root: str = "sample") -> str:
    """Return a path as one writes it: ``sample[0]['image']``.

    Args:
        path: Keys from the root inwards.
        root: What the root is called.
    """
    return root + "".join(f"[{key!r}]" for key in path)
