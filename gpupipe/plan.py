"""What becomes of a user's transform: its operators, where each runs and why, and the proof.

The transform is flattened and cut: a *suffix* that starts from a raw uint8 image is fused into one
kernel; the *prefix* before it stays on the CPU. The suffix has three stages, each of any number of
operators: geometry (which pixel goes where), pointwise (what becomes of a level) and erasing.
Before the first batch the kernel's output on synthetic images is compared with the installed
torchvision, bit by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from gpupipe.errors import PlanError
from gpupipe.operators import pointwise, registry
from gpupipe.operators.lowered import Lowered
from gpupipe.operators.pointwise import LEVELS, Refusal
from gpupipe.tables import Layout, Lookup

if TYPE_CHECKING:
    from gpupipe.images import ImageKind

Where = Literal["fused", "cpu", "refused"]

TENSOR_LEVELS = 2
"""The most that a resize of a uint8 tensor was seen to differ from torchvision's."""

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
    """A transform, flattened and cut.

    Attributes:
        operators: all of them, in order.
        cut: how many stay on the CPU, before the kernel.
        lowered: for each operator behind the cut how it becomes steps; None: it is pointwise.
        refusals: why an operator has no place in the kernel, by its number.
    """

    operators: tuple[Operator, ...]
    cut: int
    lowered: tuple[Lowered | None, ...] = ()
    refusals: dict[int, str] = field(default_factory=dict)

    def prefix(self, image: Any) -> Any:
        """Run what stays on the CPU before the kernel."""
        return pointwise.run([operator.call for operator in self.operators[: self.cut]], image)

    def suffix(self, image: Any) -> Any:
        """Run what the kernel does, by torchvision, which draws its own random numbers."""
        return pointwise.run([operator.call for operator in self.operators[self.cut :]], image)

    @property
    def fused_calls(self) -> list[Callable[[Any], Any]]:
        """The pointwise operators that the kernel takes over."""
        pairs = zip(self.operators[self.cut :], self.lowered, strict=True)
        return [operator.call for operator, lowered in pairs if lowered is None]

    def run_pointwise(self, image: Any) -> Any:
        """Run the pointwise operators of the fused part alone, by torchvision."""
        return pointwise.run(self.fused_calls, image)

    @property
    def steps(self) -> list[Lowered]:
        """The operators that become steps of a program: geometry, then erasing."""
        return [lowered for lowered in self.lowered if lowered is not None]

    @property
    def is_pointwise(self) -> bool:
        """Whether the fused part changes no place of a pixel: a table is all there is."""
        return not self.steps

    def after(self, lowered: Lowered) -> list[Callable[[Any], Any]]:
        """Return the pointwise operators behind an erasing one: they change its values, too."""
        place = next(n for n, other in enumerate(self.lowered) if other is lowered)
        pairs = zip(self.operators[self.cut + place :], self.lowered[place:], strict=True)
        return [operator.call for operator, other in pairs if other is None]

    def misfit(self, kind: ImageKind) -> tuple[int, str] | None:
        """Return the number of the operator that images of a kind cannot go through, and why."""
        for number, lowered, tensor in self.walk(kind):
            reason = lowered.check(kind, tensor=tensor)
            if reason:
                return number, reason
        return None

    def walk(self, kind: ImageKind) -> Iterator[tuple[int, Lowered, bool]]:
        """Yield the operators with steps, their numbers, and whether they are given tensors."""
        tensor = kind.container in ("tensor", "Image")
        for number, lowered in enumerate(self.lowered, start=self.cut):
            if lowered is None:
                tensor = True
            else:
                yield number, lowered, tensor

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
        others = {
            number: reason
            for number, reason in self.refusals.items()
            if not pointwise.is_pointwise(self.operators[number].call)
        }
        number, reason = max((others or self.refusals).items())
        return f"{self.operators[number].name}: {reason}"

    def levels_off(self, kind: ImageKind) -> int:
        """Return by how many uint8 levels the kernel may differ from torchvision: 0 or 2.

        torchvision resizes uint8 tensors in another arithmetic than PIL images, which changes with
        the CPU's vector width; two levels were measured, rarely (``docs/augment.md``).
        """
        inexact = (tensor and not part.exact_on_tensors for _, part, tensor in self.walk(kind))
        return TENSOR_LEVELS if any(inexact) else 0


def flatten(transform: Any, position: str = "") -> list[Operator]:
    """List the operators, seen through ``Compose``, ``Sequential`` and torchvision's presets."""
    kind = type(transform)
    container = (
        kind is nn.Sequential or pointwise.is_a(kind, ["Compose"]) or registry.is_preset(transform)
    )
    if not container or pointwise.is_marked(transform) or not pointwise.is_plain(transform):
        return [Operator(position or "0", transform)]
    if isinstance(transform, nn.Sequential):
        children = list(transform)
    else:
        preset = registry.is_preset(transform)
        children = registry.expand(transform) if preset else transform.transforms
    dot = f"{position}." if position else ""
    return [o for i, child in enumerate(children) for o in flatten(child, f"{dot}{i}")]


def cut(transform: Callable[[Any], Any], beyond: int = 0) -> Pipeline:
    """Flatten a transform and find the longest suffix that one kernel can do from raw pixels.

    Args:
        transform: what the user gave.
        beyond: how many of the first operators stay on the CPU whatever they are.

    Raises:
        PlanError: an operator with constants that cannot work.
    """
    operators = tuple(flatten(transform))
    calls = [operator.call for operator in operators]
    refusals: dict[int, str] = {}
    numbers = itertools.count()
    lowered: list[Lowered | str | None] = []
    for operator in operators:
        try:
            known = pointwise.is_pointwise(operator.call)
            lowered.append(None if known else registry.lower(operator.call, numbers))
        except PlanError as error:
            raise PlanError(f"operator {operator.position}: {error}") from error
    start = beyond
    while start < len(operators):
        bad = _first_misfit(calls, lowered, start)
        if bad is None:
            break
        number, reason = bad
        refusals[number] = reason
        start = number + 1
    fused = tuple(part for part in lowered[start:] if not isinstance(part, str))
    return Pipeline(operators, start, fused, refusals)


def _first_misfit(  # noqa: C901 # one branch a rule
    calls: Sequence[Any], lowered: Sequence[Lowered | str | None], start: int
) -> tuple[int, str] | None:
    """Return the number of the operator that a suffix from ``start`` on breaks at, and why."""
    begun = changed = erased = False
    for number in range(start, len(calls)):
        part = lowered[number]
        if isinstance(part, str):
            return number, part
        if part is None:
            if not begun and not pointwise.takes_uint8(calls[number]):
                return number, "pointwise, but no operator before it begins from raw pixels"
            begun = True
            changed = changed or not pointwise.keeps_levels(calls[number])
        elif part.stage == "erase":
            if not begun:
                return number, "it works on tensors, and no operator before it makes one"
            later = [calls[n] for n in range(number + 1, len(calls)) if lowered[n] is None]
            if part.draws_values and any(not pointwise.keeps_levels(call) for call in later):
                return number, "its random values go through operators behind it; move it last"
            if part.draws_values and not changed:
                return number, "it writes random values into levels; move it behind the scaling"
            erased = True
        elif erased:
            return number, "it moves what was erased before; move the erasing behind it"
        elif changed and not part.commutes:
            return number, "it stands behind operators that change the values; move it before them"
    return None if begun else (len(calls) - 1, "no operator such as ToTensor makes a tensor")


@dataclass
class Plan:
    """What runs where; ``print(plan)`` shows it.

    Attributes:
        pipeline: the transform; None where no torchvision transform was found.
        lookup: the fused suffix, or None where nothing is fused.
        kind: of the raw images, where something is fused.
        source: where raw pixels come from, in words.
        delivery: what makes the batch and where, in words.
        reason: why nothing, or not all, was lifted; empty where all was.
        notes: what else happened, and how often.
        deviations: samples that went through the original transform after all.
        batches: batches delivered so far.
    """

    pipeline: Pipeline | None = None
    lookup: Lookup | None = None
    kind: ImageKind | None = None
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
                part = self.pipeline.lowered[number - self.pipeline.cut]
                why = self._form(part) if self.fused else self.reason
            else:
                where, why = "cpu", self._cpu_reason(number)
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

    def _form(self, part: Lowered | None) -> str:
        if part is not None:
            return f"{part.stage}: steps drawn and composed per sample"
        if self.lookup is None or self.lookup.constants is None:
            return "pointwise: table of 256 levels"
        return "pointwise: arithmetic equal to the table of 256 levels"

    def _cpu_reason(self, number: int) -> str:
        pipeline = self.pipeline
        if pipeline is None:
            return ""
        if number in pipeline.refusals:
            return pipeline.refusals[number]
        last = pipeline.operators[pipeline.cut - 1]
        return f"runs before {last.name}, which stays on the CPU"

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
    expected = torch.stack([pipeline.run_pointwise(kind.build(image)) for image in pixels])
    expected = expected.as_subclass(torch.Tensor).to(lookup.dtype)
    return pointwise.same_bits(result.reshape(expected.shape), expected)
