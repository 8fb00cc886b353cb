"""The oracle: torchvision, sample by sample, and torch's own collate; nothing of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pil(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return pixels [H, W, C] as a PIL image, C of 1 to 4."""
    height, width, channels = pixels.shape
    return Image.frombytes(
        _MODES[channels], (width, height), np.ascontiguousarray(pixels).tobytes()
    )


def tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return pixels [H, W, C] as a uint8 tensor [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def images(
    transform: Callable[[Any], Any],
    pixels: NDArray[np.uint8],
    dtype: torch.dtype | None = None,
    make: Callable[[NDArray[np.uint8]], Any] = pil,
) -> torch.Tensor:
    """Return what torchvision makes of pixels [N, H, W, C], one by one: [N, C, H, W].

    Args:
        transform: the user's own.
        pixels: raw images.
        dtype: what the user's loop would cast the batch to.
        make: how an image is given to the transform.
    """
    batch = torch.stack([transform(make(image)) for image in pixels]).as_subclass(torch.Tensor)
    return batch if dtype is None else batch.to(dtype)


def batch_of(dataset: Any, indices: Iterable[int]) -> Any:
    """Return the batch that torch's DataLoader makes of these samples."""
    return default_collate([dataset[index] for index in indices])


def assert_same_bits(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Two tensors have one shape, one dtype and the same bits, NaN and minus zero included."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    bits = _BITS[reference.dtype.itemsize]
    left, right = (t.contiguous().view(bits) for t in (ours, reference))
    differing = int((left != right).sum())
    assert differing == 0, f"{differing} of {left.numel()} values differ"
