"""How a transform becomes steps: torchvision's classes, v1 and v2, by their exact type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torchvision import transforms as v1
from torchvision.transforms import _presets

from gpupipe.operators import pointwise
from gpupipe.operators.colourspace import ToRGB, converts_to_rgb
from gpupipe.operators.containers import Container, RandomApply, RandomChoice, RandomOrder
from gpupipe.operators.crop import CenterCrop, Flip, Pad, RandomCrop
from gpupipe.operators.erase import RandomErasing
from gpupipe.operators.lowered import Lowered
from gpupipe.operators.resize import RandomResizedCrop, Resize

_OPERATORS: dict[str, Callable[[Any, Iterator[int]], Lowered]] = {
    "CenterCrop": CenterCrop,
    "Pad": Pad,
    "RGB": ToRGB,
    "RandomCrop": RandomCrop,
    "RandomErasing": RandomErasing,
    "RandomHorizontalFlip": partial(Flip, axes=1),
    "RandomResizedCrop": RandomResizedCrop,
    "RandomVerticalFlip": partial(Flip, axes=2),
    "Resize": Resize,
}
_CONTAINERS: dict[str, type[Container]] = {
    "RandomApply": RandomApply,
    "RandomChoice": RandomChoice,
    "RandomOrder": RandomOrder,
}


def lower(call: Any, ids: Iterator[int]) -> Lowered | str:
    """Return an operator as something with steps, or a sentence that says why there is none.

    Args:
        call: the transform object.
        ids: numbers for the operators' random streams. Every operator takes one, a container
            before its children, in the order of the pipeline.

    Raises:
        PlanError: constants that cannot work.
    """
    if converts_to_rgb(call):
        return ToRGB(call, ids)
    kind = type(call)
    if not pointwise.is_plain(call):
        return "it has a hook or a forward of its own"
    for name, make in _OPERATORS.items():
        if pointwise.is_a(kind, [name]):
            return make(call, ids)
    for name, container in _CONTAINERS.items():
        if pointwise.is_a(kind, [name]):
            return _contained(call, ids, container)
    return _unknown(kind)


def _contained(call: Any, ids: Iterator[int], container: type[Container]) -> Lowered | str:
    """Lower a container, if all of its children can be."""
    made: list[Lowered] = []
    for number, child in enumerate(call.transforms):
        lowered = lower(child, ids)
        if isinstance(lowered, str):
            return f"its transform {number}, {type(child).__name__}: {lowered}"
        if lowered.stage == "erase":
            return f"its transform {number}, {type(child).__name__}, works on what others made"
        made.append(lowered)
    if not made:
        return "it has no transforms"
    return container(call, ids, made)


def _unknown(kind: type) -> str:
    """Say why a class has no steps."""
    if kind.__module__.startswith("torchvision."):
        return "no kernel yet; runs on each image, before the fused part if there is one"
    names = [*_OPERATORS, *_CONTAINERS]
    for base in kind.__mro__[1:]:
        if pointwise.is_a(base, names) or pointwise.is_pointwise_type(base):
            return f"a subclass of {base.__name__} may do something else"
    return "not a torchvision operator; gpupipe.pointwise marks one that is pointwise"


def is_preset(transform: Any) -> bool:
    """Whether a transform is what ``weights.transforms()`` gives for classification."""
    return type(transform) is _presets.ImageClassification


def expand(preset: Any) -> list[Any]:
    """Return the transforms that a preset consists of, for PIL images."""
    return [
        v1.Resize(preset.resize_size, preset.interpolation, antialias=preset.antialias),
        v1.CenterCrop(preset.crop_size),
        v1.PILToTensor(),
        v1.ConvertImageDtype(torch.float),
        v1.Normalize(mean=preset.mean, std=preset.std),
    ]
