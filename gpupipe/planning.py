"""From a loader's arguments to the route its batches take, each time iteration begins.

The transform and the raw data are read again at each ``iter()``, so that whatever the user changed
meanwhile holds. What was compiled and proved for the same operators is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, default_collate

from gpupipe import devices, sources
from gpupipe.batch import assembler
from gpupipe.devices import Device
from gpupipe.errors import DeviceError, GpupipeWarning, PlanError
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal
from gpupipe.plan import Pipeline, Plan, cut, specify
from gpupipe.resident import DeviceImages
from gpupipe.routes import ArrayRoute, EpochBatches, TorchRoute, feed_spec, finisher, proved
from gpupipe.sampling import IndexBatches, index_batches, start
from gpupipe.sources import ArraySource
from gpupipe.staging import Column
from gpupipe.tables import Layout, Lookup
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
    kept: dict[Any, Pipeline] = field(default_factory=dict)
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
        source: the arrays, where the array route is taken.
        kind: how an image reaches the transform.
        pipeline: the transform.
        lookup: the fused part.
        dataset: what torch's own loader iterates over.
    """

    plan: Plan
    dataset: Any
    source: ArraySource | None = None
    kind: ImageKind | None = None


def plan(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Plan:
    """Return what will run where, without touching a device."""
    if state.last is not None:
        return state.last
    return find(loader, settings, state).plan


def begin(loader: TorchDataLoader[Any], settings: Settings, state: State) -> EpochBatches:
    """Begin an epoch on the route that the arguments allow.

    Raises:
        PlanError: constants that cannot work; with ``strict``, anything that is not fused.
        DeviceError: a device that is not there.
    """
    device = _device(settings.device, state)
    found = find(loader, settings, state)
    _carry_over(found.plan, state)
    if found.source is not None and found.plan.lookup is not None:
        route = _array_route(found, settings, state, device)
        if route is not None:
            return _start(loader, route, state)
    _say_if_not_lifted(found, settings, state)
    where = device.torch_device
    found.plan.delivery = f"torch's own loader, then to {where}"
    return _torch_route(loader, found, state).iterate(
        finisher(where, settings.dtype, settings.memory_format), found.plan
    )


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
        found.plan.reason = reason
    else:
        found.plan.reason = source
    return found


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
    lookup = _specify(pipeline, kind, settings.dtype, state)
    if isinstance(lookup, Refusal):
        return str(lookup)
    found.plan.lookup = lookup
    found.plan.delivery = "gather and normalize in one kernel"
    found.source, found.kind = source, kind
    return ""


def _specify(
    pipeline: Pipeline, kind: ImageKind, dtype: torch.dtype | None, state: State
) -> Lookup | Refusal:
    key = (pipeline.fingerprint, kind, dtype)
    if key not in state.lookups:
        try:
            state.lookups[key] = specify(pipeline, kind, dtype)
        except Refusal as refusal:
            state.lookups[key] = refusal
        state.kept[key] = pipeline  # so that no id in the key is used again
    return state.lookups[key]


def _device(wanted: Any, state: State) -> Device:
    """Resolve the device; keep it, for its memory is used again."""
    if isinstance(wanted, (str, int, torch.device, type(None))):
        device: Device = devices.resolve(wanted)
    else:
        device = wanted
    return state.devices.setdefault((type(device), device.torch_device), device)


def _array_route(
    found: Found, settings: Settings, state: State, device: Device
) -> ArrayRoute | None:
    """Prove the kernel, and make the route; None where it differs from torchvision."""
    plan_, source, kind = found.plan, found.source, found.kind
    if plan_.pipeline is None or plan_.lookup is None or source is None or kind is None:
        return None
    layout: Layout = source.first.layout
    key = (plan_.pipeline.fingerprint, kind, settings, layout, str(device.torch_device))
    if key not in state.proofs:
        state.proofs[key] = proved(
            device, plan_.pipeline, plan_.lookup, kind, layout, settings.memory_format
        )
        state.kept[key] = plan_.pipeline
    lookup = state.proofs[key]
    if lookup is None:
        plan_.lookup = None
        plan_.reason = "the kernel differs from the installed torchvision on this machine"
        return None
    plan_.lookup = lookup
    where = device.torch_device
    cached = _cached(source, settings, state, device)
    plan_.delivery = f"gather and normalize in one kernel on {where}" + (
        ", dataset on the device" if cached else ""
    )
    columns = ()
    if assembler(source, where)[1]:
        columns = tuple(
            Column(column.shape[1:], torch.from_numpy(column[:0]).dtype)
            for column in source.first.columns
        )
    image_shape = source.first.images.shape[1:]
    spec = feed_spec(
        plan_.pipeline, lookup, kind, image_shape, layout, settings.memory_format, columns
    )
    return ArrayRoute(device, source, spec, plan_, cached=cached)


def _cached(
    source: ArraySource, settings: Settings, state: State, device: Device
) -> DeviceImages | None:
    """Return the device's copy of the source, made when it is first asked for."""
    if settings.cache != "device" or device.torch_device.type == "cpu":
        return None
    if not device.is_async:
        raise DeviceError(
            f'cache="device" needs a kernel on {device.torch_device}, which has none; leave it out'
        )
    arrays = [array for part in source.parts for array in (part.images, *part.columns)]
    key = tuple((array.__array_interface__["data"][0], array.shape) for array in arrays)
    if state.cached is None or state.cached[0] != key:
        state.cached = None  # the old copy goes before the new one comes
        state.cached = (key, DeviceImages(source, device))
    return state.cached[1]


def _start(loader: TorchDataLoader[Any], route: ArrayRoute, state: State) -> EpochBatches:
    """Draw what torch draws at ``iter()``, in its order, and begin."""
    length = len(loader.dataset)  # type: ignore[arg-type] # map-style
    workers = loader.num_workers
    indices: IndexBatches
    if loader.persistent_workers and state.persistent:
        indices = index_batches(loader.batch_sampler, length)
    else:
        indices, _ = start(loader.batch_sampler, loader.generator, length, num_workers=workers)
        state.persistent = loader.persistent_workers
    free_ahead = workers * (loader.prefetch_factor or 0)
    batches = route.iterate(indices, loader.batch_size or 1, free_ahead)
    if workers:
        batches.top_up()  # with workers torch reads the sampler at iter()
    return batches


def _torch_route(loader: TorchDataLoader[Any], found: Found, state: State) -> TorchRoute:
    """Return torch's own loader, the same one for the same dataset: it may hold workers."""
    with_indices = bool(getattr(loader, "return_indices", False))
    dataset = found.dataset
    same = getattr(dataset, "identity", id(dataset))
    key = (same, id(loader.collate_fn), loader.num_workers, with_indices)
    if state.torch_route is None or state.torch_route[0] != key:
        state.torch_route = (key, TorchRoute(loader, dataset, with_indices=with_indices))
    return state.torch_route[1]


def _carry_over(plan_: Plan, state: State) -> None:
    """Go on counting where the last epoch's plan stopped."""
    if state.last is not None:
        plan_.batches, plan_.deviations = state.last.batches, state.last.deviations
    state.last = plan_


def _say_if_not_lifted(found: Found, settings: Settings, state: State) -> None:
    """Warn once, or raise if the user was strict."""
    if settings.transform is None:
        return
    message = (
        f"nothing was fused: {found.plan.reason}; the batches are torch's own, at torch's speed "
        "(print(loader.plan) shows more; transform=None says that this is meant)"
    )
    if settings.strict:
        raise PlanError(message)
    state.warn(message)
