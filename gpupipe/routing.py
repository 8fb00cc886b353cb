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
from gpupipe.plan import Plan
from gpupipe.planning import Found, find
from gpupipe.recorded import RecordedBatches
from gpupipe.resident import DeviceImages
from gpupipe.routes import ArrayRoute, EpochBatches, feed_spec, proved
from gpupipe.sampling import IndexBatches, draw_base_seed, index_batches, start
from gpupipe.sources import ArraySource
from gpupipe.staging import Column
from gpupipe.state import Settings, State, Table
from gpupipe.tables import Layout, Lookup
from gpupipe.torch_route import TorchRoute, finisher

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
    device: Device = wanted if hasattr(wanted, "torch_device") else devices.resolve(wanted)
    for kept in state.devices:
        if type(kept) is type(device) and kept.torch_device == device.torch_device:
            return kept
    state.devices.append(device)
    return device


def _proved(
    table: Table, layout: Layout, memory_format: torch.memory_format, device: Device
) -> Lookup | None:
    """Prove the kernel for one table, once on each device."""
    key = (str(device.torch_device), layout, memory_format)
    if key not in table.proofs:
        table.proofs[key] = proved(
            device, table.pipeline, table.lookup, table.kind, layout, memory_format
        )
    return table.proofs[key]


def _array_route(
    found: Found, settings: Settings, state: State, device: Device
) -> ArrayRoute | None:
    """Prove the kernel, and make the route; None where it differs from torchvision."""
    plan_, source, table = found.plan, found.source, found.table
    if plan_.pipeline is None or source is None or table is None:
        return None
    layout: Layout = source.first.layout
    plan_.lookup = lookup = _proved(table, layout, settings.memory_format, device)
    if lookup is None:
        plan_.reason = _DIFFERS
        return None
    where = device.torch_device
    cached = _cached(source, settings, state, device)
    plan_.delivery = f"gather and normalize in one kernel on {where}" + (
        ", dataset on the device" if cached else ""
    )
    columns: tuple[Column, ...] = ()
    assemble, with_columns = assembler(source, where)
    if with_columns:
        columns = tuple(
            Column(column.shape[1:], torch.from_numpy(column[:0].copy()).dtype)
            for column in source.first.columns
        )
    spec = feed_spec(
        plan_.pipeline,
        lookup,
        table.kind,
        source.first.images.shape[1:],
        layout,
        settings.memory_format,
        columns,
    )
    return ArrayRoute(device, source, spec, plan_, assemble, cached=cached)


def _recorded(
    loader: TorchDataLoader[Any],
    found: Found,
    settings: Settings,
    state: State,
    device: Device,
) -> RecordedBatches | None:
    """Begin an epoch on the recorded route; None where the kernel differs from torchvision."""
    plan_, pipeline = found.plan, found.plan.pipeline
    if pipeline is None or found.place is None or found.verdict is None or found.table is None:
        return None
    known: dict[ImageKind, Lookup | None] = {}

    def lookup_for(kind: ImageKind) -> Lookup | None:
        if kind not in known:
            table = state.specified(pipeline, kind, settings.dtype)
            known[kind] = (
                None
                if isinstance(table, Refusal)
                else _proved(table, kind.layout, settings.memory_format, device)
            )
        return known[kind]

    plan_.lookup = lookup_for(found.table.kind)
    if plan_.lookup is None:
        plan_.reason = _DIFFERS
        return None
    if settings.strict and pipeline.cut:
        raise PlanError(
            f"not all of the transform is fused: {pipeline.operators[0].name} runs on the CPU; "
            "leave strict=True out, or take the operator away"
        )
    plan_.delivery = f"dataset[i], then normalize in one kernel on {device.torch_device}"
    fetcher = LiftedFetcher(
        found.dataset,
        found.place,
        found.verdict.path,
        prefix=pipeline.prefix if pipeline.cut else None,
        suffix=pipeline.suffix,
    )
    batches = iter(() if loader.batch_sampler is None else loader.batch_sampler)
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
        strict=settings.strict,
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
    return state.device_copy(source, device)


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
    batches = route.iterate(indices, workers * (loader.prefetch_factor or 0))
    if workers:
        batches.top_up()  # with workers torch reads the sampler at iter()
    return batches


def _torch_route(loader: TorchDataLoader[Any], found: Found, state: State) -> TorchRoute:
    """Return torch's own loader; with persistent workers the same one for the same dataset."""
    route = TorchRoute(loader, found.dataset)
    if not (loader.persistent_workers and loader.num_workers > 0):
        return route
    if state.torch_route is None or not state.torch_route.serves(route):
        state.torch_route = route
    return state.torch_route


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
