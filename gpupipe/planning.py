"""What a loader's arguments allow: where raw pixels come from, and what can be fused.

Nothing here touches a device, so ``print(loader.plan)`` works everywhere. The transform and the raw
data are read again each time; what was compiled for the same operators is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, default_collate

from gpupipe import file_sources, sources
from gpupipe.file_sources import FileSource
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal, same_bits
from gpupipe.places import Place, places
from gpupipe.plan import Pipeline, Plan, cut
from gpupipe.probe import Verdict, probe
from gpupipe.sources import ArraySource
from gpupipe.state import Settings, State, Table
from gpupipe.transformed import Transformed


@dataclass
class Found:
    """What reading the loader's arguments gave.

    Attributes:
        plan: for people.
        dataset: what torch's own loader iterates over.
        table: the specified pipeline, where one of our routes is taken.
        source: the arrays, where the array route is taken.
        files: the encoded images, where the file route is taken.
        verdict: what the probe found, where the recorded route is taken.
        place: where the transform stands then.
    """

    plan: Plan
    dataset: Any
    table: Table | None = None
    source: ArraySource | None = None
    files: FileSource | None = None
    verdict: Verdict | None = None
    place: Place | None = None


def plan(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Plan:
    """Return what will run where, without touching a device."""
    now = find(loader, settings, state).plan
    if state.last is not None and state.last.describes(now):
        return state.last
    return now


def find(loader: TorchDataLoader[Any], settings: Settings, state: State) -> Found:
    """Read the dataset and its transform; decide what can be fused."""
    dataset: Any = file_sources.as_dataset(loader.dataset)
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
        files = file_sources.resolve(dataset)
        reason = (
            files
            if isinstance(files, str)
            else _use_files(found, files, explicit, loader, settings, state)
        )
        if not reason:
            return found
        if isinstance(files, str):
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
        plan_.reason = (
            "the dataset holds no torchvision transform; pass transform="
            if explicit is None
            else f"{explicit!r} is no torchvision transform; gpupipe.pointwise marks your own"
        )
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
    verdict = _probed(found.dataset, candidates, pipelines, state)
    if not verdict.ok or verdict.place is None:
        plan_.reason = verdict.reason
        return
    place = next(p for p in candidates if p.transform is verdict.place.transform)
    plan_.pipeline = pipelines[place]
    kind = verdict.kinds[0]
    if (bad := plan_.pipeline.misfit(kind)) is not None:
        plan_.reason = f"{plan_.pipeline.operators[bad[0]].name}: {bad[1]}"
        return
    table = state.specified(plan_.pipeline, kind, settings.dtype, verdict.sizes[0])
    if isinstance(table, Refusal):
        plan_.reason = str(table)
        return
    plan_.lookup, plan_.kind = table.lookup, kind
    plan_.delivery = "dataset[i] without its fused part, then one kernel"
    found.verdict, found.place, found.table = verdict, place, table


def _probed(
    dataset: Any, candidates: list[Place], pipelines: dict[Place, Pipeline], state: State
) -> Verdict:
    """Probe a dataset, once for the same operators."""
    operators = [o.call for place in candidates for o in pipelines[place].operators]
    verdict = state.verdict(operators)
    if verdict is None:
        splits = {
            place: (pipeline.prefix if pipeline.cut else None, pipeline.suffix)
            for place, pipeline in pipelines.items()
        }
        verdict = probe(dataset, candidates, splits=splits)
        state.keep_verdict(operators, verdict)
    return verdict


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
    if any(part.target_transform for part in source.parts) and loader.num_workers > 0:
        return "a target_transform runs in torch's worker processes, which may draw random numbers"
    shape = " + ".join(str(tuple(part.images.shape)) for part in source.parts)
    found.plan.source = f"raw uint8 {shape} of {type(loader.dataset).__name__}, {source.place}"
    pipeline = found.plan.pipeline = fitting(transform, source.first.kind)
    if pipeline.cut == len(pipeline.operators):
        return pipeline.why_not()
    if pipeline.cut:
        return "operators before the fused ones run on the CPU"
    if loader.collate_fn is not default_collate:
        return "a collate_fn of the user's own"
    kind, axes = source.first.kind, dict(zip(source.first.layout, shape_of(source), strict=True))
    table = state.specified(pipeline, kind, settings.dtype, (axes["H"], axes["W"]))
    if isinstance(table, Refusal):
        return str(table)
    for other in transforms[1:] if explicit is None else ():
        if other is not transform and not (
            pipeline.is_pointwise and _alike(other, table, settings, state)
        ):
            return "its parts have different transforms"
    found.plan.lookup, found.plan.kind = table.lookup, kind
    found.plan.delivery = "gather and normalize in one kernel"
    found.source, found.table = source, table
    return ""


def _use_files(
    found: Found,
    files: FileSource,
    explicit: Callable[[Any], Any] | None,
    loader: TorchDataLoader[Any],
    settings: Settings,
    state: State,
) -> str:
    """Take the file route if the transform allows it; else say why not."""
    if explicit is not None and files.transform is not None:
        return "the dataset has a transform of its own before the one that was passed"
    transform = files.transform if explicit is None else explicit
    if transform is None:
        return "the dataset has no transform; pass transform="
    if files.mode != "RGB":
        return "its images keep the mode of their file"
    if files.target_transform is not None and loader.num_workers > 0:
        return "a target_transform runs in torch's worker processes, which may draw random numbers"
    if loader.collate_fn is not default_collate:
        return "a collate_fn of the user's own"
    kind = ImageKind("PIL", 3, "NHWC", "RGB")
    pipeline = fitting(transform, kind)
    if pipeline.cut == len(pipeline.operators):
        found.plan.pipeline = pipeline
        return pipeline.why_not()
    if pipeline.cut:
        return "operators before the fused ones run on the CPU"
    table = state.specified(pipeline, kind, settings.dtype)
    if isinstance(table, Refusal):
        return str(table)
    found.plan.pipeline = pipeline
    found.plan.source = f"{len(files)} {files.description} of {type(loader.dataset).__name__}"
    found.plan.lookup, found.plan.kind = table.lookup, kind
    found.plan.delivery = "decoded on threads, then one kernel"
    found.files, found.table = files, table
    return ""


def fitting(transform: Callable[[Any], Any], kind: ImageKind) -> Pipeline:
    """Cut a transform so that images of a kind can go through the fused part.

    Raises:
        PlanError: an operator with constants that cannot work.
    """
    pipeline = cut(transform)
    refusals = dict(pipeline.refusals)
    while (bad := pipeline.misfit(kind)) is not None:
        number, reason = bad
        refusals[number] = reason
        pipeline = cut(transform, beyond=number + 1)
        refusals = pipeline.refusals | refusals
        pipeline = replace(pipeline, refusals=refusals)
    return pipeline


def shape_of(source: ArraySource) -> tuple[int, ...]:
    """Return the shape of the first part's images, in its layout."""
    return tuple(source.first.images.shape)


def _alike(transform: Any, table: Table, settings: Settings, state: State) -> bool:
    """Whether another part's transform gives the same values at every level."""
    if transform is None:
        return False
    pipeline = cut(transform)
    other = state.specified(pipeline, table.kind, settings.dtype)
    if pipeline.cut or isinstance(other, Refusal):
        return False
    return same_bits(other.lookup.values, table.lookup.values)
