"""``compile(transform)``: a transform as a module, for any loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpupipe import devices
from gpupipe.devices import CpuDevice
from gpupipe.errors import InputError, PlanError
from gpupipe.images import ImageKind
from gpupipe.operators.pointwise import Refusal
from gpupipe.plan import Plan, cut, specify
from gpupipe.routes import feed_spec, proved
from gpupipe.staging import FeedSpec
from gpupipe.tables import Layout, Lookup


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
        self._pipeline = cut(transform)
        self._wanted = device
        self._dtype = dtype
        self._memory_format = memory_format
        self._specs: dict[Any, FeedSpec] = {}
        self._lookups: dict[Any, tuple[ImageKind, Lookup]] = {}
        self.plan = Plan(self._pipeline, source="the batch that is passed")
        if self._pipeline.cut:
            first = self._pipeline.operators[0].name
            raise PlanError(
                f"compile() takes pointwise transforms, got one that begins with {first}; run that "
                "on each image before, and compile the rest"
            )
        if not self._pipeline.operators:
            raise PlanError("compile() got an empty transform; pass at least ToTensor")

    def forward(
        self, images: NDArray[np.uint8] | torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the transformed batch on the device, made on the current stream.

        Args:
            images: uint8 ndarray [N, H, W, C] or [N, H, W], or uint8 tensor [N, C, H, W] or
                [N, H, W], on the CPU or on the device.
            out: where to write; [N, C, H, W] on the device, of the result's dtype, contiguous or
                channels_last.

        Raises:
            InputError: another dtype or shape.
            PlanError: constants that cannot work, or a transform that cannot be fused.
        """
        layout, channels = _layout(images)
        device = devices.resolve(self._wanted)
        kind, lookup = self._specified(layout, channels, isinstance(images, np.ndarray), device)
        spec = self._spec(images, layout, kind, lookup)
        shape = (len(images), *spec.output_shape)
        if out is None:
            out = device.empty(shape, lookup.dtype, spec.memory_format)
        elif tuple(out.shape) != shape:
            raise InputError(f"out must have shape {shape}, got {tuple(out.shape)}; allocate anew")
        if len(images):
            raw = _raw(images)
            if not isinstance(device, CpuDevice):
                raw = raw.to(device.torch_device, non_blocking=True)
            device.normalize(raw.contiguous(), None, [out], lookup, layout=layout)
        return device.finish(out)

    def _specified(
        self, layout: Layout, channels: int, array: bool, device: Any
    ) -> tuple[ImageKind, Lookup]:
        key = (layout, channels, array, str(device.torch_device))
        if key not in self._lookups:
            kind, lookup = self._tabulate(layout, channels, array)
            agreed = proved(device, self._pipeline, lookup, kind, layout, self._memory_format)
            if agreed is None:
                raise PlanError(
                    f"the kernel on {device.torch_device} differs from the installed torchvision; "
                    "use the transform itself, and report this with your versions"
                )
            self._lookups[key] = kind, agreed
            self.plan.lookup = agreed
            self.plan.delivery = f"normalize in one kernel on {device.torch_device}"
        return self._lookups[key]

    def _tabulate(self, layout: Layout, channels: int, array: bool) -> tuple[ImageKind, Lookup]:
        """Specify the transform for images as they came, else as PIL images of them."""
        kinds = [ImageKind("ndarray" if array else "tensor", channels, layout)]
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
        if mode is not None:
            kinds.append(ImageKind("PIL", channels, "NHW" if channels == 1 else "NHWC", mode))
        reasons = []
        for kind in kinds:
            try:
                return kind, specify(self._pipeline, kind, self._dtype)
            except Refusal as refusal:
                reasons.append(str(refusal))
        raise PlanError(f"the transform cannot be compiled: {reasons[0]}; use it as it is")

    def _spec(
        self,
        images: NDArray[np.uint8] | torch.Tensor,
        layout: Layout,
        kind: ImageKind,
        lookup: Lookup,
    ) -> FeedSpec:
        key = (tuple(images.shape[1:]), layout, kind, lookup)
        if key not in self._specs:
            self._specs[key] = feed_spec(
                self._pipeline, lookup, kind, tuple(images.shape[1:]), layout, self._memory_format
            )
        return self._specs[key]


def compile(  # noqa: A001 # the word that torch.compile taught
    transform: Callable[[Any], Any],
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Preprocess:
    """Compile a pointwise torchvision transform into a module for whole uint8 batches.

    Args:
        transform: a ``Compose`` such as ``[ToTensor(), Normalize(...)]``, v1 or v2.
        device: where results are made; None: the current CUDA device if there is one, else the
            CPU. Resolved at the first call.
        dtype: of the result; None: as the transform returns it.
        memory_format: of the result.

    Raises:
        PlanError: a transform with operators that are not pointwise.

    Example:
        >>> preprocess = gpupipe.compile(T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.5,))]))
        >>> batch = preprocess(np.zeros((8, 28, 28), np.uint8))
    """
    return Preprocess(transform, device, dtype, memory_format)


def _layout(images: Any) -> tuple[Layout, int]:
    if isinstance(images, np.ndarray):
        if images.dtype == np.uint8 and images.ndim == 4:  # noqa: PLR2004 # [N, H, W, C]
            return "NHWC", images.shape[3]
    elif isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8 and images.ndim == 4:  # noqa: PLR2004 # [N, C, H, W]
            return "NCHW", int(images.shape[1])
    else:
        raise InputError(
            f"images must be a uint8 ndarray or tensor, got {type(images).__name__}; "
            "stack the raw images into one array"
        )
    if str(images.dtype).removeprefix("torch.") == "uint8" and images.ndim == 3:  # noqa: PLR2004 # [N, H, W]
        return "NHW", 1
    axes = "N, H, W, C" if isinstance(images, np.ndarray) else "N, C, H, W"
    dtype = str(images.dtype).removeprefix("torch.")
    raise InputError(
        f"images must be uint8 [{axes}] or [N, H, W], got {dtype} {tuple(images.shape)}; "
        "pass the raw batch"
    )


def _raw(images: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Return images as a tensor in their own axis order; copies only what cannot be viewed."""
    if isinstance(images, torch.Tensor):
        return images
    array = np.ascontiguousarray(images)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
