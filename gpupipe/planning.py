"""What a loader's arguments allow: where raw pixels come from, and what can be fused.

Nothing here touches a device, so ``print(loader.plan)`` works everywhere. The transform and the raw
data are read again each time; what was compiled for the same operators is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, default_collate

from gpupipe import sources
from gpupipe.devices import Device
from gpupipe.errors import GpupipeWarning
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal
from gpupipe.places import Place, places
from gpupipe.plan import Pipeline, Plan, cut, specify
from gpupipe.probe import Verdict, probe
from gpupipe.resident import DeviceImages
from gpupipe.routes import TorchRoute
from gpupipe.sources import ArraySource
from gpupipe.tables import Lookup
from gpupipe.transformed import Transformed


@dataclass(frozen=True)
class Settings:
    """The loader's own arguments; see ``DataLoader``."""

    transform: Any
    device: Any
    dtype: torch.dtype | None
    memory_format: torch.memory_format
    cache: str | None
    strict: bool


@dataclass
class State:
    """What a loader keeps from one iteration to the next."""

    lookups: dict[Any, Lookup | Refusal] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)
    verdicts: dict[Any, Verdict] = field(default_factory=dict)
    proofs: dict[Any, Lookup | None] = field(default_factory=dict)
    devices: dict[Any, Device] = field(default_factory=dict)
    cached: tuple[Any, DeviceImages] | None = None
    torch_route: tuple[Any, TorchRoute] | None = None
    warned: set[str] = field(default_factory=set)
    last: Plan | None = None
    persistent: bool = False

    @property
    def deviations(self) -> int:
        """Samples of the latest plan that went through the original transform."""
        return 0 if self.last is None else self.last.deviations

    def warn(self, message: str) -> None:
        """Warn once in the life of the loader."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, GpupipeWarning, stacklevel=5)


@dataclass
class Found:
    """What reading the loader's arguments gave.

    Attributes:
        plan: for people.
        dataset: what torch's own loader iterates over.
        source: the arrays, where the array route is taken.
        kind: how an image reaches the transform.
        verdict: what the probe found, where the recorded route is taken.
    """

    plan: Plan
    dataset: Any
    source: ArraySource | None = None
    kind: ImageKind | None = None
    verdict: Verdict | None = None
    place: Place | None = None


def plan(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Plan:
    """Return what will run where, without touching a device."""
    if state.last is not None:
        return state.last
    return find(loader, settings, state).plan


def find(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Found:
    """Read the dataset and its transform; decide what can be fused."""
    dataset: Any = loader.dataset
    explicit = settings.transform if callable(settings.transform) else None
    found = Found(Plan(), dataset)
    found.plan.delivery = "torch's own loader"
    if settings.transform is None:
        found.plan.reason = "transform=None"
        return found
    if explicit is not None:
        found.dataset = Transformed.of(dataset, explicit)
    if isinstance(dataset, IterableDataset):
        found.plan.reason = "an IterableDataset makes its own samples"
        return found
    if loader.batch_sampler is None:
        found.plan.reason = "batch_size=None: there are no batches"
        return found
    source = sources.resolve(dataset)
    if isinstance(source, ArraySource):
        reason = _use_source(found, source, explicit, loader, settings, state)
        if not reason:
            return found
    else:
        reason = source
    _use_recorder(found, explicit, loader, settings, state, reason)
    return found


def _use_recorder(
    found: Found,
    explicit: Callable[[Any], Any] | None,
    loader: TorchDataLoader[Any],
    settings: Settings,
    state: State,
    arrays: str,
) -> None:
    """Look for the transform in the dataset and prove that it can be lifted from there."""
    plan_ = found.plan
    plan_.source = f"dataset[i] of {type(loader.dataset).__name__}: {arrays}"
    candidates = [
        place for place in places(found.dataset) if explicit is None or place.transform is explicit
    ]
    pipelines = {place: cut(place.transform) for place in candidates}
    if len(candidates) == 1:
        plan_.pipeline = pipelines[candidates[0]]
    if not candidates:
        plan_.reason = "the dataset holds no torchvision transform; pass transform="
        return
    fusable = [p for p in pipelines.values() if p.cut < len(p.operators)]
    if not fusable:
        plan_.reason = next(iter(pipelines.values())).why_not()
        return
    if loader.num_workers > 0:
        plan_.reason = (
            f"num_workers={loader.num_workers}: the dataset's own Python runs in torch's worker "
            "processes, its transform with it; lifting it from there is not done yet"
        )
        return
    key = ("probe", tuple((place.path, pipelines[place].fingerprint) for place in candidates))
    if key not in state.verdicts:
        splits = {
            place: (pipeline.prefix if pipeline.cut else None, pipeline.suffix)
            for place, pipeline in pipelines.items()
        }
        # The places themselves belong to this reading of the dataset: keep the paths.
        state.verdicts[key] = probe(found.dataset, candidates, splits=splits)
        state.kept[key] = pipelines
    verdict = state.verdicts[key]
    if not verdict.ok or verdict.place is None:
        plan_.reason = verdict.reason
        return
    place = next(p for p in candidates if p.transform is verdict.place.transform)
    plan_.pipeline = pipelines[place]
    kind = verdict.kinds[0]
    lookup = specified(plan_.pipeline, kind, settings.dtype, state)
    if isinstance(lookup, Refusal):
        plan_.reason = str(lookup)
        return
    plan_.lookup = lookup
    plan_.delivery = "dataset[i] without its pointwise part, then normalize in one kernel"
    found.verdict, found.kind, found.place = verdict, kind, place


def _use_source(
    found: Found,
    source: ArraySource,
    explicit: Callable[[Any], Any] | None,
    loader: TorchDataLoader[Any],
    settings: Settings,
    state: State,
) -> str:
    """Take the array route if the transform allows it; else say why not."""
    transforms = [part.transform for part in source.parts]
    if explicit is not None and any(transform is not None for transform in transforms):
        return "the dataset has a transform of its own before the one that was passed"
    transform = transforms[0] if explicit is None else explicit
    if transform is None:
        return "the dataset has no transform; pass transform="
    if any(other is not transforms[0] for other in transforms):
        return "its parts have different transforms"
    shape = " ".join(str(tuple(part.images.shape)) for part in source.parts)
    found.plan.source = f"raw uint8 {shape} of {type(loader.dataset).__name__}, in memory"
    pipeline = found.plan.pipeline = cut(transform)
    if pipeline.cut == len(pipeline.operators):
        return pipeline.why_not()
    if pipeline.cut:
        return "operators before the pointwise ones run on the CPU"
    if loader.collate_fn is not default_collate:
        return "a collate_fn of the user's own"
    kind = source.first.kind
    lookup = specified(pipeline, kind, settings.dtype, state)
    if isinstance(lookup, Refusal):
        return str(lookup)
    found.plan.lookup = lookup
    found.plan.delivery = "gather and normalize in one kernel"
    found.source, found.kind = source, kind
    return ""


def specified(
    pipeline: Pipeline, kind: ImageKind, dtype: torch.dtype | None, state: State
) -> Lookup | Refusal:
    """Tabulate the fused part for one kind of image, once; say why where it cannot be."""
    key = (pipeline.fingerprint, kind, dtype)
    if key not in state.lookups:
        try:
            state.lookups[key] = specify(pipeline, kind, dtype)
        except Refusal as refusal:
            state.lookups[key] = refusal
        state.kept[key] = pipeline  # so that no id in the key is used again
    return state.lookups[key]
