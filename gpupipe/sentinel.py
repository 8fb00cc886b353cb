"""A tensor that is not there yet: what a recorder returns in place of a transformed image.

It travels through the rest of the user's ``__getitem__``. Whoever only passes it on notices nothing
and leaves no trace; whoever looks at it is noted, and finds the real tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from gpupipe.images import ImageKind
    from gpupipe.places import Place

Raw = Image.Image | NDArray[np.uint8] | torch.Tensor
"""An image as a transform takes it: PIL, uint8 array or uint8 tensor, in host memory."""

Transform = Callable[..., Any]
"""What turns one image into another, or into a tensor."""

_HANDLERS = frozenset({"__torch_function__", "__torch_dispatch__"})

_healing = threading.RLock()


@dataclass(eq=False)
class Call:
    """One call of a transform while a sample was fetched.

    Attributes:
        place: Where the transform stands.
        raw: The image that the suffix would have had, or None: the transform itself answered.
        kind: What ``raw`` is.
        suffix: Makes the transformed tensor of ``raw``.
        passed: Why the transform itself answered; empty if it did not.
        touched: The first thing done to the sentinel, such as ``Tensor.half``; empty if none.
        sentinel: The sentinel, until nobody holds it.
    """

    place: Place
    raw: Raw | None = None
    kind: ImageKind | None = None
    suffix: Transform | None = None
    passed: str = ""
    touched: str = ""
    sentinel: Callable[[], object] = lambda: None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the raw image in pixels; (0, 0) if there is none."""
        if self.raw is None or self.kind is None:
            return (0, 0)
        height, width = (
            self.raw.size[::-1]
            if isinstance(self.raw, Image.Image)
            else self.raw.shape[-2:]
            if self.kind.layout == "NCHW"
            else self.raw.shape[:2]
        )
        return (int(height), int(width))

    def alive(self) -> Sentinel | None:
        """Return the sentinel if somebody still holds it and it is not yet a real tensor."""
        held = self.sentinel()
        return held if type(held) is Sentinel else None


class Sentinel(torch.Tensor):
    """Stands for a transformed image; any touch is flagged and turns it into the real tensor.

    The object stays the same when that happens: it *becomes* what the suffix makes of the raw
    image, so that whoever kept it has what torchvision would have given. Not touches: to be put
    into containers, ``isinstance``, ``type``, ``is``, ``id``, weak references.
    """

    def __new__(cls, call: Call) -> Self:
        """Make the sentinel of ``call``; it has no memory of its own."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, (0,))  # noqa: SLF001 # public in practice
        object.__getattribute__(made, "__dict__")["call"] = call
        return made

    def __getattribute__(self, name: str) -> Any:
        """Flag the reading of any attribute; ``__class__`` is what isinstance reads."""
        if name == "__class__":
            return Sentinel
        if name in _HANDLERS:  # torch asks before it calls them; they flag what is asked for
            return object.__getattribute__(self, name)
        touch(self, f"Tensor.{name}")
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Flag the setting of any attribute."""
        touch(self, f"Tensor.{name}")
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Flag the deletion of any attribute."""
        touch(self, f"Tensor.{name}")
        delattr(self, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Flag any function of torch's Python side, operators, ``len`` and iteration included."""
        if not _touch_all((args, kwargs), func):  # held where we cannot see it: below comes next
            below: Any = super().__torch_function__
            return below(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's stub omits func
        cls, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Flag what comes from below Python: TorchScript, disabled ``__torch_function__``."""
        _touch_all((args, kwargs), func)
        return func(*args, **(kwargs or {}))


def call_of(sentinel: Sentinel) -> Call:
    """Return the call that gave ``sentinel``, without touching it."""
    call: Call = object.__getattribute__(sentinel, "__dict__")["call"]
    return call


def touch(sentinel: Sentinel, what: str) -> None:
    """Note that somebody did ``what`` to ``sentinel``, and make it the real tensor.

    Raises:
        Exception: What the suffix raises for this image.
    """
    call = call_of(sentinel)
    call.touched = call.touched or what
    heal(sentinel)


def heal(sentinel: Sentinel) -> None:
    """Turn ``sentinel``, the very object, into the tensor that the suffix makes of its image.

    Raises:
        Exception: What the suffix raises for this image.
    """
    with _healing:
        if type(sentinel) is not Sentinel:
            return  # another thread was faster
        call = call_of(sentinel)
        value = call.suffix(call.raw) if call.suffix is not None else None
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"the suffix of {call.place} gave {type(value).__name__}, expected a tensor; "
                "end the transform with ToTensor or PILToTensor"
            )
        real = value.detach()  # an object of its own over the same memory
        attributes = object.__getattribute__(sentinel, "__dict__")
        attributes.clear()
        attributes.update(vars(value))
        torch._C._swap_tensor_impl(sentinel, real)  # noqa: SLF001 # as torch.utils.swap_tensors
        object.__setattr__(sentinel, "__class__", type(real))


def _touch_all(tree: Any, func: Any) -> bool:
    """Touch every sentinel among a function's arguments; False if there is none."""
    if type(tree) is Sentinel:
        touch(tree, f"Tensor.{getattr(func, '__name__', func)}")
        return True
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(_touch_all(item, func) for item in tree) > 0  # not any(): touch every one
    return False
