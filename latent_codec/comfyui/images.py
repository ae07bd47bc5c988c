"""Images as ComfyUI's nodes pass them, (B, H, W, C) in [0, 1], and as this project knows them."""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from latent_codec.images.image_source import ImageSource
from latent_codec.images.tensors import to_pil
from latent_codec.metrics import as_rgb


def to_images(pixels: Tensor) -> Tensor:
    """IMAGE (B, H, W, C) in [0, 1] -> images (B, C, H, W) in [-1, 1]."""
    return pixels.float().movedim(-1, 1).clamp(0, 1) * 2 - 1


def to_pixels(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Images (B, C, H, W) or [(C, H, W), ...] in [-1, 1] -> IMAGE (B, H, W, 3 or 4) on the CPU; gray as color."""
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    if images.shape[1] < 3:
        images = as_rgb(images)
    return (images.movedim(1, -1).to("cpu", torch.float32) + 1).div(2).clamp(0, 1).contiguous()


class PixelSource(ImageSource):
    """The images of an IMAGE."""

    def __init__(self, pixels: Tensor):
        self._images = to_images(pixels)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image {index + 1}"

    def _image(self, index: int) -> Image:
        return to_pil(self._images[index])
