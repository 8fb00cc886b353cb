"""``replay(loader, epoch, index)``: what the model saw of one sample, rebuilt by torchvision.

The dataset is read with another callable in its transform's place: it runs what stays on the CPU,
then torchvision's functionals with the parameters that the loader draws. No kernel, no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpupipe.errors import InputError, PlanError
from gpupipe.images import ImageKind, kind_of, raw_bytes
from gpupipe.loader import DataLoader
from gpupipe.operators.pointwise import Refusal
from gpupipe.places import install, places
from gpupipe.plan import Pipeline, specify
from gpupipe.planning import Found
from gpupipe.rendering import Picks, Renderer, Stream, raw_sizes


@dataclass(frozen=True)
class Replayed:
    """One sample of one epoch, rebuilt.

    Attributes:
        sample: what the dataset gives, its image transformed by torchvision.
        image: that image.
        story: what was drawn, operator by operator: ``"crop 31,12 190x201"``, ``"flipped"``.
        parameters: the drawn numbers, operator by operator.
    """

    sample: Any
    image: torch.Tensor
    story: tuple[str, ...]
    parameters: tuple[tuple[str, dict[str, Any]], ...]

    def __str__(self) -> str:
        """Return the story as one line."""
        return ", ".join(self.story) or "nothing drawn"


class _Replacement:
    """Stands in a transform's place: torchvision with the loader's parameters."""

    def __init__(self, pipeline: Pipeline, dtype: torch.dtype | None, stream: Stream) -> None:
        self._pipeline = pipeline
        self._dtype = dtype
        self._stream = stream
        self._renderers: dict[ImageKind, Renderer] = {}
        self.picks: Picks | None = None
        self.last: tuple[Renderer, Any, Any] | None = None

    def __call__(self, image: Any) -> Any:
        raw = self._pipeline.prefix(image)
        kind = kind_of(raw)
        if kind is None or self.picks is None:
            return self._pipeline.suffix(raw)
        renderer = self._renderer(kind)
        tape = renderer.tape(self.picks, *raw_sizes([raw_bytes(raw)], kind.layout))
        made = renderer.reference(tape, 0, raw)
        self.last = renderer, tape, made
        return made

    def _renderer(self, kind: ImageKind) -> Renderer:
        if kind not in self._renderers:
            lookup = specify(self._pipeline, kind, self._dtype)
            self._renderers[kind] = Renderer(self._pipeline, kind, lookup, self._stream)
        return self._renderers[kind]


class ReplayDataset(torch.utils.data.Dataset[Any]):
    """A loader's dataset whose samples are transformed by torchvision as the loader draws.

    Args:
        found: how the loader's dataset is read.
        stream: which random numbers.
        dtype: that the loader was asked for.
        positions: by index, where in the epoch it stands; 0 where it does not matter.
    """

    def __init__(
        self,
        found: Found,
        stream: Stream,
        dtype: torch.dtype | None,
        positions: Mapping[int, int] | None = None,
    ) -> None:
        pipeline = found.plan.pipeline
        if pipeline is None:
            raise PlanError("this loader has no transform that gpupipe knows; nothing to replay")
        self._replacement = _Replacement(pipeline, dtype, stream)
        wanted = {id(operator.call) for operator in pipeline.operators}
        here = [
            place
            for place in places(found.dataset)
            if wanted & {id(part) for part in _parts(place.transform)}
        ]
        self._dataset: Any = install(found.dataset, dict.fromkeys(here, self._replacement))
        self._positions = positions or {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        """Return sample ``index`` as the loader's model saw it."""
        one = np.array([index])
        position = np.array([self._positions.get(index, 0)])
        self._replacement.picks = Picks(one, one, position, np.zeros(1, bool))
        return self._dataset[index]

    @property
    def last(self) -> tuple[Renderer, Any, Any] | None:
        """Renderer, tape and image of the sample that was read last."""
        return self._replacement.last


def _parts(transform: Callable[..., Any]) -> list[Any]:
    """Return the operators of a transform, containers and all."""
    found: list[Any] = [transform]
    for child in getattr(transform, "transforms", None) or ():
        found += _parts(child)
    return found


def replay(
    loader: DataLoader[Any], epoch: int, index: int, *, position: int | None = None
) -> Replayed:
    """Rebuild one sample of one epoch on the CPU, by torchvision itself.

    Args:
        loader: with a ``seed``, or whose samples draw nothing.
        epoch: counted from 0.
        index: of the dataset.
        position: in the epoch, over all ranks: needed where the sampler may visit an index twice.

    Raises:
        InputError: no ``gpupipe.DataLoader``; an index that the dataset does not have; a loader
            without a seed, or a position that is missing.
        PlanError: nothing of the transform is fused.

    Example:
        >>> print(gpupipe.replay(loader, epoch=3, index=17))
        crop 31,12 190x201, resized to 224x224, flipped
    """
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"replay() takes a gpupipe.DataLoader, got {type(loader).__name__}; lift() it first"
        )
    length = len(loader.dataset)  # type: ignore[arg-type] # map-style
    if not 0 <= index < length:
        raise InputError(f"index must lie in 0..{length - 1}, got {index}; the dataset has no more")
    found, stream = loader.reading(epoch)
    pipeline = found.plan.pipeline
    if pipeline is None or not found.plan.fused:
        raise PlanError(f"nothing is fused, so nothing is drawn here: {found.plan.reason}")
    if not pipeline.is_pointwise:
        if loader.seed is None:
            raise InputError("replay() needs a loader with a seed, got seed=None; pass seed=")
        if stream.repeats and position is None:
            raise InputError(
                "this loader's sampler may visit an index twice in an epoch; pass position=, the "
                "place of the sample in the epoch over all ranks"
            )
    dataset = ReplayDataset(found, stream, loader.dtype, {index: position or 0})
    try:
        sample = dataset[index]
    except Refusal as refusal:
        raise PlanError(f"this sample is not lifted: {refusal}") from refusal
    if dataset.last is None:
        raise PlanError("this sample's image is not lifted, so nothing was drawn for it here")
    renderer, tape, image = dataset.last
    return Replayed(
        sample,
        image,
        tuple(text for text in renderer.story(tape, 0) if text),
        tuple((type(part.call).__name__, values) for part, values in tape.played(0)),
    )
