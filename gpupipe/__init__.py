"""Your torchvision pipeline, compiled to one CUDA kernel. Same bits."""

from gpupipe._version import __version__

__all__ = ["__version__"]
