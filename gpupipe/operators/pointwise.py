"""Operators that make each output value from one uint8 value of the same channel.

``ToTensor``, ``PILToTensor``, ``ToImage``, ``ToPureTensor``, ``ToDtype``, ``ConvertImageDtype``,
``Normalize`` of torchvision's v1 and v2, and callables that their author marks ``pointwise``. They
are specified by tabulation: torchvision itself runs them on all 256 levels of every channel.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import nn
from torchvision import transforms as v1

from gpupipe import notices
from gpupipe.errors import PlanError
from gpupipe.places import MARK
from gpupipe.tables import DTYPES, Lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpupipe.images import ImageKind

LEVELS = 256

_NORMALIZE = ("Normalize",)
_FROM_UINT8 = (
    *("ToTensor", "PILToTensor", "ConvertImageDtype"),
    *("ToImage", "ToPureTensor", "ToDtype"),
)
_PROOF_SIZES = ((1, 1), (5, 3), (2, 31), (17, 8))
"""Heights and widths of the random images that a table is tried on."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

F = TypeVar("F", bound=Callable[..., Any])


def is_a(kind: type, names: Sequence[str]) -> bool:
    """Whether a class is exactly one of torchvision's transforms, v1 or v2, of these names.

    v2 takes 0.2 s to import: who has one of its objects has imported it already.
    """
    modules = (v1, sys.modules.get("torchvision.transforms.v2"))
    return any(kind is getattr(module, name, None) for module in modules for name in names)


class Refusal(Exception):  # noqa: N818 # no error: the operator runs on the CPU instead
    """Why a pipeline cannot be fused, in a sentence for people."""


def pointwise(function: F) -> F:
    """Mark a callable as pointwise, so that it may be fused.

    A pointwise callable takes an image tensor and returns one of the same shape in which each
    value depends on nothing but the value at the same place and on its channel: a gamma curve, a
    threshold, ``lambda x: x * 2 - 1``. The promise is checked on random images before it is used.

    Args:
        function: a function, or an object with ``__call__`` that takes attributes.

    Returns:
        ``function`` itself.

    Raises:
        PlanError: the callable does not take attributes.

    Example:
        >>> double = pointwise(lambda image: image * 2 - 1)
    """
    try:
        setattr(function, MARK, True)
    except AttributeError as error:
        raise PlanError(
            f"pointwise() got {function!r}, which takes no attributes; wrap it in a function"
        ) from error
    return function


def is_marked(operator: Any) -> bool:
    """Whether the author of ``operator`` promises that it is pointwise."""
    return getattr(operator, MARK, False) is True


def is_pointwise_type(kind: type) -> bool:
    """Whether a class belongs to this family."""
    return is_a(kind, _FROM_UINT8 + _NORMALIZE)


def is_plain(operator: Any) -> bool:
    """Whether a call runs the code of the class alone: no hook, no ``forward`` of the instance."""
    if not isinstance(operator, nn.Module):
        return True
    hooks = operator._forward_hooks or operator._forward_pre_hooks  # noqa: SLF001 # no public way
    return not hooks and "forward" not in vars(operator)


def is_pointwise(operator: Any) -> bool:
    """Whether ``operator`` belongs to this family; subclasses do not."""
    return (is_pointwise_type(type(operator)) and is_plain(operator)) or is_marked(operator)


def takes_uint8(operator: Any) -> bool:
    """Whether ``operator`` is of this family and may be the first one that sees raw pixels."""
    return is_pointwise(operator) and not is_a(type(operator), _NORMALIZE)


def keeps_levels(operator: Any) -> bool:
    """Whether a value that ``operator`` is given comes out as it was, in another container."""
    if is_marked(operator):
        return False
    if is_a(type(operator), ("ToDtype", "ConvertImageDtype")):
        dtype = getattr(operator, "dtype", None)
        return dtype is torch.uint8
    return is_a(type(operator), ("PILToTensor", "ToImage", "ToPureTensor"))


def run(operators: Sequence[Callable[[Any], Any]], image: Any) -> Any:
    """Return what the operators make of an image, one after the other, by torchvision itself."""
    for operator in operators:
        image = operator(image)
    return image


def tabulate(
    operators: Sequence[Callable[[Any], Any]],
    kind: ImageKind,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
) -> Lookup:
    """Specify pointwise operators by their values at all levels, and check that they are pointwise.

    Args:
        operators: in order; the first takes the raw image.
        kind: how the image is given.
        dtype: round the result to this; default: as the operators return it.
        size: height and width of the images to come, on which a marked callable is tried, too.

    Raises:
        PlanError: wrong constants, or a callable that is marked pointwise and is not.
        Refusal: a result that no kernel writes, such as float64 or another number of channels.
    """
    check_constants(operators, kind)
    values = levels(operators, kind)
    rng = np.random.default_rng(0)
    marked = size is not None and 0 not in size and any(map(is_marked, operators))
    for height, width in (*_PROOF_SIZES, *([size] if marked and size else [])):
        pixels = rng.integers(0, LEVELS, (height, width, kind.channels), np.uint8)
        given = _call(operators, kind, pixels).reshape(kind.channels, height, width)
        where = torch.from_numpy(pixels.astype(np.int64)).permute(2, 0, 1)
        looked_up = torch.stack([values[c][where[c]] for c in range(kind.channels)])
        if not same_bits(given, looked_up):
            _not_pointwise(operators, given, looked_up)
    if dtype is not None and values.dtype != dtype:
        if not values.is_floating_point():
            raise Refusal(f"the transform returns {values.dtype}, which dtype={dtype} cannot mean")
        values = values.to(dtype)
    if values.dtype not in DTYPES:
        raise Refusal(f"the result is {values.dtype}; kernels write {_names(DTYPES)}")
    return Lookup(values, fit(operators, values))


def levels(operators: Sequence[Callable[[Any], Any]], kind: ImageKind) -> torch.Tensor:
    """Return what torchvision makes of all levels, [channels, 256].

    Raises:
        Refusal: the operators do not take such images.
    """
    ramp = np.arange(LEVELS, dtype=np.uint8).reshape(8, 32, 1).repeat(kind.channels, 2)
    return _call(operators, kind, ramp).reshape(kind.channels, LEVELS)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; NaN equals the same NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = _BITS.get(left.dtype.itemsize, left.dtype)
    return torch.equal(left.view(bits), right.view(bits))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _call(
    operators: Sequence[Callable[[Any], Any]], kind: ImageKind, pixels: NDArray[np.uint8]
) -> torch.Tensor:
    """Run the operators on pixels [H, W, C]; return the result's plain tensor [C, H, W]."""
    height, width, channels = pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecation notes are the user's to see
        try:
            result = run(operators, kind.build(pixels))
        except Exception as error:
            raise Refusal(f"torchvision refuses {kind}: {error}") from error
    if not isinstance(result, torch.Tensor):
        raise Refusal(f"the result is a {type(result).__name__}, not a tensor")
    wanted = [(channels, height, width)] + [(height, width)] * (kind.layout == "NHW")
    if tuple(result.shape) not in wanted:
        raise Refusal(
            f"the result has shape {tuple(result.shape)} for an image of shape "
            f"{(channels, height, width)}"
        )
    if result.requires_grad:
        raise Refusal("the result requires a gradient, which a kernel cannot give")
    return result.detach().as_subclass(torch.Tensor).clone()


def _not_pointwise(
    operators: Sequence[Any], given: torch.Tensor, looked_up: torch.Tensor
) -> NoReturn:
    """Say what is wrong: the last bits of torch's own functions, or the author's promise."""
    if given.dtype == looked_up.dtype and given.is_floating_point():
        rounding = 4 * torch.finfo(given.dtype).eps
        if torch.allclose(given, looked_up, rtol=rounding, atol=rounding, equal_nan=True):
            raise Refusal(
                "its last bits differ from place to place: torch computes functions such as pow "
                "and exp in vectors, and the rest of a row in another way"
            )
    marked = [operator for operator in operators if is_marked(operator)]
    if marked:
        raise PlanError(
            f"{marked[0]!r} is marked pointwise, but its result at one place depends on other "
            "pixels, on other channels or on chance; take the mark away"
        )
    raise Refusal("the result at one place depends on more than the pixel there")


def check_constants(operators: Sequence[Any], kind: ImageKind) -> None:
    """Look at every ``Normalize``: constants that cannot work raise, suspicious ones warn.

    Raises:
        PlanError: NaN, a standard deviation of 0, a number of channels that does not fit.
    """
    for position, operator in enumerate(operators):
        if not is_a(type(operator), _NORMALIZE):
            continue
        mean, std = _constants(operator.mean), _constants(operator.std)
        name = f"Normalize(mean={mean}, std={std})"
        if not all(map(math.isfinite, (*mean, *std))):
            raise PlanError(f"{name} has a constant that is not finite; compute it again")
        if 0.0 in std:
            raise PlanError(f"{name} divides by a std of 0; a constant channel needs std 1")
        if {len(mean), len(std)} - {1, kind.channels} and not _accepts(operators, kind):
            raise PlanError(
                f"{name} is for {max(len(mean), len(std))} channels, but the images are {kind} "
                f"with {kind.channels}; give one mean and std per channel"
            )
        _check_scale(operators[:position], name, mean, kind)


def _accepts(operators: Sequence[Any], kind: ImageKind) -> bool:
    """Whether torchvision gives a result all the same: v2 spreads one channel over many."""
    pixels = np.zeros((2, 3, kind.channels), np.uint8)
    try:
        run(operators, kind.build(pixels))
    except Exception:  # noqa: BLE001 # whatever it is, it does not work
        return False
    return True


def _constants(values: Any) -> list[float]:
    return [float(v) for v in torch.as_tensor(values, dtype=torch.float64).reshape(-1)]


def _check_scale(
    before: Sequence[Callable[[Any], Any]], name: str, mean: list[float], kind: ImageKind
) -> None:
    """Warn about a mean that does not lie in the range of what is normalised."""
    ends = np.array([0, 255], np.uint8).reshape(1, 2, 1).repeat(kind.channels, 2)
    try:
        low, high = (float(value) for value in _call(before, kind, ends).float().aminmax())
    except Refusal:
        return  # said better where the whole pipeline is run
    if low < 0:
        text = f"{name} normalises values that already lie in {low:.3g}..{high:.3g}: a second time?"
    elif high <= 1 and max(map(abs, mean)) > 1:
        text = f"{name} has a mean on the scale 0..255, but the values lie in 0..1; divide by 255"
    elif high > 1 and 0 < max(mean) < 1:
        text = (
            f"{name} has a mean on the scale 0..1, but the values lie in 0..{high:.0f}; "
            "scale the image first (ToTensor, or ToDtype(torch.float32, scale=True))"
        )
    else:
        return
    notices.warn(text)


def fit(operators: Sequence[Any], values: torch.Tensor) -> NDArray[np.float32] | None:
    """Find constants of the kernels' arithmetic form that give every value, or None.

    The form is ``t = fma(x, a, x * a_low) - mean; fma(t, b, t * b_low)``: with ``a + a_low`` the
    reciprocal of 255 to twice float32's precision that is the correctly rounded ``x / 255``, and
    likewise for the division by std (Markstein, 1990). It is compared with all of ``values``.

    Args:
        operators: for the constants of their ``Normalize``, at most one.
        values: [C, 256], the specification.
    """
    normalize = [operator for operator in operators if is_a(type(operator), _NORMALIZE)]
    if len(normalize) > 1 or not values.is_floating_point():
        return None
    channels = values.shape[0]
    mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    if normalize:
        with np.errstate(over="ignore"):  # a constant beyond float32 is found by the comparison
            mean[:] = _constants(normalize[0].mean)
            std[:] = _constants(normalize[0].std)
    b, b_low = _reciprocal(std)
    by_255 = _reciprocal(np.full(channels, 255, np.float32))
    zero, one = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    for a, a_low in (by_255, (by_255[0], zero), (one, zero)):
        constants = np.stack([a, a_low, mean, b, b_low], axis=1)
        if same_bits(torch.from_numpy(evaluate(constants)).to(values.dtype), values):
            return constants
    return None


def _reciprocal(value: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return 1 / value as the sum of two float32."""
    with np.errstate(all="ignore"):
        exact = 1 / value.astype(np.float64)
        high = exact.astype(np.float32)
        return high, (exact - high).astype(np.float32)


def evaluate(constants: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the arithmetic form at all levels, float32 [C, 256].

    A fused multiply-add is a sum in extended precision here; where that is not enough, the proof
    on the kernel itself (``plan.prove``) finds it.
    """
    a, a_low, mean, b, b_low = (column[:, None] for column in constants.T)
    x = np.arange(LEVELS, dtype=np.float32)[None]
    with np.errstate(all="ignore"):  # overflow to infinity is what torchvision gives, too
        t = _fma(x, a, x * a_low) - mean
        return _fma(t, b, t * b_low)


def _fma(
    x: NDArray[np.float32], y: NDArray[np.float32], z: NDArray[np.float32]
) -> NDArray[np.float32]:
    wide = np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(np.float32)
