"""What the stream protocol of ``transfer`` asks of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpupipe.program import Program, Recipe
    from gpupipe.tables import Layout, Lookup


class Stream(Protocol):
    """A queue of work in order, as ``torch.cuda.Stream``."""

    def wait_event(self, event: Any) -> None:
        """Let work enqueued from now on wait for the event's latest record."""

    def synchronize(self) -> None:
        """Let the host wait for all work enqueued so far."""


class Event(Protocol):
    """A point in a stream, as ``torch.cuda.Event``; waiting for one never recorded is no wait."""

    def record(self, stream: Any) -> None:
        """Mark the work enqueued on ``stream`` so far."""

    def synchronize(self) -> None:
        """Let the host wait for the latest record."""


class Device(Protocol):
    """Where batches are made. Tensors given out without a stream belong to the current one."""

    @property
    def torch_device(self) -> torch.device:
        """Where the batches that ``finish`` returns lie."""

    @property
    def is_async(self) -> bool:
        """Whether work is enqueued, so that copies overlap with the host."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] in host memory, page-locked if the device copies from it."""

    def staging(self, host: torch.Tensor, stream: Any) -> torch.Tensor:
        """Return uint8 memory like ``host`` on the device, allocated on ``stream``."""

    def new_stream(self) -> Stream:
        """Return a stream for the copies."""

    def current_stream(self) -> Stream:
        """Return the calling thread's current stream on this device."""

    def new_event(self) -> Event:
        """Return an event that was never recorded."""

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""

    def copy(self, staging: torch.Tensor, host: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Enqueue the copy of the first ``nbytes`` bytes on ``stream``."""

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        """Return an uninitialised tensor, allocated on the current stream."""

    def normalize(
        self,
        images: torch.Tensor,
        rows: torch.Tensor | None,
        outputs: Sequence[torch.Tensor],
        lookup: Lookup,
        *,
        layout: Layout,
    ) -> None:
        """Launch ``cuda_ops.normalize``, or its twin, on the current stream."""

    def resample(
        self,
        images: torch.Tensor,
        program: Program,
        outputs: Sequence[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        """Launch ``cuda_ops.resample``, or its twin, on the current stream."""

    def clone(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy in memory of its own, made on the current stream."""

    def record_stream(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the allocator that ``stream``, too, uses the tensor."""

    def finish(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor where the consumer wants it."""
