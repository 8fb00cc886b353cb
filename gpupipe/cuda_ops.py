"""Launchers of the CUDA kernels; the twins in ``cpu_ops`` have the same names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpupipe import kernel_source
from gpupipe.errors import InputError
from gpupipe.geometry import check
from gpupipe.kernel_source import THREADS
from gpupipe.tables import Images, Layout, Lookup, Rows

MAX_OUTPUTS = 64
"""Allocations that one launch writes, ``MAX_OUTPUTS`` in ``common.cuh``."""

_OUTPUTS = np.dtype([("pointer", np.int64, (MAX_OUTPUTS,))])
_VECTOR_BYTES = 16
_TEMPLATED_CHANNELS = (1, 3, 4)


def normalize(
    images: Images,
    rows: Rows | None,
    outputs: Sequence[torch.Tensor],
    lookup: Lookup,
    *,
    layout: Layout,
) -> None:
    """Gather raw images and write what the pipeline makes of every pixel, on the current stream.

    ``outputs[n // B][n % B, c, h, w] = lookup.values[c, images[rows[n], h, w, c]]`` where B is the
    batch size of all outputs but the last. Nothing waits for the device. As with any operation,
    the caller keeps the arguments alive until the stream has passed the launch.

    Args:
        images: uint8 tensor [M, H, W, C], [M, C, H, W] or [M, H, W], contiguous, on a CUDA device.
        rows: int64 [N] indices into ``images`` on the same device, or None for all of them in
            order. Their range is not checked here: that would wait for the device.
        outputs: tensors [B, C, H, W], contiguous or channels_last, or [B, H, W], of
            ``lookup.dtype`` on the same device; all but the last of the same B, N images in all.
        lookup: the pipeline.
        layout: of ``images``.

    Raises:
        InputError: a dtype, shape, layout or device that does not fit.
        DeviceError: CuPy is missing or does not fit, or the kernel does not compile.
    """
    g = check(images, rows, outputs, lookup, layout, "cuda")
    device = _one_device(images, rows, outputs)
    if not g.count or not g.pixels:
        return
    templated = g.channels if g.channels in _TEMPLATED_CHANNELS else 0
    size = lookup.dtype.itemsize
    instance = kernel_source.Normalize(size, templated, g.planar_in, g.planar_out)
    kernel = kernel_source.kernel("normalize", instance.expression, device.index)
    table = lookup.on(device)
    tile = tile_pixels(g.pixels, size)
    planes = g.channels if g.planar_in and g.planar_out else 1
    tiles_per_image = planes * -(-g.pixels // tile)
    source = images.data_ptr() if isinstance(images, torch.Tensor) else 0
    picked = None if rows is None else torch.as_tensor(rows).contiguous()

    # CuPy's current device and stream are its own, per thread: give it torch's.
    cupy = kernel_source.require_cupy()
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    with (
        torch.cuda.device(device),
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(stream),
    ):
        for first in range(0, len(outputs), MAX_OUTPUTS):
            part = outputs[first : first + MAX_OUTPUTS]
            begin = first * g.per_output
            count = min(g.count - begin, len(part) * g.per_output)
            if count <= 0:
                continue
            pointers = np.zeros((), _OUTPUTS)  # copied into the launch, so nothing can race on it
            pointers["pointer"][: len(part)] = [output.data_ptr() for output in part]
            kernel.function(
                (min(count * tiles_per_image, kernel.blocks),),
                (THREADS,),
                (
                    source if picked is not None else source + begin * g.channels * g.pixels,
                    0 if picked is None else picked.data_ptr() + begin * picked.itemsize,
                    pointers,
                    g.per_output,
                    count,
                    g.pixels,
                    g.channels,
                    tile,
                    table.data_ptr(),
                ),
            )


@dataclass(frozen=True)
class _Stream:
    """A raw stream handle under the CUDA stream protocol, which older torch streams lack."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


def tile_pixels(pixels: int, element_size: int) -> int:
    """Return the pixels of a tile: equal shares of an image, in steps that keep alignment.

    Args:
        pixels: H * W.
        element_size: bytes of an output element.
    """
    limit = 2 * THREADS * _VECTOR_BYTES // element_size
    share = -(-pixels // -(-pixels // limit))
    return min(-(-share // _VECTOR_BYTES) * _VECTOR_BYTES, limit)


def _one_device(images: Images, rows: Rows | None, outputs: Sequence[torch.Tensor]) -> torch.device:
    """Return the device that all arguments lie on."""
    devices = [x.device for x in (images, rows, *outputs) if isinstance(x, torch.Tensor)]
    for other in devices[1:]:
        if other != devices[0]:
            raise InputError(
                f"images, rows and outputs must lie on one device, got {devices[0]} and {other}; "
                "move them to the device that the batch is made on"
            )
    return devices[0]
