"""The start of an epoch: the device is resolved, the kernel proved, and the route begun."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader as TorchDataLoader

from gpupipe import devices
from gpupipe.batch import assembler
from gpupipe.device import Device
from gpupipe.epochs import EpochBatches
from gpupipe.errors import DeviceError, PlanError
from gpupipe.fetching import LiftedFetcher
from gpupipe.file_sources import FileSource
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal
from gpupipe.plan import Pipeline, Plan
from gpupipe.planning import Found, find
from gpupipe.proving import prove_program
from gpupipe.recorded import RecordedBatches
from gpupipe.rendering import Stream
from gpupipe.resident import DeviceImages
from gpupipe.routes import ArrayRoute, FileRoute, proved
from gpupipe.sampling import IndexBatches, draw_base_seed, index_batches, may_repeat, start
from gpupipe.sources import ArraySource
from gpupipe.staging import Column
from gpupipe.state import Settings, State, Table
from gpupipe.tables import Layout, Lookup
from gpupipe.threads import cpu_count
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
    if found.plan.pipeline is not None and not found.plan.pipeline.is_pointwise:
        device = _device(devices.for_programs(device), state)
    _carry_over(found.plan, state)
    state.epochs += 1
    if found.source is not None:
        route = _array_route(found, settings, state, device)
        if route is not None:
            return _start(loader, route, settings, state)
    elif found.files is not None:
        files = _file_route(found, settings, state, device)
        if files is not None:
            return _start(loader, files, settings, state)
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
    if not _geometry_proved(plan_.pipeline, table, lookup, settings, device):
        plan_.lookup, plan_.reason = None, _DIFFERS
        return None
    where = device.torch_device
    cached = _cached(source, settings, state, device)
    plan_.delivery = f"gather and {_kernel(plan_.pipeline)} in one kernel on {_place(device)}" + (
        ", dataset on the device" if cached else ""
    )
    assemble, with_columns = assembler(source, where)
    return ArrayRoute(
        device,
        source,
        plan_.pipeline,
        table.kind,
        lookup,
        settings.memory_format,
        _columns(source) if with_columns else (),
        plan_,
        assemble,
        cached=cached,
    )


def _place(device: Device) -> str:
    """Say where the kernel runs."""
    where = str(device.torch_device)
    return f"the CPU, one copy to {where}" if devices.copies(device) else where


def _kernel(pipeline: Pipeline) -> str:
    return "normalize" if pipeline.is_pointwise else "resample"


def _columns(source: ArraySource | FileSource) -> tuple[Column, ...]:
    """Return what travels with the images."""
    return tuple(
        Column(column.shape[1:], torch.from_numpy(column[:0].copy()).dtype)
        for column in source.first.columns
    )


def _geometry_proved(
    pipeline: Pipeline, table: Table, lookup: Lookup, settings: Settings, device: Device
) -> bool:
    """Prove the steps of a pipeline, once on each device."""
    if pipeline.is_pointwise:
        return True
    key = (str(device.torch_device), settings.memory_format)
    if key not in table.geometry:
        table.geometry[key] = prove_program(
            device, pipeline, table.kind, lookup, settings.memory_format
        )
    return table.geometry[key]


def _file_route(found: Found, settings: Settings, state: State, device: Device) -> FileRoute | None:
    """Prove the kernel, and make the route; None where it differs from torchvision."""
    plan_, files, table = found.plan, found.files, found.table
    if plan_.pipeline is None or files is None or table is None:
        return None
    plan_.lookup = lookup = _proved(table, "NHWC", settings.memory_format, device)
    if lookup is None or not _geometry_proved(plan_.pipeline, table, lookup, settings, device):
        plan_.lookup, plan_.reason = None, _DIFFERS
        return None
    where = device.torch_device
    workers = state.threads(cpu_count() if settings.threads is None else settings.threads)
    how = f"decoded on {workers.threads} threads" if workers.threads else "decoded in line"
    plan_.delivery = f"{how}, resample in one kernel on {_place(device)}"
    assemble, with_columns = assembler(files, where)
    return FileRoute(
        device,
        files,
        plan_.pipeline,
        table.kind,
        lookup,
        settings.memory_format,
        _columns(files) if with_columns else (),
        plan_,
        assemble,
        workers,
        state.faults,
        fast=settings.fast,
    )


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
                if isinstance(table, Refusal) or pipeline.misfit(kind)
                else _kind_proved(table, pipeline, settings, device)
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
    plan_.delivery = f"dataset[i], then {_kernel(pipeline)} in one kernel on {_place(device)}"
    fetcher = LiftedFetcher(
        found.dataset,
        found.place,
        found.verdict.path,
        prefix=pipeline.prefix if pipeline.cut else None,
        suffix=pipeline.suffix,
    )
    batches = iter(() if loader.batch_sampler is None else loader.batch_sampler)
    state.base_seed = draw_base_seed(loader.generator)
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
        stream_of(loader, settings, state),
        strict=settings.strict,
    )


def _kind_proved(
    table: Table, pipeline: Pipeline, settings: Settings, device: Device
) -> Lookup | None:
    """Prove all of the fused part for one kind of image."""
    lookup = _proved(table, table.kind.layout, settings.memory_format, device)
    if lookup is None or not _geometry_proved(pipeline, table, lookup, settings, device):
        return None
    return lookup


def _cached(
    source: ArraySource, settings: Settings, state: State, device: Device
) -> DeviceImages | None:
    """Return the device's copy of the source, made when it is first asked for."""
    if settings.cache != "device" or device.torch_device.type == "cpu":
        return None
    if not device.is_async:
        raise DeviceError(
            f'cache="device" needs a kernel that runs on {device.torch_device}, and for this '
            "transform there is none; leave it out"
        )
    return state.device_copy(source, device)


def _start(
    loader: TorchDataLoader[Any], route: ArrayRoute | FileRoute, settings: Settings, state: State
) -> EpochBatches:
    """Draw what torch draws at ``iter()``, in its order, and begin."""
    length = len(loader.dataset)  # type: ignore[arg-type] # map-style
    workers = loader.num_workers
    indices: IndexBatches
    if loader.persistent_workers and state.persistent:
        indices = index_batches(loader.batch_sampler, length)
    else:
        indices, state.base_seed = start(
            loader.batch_sampler, loader.generator, length, num_workers=workers
        )
        state.persistent = loader.persistent_workers
    batches = route.iterate(
        indices, workers * (loader.prefetch_factor or 0), stream_of(loader, settings, state)
    )
    if workers:
        batches.top_up()  # with workers torch reads the sampler at iter()
    return batches


def stream_of(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Stream:
    """Return which random numbers this epoch takes."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    epoch = settings.epoch
    if epoch is None:
        own = getattr(sampler, "epoch", None)
        epoch = own if isinstance(own, int) else state.epochs - 1
    seed = state.base_seed if settings.seed is None else settings.seed
    rank, world = getattr(sampler, "rank", 0), getattr(sampler, "num_replicas", 1)
    known = isinstance(rank, int) and isinstance(world, int)
    return Stream(
        seed, epoch, may_repeat(loader.batch_sampler), *((rank, world) if known else (0, 1))
    )


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
