"""How a user's ``collate_fn`` treats the images, so that the batch can be collated without them.

``default_collate`` is known. Any other is tried on placeholders whose every pixel is unique: if
they come out as one tensor, in order and unchanged, and nothing else in the batch depends on them,
then it may be run on small placeholders and the finished images be put where they came out. This
is checked again for every batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from gpupipe import trees
from gpupipe.fetching import HOLE
from gpupipe.rng import RngState
from gpupipe.trees import Path, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CollateChanged", "CollatePlan", "CollateRefusal", "fill", "recognise"]

_TILE = (2, 3)
"""Height and width of a placeholder at run time: a flip and a transposition show."""

_LONGEST_TEXT = 300


class CollateChanged(Exception):  # noqa: N818 # a signal to the loader, not an error
    """This batch was not collated as the proof says: collate the real tensors instead."""


@dataclass(frozen=True)
class CollateRefusal:
    """Why a ``collate_fn`` cannot be run without the images; a sentence for people."""

    reason: str


@dataclass(frozen=True, eq=False)
class CollatePlan:
    """A ``collate_fn`` that stacks the images, in order, into one tensor of the batch.

    Attributes:
        collate_fn: The user's.
        image_path: Where in a sample the image lies.
        path: Where in the batch the tensor lies.
        channels: C of the transformed image [C, H, W].
        dtype: Of the transformed image.
    """

    collate_fn: Callable[[list[Any]], Any]
    image_path: Path
    path: Path
    channels: int
    dtype: torch.dtype

    def apply(self, samples: Sequence[Any]) -> tuple[Any, Path]:
        """Collate all but the images.

        Args:
            samples: What the fetcher gave, with anything where the image was; not changed, as far
                as ``collate_fn`` does not.

        Returns:
            The batch, and the path at which ``fill`` puts the images.

        Raises:
            CollateChanged: The placeholders did not come out as they did in the proof, or
                ``collate_fn`` raised. The generators are as they were before.
            Exception: What ``default_collate`` raises for the other parts of a sample.
        """
        if self.collate_fn is default_collate:
            holed = [fill(sample, self.image_path, HOLE, copied=True) for sample in samples]
            return default_collate(holed), self.path
        before = RngState.now()
        images = _placeholders(len(samples), (self.channels, *_TILE), self.dtype, seed=0)
        try:
            batch = self.collate_fn(_filled(samples, self.image_path, images))
            came = trees.get(batch, self.path)
        except Exception as error:
            before.restore()
            raise CollateChanged(f"collate_fn raises {_text(error)}") from error
        expected = torch.stack(images)
        if not _equal(came, expected):
            before.restore()
            raise CollateChanged(_difference(came, expected))
        return batch, self.path


def recognise(
    collate_fn: Callable[[list[Any]], Any],
    samples: Sequence[Any],
    image_path: Path,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
) -> CollatePlan | CollateRefusal:
    """Find out whether ``collate_fn`` can be run without the images.

    The generators are left as they were.

    Args:
        collate_fn: The user's; it is run four times.
        samples: A few samples, at least two where the dataset has them, with anything where the
            image was; not changed, as far as ``collate_fn`` does not.
        image_path: Where in a sample the image lies.
        shape: C, H and W of the transformed image.
        dtype: Of the transformed image.
    """
    plan = CollatePlan(collate_fn, image_path, image_path, shape[0], dtype)
    if collate_fn is default_collate:
        return plan
    tile = (shape[0], *_TILE)
    before = RngState.now()
    trials: list[_Trial] = []
    try:
        for number, size in enumerate((shape, shape, tile, tile)):
            before.restore()
            images = _placeholders(len(samples), size, dtype, seed=number)
            trials.append(_try(collate_fn, _filled(samples, image_path, images), images))
        outcome = _compare(trials)
        if isinstance(outcome, str):
            return CollateRefusal(outcome)
        fill(trials[0].batch, outcome, trials[0].expected)
    except _Refused as refused:
        text = str(refused)
        if len(trials) > 1 and "raises" in text:
            text = f"{text} for images of {_TILE[0]}x{_TILE[1]} pixels: it depends on their size"
        return CollateRefusal(text)
    except Exception as error:  # noqa: BLE001 # mappings and dataclasses of the user's
        return CollateRefusal(f"collate_fn gives a batch that cannot be filled: {_text(error)}")
    finally:
        before.restore()
    return dataclasses.replace(plan, path=outcome)


class _Refused(Exception):  # noqa: N818 # an answer, not an error
    """Ends a recognition; the text is the reason."""


@dataclass
class _Trial:
    """One run on placeholders: the batch, the images stacked, the generators after it."""

    batch: Any
    expected: torch.Tensor
    after: RngState


def _try(collate_fn: Callable[[list[Any]], Any], samples: list[Any], images: Any) -> _Trial:
    """Run ``collate_fn``; a failure of it is a refusal."""
    try:
        return _Trial(collate_fn(samples), torch.stack(images), RngState.now())
    except Exception as error:
        raise _Refused(f"collate_fn raises {_text(error)}") from error


def _compare(trials: list[_Trial]) -> Path | str:
    """Where the images lie in the batches, or why the batches do not agree."""
    first = trials[0]
    paths = [path for path, node in trees.walk(first.batch) if _equal(node, first.expected)]
    if not paths:
        return _lost(first)
    if len(paths) > 1:
        at = " and ".join(trees.show(path, "batch") for path in paths)
        return f"collate_fn gives the images more than once: {at}"
    for trial in trials[1:]:
        try:
            came = trees.get(trial.batch, paths[0])
        except (LookupError, AttributeError, TypeError):
            came = None
        if not _equal(came, trial.expected):
            return _difference(came, trial.expected)
        other = _unlike(first.batch, trial.batch, paths[0])
        if other is not None:
            return (
                f"collate_fn makes {trees.show(other, 'batch')} from the images or their size, or "
                "differently each time; only what does not depend on the images can be collated "
                "without them"
            )
        if not trial.after.same_as(first.after):
            return "collate_fn draws random numbers in a quantity that depends on the images"
    return paths[0]


def _unlike(one: Any, other: Any, images: Path) -> Path | None:
    """The first path at which two batches differ, the images' own apart."""
    ours, theirs = list(trees.walk(one)), list(trees.walk(other))
    for (path, mine), (their_path, their) in zip(ours, theirs, strict=False):
        if path != their_path or type(mine) is not type(their):
            return path
        if path != images and not trees.children(mine) and not _equal(mine, their):
            return path
    if len(ours) != len(theirs):
        return max(ours, theirs, key=len)[min(len(ours), len(theirs))][0]
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two leaves are the same, in type, dtype and every value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or one.device != other.device:
            return False
        both_nan = torch.isnan(one) & torch.isnan(other)
        return bool(((one == other) | both_nan).all())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return one is other or bool(one == other)


def _lost(trial: _Trial) -> str:
    """Why the images are nowhere in a batch; the nearest thing to them says it."""
    rows = list(trial.expected)
    for path, node in trees.walk(trial.batch):
        inside = [child for _, child in trees.children(node)]
        if len(inside) == len(rows) and all(map(_equal, inside, rows)):
            return f"collate_fn keeps the images as a {type(node).__name__} at " + trees.show(
                path, "batch"
            )
    tensors = [node for _, node in trees.walk(trial.batch) if isinstance(node, torch.Tensor)]
    same_size = [node for node in tensors if node.numel() == trial.expected.numel()]
    near = [node for node in tensors if node.shape == trial.expected.shape] or same_size or tensors
    if not near:
        return "collate_fn gives a batch without the images"
    return _difference(near[0], trial.expected)


def _difference(came: Any, expected: torch.Tensor) -> str:
    """What became of the images."""
    if not isinstance(came, torch.Tensor):
        return f"collate_fn gives {type(came).__name__} where it gave the images"
    if came.shape != expected.shape:
        return (
            f"collate_fn changes the shape of the images: {tuple(came.shape)} came, "
            f"{tuple(expected.shape)} was expected"
        )
    if came.dtype != expected.dtype:
        return f"collate_fn changes the dtype of the images: {came.dtype}, not {expected.dtype}"
    rows = {tuple(row.flatten().tolist()) for row in expected}
    if {tuple(row.flatten().tolist()) for row in came} <= rows:
        return "collate_fn reorders the images"
    return "collate_fn changes or mixes the pixels (MixUp or CutMix? apply it in the loop)"


def _placeholders(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, *, seed: int
) -> list[torch.Tensor]:
    """Images [C, H, W] with values, as unique as the dtype allows, below 0, in [0, 1] and above."""
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.random((count, *shape), dtype=np.float32))
    scaled = values * 255 if not dtype.is_floating_point else values * 6 - 3
    return list(scaled.to(dtype))


def _filled(samples: Sequence[Any], path: Path, images: list[torch.Tensor]) -> list[Any]:
    """The samples with images in them, as new containers along the path."""
    pairs = zip(samples, images, strict=True)
    return [fill(sample, path, image, copied=True) for sample, image in pairs]


def _text(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
