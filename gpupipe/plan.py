"""What becomes of a user's transform: its operators, where each runs and why, and the proof.

The transform is flattened and cut: a *suffix* of pointwise operators that starts from a raw uint8
image is fused into one kernel; the *prefix* before it stays on the CPU. Before the first batch the
kernel's output on synthetic images is compared with the installed torchvision, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from gpupipe.operators import pointwise
from gpupipe.operators.pointwise import LEVELS, Refusal
from gpupipe.tables import Layout, Lookup

if TYPE_CHECKING:
    from gpupipe.images import ImageKind

Where = Literal["fused", "cpu", "refused"]

_PROOF_SIZES = ((7, 5), (3, 16), (1, 1), (19, 21))
"""Heights and widths of the images that prove a kernel: below, at and beyond a vector.

The largest holds all levels."""


@dataclass(frozen=True)
class Operator:
    """One operator of the flattened transform; ``position`` counts through nested containers."""

    position: str
    call: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """A short text for people: the operator as it prints, on one line."""
        text = " ".join(repr(self.call).split())
        return text if len(text) <= 72 else f"{text[:69]}..."  # noqa: PLR2004 # a table column


@dataclass(frozen=True)
class Pipeline:
    """A transform, flattened and cut at ``cut``."""

    operators: tuple[Operator, ...]
    cut: int

    def prefix(self, image: Any) -> Any:
        """Run what stays on the CPU before the kernel."""
        return pointwise.run([operator.call for operator in self.operators[: self.cut]], image)

    def suffix(self, image: Any) -> Any:
        """Run what the kernel does, by torchvision."""
        return pointwise.run(self.fused_calls, image)

    @property
    def fused_calls(self) -> list[Callable[[Any], Any]]:
        """The operators that the kernel takes over."""
        return [operator.call for operator in self.operators[self.cut :]]

    def same_as(self, other: Pipeline | None) -> bool:
        """Whether both hold the same operator objects, cut at the same place."""
        if other is None or (len(self.operators), self.cut) != (len(other.operators), other.cut):
            return False
        pairs = zip(self.operators, other.operators, strict=True)
        return all(mine.call is their.call for mine, their in pairs)

    def why_not(self) -> str:
        """Say why nothing can be fused, for a pipeline whose suffix is empty."""
        if not self.operators:
            return "the transform is empty"
        first = next((o for o in self.operators if pointwise.takes_uint8(o.call)), None)
        others = [o for o in self.operators if not pointwise.is_pointwise(o.call)]
        if first is None or not others:
            return (
                f"no operator such as ToTensor begins from raw pixels; got {self.operators[0].name}"
            )
        return (
            f"{others[-1].name} works on what {first.name} made, and has no kernel yet; "
            "if it takes raw images too, move it before"
        )


def flatten(transform: Any, position: str = "") -> list[Operator]:
    """List the operators of a transform, through exact ``Compose`` and ``nn.Sequential``."""
    kind = type(transform)
    container = kind is nn.Sequential or pointwise.is_a(kind, ["Compose"])
    if not container or pointwise.is_marked(transform) or not pointwise.is_plain(transform):
        return [Operator(position or "0", transform)]
    children = list(transform) if isinstance(transform, nn.Sequential) else transform.transforms
    dot = f"{position}." if position else ""
    return [o for i, child in enumerate(children) for o in flatten(child, f"{dot}{i}")]


def cut(transform: Callable[[Any], Any]) -> Pipeline:
    """Flatten a transform and find the longest pointwise suffix that starts from uint8."""
    operators = flatten(transform)
    start = len(operators)
    while start and pointwise.is_pointwise(operators[start - 1].call):
        start -= 1
    # A uint8 image stays one through PILToTensor; the first that takes uint8 begins the suffix.
    while start < len(operators) and not pointwise.takes_uint8(operators[start].call):
        start += 1
    return Pipeline(tuple(operators), start)


@dataclass
class Plan:
    """What runs where; ``print(plan)`` shows it.

    Attributes:
        pipeline: the transform; None where no torchvision transform was found.
        lookup: the fused suffix, or None where nothing is fused.
        source: where raw pixels come from, in words.
        delivery: what makes the batch and where, in words.
        reason: why nothing, or not all, was lifted; empty where all was.
        notes: what else happened, and how often.
        deviations: samples that went through the original transform after all.
        batches: batches delivered so far.
    """

    pipeline: Pipeline | None = None
    lookup: Lookup | None = None
    source: str = ""
    delivery: str = ""
    reason: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    deviations: int = 0
    batches: int = 0

    @property
    def fused(self) -> bool:
        """Whether a kernel of ours makes the batches."""
        return self.lookup is not None

    def rows(self) -> list[tuple[str, str, Where, str]]:
        """Return position, operator, where it runs and why, one row per operator."""
        if self.pipeline is None:
            return []
        result: list[tuple[str, str, Where, str]] = []
        for number, operator in enumerate(self.pipeline.operators):
            where: Where
            if number >= self.pipeline.cut:
                where = "fused" if self.fused else "refused"
                why = self._form() if self.fused else self.reason
            else:
                where, why = "cpu", self._cpu_reason(operator)
            result.append((operator.position, operator.name, where, why))
        return result

    def note(self, text: str) -> None:
        """Remember that something happened once more."""
        self.notes[text] = self.notes.get(text, 0) + 1

    def describes(self, other: Plan) -> bool:
        """Whether this plan, further on, still says what ``other``, made anew, says."""
        if self.pipeline is None or other.pipeline is None:
            return self.pipeline is other.pipeline and self.reason == other.reason
        if not self.pipeline.same_as(other.pipeline):
            return False
        if self.lookup is None or other.lookup is None:
            return self.lookup is other.lookup and self.reason == other.reason
        return pointwise.same_bits(self.lookup.values, other.lookup.values)

    def _form(self) -> str:
        if self.lookup is None or self.lookup.constants is None:
            return "pointwise: table of 256 levels"
        return "pointwise: arithmetic equal to the table of 256 levels"

    def _cpu_reason(self, operator: Operator) -> str:
        operators = () if self.pipeline is None else self.pipeline.operators
        if pointwise.is_pointwise(operator.call):
            if all(pointwise.is_pointwise(other.call) for other in operators):
                return "pointwise, but no operator before it begins from raw pixels"
            return "pointwise, but an operator after it is not"
        if not pointwise.is_plain(operator.call):
            return "it has a hook or a forward of its own"
        kind = type(operator.call)
        known = kind.__module__.startswith("torchvision.")
        base = next((b.__name__ for b in kind.__mro__[1:] if pointwise.is_pointwise_type(b)), None)
        if base is not None and not known:
            return f"a subclass of {base} may do something else"
        if known:
            return "no kernel yet; runs on each image, before the fused part if there is one"
        return "not a torchvision operator; gpupipe.pointwise marks one that is pointwise"

    def __str__(self) -> str:
        """Return it as lines of text; ``gpupipe explain`` makes a table of it."""
        lines = [f"source    {self.source or 'dataset[i]'}"]
        for position, name, where, why in self.rows():
            lines.append(f"{position:<9} {name}\n          {where}: {why}")
        if self.pipeline is None:
            lines.append("transform none found")
        lines.append(f"delivery  {self.delivery}")
        if self.reason:
            lines.append(f"not lifted: {self.reason}" if not self.fused else f"note: {self.reason}")
        lines += [f"note: {note} ({count} times)" for note, count in self.notes.items()]
        if self.deviations:
            lines.append(
                f"deviations: {self.deviations} samples went through the original transform"
            )
        return "\n".join(lines)


def specify(
    pipeline: Pipeline,
    kind: ImageKind,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
) -> Lookup:
    """Tabulate the fused part for one kind of image; see ``operators.pointwise.tabulate``.

    Raises:
        PlanError: wrong constants, or a callable that is marked pointwise and is not.
        Refusal: it cannot be fused.
    """
    if pipeline.cut == len(pipeline.operators):
        raise Refusal(pipeline.why_not())
    return pointwise.tabulate(pipeline.fused_calls, kind, dtype, size)


Render = Callable[[Any, Lookup], torch.Tensor]
"""Raw uint8 images in their layout -> the batch that the device's kernel makes, on the CPU."""


def prove(
    pipeline: Pipeline, lookup: Lookup, kind: ImageKind, layout: Layout, render: Render
) -> Lookup | None:
    """Compare a device's kernel with the installed torchvision on synthetic images.

    Args:
        pipeline: its fused part is the reference.
        lookup: what the kernel evaluates.
        kind: how an image reaches the transform.
        layout: of the raw batch.
        render: runs the kernel.

    Returns:
        ``lookup``, or its table alone where the arithmetic form differs, or None where both do.
    """
    attempts = [lookup] if lookup.constants is None else [lookup, Lookup(lookup.values)]
    for attempt in attempts:
        if all(_agrees(pipeline, attempt, kind, layout, render, size) for size in _PROOF_SIZES):
            return attempt
    return None


def _agrees(  # prove's own, and a size
    pipeline: Pipeline,
    lookup: Lookup,
    kind: ImageKind,
    layout: Layout,
    render: Render,
    size: tuple[int, int],
) -> bool:
    rng = np.random.default_rng(size[0])
    pixels = rng.integers(0, LEVELS, (3, *size, kind.channels), np.uint8)
    if size[0] * size[1] >= LEVELS:  # every entry of the table
        for channel in range(kind.channels):
            pixels.reshape(3, -1, kind.channels)[:, :LEVELS, channel] = rng.permutation(LEVELS)
    raw = pixels
    if layout == "NHW":
        raw = pixels[..., 0]
    elif layout == "NCHW":
        raw = pixels.transpose(0, 3, 1, 2)
    result = render(np.ascontiguousarray(raw), lookup)
    expected = torch.stack([pipeline.suffix(kind.build(image)) for image in pixels])
    expected = expected.as_subclass(torch.Tensor).to(lookup.dtype)
    return pointwise.same_bits(result.reshape(expected.shape), expected)
