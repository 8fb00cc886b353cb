"""Your torchvision pipeline, compiled to one CUDA kernel. Same bits."""

from gpupipe.pauses import collector_paused

with collector_paused():
    from gpupipe._version import __version__
    from gpupipe.array_dataset import ArrayDataset
    from gpupipe.errors import (
        DecodeError,
        DeviceError,
        GpupipeError,
        GpupipeWarning,
        IndexRangeError,
        InputError,
        PlanError,
        SourceError,
        VerificationError,
    )
    from gpupipe.image_files import ImageFiles
    from gpupipe.lift import lift
    from gpupipe.loader import DataLoader
    from gpupipe.operators.pointwise import pointwise
    from gpupipe.plan import Plan
    from gpupipe.preprocess import Preprocess, compile  # noqa: A004 # the word that torch.compile taught
    from gpupipe.replay import Replayed, replay
    from gpupipe.stats import ChannelStats, channel_stats
    from gpupipe.verify import Verification, verify

del collector_paused

__all__ = [
    "ArrayDataset",
    "ChannelStats",
    "DataLoader",
    "DecodeError",
    "DeviceError",
    "GpupipeError",
    "GpupipeWarning",
    "ImageFiles",
    "IndexRangeError",
    "InputError",
    "Plan",
    "PlanError",
    "Preprocess",
    "Replayed",
    "SourceError",
    "Verification",
    "VerificationError",
    "__version__",
    "channel_stats",
    "compile",
    "lift",
    "pointwise",
    "replay",
    "verify",
]

for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = "gpupipe"
del _name
