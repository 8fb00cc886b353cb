"""The exceptions and the one warning that gpupipe raises.

::

    GpupipeError
    ├── InputError (ValueError)          an argument, array or dataset that cannot be used
    │   └── SourceError                  raw data: wrong dtype, mixed shapes, truncated files
    │       └── DecodeError              an encoded image that cannot be read or decoded
    ├── PlanError (ValueError)           a transform that cannot be compiled as it stands
    ├── IndexRangeError (IndexError)     a sampler asked for an index the dataset does not have
    ├── DeviceError (RuntimeError)       CUDA, CuPy or a kernel that is not there
    └── VerificationError (AssertionError)  a result that differs from torchvision's

    GpupipeWarning (UserWarning)

Every message says which argument, what came, what was expected and what to do.
"""


class GpupipeError(Exception):
    """Base of everything gpupipe raises on purpose."""


class InputError(GpupipeError, ValueError):
    """An argument, array or dataset that cannot be used as it is."""


class SourceError(InputError):
    """Raw data with the wrong dtype or shape, or a damaged file."""


class DecodeError(SourceError):
    """A file, or encoded bytes, that cannot be read or decoded as an image."""


class PlanError(GpupipeError, ValueError):
    """A transform that cannot be compiled: wrong constants, channels or claims."""


class IndexRangeError(GpupipeError, IndexError):
    """A sampler asked for an index that the dataset does not have."""


class DeviceError(GpupipeError, RuntimeError):
    """A device, CUDA library or kernel that is needed and not there."""


class VerificationError(GpupipeError, AssertionError):
    """A batch that differs from what torchvision gives for the same samples."""


class GpupipeWarning(UserWarning):
    """Something works, but not as its author probably meant."""
