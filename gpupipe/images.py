"""What a transform sees: a PIL image, a uint8 array or a uint8 tensor; its raw bytes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpupipe.tables import Layout

Container = Literal["PIL", "ndarray", "tensor", "Image"]
"""``"Image"`` is ``torchvision.tv_tensors.Image``; ``"tensor"`` is a plain torch.Tensor."""

_PIL_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}


@dataclass(frozen=True)
class ImageKind:
    """How one image is given to a transform, its size aside.

    Attributes:
        container: the type.
        channels: C.
        layout: of the raw bytes of a batch of such images.
        mode: Pillow's mode, where the container is PIL.
    """

    container: Container
    channels: int
    layout: Layout
    mode: str | None = None

    def build(self, pixels: NDArray[np.uint8]) -> Any:
        """Return pixels [H, W, C] as such an image, with memory of its own."""
        if self.layout == "NHW":
            pixels = pixels[:, :, 0]
        elif self.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        pixels = pixels.copy()  # in C order; a transform may work in place
        if self.container == "PIL":
            if self.mode in ("L", "LA", "RGB", "RGBA"):
                return Image.fromarray(pixels)
            size = (pixels.shape[1], pixels.shape[0])
            return Image.frombytes(str(self.mode), size, pixels.tobytes())
        if self.container == "ndarray":
            return pixels
        tensor = torch.from_numpy(pixels)
        return tv_tensors.Image(tensor) if self.container == "Image" else tensor

    def __str__(self) -> str:
        """Return a name for people: ``PIL L``, ``uint8 ndarray [H, W, 3]``."""
        if self.container == "PIL":
            return f"PIL {self.mode}"
        axes = {"NHWC": f"H, W, {self.channels}", "NCHW": f"{self.channels}, H, W", "NHW": "H, W"}
        name = {"ndarray": "ndarray", "tensor": "tensor", "Image": "tv_tensors.Image"}
        return f"uint8 {name[self.container]} [{axes[self.layout]}]"


def kind_of(image: Any) -> ImageKind | None:  # one return a refusal
    """Return how ``image`` is given, or None where it is no uint8 image that can be lifted."""
    if isinstance(image, Image.Image):
        channels = _PIL_CHANNELS.get(image.mode)
        if channels is None:
            return None
        return ImageKind("PIL", channels, "NHW" if channels == 1 else "NHWC", image.mode)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            return None
        channels = 1 if image.ndim == 2 else image.shape[2]  # noqa: PLR2004 # [H, W]
        return ImageKind("ndarray", channels, "NHW" if image.ndim == 2 else "NHWC")  # noqa: PLR2004
    if type(image) in (torch.Tensor, tv_tensors.Image):
        if image.dtype != torch.uint8 or image.ndim not in (2, 3) or image.device.type != "cpu":
            return None
        container: Container = "tensor" if type(image) is torch.Tensor else "Image"
        if image.ndim == 2:  # noqa: PLR2004 # [H, W]
            return ImageKind(container, 1, "NHW")
        return ImageKind(container, int(image.shape[0]), "NCHW")
    return None


def raw_bytes(image: Any) -> NDArray[np.uint8]:
    """Return the pixels of an image that ``kind_of`` knows, in its layout; a view if possible."""
    if isinstance(image, torch.Tensor):
        array: NDArray[np.uint8] = image.as_subclass(torch.Tensor).numpy()
        return array
    return np.asarray(image)
