"""``lift(loader)``: an existing torch loader, on gpupipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import BatchSampler
from torch.utils.data import DataLoader as TorchDataLoader

from gpupipe.errors import InputError
from gpupipe.faults import OnError
from gpupipe.loader import Auto, DataLoader, Decode, Device

T = TypeVar("T")


def lift(
    loader: TorchDataLoader[T],
    *,
    transform: Callable[[Any], Any] | Auto | None = "auto",
    device: Device = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    cache: Literal["device"] | None = None,
    decode: Decode = "exact",
    on_error: OnError = "raise",
    max_errors: int | None = None,
    error_log: str | os.PathLike[str] | None = None,
    strict: bool = False,
    return_indices: bool = False,
) -> DataLoader[T]:
    """Return a loader with the same dataset, sampler and arguments that runs on gpupipe.

    Args:
        loader: exactly a ``torch.utils.data.DataLoader``; it stays as it is.
        transform: see ``DataLoader``, and so for the rest.
        device: see ``DataLoader``.
        seed: see ``DataLoader``.
        dtype: see ``DataLoader``.
        memory_format: see ``DataLoader``.
        cache: see ``DataLoader``.
        decode: see ``DataLoader``.
        on_error: see ``DataLoader``.
        max_errors: see ``DataLoader``.
        error_log: see ``DataLoader``.
        strict: see ``DataLoader``.
        return_indices: see ``DataLoader``.

    Raises:
        InputError: not a loader, or a subclass, whose changes would be lost.
    """
    if type(loader) is not TorchDataLoader:
        raise InputError(
            f"lift() takes a torch.utils.data.DataLoader, got {_describe(loader)}; "
            "use gpupipe.DataLoader(dataset, ...) with its arguments"
        )
    arguments: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "pin_memory_device": loader.pin_memory_device,
        "in_order": loader.in_order,
    }
    own = loader.batch_sampler
    if loader.batch_size is not None and type(own) is BatchSampler:
        arguments |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        arguments["sampler"] = loader.sampler
    elif own is not None:
        arguments["batch_sampler"] = own
    else:
        arguments |= {"batch_size": None, "sampler": loader.sampler}
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        arguments.pop("sampler", None)
        arguments.pop("batch_sampler", None)
    return DataLoader(
        loader.dataset,
        **arguments,
        transform=transform,
        device=device,
        seed=seed,
        dtype=dtype,
        memory_format=memory_format,
        cache=cache,
        decode=decode,
        on_error=on_error,
        max_errors=max_errors,
        error_log=error_log,
        strict=strict,
        return_indices=return_indices,
    )


def _describe(value: Any) -> str:
    kind = type(value)
    if isinstance(value, DataLoader):
        return "a gpupipe.DataLoader, which is lifted already"
    if isinstance(value, TorchDataLoader):
        return f"{kind.__name__}, a subclass, whose changes would be lost"
    return f"{kind.__module__}.{kind.__qualname__}"
