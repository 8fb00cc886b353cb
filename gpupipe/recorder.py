"""A stand-in for a dataset's transform that keeps its input and returns a sentinel."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from gpupipe.images import ImageKind, kind_of
from gpupipe.sentinel import Call, Raw, Sentinel, Transform, touch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpupipe.places import Place


def _kept(image: Any) -> Raw:
    """A copy of its own: the dataset may close the file or reuse the buffer at once."""
    if isinstance(image, Image.Image):
        return image.copy()
    return np.array(image) if isinstance(image, np.ndarray) else image.clone()


class Session:
    """Which calls belong to the sample that this thread is fetching."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def calls(self) -> list[Call] | None:
        """The calls of this thread's sample so far; None while it fetches none."""
        return getattr(self._local, "calls", None)

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collect the calls that this thread makes inside the ``with`` block."""
        outer, calls = self.calls, list[Call]()
        self._local.calls = calls
        try:
            yield calls
        finally:
            self._local.calls = outer


class _State(NamedTuple):
    """What a recorder knows; its other attributes are the original's."""

    place: Place
    session: Session
    prefix: Transform | None
    suffix: Transform


class Recorder:
    """Takes the place of a transform: has its class and attributes, keeps its input.

    Outside a recording, or in a thread that the dataset started itself, it is the original.

    Args:
        place: The place it takes; ``place.transform`` is the original.
        session: Where its calls are noted.
        prefix: The part of the transform that stays on the CPU; None if there is none.
        suffix: The rest, which gives the tensor; None if that is the whole transform.
    """

    __slots__ = ("_gpupipe_recorder",)
    _gpupipe_recorder: _State

    def __init__(
        self,
        place: Place,
        session: Session,
        prefix: Transform | None = None,
        suffix: Transform | None = None,
    ) -> None:
        state = _State(place, session, prefix, suffix or place.transform)
        object.__setattr__(self, "_gpupipe_recorder", state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the image and return a sentinel; for anything else the original answers.

        Raises:
            Exception: What the original, the prefix or reading the image raises.
        """
        place, session, prefix, suffix = self._gpupipe_recorder
        calls = session.calls
        if calls is None:
            return place.transform(*args, **kwargs)
        if len(args) != 1 or kwargs:
            given = "keyword arguments" if kwargs else f"{len(args)} arguments"
            calls.append(Call(place, passed=f"{given} instead of one image"))
            return place.transform(*args, **kwargs)
        image = args[0]
        if type(image) is Sentinel:
            touch(image, f"{place} called with its own result")
        if _raw_kind(image) is None:
            calls.append(Call(place, passed=f"{_describe(image)} instead of an image"))
            return place.transform(image)
        if prefix is not None:
            image = prefix(image)
        kind = _raw_kind(image)
        if kind is None:
            calls.append(Call(place, passed=f"{_describe(image)} after the part kept on the CPU"))
            return suffix(image)
        call = Call(place, _kept(image), kind, suffix)
        sentinel = Sentinel(call)
        call.sentinel = weakref.ref(sentinel)
        calls.append(call)
        return sentinel

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's class, so that isinstance sees no difference."""
        return self._gpupipe_recorder.place.transform.__class__

    def __getattr__(self, name: str) -> Any:
        """Read the original's attribute."""
        return getattr(self._gpupipe_recorder.place.transform, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the original's attribute, as the dataset's own code would have."""
        setattr(self._gpupipe_recorder.place.transform, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete the original's attribute."""
        delattr(self._gpupipe_recorder.place.transform, name)

    def __bool__(self) -> bool:
        """Truth of the original: an empty ``nn.Sequential`` is false."""
        return bool(self._gpupipe_recorder.place.transform)

    def __len__(self) -> int:
        """Length of the original."""
        return len(self._gpupipe_recorder.place.transform)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the original."""
        return iter(self._gpupipe_recorder.place.transform)  # type: ignore[call-overload,no-any-return]

    def __getitem__(self, key: Any) -> Any:
        """Item of the original."""
        return self._gpupipe_recorder.place.transform[key]  # type: ignore[index]

    def __repr__(self) -> str:
        """Text of the original."""
        return repr(self._gpupipe_recorder.place.transform)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the original's, not a recorder."""
        return self._gpupipe_recorder.place.transform.__reduce_ex__(protocol)


def _raw_kind(image: Any) -> ImageKind | None:
    """What kind of raw image ``image`` is; None for a masked array, or where it is none."""
    if isinstance(image, np.ndarray) and type(image) not in {np.ndarray, np.memmap}:
        return None
    return kind_of(image)


def _describe(value: object) -> str:
    """What came, in a few words."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"a PIL image of mode {value.mode}"
    return type(value).__name__
