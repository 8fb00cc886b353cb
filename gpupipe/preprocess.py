"""``compile(transform)``: a transform as a module, for any loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpupipe import devices
from gpupipe.device import Device
from gpupipe.devices import CpuDevice
from gpupipe.errors import InputError, PlanError
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal, is_marked
from gpupipe.plan import Plan, cut, specify
from gpupipe.routes import feed_spec, proved
from gpupipe.staging import FeedSpec
from gpupipe.tables import Layout, Lookup, check_output


class Preprocess(nn.Module):
    """A torchvision transform for whole batches of raw images, in one kernel.

    Made by ``compile``. Has no parameters; ``.to()`` and ``.half()`` do not change it.

    Attributes:
        plan: what runs where; complete after the first batch.
    """

    def __init__(
        self,
        transform: Callable[[Any], Any],
        device: str | int | torch.device | None,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__()
        check_output(dtype, memory_format)
        self._pipeline = cut(transform)
        self._wanted = device
        self._dtype = dtype
        self._memory_format = memory_format
        self._devices: dict[Any, Device] = {}
        self._specs: dict[Any, FeedSpec] = {}
        self.plan = self._new_plan()
        if self._pipeline.cut:
            first = self._pipeline.operators[0].name
            raise PlanError(
                f"compile() takes pointwise transforms, got one that begins with {first}; run that "
                "on each image before, and compile the rest"
            )
        if not self._pipeline.is_pointwise:
            first = next(
                o.name
                for o, low in zip(self._pipeline.operators, self._pipeline.lowered, strict=True)
                if low is not None
            )
            raise PlanError(
                f"compile() takes pointwise transforms, got {first}, which moves pixels; use a "
                "gpupipe.DataLoader, which draws and crops, or compile the rest"
            )
        if not self._pipeline.operators:
            raise PlanError("compile() got an empty transform; pass at least ToTensor")

    def forward(
        self, images: NDArray[np.uint8] | torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the transformed batch on the device, made on the current stream.

        Args:
            images: uint8 ndarray [N, H, W, C] or [N, H, W], or uint8 tensor [N, C, H, W] or
                [N, H, W], on the CPU or on the device. It may be filled again at once.
            out: where to write; [N, C, H, W] on the device, of the result's dtype, contiguous or
                channels_last, without ``requires_grad``.

        Raises:
            InputError: another dtype, shape, layout or device.
            PlanError: constants that cannot work, or a transform that cannot be fused.
        """
        layout, channels = _layout(images)
        device = self._device()
        memory_format = self._memory_format if out is None else _format(out)
        sizes = dict(zip(layout, images.shape, strict=True))
        size = (sizes["H"], sizes["W"])
        array = isinstance(images, np.ndarray)
        spec = self._specified(layout, channels, size, memory_format, device, array=array)
        shape = (len(images), *spec.output_shape[:-2], *size)
        if out is not None:
            _check_out(out, shape, spec.lookup.dtype, device.torch_device)
        place = torch.device("cpu") if isinstance(device, CpuDevice) else device.torch_device
        made = out
        if made is None or not _lies_on(made, place):
            made = device.empty(shape, spec.lookup.dtype, spec.memory_format)
        if made.numel():
            raw = _raw(images).to(place)  # waits for the copy: pinned memory is the caller's again
            device.normalize(raw.contiguous(), None, [made], spec.lookup, layout=layout)
        if out is None:
            return device.finish(made)
        if made is not out:
            return out.copy_(made)
        torch.autograd.graph.increment_version(out)  # autograd does not see what kernels write
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled and device state behind; it is made again where the copy runs."""
        return {**self.__dict__, "plan": self._new_plan(), "_devices": {}, "_specs": {}}

    def _new_plan(self) -> Plan:
        return Plan(self._pipeline, source="the batch that is passed")

    def _device(self) -> Device:
        """Resolve the device; keep it, for its memory is used again."""
        device = devices.resolve(self._wanted)
        return self._devices.setdefault((type(device), device.torch_device), device)

    def _specified(
        self,
        layout: Layout,
        channels: int,
        size: tuple[int, int],
        memory_format: torch.memory_format,
        device: Device,
        *,
        array: bool,
    ) -> FeedSpec:
        """Return what becomes of an image of one pixel; the kernel is proved first, once."""
        tried = size if any(map(is_marked, self._pipeline.fused_calls)) else None
        key = (layout, channels, tried, memory_format, device.torch_device, array)
        if key not in self._specs:
            kind, lookup = self._tabulate(layout, channels, size, array=array)
            agreed = proved(device, self._pipeline, lookup, kind, layout, memory_format)
            if agreed is None:
                raise PlanError(
                    f"the kernel on {device.torch_device} differs from the installed torchvision; "
                    "use the transform itself, and report this with your versions"
                )
            pixel = tuple(channels if axis == "C" else 1 for axis in layout[1:])
            self._specs[key] = feed_spec(self._pipeline, agreed, kind, pixel, layout, memory_format)
            self.plan.lookup = agreed
            self.plan.delivery = f"normalize in one kernel on {device.torch_device}"
        return self._specs[key]

    def _tabulate(
        self, layout: Layout, channels: int, size: tuple[int, int], *, array: bool
    ) -> tuple[ImageKind, Lookup]:
        """Specify the transform for images as they came, else as PIL images of them."""
        kinds = [ImageKind("ndarray" if array else "tensor", channels, layout)]
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels)
        if mode is not None:
            kinds.append(ImageKind("PIL", channels, "NHW" if channels == 1 else "NHWC", mode))
        reasons = []
        for kind in kinds:
            try:
                return kind, specify(self._pipeline, kind, self._dtype, size)
            except Refusal as refusal:
                reasons.append(str(refusal))
        why = "; ".join(dict.fromkeys(reasons))
        raise PlanError(f"the transform cannot be compiled: {why}; use it as it is")


def compile(  # noqa: A001 # the word that torch.compile taught
    transform: Callable[[Any], Any],
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Preprocess:
    """Compile a pointwise torchvision transform into a module for whole uint8 batches.

    The transform is read once: what is changed in it afterwards, the module does not see. Compile
    it again then.

    Args:
        transform: a ``Compose`` such as ``[ToTensor(), Normalize(...)]``, v1 or v2.
        device: where results are made; None: the current CUDA device if there is one, else the
            CPU. Resolved at the first call.
        dtype: of the result: float32, float16 or bfloat16; None: as the transform returns it.
        memory_format: of the result, ``torch.contiguous_format`` or ``torch.channels_last``.

    Raises:
        InputError: another dtype or memory format.
        PlanError: a transform with operators that are not pointwise.

    Example:
        >>> preprocess = gpupipe.compile(T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.5,))]))
        >>> batch = preprocess(np.zeros((8, 28, 28), np.uint8))
    """
    return Preprocess(transform, device, dtype, memory_format)


def _layout(images: Any) -> tuple[Layout, int]:
    """Return the layout and the channels of raw images."""
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        raise InputError(
            f"images must be a uint8 ndarray or tensor, got {type(images).__name__}; "
            "stack the raw images into one array"
        )
    layout: Layout = "NHWC" if isinstance(images, np.ndarray) else "NCHW"
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if dtype == "uint8" and len(shape) == 3:  # noqa: PLR2004 # [N, H, W]
        return "NHW", 1
    if dtype == "uint8" and len(shape) == 4 and shape[layout.index("C")]:  # noqa: PLR2004
        return layout, shape[layout.index("C")]
    raise InputError(
        f"images must be uint8 [{', '.join(layout)}] or [N, H, W], got {dtype} {shape}; "
        "pass the raw batch"
    )


def _format(out: Any) -> torch.memory_format:
    """Return the memory format in which to write ``out``."""
    if not isinstance(out, torch.Tensor) or out.layout != torch.strided:
        raise InputError(f"out must be a dense tensor, got {type(out).__name__}; leave it out")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if out.is_contiguous(memory_format=memory_format):
            return memory_format
    raise InputError(
        f"out must be contiguous or channels_last, got strides {out.stride()} for shape "
        f"{tuple(out.shape)}; allocate a tensor of its own"
    )


def _check_out(
    out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse an ``out`` that the result does not fit."""
    if tuple(out.shape) != shape or out.dtype != dtype or not _lies_on(out, device):
        raise InputError(
            f"out must be {dtype} of shape {shape} on {device}, got {out.dtype} of shape "
            f"{tuple(out.shape)} on {out.device}; allocate anew"
        )
    if out.requires_grad:
        raise InputError(
            "out must not require grad, got one that does: a kernel that writes it has no "
            "backward; pass out.detach(), or leave it out"
        )


def _lies_on(tensor: torch.Tensor, device: torch.device) -> bool:
    here = tensor.device
    return here.type == device.type and device.index in (None, here.index)


def _raw(images: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Return images as a tensor in their own axis order; copies only what cannot be viewed."""
    if isinstance(images, torch.Tensor):
        return images
    array = np.ascontiguousarray(images)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
