"""``verify(loader)``: the loader's batches against torchvision's own, bit by bit."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, zip_longest
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from gpupipe import devices, trees
from gpupipe.batch import restyle
from gpupipe.errors import GpupipeWarning, InputError, VerificationError
from gpupipe.loader import DataLoader
from gpupipe.operators.pointwise import same_bits
from gpupipe.replay import ReplayDataset
from gpupipe.rng import RngState
from gpupipe.transformed import Transformed


@dataclass(frozen=True)
class Row:
    """One item of the batches, such as the images, compared over all samples.

    Attributes:
        path: where in a batch it lies.
        dtype: of the tensors, or the type of what is no tensor.
        shape: of one sample's.
        samples: compared.
        different: of them with at least one other bit.
        worst: largest absolute difference.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    samples: int
    different: int
    worst: float


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found; ``print`` it.

    Attributes:
        rows: one per item of a batch.
        fused: whether a kernel of ours made the images.
        reason: why not, if not.
        deviations: compared samples that went through the original transform.
    """

    rows: tuple[Row, ...]
    fused: bool
    reason: str
    deviations: int

    @property
    def ok(self) -> bool:
        """Whether every bit was the same."""
        return all(row.different == 0 for row in self.rows)

    def check(self) -> None:
        """Raise if anything differed.

        Raises:
            VerificationError: with the table.
        """
        if not self.ok:
            raise VerificationError(f"batches differ from torchvision's:\n{self}")

    def __str__(self) -> str:
        lines = [
            f"{'item':<16} {'dtype':<10} {'shape':<16} {'samples':>8} {'differ':>7} {'max':>9}"
        ]
        lines += [
            f"{r.path:<16} {r.dtype:<10} {r.shape!s:<16} {r.samples:>8} {r.different:>7} "
            f"{r.worst:>9.3g}"
            for r in self.rows
        ]
        made = "made by the fused kernel" if self.fused else f"made by torch: {self.reason}"
        if self.deviations:
            made += f"; {self.deviations} samples went through the original transform"
        return "\n".join([*lines, f"images {made}", "same bits" if self.ok else "DIFFERENT"])


def verify(loader: DataLoader[Any], samples: int = 256, seed: int = 0) -> Verification:
    """Compare samples of a loader with what torchvision itself makes of them.

    The reference is torch's own loader over the same dataset, transform and collate_fn, seeded
    alike; samples that were not fused are compared too. The global generators end as they began,
    and the loader's warnings are left for the loader to say.

    Args:
        loader: its own order is not used and its samplers are not touched.
        samples: how many, drawn at random; all if the dataset has fewer. Of an
            ``IterableDataset`` the first ones, in whole batches.
        seed: for the choice, and for random operators before the fused part.

    Raises:
        InputError: no ``gpupipe.DataLoader``, or samples < 1.
    """
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"verify() takes a gpupipe.DataLoader, got {type(loader).__name__}; lift() it first"
        )
    if samples < 1:
        raise InputError(f"samples must be 1 or more, got {samples}")
    if loader.device is None or isinstance(loader.device, (str, int, torch.device)):
        devices.resolve(loader.device)  # what it warns of, it says once in a process: let it
    before = RngState.now()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GpupipeWarning)  # the loader says them to its user
            return _verify(loader, samples, seed)
    finally:
        before.restore()


def _verify(loader: DataLoader[Any], samples: int, seed: int) -> Verification:
    ours, theirs, limit = _loaders(loader, samples, seed)
    lookup_off = _levels_off(ours)
    totals: dict[str, list[Row]] = {}
    for mine, their in zip_longest(_run(ours, seed, limit), _run(theirs, seed, limit)):
        styled = restyle(their, loader.dtype, loader.memory_format)  # as was asked for
        for row in _compare(mine, styled, lookup_off):
            totals.setdefault(row.path, []).append(row)
    plan = ours.plan
    rows = tuple(_sum(rows) for rows in totals.values())
    return Verification(rows, plan.fused, plan.reason, plan.deviations)


def _loaders(
    loader: DataLoader[Any], samples: int, seed: int
) -> tuple[DataLoader[Any], TorchDataLoader[Any], int | None]:
    """Return a gpupipe and a torch loader over the same samples, and how many batches to compare.

    None: all of them.
    """
    dataset: Any = loader.dataset
    shared: dict[str, Any] = {"collate_fn": loader.collate_fn}
    limit = None
    if isinstance(dataset, IterableDataset):
        shared |= {"batch_size": loader.batch_size}
        limit = -(-samples // (loader.batch_size or 1))
    else:
        rng = np.random.default_rng(seed)
        length = len(dataset)
        chosen = rng.choice(length, min(samples, length), replace=False).tolist()
        if loader.batch_sampler is None:
            shared |= {"batch_size": None, "sampler": chosen}
        else:
            size = loader.batch_size or 32
            shared["batch_sampler"] = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    ours = DataLoader(
        dataset,
        **shared,
        transform=loader.transform,
        device=loader.device,
        dtype=loader.dtype,
        memory_format=loader.memory_format,
        cache=loader.cache,
        seed=seed if loader.seed is None else loader.seed,
        num_workers=0,
    )
    ours.set_epoch(0)
    return ours, TorchDataLoader(_reference(ours, shared), **shared), limit


def _reference(ours: DataLoader[Any], shared: dict[str, Any]) -> Any:
    """Return the dataset whose samples torchvision makes: with our parameters, if any are drawn."""
    found, stream = ours.reading(0)
    pipeline = found.plan.pipeline
    if found.plan.fused and pipeline is not None and not pipeline.is_pointwise:
        order = [index for batch in shared["batch_sampler"] for index in batch]
        positions = {index: place for place, index in enumerate(order)}
        return ReplayDataset(found, stream, None, positions)
    if callable(ours.transform):
        return Transformed.of(ours.dataset, ours.transform)
    return ours.dataset


def _levels_off(ours: DataLoader[Any]) -> float:
    """Return by how much images may differ from torchvision's: the plan says whether they may."""
    plan = ours.plan
    if plan.pipeline is None or plan.lookup is None or plan.kind is None:
        return 0.0
    if not plan.pipeline.levels_off(plan.kind):
        return 0.0
    return float(plan.lookup.values.double().diff(dim=1).abs().max()) * (1 + 1e-3)


def _run(loader: TorchDataLoader[Any], seed: int, limit: int | None) -> Iterator[Any]:
    """Yield at most ``limit`` batches, the generators seeded before each."""
    _seed(seed)
    iterator = iter(loader)
    for number in count() if limit is None else range(limit):
        _seed(seed + number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch


def _seed(seed: int) -> None:
    """Seed what ``RngState`` restores, and nothing else: CUDA's generators stay as they are."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # what the user's transforms draw from
    torch.default_generator.manual_seed(seed)


def _compare(mine: Any, their: Any, off: float = 0.0) -> Iterator[Row]:
    """Compare two batches leaf by leaf, in the order of the reference's."""
    ours, theirs = _leaves(mine), _leaves(their)
    for path in dict.fromkeys((*theirs, *ours)):
        name = trees.show(path, "batch")
        a, b = _as_tensor(ours.get(path)), _as_tensor(theirs.get(path))
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            yield _row(name, a.detach().cpu(), b.detach().cpu(), off)
            continue
        single = not (_is_strings(a) and _is_strings(b))
        pairs = list(zip_longest([a] if single else a, [b] if single else b))
        different = sum(not _same(*pair) for pair in pairs)
        kind = type(b if single else b[0]).__name__
        yield Row(name, kind, (), len(pairs), different, float("inf") if different else 0.0)


def _leaves(batch: Any) -> dict[trees.Path, Any]:
    """Return what lies where in a batch; strings, which torch collates to a list, as that list."""
    nodes = dict(trees.walk(batch))
    lists = {path for path, node in nodes.items() if _is_strings(node)}
    return {
        path: node
        for path, node in nodes.items()
        if path in lists or (path[:-1] not in lists and not trees.children(node))
    }


def _is_strings(node: Any) -> bool:
    plain = type(node) in (list, tuple) and len(node) > 0
    return plain and all(isinstance(item, (str, bytes)) for item in node)


def _as_tensor(leaf: Any) -> Any:
    """Return an array as a tensor, where torch has its dtype; all else as it is."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        return torch.from_numpy(leaf.copy())
    except TypeError:  # strings, objects
        return leaf


def _same(mine: Any, their: Any) -> bool:
    """Whether two leaves that are no tensors are equal, or, where ``==`` does not tell, pickled."""
    if type(mine) is not type(their):
        return False
    with suppress(Exception):  # foreign code
        if (mine == their) is True:
            return True
    with suppress(Exception):
        return pickle.dumps(mine) == pickle.dumps(their)
    return False


def _row(path: str, mine: torch.Tensor, their: torch.Tensor, off: float = 0.0) -> Row:
    dtype = str(their.dtype).removeprefix("torch.")
    if mine.shape != their.shape or mine.dtype != their.dtype:
        size = len(their) if their.ndim else 1
        return Row(path, dtype, tuple(their.shape[1:]), size, size, float("inf"))
    if not their.ndim:
        mine, their = mine[None], their[None]
    allowed = off if their.is_floating_point() and their.ndim > 2 else 0.0  # noqa: PLR2004 # images
    pairs = list(zip(mine, their, strict=True))
    different = sum(not (same_bits(a, b) or 0 < _worst(a, b) <= allowed) for a, b in pairs)
    return Row(path, dtype, tuple(their.shape[1:]), len(their), different, _worst(mine, their))


def _worst(mine: torch.Tensor, their: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity where only one of two is NaN."""
    wide = torch.complex128 if their.is_complex() else torch.float64
    mine, their = mine.to(wide), their.to(wide)
    unequal = (mine != their) & ~(mine.isnan() & their.isnan())
    gaps = (mine - their).abs()[unequal].nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(gaps.max()) if gaps.numel() else 0.0


def _sum(rows: list[Row]) -> Row:
    first = rows[0]
    return Row(
        first.path,
        first.dtype,
        first.shape,
        sum(row.samples for row in rows),
        sum(row.different for row in rows),
        max(row.worst for row in rows),
    )
