"""Your torchvision pipeline, compiled to one CUDA kernel. Same bits."""

import gc

# After torch's imports a full collection is due, and the next few thousand objects set it off:
# 0.2 s over torch's objects, amid 50 ms of imports. Let it come later, with the user's own objects.
_collecting = gc.isenabled()
gc.disable()

from gpupipe._version import __version__
from gpupipe.array_dataset import ArrayDataset
from gpupipe.errors import (
    DeviceError,
    GpupipeError,
    GpupipeWarning,
    IndexRangeError,
    InputError,
    PlanError,
    SourceError,
    VerificationError,
)
from gpupipe.lift import lift
from gpupipe.loader import DataLoader
from gpupipe.operators.pointwise import pointwise
from gpupipe.plan import Plan
from gpupipe.preprocess import Preprocess, compile  # noqa: A004 # the word that torch.compile taught
from gpupipe.stats import ChannelStats, channel_stats
from gpupipe.verify import Verification, verify

__all__ = [
    "ArrayDataset",
    "ChannelStats",
    "DataLoader",
    "DeviceError",
    "GpupipeError",
    "GpupipeWarning",
    "IndexRangeError",
    "InputError",
    "Plan",
    "PlanError",
    "Preprocess",
    "SourceError",
    "Verification",
    "VerificationError",
    "__version__",
    "channel_stats",
    "compile",
    "lift",
    "pointwise",
    "verify",
]

if _collecting:
    gc.enable()
del _collecting, gc

for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = "gpupipe"
del _name
