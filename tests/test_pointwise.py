"""What is fused, what is refused, and that the proof finds what is wrong."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from gpupipe import cpu_ops
from gpupipe.errors import GpupipeWarning, PlanError
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal, pointwise, tabulate
from gpupipe.plan import Plan, cut, prove, specify
from gpupipe.tables import Layout, Lookup
from tests import reference, strategies

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

L = ImageKind("PIL", 1, "NHW", "L")
RGB = ImageKind("PIL", 3, "NHWC", "RGB")
RGB_TENSOR = ImageKind("tensor", 3, "NCHW")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

V1 = [v1.ToTensor(), v1.Normalize(MEAN, STD)]
V2 = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def ramp(channels: int) -> NDArray[np.uint8]:
    """One image [1, 16, 16, C] with every level, in another order in every channel."""
    return strategies.levels(1, 16, 16, channels, seed=9)


def looked_up(lookup: Lookup, pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Look pixels [N, H, W, C] up, by indexing alone: [N, C, H, W]."""
    where = torch.from_numpy(pixels.astype(np.int64))
    return torch.stack([lookup.values[c][where[..., c]] for c in range(lookup.channels)], 1)


def on_cpu(kind: ImageKind, layout: Layout) -> Callable[[Any, Lookup], torch.Tensor]:
    """The CPU's kernel, as ``prove`` calls it."""

    def render(raw: NDArray[np.uint8], lookup: Lookup) -> torch.Tensor:
        sizes = dict(zip(layout, raw.shape, strict=True))
        shape = (sizes["N"], kind.channels, sizes["H"], sizes["W"])
        output = torch.empty(shape, dtype=lookup.dtype)
        cpu_ops.normalize(raw, None, [output], lookup, layout=layout)
        return output

    return render


@settings(deadline=None, max_examples=60)
@given(data=st.data(), channels=st.integers(1, 5), dtype=st.sampled_from((None, *FLOATS)))
def test_the_table_is_torchvisions(
    data: st.DataObject, channels: int, dtype: torch.dtype | None
) -> None:
    """Every entry of the table is what the user's transform gives, rounded to dtype."""
    case = data.draw(strategies.pointwise_cases(channels))
    operators = [operator.call for operator in cut(case.transform).operators]
    if case.container == "PIL":
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        kind = ImageKind("PIL", channels, "NHW" if channels == 1 else "NHWC", mode)
    else:
        kind = ImageKind("tensor", channels, "NCHW")
    pixels = ramp(channels)
    expected = reference.images(case.transform, pixels, None, case.make)
    if dtype is not None and expected.dtype == torch.uint8:
        with pytest.raises(Refusal, match="uint8"):
            tabulate(operators, kind, dtype)
        return
    expected = expected if dtype is None else expected.to(dtype)
    lookup = tabulate(operators, kind, dtype)
    reference.assert_same_bits(looked_up(lookup, pixels), expected)


@settings(deadline=None, max_examples=200)
@given(
    mean=st.lists(st.just(0.0) | st.floats(1e-30, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.01, 2), min_size=3, max_size=3),
    dtype=st.sampled_from(FLOATS),
)
def test_the_arithmetic_form_is_always_found(
    mean: list[float], std: list[float], dtype: torch.dtype
) -> None:
    """``ToTensor`` and ``Normalize`` need no table unless a result is subnormal."""
    lookup = tabulate([v1.ToTensor(), v1.Normalize(mean, std)], RGB, dtype)
    assert lookup.constants is not None


@settings(deadline=None, max_examples=100)
@given(
    mean=st.floats(-(2.0**100), 2.0**100) | st.floats(-1, 1),
    std=st.floats(1e-30, 1e30) | st.floats(-2, -0.01),
    dtype=st.sampled_from(FLOATS),
)
def test_any_finite_constants_are_exact(mean: float, std: float, dtype: torch.dtype) -> None:
    """Overflow, underflow and negative std: the kernel gives torchvision's bits all the same."""
    transform = v1.Compose([v1.ToTensor(), v1.Normalize([mean], [std])])
    pipeline = cut(transform)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GpupipeWarning)
        lookup = specify(pipeline, L, dtype)
    proved = prove(pipeline, lookup, L, "NHW", on_cpu(L, "NHW"))
    assert proved is not None
    output = on_cpu(L, "NHW")(np.ascontiguousarray(ramp(1)[..., 0]), proved)
    reference.assert_same_bits(output, reference.images(transform, ramp(1), dtype))


@pytest.mark.parametrize("normalize", [v1.Normalize, v2.Normalize])
@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([float("nan"), 0.5, 0.5], [1.0, 1.0, 1.0], "not finite"),
        ([0.5, float("inf"), 0.5], [1.0, 1.0, 1.0], "not finite"),
        ([0.5, 0.5, 0.5], [1.0, float("nan"), 1.0], "not finite"),
        ([0.5, 0.5, 0.5], [1.0, 0.0, 1.0], "std of 0"),
        ([0.5] * 4, [1.0] * 4, "for 4 channels"),
        ([0.5] * 2, [1.0] * 2, "for 2 channels"),
        ([0.5] * 3, [1.0] * 4, "for 4 channels"),
    ],
)
def test_constants_that_cannot_work(
    normalize: Any, mean: list[float], std: list[float], message: str
) -> None:
    """NaN, infinity, a std of 0 and a wrong number of channels are errors that say so."""
    scale = v1.ToTensor() if normalize is v1.Normalize else v2.ToDtype(torch.float32, scale=True)
    kind = RGB if normalize is v1.Normalize else RGB_TENSOR
    with pytest.raises(PlanError, match=message) as raised:
        tabulate([scale, normalize(mean, std)], kind)
    assert "Normalize(mean=" in str(raised.value)


def test_three_constants_for_grey_images() -> None:
    """An error where torchvision has one (v1); where it spreads grey to RGB (v2), no fusion."""
    with pytest.raises(PlanError, match="for 3 channels, but the images are PIL L with 1"):
        tabulate(V1, L)
    with pytest.raises(Refusal, match="shape"):
        tabulate(V2, L)


@pytest.mark.parametrize(
    ("operators", "message"),
    [
        ([v1.ToTensor(), v1.Normalize([123.7] * 3, [58.4] * 3)], "scale 0..255"),
        ([v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(MEAN, STD)], "scale 0..1"),
        ([*V1, v1.Normalize(MEAN, STD)], "a second time"),
        ([*V2, v2.Normalize([0.5], [0.5])], "a second time"),
    ],
)
def test_suspicious_constants_warn(operators: list[Any], message: str) -> None:
    """A mean on the wrong scale and a second normalisation warn; the bits stay torchvision's."""
    with pytest.warns(GpupipeWarning, match=message):
        lookup = tabulate(operators, RGB)
    pixels = ramp(3)
    reference.assert_same_bits(
        looked_up(lookup, pixels), reference.images(v1.Compose(operators), pixels)
    )


@pytest.mark.parametrize(
    "operators",
    [
        V1,
        V2,
        [v1.ToTensor(), v1.Normalize([0.0] * 3, [1.0] * 3)],
        [v1.ToTensor(), v1.Normalize([-1.0] * 3, [0.5] * 3)],
        [v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize([123.7] * 3, [58.4] * 3)],
        [v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize([0.0], [255.0])],
    ],
)
def test_sensible_constants_do_not_warn(operators: list[Any]) -> None:
    """Warnings are errors here."""
    tabulate(operators, RGB)


@pytest.mark.parametrize(
    ("operators", "kind", "message"),
    [
        ([v2.ToDtype(torch.float64, scale=True)], RGB_TENSOR, "float64"),
        ([v1.ToTensor(), v1.ConvertImageDtype(torch.float64)], RGB, "float64"),
        ([v2.ToDtype(torch.int64)], RGB_TENSOR, "int64"),
        ([v2.ToImage(), v2.Normalize([128.0], [64.0])], RGB, "torchvision refuses"),
        ([v1.ToTensor()], RGB_TENSOR, "torchvision refuses"),
        ([pointwise(lambda image: image[..., 1:])], RGB_TENSOR, "shape"),
        ([pointwise(lambda image: image.float().mean(0, keepdim=True))], RGB_TENSOR, "shape"),
        ([pointwise(lambda image: image.tolist())], RGB_TENSOR, "a list, not a tensor"),
    ],
)
def test_what_no_kernel_writes(operators: list[Any], kind: ImageKind, message: str) -> None:
    """Other dtypes, shapes and types are refused with the reason, not guessed at."""
    with pytest.raises(Refusal, match=message):
        tabulate(operators, kind)


def test_dtype_rounds_once_and_never_makes_floats_of_uint8() -> None:
    """``dtype=`` is a cast of the float result."""
    assert tabulate(V1, RGB, torch.float16).dtype == torch.float16
    assert tabulate([v1.PILToTensor()], RGB).dtype == torch.uint8
    with pytest.raises(Refusal, match="uint8"):
        tabulate([v1.PILToTensor()], RGB, torch.float32)


def _noise(image: torch.Tensor) -> torch.Tensor:
    return image + 0.01 * torch.rand_like(image)


def _place(image: torch.Tensor) -> torch.Tensor:
    return image + torch.linspace(0, 1, image.numel()).view_as(image)


NOT_POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "minus its mean": lambda image: image - image.mean(),
    "over its maximum": lambda image: image / image.amax((1, 2), keepdim=True),
    "channels swapped": lambda image: image[[2, 1, 0]],
    "gray": lambda image: image.mean(0, keepdim=True).expand(3, -1, -1),
    "flipped": lambda image: image.flip(-1),
    "turned upside down": lambda image: image.flip(-2),
    "shifted": lambda image: image.roll(1, -1),
    "noisy": _noise,
    "by place": _place,
    "summed": lambda image: image.cumsum(-1),
    "sorted, as the levels are": lambda image: image.sort(-1).values,
    "running maximum": lambda image: image.cummax(-1).values,
    "constant but for large images": lambda image: image if image.shape[-1] < 31 else image * 2,
}


@pytest.mark.parametrize("name", NOT_POINTWISE)
def test_a_false_promise_is_found_out(name: str) -> None:
    """Callables marked pointwise that look at other pixels, channels, places or dice."""
    with pytest.raises(PlanError, match="is marked pointwise, but"):
        tabulate([v1.ToTensor(), pointwise(NOT_POINTWISE[name])], RGB)
    NOT_POINTWISE[name].__gpupipe_pointwise__ = False  # type: ignore[attr-defined]


POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "affine": lambda image: image * 2 - 1,
    "square root": torch.Tensor.sqrt,
    "inverted": lambda image: 1 - image,
    "threshold": lambda image: (image > 0.5).float(),
    "by channel": lambda image: image * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
    "in place": lambda image: image.mul_(3).clamp_(0, 1),
    "not a number": lambda image: torch.where(image < 0.5, torch.nan, image),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_a_kept_promise_is_fused(name: str) -> None:
    """Curves, thresholds and work in place, bit for bit by the kernel."""

    def curve(image: torch.Tensor) -> torch.Tensor:
        return POINTWISE[name](image)

    transform = v1.Compose([v1.ToTensor(), pointwise(curve)])
    pipeline = cut(transform)
    assert pipeline.cut == 0
    lookup = specify(pipeline, RGB)
    assert prove(pipeline, lookup, RGB, "NHWC", on_cpu(RGB, "NHWC")) is not None
    output = on_cpu(RGB, "NHWC")(ramp(3), lookup)
    reference.assert_same_bits(output, reference.images(transform, ramp(3)))


def test_raw_pixels_changed_in_place() -> None:
    """A marked callable may be the first, and may write into the image that it gets."""

    @pointwise
    def inverted(image: torch.Tensor) -> torch.Tensor:
        return image.bitwise_not_()

    lookup = tabulate([inverted, v2.ToDtype(torch.float32, scale=True)], RGB_TENSOR)
    assert lookup.values[0, 0] == 1


def test_functions_whose_last_bits_depend_on_the_place() -> None:
    """PyTorch's pow in vectors differs from its tail's: not the author's fault, and not fused."""
    try:
        tabulate([v1.ToTensor(), pointwise(lambda image: image**2.2)], RGB)
    except Refusal as refusal:
        assert "last bits differ" in str(refusal)  # noqa: PT017 # fine on a machine that has one way


def test_marking() -> None:
    """The mark is an attribute; what takes none is refused."""

    class Slotted:
        __slots__ = ()

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return image

    def same(image: torch.Tensor) -> torch.Tensor:
        return image

    assert pointwise(same) is same
    with pytest.raises(PlanError, match="takes no attributes"):
        pointwise(Slotted())


class MyNormalize(v1.Normalize):  # type: ignore[misc] # torchvision is untyped
    """May do anything."""


class MyCompose(v2.Compose):  # type: ignore[misc] # torchvision is untyped
    """May do anything."""


@pytest.mark.parametrize(
    ("transform", "fused", "positions"),
    [
        (v1.Compose(V1), 2, ["0", "1"]),
        (v2.Compose([v2.Compose(V2[:1]), v1.Compose(V2[1:])]), 3, ["0.0", "1.0", "1.1"]),
        (nn.Sequential(v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)), 2, None),
        (v1.ToTensor(), 1, ["0"]),
        (v1.Compose([v1.RandomRotation(3), v1.Compose(V1)]), 2, ["0", "1.0", "1.1"]),
        (v1.Compose([v1.ToTensor(), v1.RandomInvert(), V1[1]]), 0, None),
        (v1.Compose([V1[1]]), 0, None),
        (v1.Compose([v1.ToTensor(), MyNormalize(MEAN, STD)]), 0, None),
        (MyCompose(V2), 0, ["0"]),
        (v1.Compose([v1.ToTensor(), lambda image: image]), 0, None),
        (v1.Compose([]), 0, []),
    ],
)
def test_where_a_pipeline_is_cut(transform: Any, fused: int, positions: list[str] | None) -> None:
    """The longest pointwise suffix that takes uint8; subclasses and strangers end it."""
    pipeline = cut(transform)
    assert len(pipeline.fused_calls) == fused
    if positions is not None:
        assert [operator.position for operator in pipeline.operators] == positions
    if not fused:
        with pytest.raises(Refusal):
            specify(pipeline, RGB)
    lines = str(Plan(pipeline, reason="a reason")).splitlines()
    assert sum("refused: a reason" in line for line in lines) == fused


def test_a_container_with_hooks_is_left_alone() -> None:
    """A hook could do anything, once per sample: neither container nor operator is fused then."""
    sequence = nn.Sequential(*V2[1:])
    sequence.register_forward_hook(lambda _module, _args, output: output.flip(-1))
    assert cut(sequence).fused_calls == []
    normalize = v2.Normalize(MEAN, STD)
    normalize.register_forward_hook(lambda _module, _args, output: output * 2)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])
    assert cut(transform).fused_calls == []


def test_the_plan_prints_where_everything_runs() -> None:
    """Per operator: fused or on the CPU, and why."""
    transform = v1.Compose([v1.RandomRotation(8), MyNormalize(MEAN, STD), _noise, *V1])
    pipeline = cut(transform)
    text = str(Plan(pipeline, specify(pipeline, RGB)))
    assert "fused: pointwise: arithmetic equal to the table" in text
    assert "no kernel yet" in text
    assert "a subclass of Normalize may do something else" in text
    assert "gpupipe.pointwise marks one" in text


LAYOUTS: tuple[Layout, ...] = ("NHWC", "NCHW")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_the_proof_accepts_what_is_right(layout: Layout, dtype: torch.dtype | None) -> None:
    """The lookup itself comes back, constants and all."""
    for transform in (v1.Compose(V1), v2.Compose(V2)):
        pipeline = cut(transform)
        lookup = specify(pipeline, RGB, dtype)
        assert prove(pipeline, lookup, RGB, layout, on_cpu(RGB, layout)) is lookup


@pytest.mark.parametrize("kind", [L, RGB])
def test_the_proof_looks_at_every_entry(kind: ImageKind) -> None:
    """All 256 levels of every channel are in the images that prove a kernel."""
    pipeline = cut(v1.Compose([v1.ToTensor()]))
    seen = np.zeros((kind.channels, 256), bool)
    own = on_cpu(kind, kind.layout)

    def render(raw: NDArray[np.uint8], lookup: Lookup) -> torch.Tensor:
        for channel in range(kind.channels):
            seen[channel, raw.reshape(-1, kind.channels)[:, channel]] = True
        return own(raw, lookup)

    assert prove(pipeline, specify(pipeline, kind), kind, kind.layout, render) is not None
    assert seen.all()


@settings(deadline=None, max_examples=60)
@given(channel=st.integers(0, 2), level=st.integers(0, 255), up=st.booleans())
def test_the_proof_finds_one_wrong_entry(channel: int, level: int, up: bool) -> None:
    """A single entry of the table, off by one unit in the last place: not one is overlooked."""
    pipeline = cut(v1.Compose(V1))
    values = specify(pipeline, RGB).values.clone()
    towards = torch.tensor(torch.inf if up else -torch.inf)
    values[channel, level] = values[channel, level].nextafter(towards)
    wrong = Lookup(values)
    assert prove(pipeline, wrong, RGB, "NHWC", on_cpu(RGB, "NHWC")) is None


@pytest.mark.parametrize("column", [0, 2, 3])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_the_proof_falls_back_to_the_table(column: int, channel: int) -> None:
    """Constants off by one unit in the last place: the table is right and takes over."""
    pipeline = cut(v1.Compose(V1))
    lookup = specify(pipeline, RGB)
    assert lookup.constants is not None
    constants = lookup.constants.copy()
    constants[channel, column] = np.nextafter(constants[channel, column], np.float32(1e9))
    planted = Lookup(lookup.values, constants)
    proved = prove(pipeline, planted, RGB, "NHWC", on_cpu(RGB, "NHWC"))
    assert proved is not None
    assert proved.constants is None
    assert torch.equal(proved.values, lookup.values)


@pytest.mark.parametrize("fault", ["layout", "channels", "dropped", "tail"])
def test_the_proof_finds_a_wrong_kernel(fault: str) -> None:
    """Axes or channels exchanged, an image dropped, a tail not written."""
    pipeline = cut(v1.Compose(V1))
    right = on_cpu(RGB, "NHWC")

    def wrong(raw: NDArray[np.uint8], lookup: Lookup) -> torch.Tensor:
        output = right(raw, lookup)
        if fault == "layout":
            return output.transpose(2, 3).reshape(output.shape)
        if fault == "channels":
            return output.flip(1)
        if fault == "dropped":
            output[-1] = output[0]
        else:
            pixels = output.shape[2] * output.shape[3]
            output.view(3, 3, pixels)[:, :, pixels // 16 * 16 :] = 0
        return output

    assert prove(pipeline, specify(pipeline, RGB), RGB, "NHWC", wrong) is None
