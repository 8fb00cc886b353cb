"""Devices behind one protocol: what the stream protocol of ``transfer`` asks of a device.

``CudaDevice`` is torch's streams, events and allocator; ``CpuDevice`` does everything at once, so
its streams are no-ops and its staging is the host memory itself. The third, a simulated GPU with
adversarial delays, lives in the tests. Nothing here touches CUDA before ``resolve`` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpupipe import notices
from gpupipe.device import Device
from gpupipe.errors import DeviceError, InputError
from gpupipe.memory import OutputPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpupipe.program import Program, Recipe
    from gpupipe.tables import Layout, Lookup


class HostMemory:
    """Host memory, page-locked until that fails; then plain, with one warning.

    Args:
        pinned: returns uint8 [nbytes], page-locked, or raises RuntimeError.
    """

    def __init__(self, pinned: Callable[[int], torch.Tensor]) -> None:
        self._pinned: Callable[[int], torch.Tensor] | None = pinned

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return uninitialised uint8 [nbytes]."""
        if self._pinned is not None:
            try:
                return self._pinned(nbytes)
            except RuntimeError as error:
                self._pinned = None
                notices.warn(
                    f"{nbytes} bytes of host memory could not be pinned ({error}); going on "
                    "without: the batches are the same, the copies are slower and overlap less; "
                    "raise the memory-lock limit (ulimit -l) or lower the batch size"
                )
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class CudaDevice:
    """One CUDA device, by torch's streams, events and allocator.

    Args:
        index: of the device, as torch counts.
        pinned: how page-locked memory is had; for tests.
    """

    is_async = True

    def __init__(self, index: int, pinned: Callable[[int], torch.Tensor] | None = None) -> None:
        self.torch_device = torch.device("cuda", index)
        self._host = HostMemory(pinned or self._pinned)

    def _pinned(self, nbytes: int) -> torch.Tensor:
        # The producer thread's current device is cuda:0; a context there would cost its memory.
        with torch.cuda.device(self.torch_device):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """See ``Device``."""
        return self._host.empty(nbytes)

    def staging(self, host: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
        """See ``Device``."""
        with torch.cuda.stream(stream):
            return torch.empty(host.numel(), dtype=torch.uint8, device=self.torch_device)

    def new_stream(self) -> torch.cuda.Stream:
        """See ``Device``."""
        return torch.cuda.Stream(self.torch_device)

    def current_stream(self) -> torch.cuda.Stream:
        """See ``Device``."""
        return torch.cuda.current_stream(self.torch_device)

    def new_event(self) -> torch.cuda.Event:
        """See ``Device``; a host that waits sleeps, it does not spin beside the training loop."""
        return torch.cuda.Event(blocking=True)

    def is_capturing(self) -> bool:
        """See ``Device``."""
        with torch.cuda.device(self.torch_device):
            return bool(torch.cuda.is_current_stream_capturing())

    def copy(
        self, staging: torch.Tensor, host: torch.Tensor, nbytes: int, stream: torch.cuda.Stream
    ) -> None:
        """See ``Device``."""
        with torch.cuda.stream(stream):
            staging[:nbytes].copy_(host[:nbytes], non_blocking=True)

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        """See ``Device``."""
        return torch.empty(
            shape, dtype=dtype, device=self.torch_device, memory_format=memory_format
        )

    def normalize(
        self,
        images: torch.Tensor,
        rows: torch.Tensor | None,
        outputs: Sequence[torch.Tensor],
        lookup: Lookup,
        *,
        layout: Layout,
    ) -> None:
        """See ``Device``."""
        from gpupipe import cuda_ops  # CuPy: where there is CUDA, and not before it is used

        with torch.cuda.device(self.torch_device):
            cuda_ops.normalize(images, rows, outputs, lookup, layout=layout)

    def resample(
        self,
        images: torch.Tensor,  # noqa: ARG002 # the protocol's, and so the others
        program: Program,  # noqa: ARG002
        outputs: Sequence[torch.Tensor],  # noqa: ARG002
        recipe: Recipe,  # noqa: ARG002
    ) -> None:
        """See ``Device``; ``for_programs`` never lets it come to this.

        Raises:
            DeviceError: always, there is no CUDA kernel for programs yet.
        """
        raise DeviceError("programs have no CUDA kernel yet; use for_programs(device)")

    def clone(self, source: torch.Tensor) -> torch.Tensor:
        """See ``Device``."""
        return source.clone()

    def record_stream(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """See ``Device``."""
        tensor.record_stream(stream)

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Device``."""
        return tensor


class _NoStream:
    """The stream and the event of a device that does everything at once."""

    def wait_event(self, event: Any) -> None:
        """Nothing is ever pending."""

    def record(self, stream: Any) -> None:
        """Nothing is ever pending."""

    def synchronize(self) -> None:
        """Nothing is ever pending."""


_NO_STREAM = _NoStream()


class CpuDevice:
    """The host: staging is the host memory itself, and every call is done when it returns.

    Args:
        final: where batches are copied once they are done; for devices without a kernel of ours.
    """

    is_async = False

    def __init__(self, final: torch.device | None = None) -> None:
        self.torch_device = final or torch.device("cpu")
        self._copies = final is not None
        self._pool = OutputPool()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """See ``Device``."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def staging(self, host: torch.Tensor, stream: Any) -> torch.Tensor:  # noqa: ARG002 - protocol
        """See ``Device``."""
        return host

    def new_stream(self) -> _NoStream:
        """See ``Device``."""
        return _NO_STREAM

    def current_stream(self) -> _NoStream:
        """See ``Device``."""
        return _NO_STREAM

    def new_event(self) -> _NoStream:
        """See ``Device``."""
        return _NO_STREAM

    def is_capturing(self) -> bool:
        """See ``Device``."""
        return False

    def copy(self, staging: torch.Tensor, host: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Do nothing: ``staging`` is ``host``."""

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        """See ``Device``; memory that the consumer has dropped is used again."""
        channels_last = memory_format is torch.channels_last
        return self._pool.empty(shape, dtype, channels_last=channels_last)

    def normalize(
        self,
        images: torch.Tensor,
        rows: torch.Tensor | None,
        outputs: Sequence[torch.Tensor],
        lookup: Lookup,
        *,
        layout: Layout,
    ) -> None:
        """See ``Device``."""
        from gpupipe import cpu_ops  # not needed before the first batch

        host_rows = None if rows is None else rows.numpy()
        cpu_ops.normalize(images.numpy(), host_rows, outputs, lookup, layout=layout)

    def resample(
        self,
        images: torch.Tensor,
        program: Program,
        outputs: Sequence[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        """See ``Device``."""
        from gpupipe import cpu_ops  # not needed before the first batch

        cpu_ops.resample(images.numpy(), program.on_host(), outputs, recipe)

    def clone(self, source: torch.Tensor) -> torch.Tensor:
        """See ``Device``."""
        return source.clone()

    def record_stream(self, tensor: torch.Tensor, stream: Any) -> None:
        """Nothing is ever pending."""

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Device``."""
        return tensor.to(self.torch_device) if self._copies else tensor


def copies(device: Device) -> bool:
    """Whether the CPU's kernel makes the batches of a device, which are then copied there."""
    return isinstance(device, CpuDevice) and device.torch_device.type != "cpu"


def for_programs(device: Device) -> Device:
    """Return the device that makes batches with geometry for another one.

    There is no CUDA kernel for them yet: the CPU's makes the same bits, and they are copied once.
    """
    return CpuDevice(final=device.torch_device) if isinstance(device, CudaDevice) else device


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    """Warn once in the life of the process."""
    if message not in _warned:
        _warned.add(message)
        notices.warn(message)


def resolve(device: str | int | torch.device | None) -> CudaDevice | CpuDevice:
    """Return the device to make batches on; called when iteration begins, never before.

    Args:
        device: ``None`` (torch's current CUDA device if there is one, else the CPU), ``"cpu"``,
            ``"cuda"``, ``"cuda:1"``, an index, or any ``torch.device``. On a device without a
            kernel of ours (mps, xpu, ROCm) the CPU kernel runs and the batch is copied once.

    Raises:
        InputError: not a device.
        DeviceError: a device, CuPy or kernel that is not there.
    """
    if device is None and not torch.cuda.is_available():
        return CpuDevice()
    wanted = _parse("cuda" if device is None else device)
    if wanted.type == "cpu":
        return CpuDevice()
    if wanted.type != "cuda" or torch.version.hip is not None:
        return _copied(device, wanted)
    index = _cuda_index(device, wanted)
    from gpupipe import kernel_source

    try:
        kernel_source.require_cupy()
    except DeviceError as error:
        if device is not None:
            raise
        _warn_once(f"batches are made on the CPU and copied to the GPU: {error}")
        return CpuDevice(final=torch.device("cuda", index))
    return CudaDevice(index)


def _parse(device: str | int | torch.device) -> torch.device:
    """Return what the user's value means; an index counts CUDA devices."""
    try:
        if isinstance(device, int) and not isinstance(device, bool):
            return torch.device("cuda", device)
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"device must be None, 'cpu', 'cuda', 'cuda:N', an index or a torch.device, "
            f"got {device!r}; pass one of these"
        ) from error


def _cuda_index(device: object, wanted: torch.device) -> int:
    """Return the index of a CUDA device that is there."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees no CUDA device; "
            "expected an NVIDIA GPU, its driver and a CUDA build of torch; install these, or pass "
            "device='cpu' (the same bits) or device=None (a GPU where there is one)"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if not 0 <= index < count:
        raise DeviceError(
            f"device={device!r} was asked for, but torch sees {count} CUDA device(s); expected an "
            f"index in 0..{count - 1}; pass one of these, or look at CUDA_VISIBLE_DEVICES"
        )
    return index


def _copied(device: object, wanted: torch.device) -> CpuDevice:
    """Return the CPU's kernels with one copy to a device for which there is no kernel."""
    name = "ROCm" if wanted.type == "cuda" else wanted.type
    try:
        _try(wanted)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise DeviceError(
            f"device={device!r} was asked for, but torch cannot use it here ({error}); expected a "
            "device with memory; pass device='cpu' or device=None"
        ) from error
    _warn_once(
        f"gpupipe has no kernel for {name}: batches are made by the CPU kernel (the same bits) "
        "and copied there; pass device='cpu' to copy them yourself"
    )
    return CpuDevice(final=wanted)


def _try(wanted: torch.device) -> None:
    """Raise what torch raises where a device cannot be used."""
    torch.empty(1, device=wanted).cpu()
