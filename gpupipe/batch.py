"""How the parts of a batch become what the user's loop receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from gpupipe import trees
from gpupipe.errors import InputError

if TYPE_CHECKING:
    from gpupipe.file_sources import FileSource
    from gpupipe.sources import ArraySource

Assemble = Callable[[torch.Tensor, tuple[torch.Tensor, ...], NDArray[np.int64]], Any]
"""``assemble(images, columns, indices)`` returns the batch; ``indices`` are the dataset's."""


def move(tree: Any, device: torch.device) -> Any:  # one return a kind of tree
    """Return a batch with its tensors on ``device``; structure, strings and numbers stay.

    Args:
        tree: tensors, in lists, tuples, named tuples, mappings or objects with ``.to``.
        device: where to.
    """
    if isinstance(tree, torch.Tensor):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, (str, bytes)):
        return tree
    if type(tree) is dict:
        return {key: move(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(move(value, device) for value in tree))
    if type(tree) in (list, tuple):
        return type(tree)(move(value, device) for value in tree)
    if isinstance(tree, Mapping) or hasattr(tree, "data_ptr"):
        return tree.to(device) if hasattr(tree, "to") else tree
    return tree


def restyle(tree: Any, dtype: torch.dtype | None, memory_format: torch.memory_format) -> Any:
    """Give the images of a batch that no kernel made the dtype and layout that were asked for.

    The images are the first floating-point tensor [N, C, H, W] or [N, H, W] of the batch.
    """
    for path, leaf in trees.walk(tree):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            continue
        if leaf.ndim == 4:  # noqa: PLR2004 # [N, C, H, W]
            styled = leaf.to(dtype=dtype or leaf.dtype, memory_format=memory_format)
        elif leaf.ndim == 3:  # noqa: PLR2004 # [N, H, W]
            styled = leaf.to(dtype=dtype or leaf.dtype)
        else:
            continue
        return trees.fill(tree, path, styled)
    return tree


def assembler(source: ArraySource | FileSource, device: torch.device) -> tuple[Assemble, bool]:
    """Return how a source's batches are put together, and whether its columns are used.

    A ``target_transform`` is the user's Python and runs sample by sample; what it returns goes
    through ``default_collate``. Without one the columns are gathered as arrays.
    """
    if any(part.target_transform is not None for part in source.parts):
        return _Targets(source, device), False
    if source.first.position is None:
        return (lambda images, _columns, _indices: images), True
    return (lambda images, columns, _indices: [images, *columns]), True


class _Targets:
    """Puts targets beside the images that a ``target_transform`` makes one by one."""

    def __init__(self, source: ArraySource | FileSource, device: torch.device) -> None:
        self._source = source
        self._device = device

    def __call__(
        self,
        images: torch.Tensor,
        _columns: tuple[torch.Tensor, ...],
        indices: NDArray[np.int64],
    ) -> list[Any]:
        targets = self._source.targets(indices)
        return [images, move(collate_targets(targets), self._device)]


def collate_targets(targets: list[Any]) -> Any:
    """Collate targets as torch's default does.

    Raises:
        InputError: the targets cannot be collated.
    """
    try:
        return default_collate(targets)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"targets must be numbers, strings, tensors or containers of them, all of one shape, "
            f"got {type(targets[0]).__name__} first: {error}; change target_transform, or pass a "
            "collate_fn that knows them"
        ) from error
