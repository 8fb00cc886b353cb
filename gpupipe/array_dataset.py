"""Images in an array or a ``.npy`` file, as a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gpupipe.errors import SourceError

Transform = Callable[[Any], Any]


class ArrayDataset(Dataset[Any]):
    """Images in a NumPy array or a ``.npy`` file, with labels: a dataset for any loader.

    ``[i]`` is ``(transform(images[i]), target_transform(labels[i]))``, or the image alone where
    there are no labels. A ``.npy`` file is memory-mapped and stays on disk.

    Args:
        images: uint8 [N, H, W, C] or [N, H, W], or the path of such a ``.npy`` file.
        labels: [N, ...] or None, or the path of a ``.npy`` file.
        transform: takes an image, a uint8 ndarray [H, W, C] or [H, W].
        target_transform: takes a label.

    Raises:
        SourceError: another dtype or shape, labels of another length, a damaged or pickled file.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | str | PathLike[str],
        labels: NDArray[Any] | Sequence[Any] | str | PathLike[str] | None = None,
        *,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.images = _open(images, "images")
        self.labels = None if labels is None else _open(labels, "labels")
        self.transform = transform
        self.target_transform = target_transform
        check_images(self.images, "images")
        if self.labels is not None and self.labels.shape[:1] != (len(self.images),):
            raise SourceError(
                f"labels must be as many as images, got labels of shape {self.labels.shape} for "
                f"{len(self.images)} images; check that both belong together"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.labels is None:
            return image
        label = self.labels[index]
        return image, label if self.target_transform is None else self.target_transform(label)


def _open(array: Any, name: str) -> NDArray[Any]:
    if not isinstance(array, (str, PathLike)):
        return np.asanyarray(array)
    try:
        mapped: NDArray[Any] = np.lib.format.open_memmap(array, mode="r")
    except (ValueError, EOFError) as error:
        raise SourceError(
            f"{name} must be a whole .npy file of plain numbers, got {array}: {error}; "
            "save it again with np.save"
        ) from error
    return mapped


def check_images(images: NDArray[Any] | torch.Tensor, name: str) -> None:
    """Check raw images: uint8 with 3 or 4 axes.

    Raises:
        SourceError: anything else.
    """
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(images.shape) not in (3, 4):
        raise SourceError(
            f"{name} must be uint8 [N, H, W, C] or [N, H, W], got {dtype} {tuple(images.shape)}; "
            "pass the raw pixels, before any scaling"
        )
