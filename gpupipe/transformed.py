"""A dataset with a transform on top of it, for ``DataLoader(transform=...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch.utils.data import Dataset, IterableDataset


def apply_to_image(sample: Any, transform: Callable[[Any], Any]) -> Any:
    """Apply a transform to the image of a sample: the sample, or the first item of its tuple."""
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return type(sample)(transform(sample[0]), *sample[1:])
    if isinstance(sample, (tuple, list)):
        return type(sample)((transform(sample[0]), *sample[1:]))
    return transform(sample)


class Transformed(Dataset[Any]):
    """``dataset`` with ``transform`` applied to the image of each sample.

    Args:
        dataset: map-style.
        transform: takes the image.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    @classmethod
    def of(cls, dataset: Any, transform: Callable[[Any], Any]) -> Self | TransformedIterable:
        """Return the wrapper for a map-style or iterable dataset."""
        if isinstance(dataset, IterableDataset):
            return TransformedIterable(dataset, transform)
        return cls(dataset, transform)

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for wrappers of the same objects."""
        return id(self.dataset), id(self.transform)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return one sample."""
        return apply_to_image(self.dataset[index], self.transform)

    def __getattr__(self, name: str) -> Any:
        """Have ``__getitems__`` where the dataset has it: torch reads whole batches by it."""
        if name != "__getitems__":
            raise AttributeError(name)
        read = self.dataset.__getitems__
        return lambda indices: [apply_to_image(sample, self.transform) for sample in read(indices)]


class TransformedIterable(IterableDataset[Any]):
    """As ``Transformed``, for an iterable dataset."""

    def __init__(self, dataset: Any, transform: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for wrappers of the same objects."""
        return id(self.dataset), id(self.transform)

    def __iter__(self) -> Iterator[Any]:
        for sample in self.dataset:
            yield apply_to_image(sample, self.transform)
