"""Labels and other values of samples as arrays, with the dtypes that ``default_collate`` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

NO_COLUMN = "its labels are not plain numbers of one type"


def _array(values: Any) -> NDArray[Any] | None:
    """Return values as an array if they all have one type and shape, or None."""
    if isinstance(values, (list, tuple)) and len(set(map(type, values))) > 1:
        return None  # default_collate goes by the first of a batch, NumPy by all of them
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def label_column(values: Any) -> NDArray[Any] | None:
    """Return labels as default_collate would type them after ``int()``, or None."""
    array = _array(values)
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    if array.size and array.max() > np.iinfo(np.int64).max:
        return None  # default_collate refuses them
    return array.astype(np.int64, copy=False)


def number_column(values: Any) -> NDArray[Any] | None:
    """Return a sequence of numbers with the dtype that default_collate gives them, or None."""
    array = _array(values)
    if array is None or array.dtype.kind not in "biuf" or not array.ndim or not len(array):
        return None
    try:
        batch = default_collate([values[0]])
    except (TypeError, ValueError, RuntimeError):  # float128, foreign byte order, too large
        return None
    if not isinstance(batch, torch.Tensor) or batch.shape[1:] != array.shape[1:]:
        return None  # a list of lists is collated item by item
    dtype = batch.numpy().dtype
    if not np.can_cast(array.dtype, dtype):
        return None  # a list of ints that int64 cannot hold: NumPy makes them uint64 or float64
    return array.astype(dtype, copy=False)
