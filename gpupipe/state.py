"""What a loader keeps from one epoch to the next, and when it still holds.

Everything is compared by the objects and values it was made from, which are kept with it: an
address or a printed form may come again for something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpupipe import notices
from gpupipe.device import Device
from gpupipe.faults import Faults
from gpupipe.images import ImageKind
from gpupipe.operators import pointwise
from gpupipe.operators.pointwise import Refusal
from gpupipe.plan import Pipeline, Plan, specify
from gpupipe.probe import Verdict
from gpupipe.resident import DeviceImages
from gpupipe.sources import ArraySource
from gpupipe.tables import Layout, Lookup
from gpupipe.torch_route import TorchRoute
from gpupipe.workers import Workers

MOST_TABLES = 16
"""Pipelines that are remembered; a transform that is new at each epoch does not pile up."""


@dataclass(frozen=True)
class Settings:
    """The loader's own arguments; see ``DataLoader``."""

    transform: Any
    device: Any
    dtype: torch.dtype | None
    memory_format: torch.memory_format
    cache: str | None
    strict: bool
    seed: int | None = None
    epoch: int | None = None
    threads: int | None = None
    fast: bool = False


@dataclass
class Table:
    """One specified pipeline, and what was proved of it.

    Attributes:
        pipeline: what it was made from.
        kind: of the images.
        dtype: that was asked for.
        levels: torchvision's result for all levels, before rounding to ``dtype``.
        lookup: the specification.
        proofs: by device, layout and memory format, what the kernel may evaluate; None: nothing.
        geometry: by device and memory format, whether the steps gave torchvision's bits.
    """

    pipeline: Pipeline
    kind: ImageKind
    dtype: torch.dtype | None
    levels: torch.Tensor
    lookup: Lookup
    proofs: dict[tuple[str, Layout, torch.memory_format], Lookup | None] = field(
        default_factory=dict
    )
    geometry: dict[tuple[str, torch.memory_format], bool] = field(default_factory=dict)


@dataclass
class State:
    """See the module."""

    tables: list[Table] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    torch_route: TorchRoute | None = None
    warned: set[str] = field(default_factory=set)
    last: Plan | None = None
    persistent: bool = False
    epochs: int = 0
    base_seed: int = 0
    workers: Workers | None = None
    faults: Faults = field(default_factory=Faults)
    _verdict: tuple[list[Any], Verdict] | None = None
    _copy: tuple[list[NDArray[Any]], list[NDArray[Any]], DeviceImages] | None = None

    @property
    def deviations(self) -> int:
        """Samples so far that went through the original transform."""
        return 0 if self.last is None else self.last.deviations

    def threads(self, wanted: int) -> Workers:
        """Return the decode threads, the same ones at every epoch."""
        if self.workers is None or self.workers.threads != wanted:
            if self.workers is not None:
                self.workers.close()
            self.workers = Workers(wanted)
        return self.workers

    def warn(self, message: str) -> None:
        """Warn once in the life of the loader."""
        if message not in self.warned:
            self.warned.add(message)
            notices.warn(message)

    def specified(
        self,
        pipeline: Pipeline,
        kind: ImageKind,
        dtype: torch.dtype | None,
        size: tuple[int, int] | None = None,
    ) -> Table | Refusal:
        """Specify the fused part for one kind of image, or say why it cannot be.

        torchvision is asked for all levels each time, so that a changed operator shows.

        Raises:
            PlanError: wrong constants, or a callable that is marked pointwise and is not.
        """
        try:
            for table in self.tables:
                if (table.kind, table.dtype) != (kind, dtype) or not pipeline.same_as(
                    table.pipeline
                ):
                    continue
                marked = any(map(pointwise.is_marked, pipeline.fused_calls))
                now = pointwise.levels(pipeline.fused_calls, kind)
                if not marked and pointwise.same_bits(now, table.levels):
                    return table
            lookup = specify(pipeline, kind, dtype, size)
        except Refusal as refusal:
            return refusal
        for table in self.tables:
            if table.kind == kind and pointwise.same_bits(table.lookup.values, lookup.values):
                lookup, proofs = table.lookup, table.proofs
                break
        else:
            proofs = {}
        levels = pointwise.levels(pipeline.fused_calls, kind)
        self.tables = [
            table
            for table in self.tables
            if (table.kind, table.dtype) != (kind, dtype) or not pipeline.same_as(table.pipeline)
        ]
        self.tables.append(Table(pipeline, kind, dtype, levels, lookup, proofs))
        del self.tables[:-MOST_TABLES]
        return self.tables[-1]

    def verdict(self, operators: list[Any]) -> Verdict | None:
        """Return what the probe found for the same operator objects."""
        if self._verdict is None or len(self._verdict[0]) != len(operators):
            return None
        same = all(a is b for a, b in zip(self._verdict[0], operators, strict=True))
        return self._verdict[1] if same else None

    def keep_verdict(self, operators: list[Any], verdict: Verdict) -> None:
        """Remember what the probe found."""
        self._verdict = operators, verdict

    def device_copy(self, source: ArraySource, device: Device) -> DeviceImages:
        """Return a device's copy of a source, made anew when other arrays came.

        The same memory is taken for the same images: pixels that are changed in place are not seen.
        Labels are compared.
        """
        images: list[NDArray[Any]] = [part.images for part in source.parts]
        columns = [column for part in source.parts for column in part.columns]
        if self._copy is not None:
            kept_images, kept_columns, copy = self._copy
            if (
                copy.device is device
                and _same(kept_images, images, _same_memory)
                and _same(kept_columns, columns, np.array_equal)
            ):
                return copy
        self._copy = None  # the old copy goes before the new one comes
        copy = DeviceImages(source, device)
        # The arrays are kept alive: their addresses cannot come again for others.
        self._copy = images, [column.copy() for column in columns], copy
        return copy


def _same(old: Sequence[NDArray[Any]], new: Sequence[NDArray[Any]], alike: Any) -> bool:
    return len(old) == len(new) and all(alike(a, b) for a, b in zip(old, new, strict=True))


def _same_memory(old: NDArray[Any], new: NDArray[Any]) -> bool:
    one, other = old.__array_interface__, new.__array_interface__
    return all(one[key] == other[key] for key in ("data", "shape", "strides", "typestr"))
