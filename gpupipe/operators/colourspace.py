"""The conversion to RGB, where the image is RGB already."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

from gpupipe.operators.lowered import Lowered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpupipe.images import ImageKind
    from gpupipe.tape import Parameters, Tape


def _template(image: Any) -> Any:
    return image.convert("RGB")


class ToRGB(Lowered):
    """Nothing, for images that have three colours; others stay on the CPU."""

    def check(self, kind: ImageKind, *, tensor: bool) -> str | None:  # noqa: ARG002 # as its base
        """See ``Lowered``."""
        if kind.mode == "RGB" or (kind.container != "PIL" and kind.channels == 3):  # noqa: PLR2004
            return None
        return f"the images are {kind}, not RGB already"

    def play(self, tape: Tape, where: NDArray[np.bool_]) -> None:
        """Do nothing."""

    def reference(self, image: Any, parameters: Parameters) -> Any:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return self.call(image)

    def describe(self, parameters: Parameters) -> str:  # noqa: ARG002 # none drawn
        """See ``Lowered``."""
        return ""


def converts_to_rgb(call: Any) -> bool:
    """Whether a plain function does nothing but ``return image.convert("RGB")``.

    Its bytecode, names and constants are compared, so that no name has to be trusted; one argument,
    no default, nothing captured.
    """
    if (
        type(call) is not FunctionType
        or call.__closure__
        or call.__defaults__
        or call.__kwdefaults__
    ):
        return False
    code, known = call.__code__, _template.__code__
    return (
        code.co_code == known.co_code
        and code.co_names == known.co_names
        and {c for c in code.co_consts if c is not None} == {"RGB"}
        and (code.co_argcount, code.co_nlocals) == (known.co_argcount, known.co_nlocals)
        and code.co_flags & 0x0C == known.co_flags & 0x0C  # *args, **kwargs
    )
