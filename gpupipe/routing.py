"""The start of an epoch: the device is resolved, the kernel proved, and the route begun."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader as TorchDataLoader

from gpupipe import devices
from gpupipe.batch import assembler
from gpupipe.devices import Device
from gpupipe.errors import DeviceError, PlanError
from gpupipe.fetching import LiftedFetcher
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal
from gpupipe.plan import Pipeline, Plan
from gpupipe.planning import Found, Settings, State, find, specified
from gpupipe.recorded import RecordedBatches
from gpupipe.resident import DeviceImages
from gpupipe.routes import ArrayRoute, EpochBatches, TorchRoute, feed_spec, finisher, proved
from gpupipe.sampling import IndexBatches, draw_base_seed, index_batches, start
from gpupipe.sources import ArraySource
from gpupipe.staging import Column
from gpupipe.tables import Layout, Lookup

_DIFFERS = "the kernel differs from the installed torchvision on this machine"


def begin(loader: TorchDataLoader[Any], settings: Settings, state: State) -> EpochBatches:
    """Begin an epoch on the route that the arguments allow.

    Raises:
        PlanError: constants that cannot work; with ``strict``, anything that is not fused.
        DeviceError: a device that is not there.
    """
    device = _device(settings.device, state)
    found = find(loader, settings, state)
    _carry_over(found.plan, state)
    if found.source is not None:
        route = _array_route(found, settings, state, device)
        if route is not None:
            return _start(loader, route, state)
    elif found.verdict is not None:
        batches = _recorded(loader, found, settings, state, device)
        if batches is not None:
            return batches
    _say_if_not_lifted(found, settings, state)
    where = device.torch_device
    found.plan.delivery = f"torch's own loader, then to {where}"
    return _torch_route(loader, found, state).iterate(
        finisher(where, settings.dtype, settings.memory_format), found.plan
    )


def _device(wanted: Any, state: State) -> Device:
    """Resolve the device; keep it, for its memory is used again."""
    if isinstance(wanted, (str, int, torch.device, type(None))):
        device: Device = devices.resolve(wanted)
    else:
        device = wanted
    return state.devices.setdefault((type(device), device.torch_device), device)


def _proved(
    pipeline: Pipeline,
    lookup: Lookup,
    kind: ImageKind,
    layout: Layout,
    settings: Settings,
    state: State,
    device: Device,
) -> Lookup | None:
    """Prove the kernel for one kind of image, once."""
    key = (pipeline.fingerprint, kind, settings, layout, str(device.torch_device))
    if key not in state.proofs:
        state.proofs[key] = proved(device, pipeline, lookup, kind, layout, settings.memory_format)
        state.kept[key] = pipeline
    return state.proofs[key]


def _array_route(
    found: Found, settings: Settings, state: State, device: Device
) -> ArrayRoute | None:
    """Prove the kernel, and make the route; None where it differs from torchvision."""
    plan_, source, kind = found.plan, found.source, found.kind
    if plan_.pipeline is None or plan_.lookup is None or source is None or kind is None:
        return None
    layout: Layout = source.first.layout
    lookup = _proved(plan_.pipeline, plan_.lookup, kind, layout, settings, state, device)
    plan_.lookup = lookup
    if lookup is None:
        plan_.reason = _DIFFERS
        return None
    where = device.torch_device
    cached = _cached(source, settings, state, device)
    plan_.delivery = f"gather and normalize in one kernel on {where}" + (
        ", dataset on the device" if cached else ""
    )
    columns: tuple[Column, ...] = ()
    if assembler(source, where)[1]:
        columns = tuple(
            Column(column.shape[1:], torch.from_numpy(column[:0].copy()).dtype)
            for column in source.first.columns
        )
    image_shape = source.first.images.shape[1:]
    spec = feed_spec(
        plan_.pipeline, lookup, kind, image_shape, layout, settings.memory_format, columns
    )
    return ArrayRoute(device, source, spec, plan_, cached=cached)


def _recorded(
    loader: TorchDataLoader[Any],
    found: Found,
    settings: Settings,
    state: State,
    device: Device,
) -> RecordedBatches | None:
    """Begin an epoch on the recorded route; None where the kernel differs from torchvision."""
    plan_, pipeline = found.plan, found.plan.pipeline
    if pipeline is None or found.place is None or found.verdict is None or found.kind is None:
        return None

    def lookup_for(kind: ImageKind) -> Lookup | None:
        lookup = specified(pipeline, kind, settings.dtype, state)
        if isinstance(lookup, Refusal):
            return None
        return _proved(pipeline, lookup, kind, kind.layout, settings, state, device)

    plan_.lookup = lookup_for(found.kind)
    if plan_.lookup is None:
        plan_.reason = _DIFFERS
        return None
    plan_.delivery = f"dataset[i], then normalize in one kernel on {device.torch_device}"
    fetcher = LiftedFetcher(
        found.dataset,
        found.place,
        found.verdict.path,
        prefix=pipeline.prefix if pipeline.cut else None,
        suffix=pipeline.suffix,
    )
    batches = iter(loader.batch_sampler or ())
    draw_base_seed(loader.generator)
    return RecordedBatches(
        batches,
        found.dataset,
        fetcher,
        loader.collate_fn,
        pipeline,
        lookup_for,
        device,
        settings.memory_format,
        finisher(device.torch_device, settings.dtype, settings.memory_format),
        plan_,
        state.warn,
    )


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
