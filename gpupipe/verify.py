"""``verify(loader)``: the loader's batches against torchvision's own, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from gpupipe import trees
from gpupipe.batch import restyle
from gpupipe.errors import InputError, VerificationError
from gpupipe.loader import DataLoader
from gpupipe.operators.pointwise import same_bits
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
    alike; samples that were not fused are compared too.

    Args:
        loader: its own order is not used and its samplers are not touched.
        samples: how many, drawn at random; all if the dataset has fewer.
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
    ours, theirs = _loaders(loader, samples, seed)
    limit = -(-samples // (loader.batch_size or 1)) if loader.batch_sampler is None else None
    totals: dict[str, list[Row]] = {}
    pairs = zip(_run(ours, seed, limit), _run(theirs, seed, limit), strict=True)
    for mine, their in pairs:
        their = restyle(their, loader.dtype, loader.memory_format)  # noqa: PLW2901 # as was asked for
        for row in _compare(mine, their):
            totals.setdefault(row.path, []).append(row)
    plan = ours.plan
    rows = tuple(_sum(rows) for rows in totals.values())
    return Verification(rows, plan.fused, plan.reason, plan.deviations)


def _loaders(
    loader: DataLoader[Any], samples: int, seed: int
) -> tuple[DataLoader[Any], TorchDataLoader[Any]]:
    """Return a gpupipe and a torch loader over the same chosen batches."""
    dataset: Any = loader.dataset
    shared: dict[str, Any] = {"collate_fn": loader.collate_fn}
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        shared |= {"batch_size": loader.batch_size}
    else:
        rng = np.random.default_rng(seed)
        length = len(dataset)
        chosen = rng.choice(length, min(samples, length), replace=False).tolist()
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
    )
    reference = dataset
    if callable(loader.transform):
        reference = Transformed.of(dataset, loader.transform)
    return ours, TorchDataLoader(reference, **shared)


def _run(loader: TorchDataLoader[Any], seed: int, limit: int | None) -> Iterator[Any]:
    """Yield batches, seeded one by one; the generators end as they began."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002 # the user's transforms draw from it
    try:
        iterator = iter(loader)
        number = 0
        while limit is None or number < limit:
            random.seed(seed + number)
            np.random.seed(seed + number)  # noqa: NPY002 # likewise
            torch.manual_seed(seed + number)
            try:
                yield next(iterator)
            except StopIteration:
                return
            number += 1
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 # likewise
        torch.set_rng_state(states[2])


def _compare(mine: Any, their: Any) -> Iterator[Row]:
    """Compare two batches leaf by leaf."""
    ours = {path: leaf for path, leaf in trees.walk(mine) if not trees.children(leaf)}
    theirs = {path: leaf for path, leaf in trees.walk(their) if not trees.children(leaf)}
    for path in ours.keys() | theirs.keys():
        name = trees.show(path, "batch")
        a, b = ours.get(path), theirs.get(path)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            yield _row(name, a.detach().cpu(), b.detach().cpu())
        else:
            same = type(a) is type(b) and bool(a == b)
            yield Row(name, type(b).__name__, (), 1, int(not same), 0.0 if same else float("inf"))


def _row(path: str, mine: torch.Tensor, their: torch.Tensor) -> Row:
    dtype = str(their.dtype).removeprefix("torch.")
    if mine.shape != their.shape or mine.dtype != their.dtype:
        size = len(their) if their.ndim else 1
        return Row(path, dtype, tuple(their.shape[1:]), size, size, float("inf"))
    if not their.ndim:
        mine, their = mine[None], their[None]
    different = sum(not same_bits(a, b) for a, b in zip(mine, their, strict=True))
    worst = float((mine.double() - their.double()).abs().max()) if their.numel() else 0.0
    return Row(path, dtype, tuple(their.shape[1:]), len(their), different, worst)


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
