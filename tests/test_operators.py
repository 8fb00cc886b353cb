"""Which operators are fused, which stay on the CPU and why, and bad constants at once."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.models import ResNet50_Weights
from torchvision.transforms import InterpolationMode, v2

from gpupipe.errors import PlanError, SourceError
from gpupipe.images import ImageKind
from gpupipe.operators import registry
from gpupipe.operators.colourspace import converts_to_rgb
from gpupipe.plan import cut
from gpupipe.planning import fitting

RGB = ImageKind("PIL", 3, "NHWC", "RGB")
GREY = ImageKind("PIL", 1, "NHW", "L")
ALPHA = ImageKind("PIL", 4, "NHWC", "RGBA")
PLANES = ImageKind("tensor", 3, "NCHW")
TENSOR = [v1.ToTensor(), v1.Normalize((0.5,), (0.5,))]


class MyCrop(v1.RandomCrop):  # type: ignore[misc] # torchvision is untyped
    """May do anything."""


@pytest.mark.parametrize(
    ("operators", "kept", "reason"),
    [
        ([v1.RandomRotation(3), v1.RandomCrop(5), *TENSOR], 1, "no kernel yet"),
        ([v1.RandomCrop(5), v1.ColorJitter(), v1.CenterCrop(4), *TENSOR], 2, "no kernel yet"),
        ([MyCrop(5), *TENSOR], 1, "a subclass of RandomCrop"),
        ([v1.Lambda(lambda image: image), v1.CenterCrop(4), *TENSOR], 1, "no kernel yet"),
        ([lambda image: image, v1.CenterCrop(4), *TENSOR], 1, "not a torchvision operator"),
        ([v1.RandomApply([v1.GaussianBlur(3)]), *TENSOR], 1, "its transform 0, GaussianBlur"),
        ([*TENSOR, v1.RandomCrop(5, padding=2)], 3, "change the values"),
        ([*TENSOR, v1.Resize(5)], 3, "change the values"),
        ([*TENSOR, v1.RandomErasing(), v1.RandomHorizontalFlip()], 4, "moves what was erased"),
        ([v1.ToTensor(), v1.RandomErasing(value="random"), TENSOR[1]], 3, "move it last"),
        ([v1.RandomErasing(), v1.CenterCrop(4), *TENSOR], 1, "no operator before it makes one"),
        ([v1.Pad(-3), *TENSOR], 1, "a negative padding"),
    ],
)
def test_what_stays_on_the_cpu(operators: list[Any], kept: int, reason: str) -> None:
    """An operator without steps, and what must come before it, and nothing else."""
    pipeline = fitting(v1.Compose(operators), RGB)
    assert pipeline.cut == kept
    assert any(reason in text for text in pipeline.refusals.values()), pipeline.refusals


@pytest.mark.parametrize(
    "operators",
    [
        [*TENSOR, v1.RandomHorizontalFlip(), v1.RandomCrop(5)],
        [v2.ToImage(), v2.RandomCrop(5, padding=2), v2.ToDtype(torch.float32, scale=True)],
        [v1.RandomCrop(5), *TENSOR, v1.RandomErasing(value="random")],
        [v1.ToTensor(), v1.RandomErasing(value=0.3), TENSOR[1]],
        [v1.RandomOrder([v1.RandomApply([v1.Resize(9)]), v1.RandomCrop(4)]), *TENSOR],
        list(ResNet50_Weights.IMAGENET1K_V2.transforms().children()) or [v1.CenterCrop(3), *TENSOR],
    ],
)
def test_what_is_fused_whole(operators: list[Any]) -> None:
    """Also behind the scaling, where it only moves pixels."""
    assert fitting(v1.Compose(operators), RGB).cut == 0


def test_a_preset_is_seen_through() -> None:
    """``weights.transforms()`` becomes its five operators; with a hook it stays what it is."""
    preset = ResNet50_Weights.IMAGENET1K_V2.transforms()
    pipeline = fitting(preset, RGB)
    names = [type(operator.call).__name__ for operator in pipeline.operators]
    assert names == ["Resize", "CenterCrop", "PILToTensor", "ConvertImageDtype", "Normalize"]
    assert pipeline.cut == 0
    hooked = ResNet50_Weights.IMAGENET1K_V2.transforms()
    hooked.register_forward_hook(lambda *_: None)
    assert len(cut(hooked).operators) == 1


@pytest.mark.parametrize(
    ("operator", "kind", "reason"),
    [
        (v1.Resize(9), ALPHA, "mode RGBA"),
        (v1.RandomResizedCrop(9), ALPHA, "mode RGBA"),
        (v1.Resize(9, InterpolationMode.NEAREST), PLANES, "another arithmetic"),
        (v2.Resize(9, antialias=False), PLANES, "another arithmetic"),
        (v1.Pad(3, padding_mode="reflect"), PLANES, "by less than their size"),
        (v1.Pad(3, fill=(1, 2)), RGB, "no level"),
        (v2.RGB(), GREY, "not RGB already"),
    ],
)
def test_what_a_kind_of_image_refuses(operator: Any, kind: ImageKind, reason: str) -> None:
    """Some operators depend on what an image is."""
    lowered = registry.lower(operator, count())
    assert not isinstance(lowered, str)
    assert reason in str(lowered.check(kind, tensor=kind.container == "tensor"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: v1.RandomCrop(0), "RandomCrop needs a size"),
        (lambda: v1.CenterCrop((3, -1)), "CenterCrop needs a size"),
        (
            lambda: v1.RandomResizedCrop(9, scale=(0.1, float("nan"))),
            "RandomResizedCrop needs a scale",
        ),
        (lambda: _changed(v1.RandomHorizontalFlip(), p=1.5), "RandomHorizontalFlip needs a p"),
        (lambda: _changed(v1.Resize(9, max_size=12), max_size=8), "max_size above its size"),
        (lambda: _changed(v1.RandomErasing(), value="noise"), "RandomErasing needs a value"),
        (lambda: v1.RandomErasing(value=(1, 2)), "one value, or one for each of 3 channels"),
    ],
)
def test_constants_that_cannot_work(make: Any, words: str) -> None:
    """Refused when the plan is made, with the operator's position, not at step 40,000."""
    transform = v1.Compose([v1.CenterCrop(9), v1.ToTensor(), make()])
    if not isinstance(transform.transforms[2], v1.RandomErasing):
        transform = v1.Compose([v1.CenterCrop(9), transform.transforms[2], v1.ToTensor()])
    with pytest.raises(PlanError, match=words):
        fitting(transform, RGB)


def _changed(operator: Any, **values: Any) -> Any:
    """Return an operator with constants that its constructor refuses."""
    for name, value in values.items():
        setattr(operator, name, value)
    return operator


def test_only_the_conversion_to_rgb_is_recognised() -> None:
    """By bytecode: the same names and constants, one argument, nothing captured."""

    def plain(image: Any) -> Any:
        return image.convert("RGB")

    def other(image: Any) -> Any:
        return image.convert("L")

    def default(image: Any, mode: str = "RGB") -> Any:
        return image.convert(mode)

    def twice(image: Any) -> Any:
        return image.convert("RGB").convert("RGB")

    assert converts_to_rgb(plain)
    assert converts_to_rgb(lambda picture: picture.convert("RGB"))
    for function in (other, default, twice, print, nn.Identity(), lambda i: i.resize("RGB")):
        assert not converts_to_rgb(function)


def test_an_image_smaller_than_its_crop() -> None:
    """The error is torchvision's, with what to do."""
    from gpupipe.plan import specify
    from gpupipe.rendering import Picks, Renderer, Stream

    pipeline = fitting(v1.Compose([v1.RandomCrop(30), *TENSOR]), RGB)
    renderer = Renderer(pipeline, RGB, specify(pipeline, RGB), Stream(0, 0))
    one = np.zeros(1, np.int64)
    picks = Picks(one, one, one, np.zeros(1, bool))
    with pytest.raises(SourceError, match=r"crop size \(30, 30\) is larger .*\(20, 40\); use"):
        renderer.tape(picks, np.array([20]), np.array([40]))
