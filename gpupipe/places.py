"""Where a dataset holds torchvision transforms, and how to stand something else in their place.

The dataset and everything that it holds (wrapped datasets, torchvision's ``StandardTransform``,
helpers, lists and dictionaries of either) is one graph. A *place* is a transform in it. Nothing of
the user's runs while the graph is read or copied: instance dictionaries are looked into directly.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch

from gpupipe.errors import InputError

Step = tuple[Literal["attribute", "key"], Hashable]
"""One step from an object to what it holds."""

MARK = "__gpupipe_pointwise__"
"""The attribute by which its author promises that a callable works pixel by pixel."""

_NEVER = frozenset({"target_transform"})
_OPAQUE = (str, bytes, type, ModuleType, FunctionType, MethodType, torch.Tensor)
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, tuple})
_MOST_ITEMS = 1024  # longer lists are labels, file names or samples
_MOST_OBJECTS = 4096


@dataclass(frozen=True, eq=False)
class Place:
    """One transform object that a dataset holds; equal only to itself.

    Attributes:
        transform: The user's transform, the very object.
        path: The shortest way to it from the dataset.
        owner: Name of the class of the object that holds it.
    """

    transform: Callable[..., Any]
    path: tuple[Step, ...]
    owner: str

    def __str__(self) -> str:
        """Return the way to it as one writes it: ``.dataset.transform``, ``.views[1]``."""
        return "".join(
            f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in self.path
        )


@dataclass
class Node:
    """An object of the dataset's graph, with what it holds and how it was first reached."""

    value: Any
    path: tuple[Step, ...]
    owner: str
    edges: list[tuple[Step, int]] = field(default_factory=list)


def is_transform(value: object) -> bool:
    """Whether ``value`` is a torchvision transform, or marked as a pointwise one.

    True for instances of any class that derives from one of ``torchvision.transforms`` (v1 or v2),
    for an ``nn.Sequential`` of such, and for a callable with the attribute of ``MARK``.

    Args:
        value: Any object; no code of its class runs.
    """
    if isinstance(value, type) or not callable(value):
        return False
    if inspect.getattr_static(value, MARK, None):
        return True
    if isinstance(value, torch.nn.Sequential):
        return len(value) > 0 and all(is_transform(module) for module in value)
    modules = (str(base.__module__) for base in type(value).__mro__)
    return any(f"{module}.".startswith("torchvision.transforms.") for module in modules)


def places(dataset: object) -> tuple[Place, ...]:
    """Return every transform that ``dataset`` holds, nearest first.

    A transform that is held twice, as ``.transform`` and ``.transforms.transform`` of torchvision's
    datasets are, is one place. ``target_transform`` is never one.

    Args:
        dataset: Any object, usually a map-style dataset.
    """
    nodes = graph(dataset).values()
    return tuple(Place(n.value, n.path, n.owner) for n in nodes if n.path and is_transform(n.value))


def install(dataset: Any, replacements: Mapping[Place, object]) -> Any:
    """Return a shallow copy of ``dataset`` in which other objects stand in the places.

    Every object from which a place can be reached is copied (its ``__dict__``, list or dictionary,
    not what they hold), and the copies refer to each other. The user's objects are not changed;
    whatever else they hold is shared.

    Args:
        dataset: What ``places`` was asked about.
        replacements: What to put where.

    Raises:
        InputError: An object along the way cannot be copied, or a place is not in ``dataset``.
    """
    nodes = graph(dataset)
    swaps = {id(place.transform): new for place, new in replacements.items()}
    for place in replacements:
        if id(place.transform) not in nodes:
            raise InputError(
                f"{type(dataset).__name__}{place} no longer holds the transform that was found "
                "there; ask places() again"
            )
    stale = _leading_to(set(swaps), nodes)
    done: dict[int, Any] = dict(swaps)

    def renewed(key: int) -> Any:
        node = nodes[key]
        if key in done or key not in stale:
            return done.get(key, node.value)
        if isinstance(node.value, tuple):
            items = list(node.value)
            for (_, position), child in node.edges:
                items[position] = renewed(child)  # type: ignore[call-overload]
            make = getattr(type(node.value), "_make", tuple)
            return done.setdefault(key, make(items))
        done[key] = clone = _shallow(node.value)
        for (kind, name), child in node.edges:
            if child in stale:
                slots = clone.__dict__ if kind == "attribute" else clone
                slots[name] = renewed(child)
        return clone

    return renewed(id(dataset))


def graph(dataset: object) -> dict[int, Node]:
    """Return all that can hold a transform, reached from ``dataset`` breadth first, by ``id``.

    Args:
        dataset: The root; the result keeps it and everything else alive.
    """
    nodes = {id(dataset): Node(dataset, (), "")}
    pending = deque(nodes.values())
    while pending and len(nodes) < _MOST_OBJECTS:
        node = pending.popleft()
        if node.path and is_transform(node.value):
            continue
        owner = node.owner if _is_container(node.value) else type(node.value).__name__
        for step, child in _held(node.value):
            if id(child) not in nodes:
                nodes[id(child)] = Node(child, (*node.path, step), owner)
                pending.append(nodes[id(child)])
            node.edges.append((step, id(child)))
    return nodes


def _leading_to(targets: set[int], nodes: Mapping[int, Node]) -> set[int]:
    """The objects from which one of ``targets`` can be reached, and ``targets``."""
    holders: dict[int, list[int]] = {}
    for key, node in nodes.items():
        for _, child in node.edges:
            holders.setdefault(child, []).append(key)
    reached, pending = set(targets), list(targets)
    while pending:
        for holder in holders.get(pending.pop(), ()):
            if holder not in reached:
                reached.add(holder)
                pending.append(holder)
    return reached


def _held(value: Any) -> list[tuple[Step, Any]]:
    """What an object holds that can be, or lead to, a transform."""
    if _is_container(value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        found: list[tuple[Step, Any]] = [(("key", key), child) for key, child in pairs]
    else:
        try:
            slots = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return []
        found = [(("attribute", name), child) for name, child in slots.items()]
        for base in type(value).__mro__:  # a transform that the class holds for all its instances
            for name, child in vars(base).items():
                if name not in slots and is_transform(child):
                    found.append((("attribute", name), child))
    return [(step, child) for step, child in found if step[1] not in _NEVER and _opens(child)]


def _is_container(value: object) -> bool:
    """Whether ``value`` holds things by key or position, and nothing by attribute."""
    return type(value) in _CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_make"))


def _opens(value: object) -> bool:
    """Whether ``value`` is a transform or may lead to one."""
    if is_transform(value):
        return True
    if isinstance(value, _OPAQUE):
        return False
    if _is_container(value):
        return len(value) <= _MOST_ITEMS  # type: ignore[arg-type]
    module = str(type(value).__module__)
    library = module.partition(".")[0]
    if isinstance(value, torch.nn.Module) and not isinstance(value, torch.utils.data.Dataset):
        return False
    if library in sys.stdlib_module_names or library in {"numpy", "PIL"}:
        return False
    return library != "torch" or module.startswith("torch.utils.data")


def _shallow(value: Any) -> Any:
    """A copy of one object, made without running its class's own code."""
    if _is_container(value):
        return value.copy()
    name = type(value).__name__
    if getattr(type(value), "__del__", None) is not None:
        raise InputError(
            f"{name} defines __del__, which a copy of it would run as well (closing files that "
            "the original still reads); release them with weakref.finalize instead"
        )
    try:
        clone = object.__new__(type(value))
        clone.__dict__.update(value.__dict__)
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot not in {"__dict__", "__weakref__"} and hasattr(value, slot):
                    object.__setattr__(clone, slot, getattr(value, slot))
    except TypeError:  # a subclass of list, dict or another built-in
        try:
            return copy.copy(value)
        except Exception as error:
            raise InputError(
                f"{name} cannot be copied: {type(error).__name__}: {error}; expected an object "
                "whose state is its __dict__"
            ) from error
    return clone
