"""A tiny codec with one vector per image, and images that it tells apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.autoencoders import build
from latent_codec import LatentCodec
from latent_codec.images.sources import ImageSource

SIDE = 8


def one_vector_codec(name: str = "AutoencoderKL", **changes) -> LatentCodec:
    """Random weights, 4 numbers for 8x8 px."""
    blocks = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return LatentCodec(build(name, **{**blocks, "sample_size": SIDE, **changes}), name="tiny")


class LabelledImages(ImageSource):
    """Images in memory, (3, H, W) uint8 each, and their labels."""

    def __init__(self, images: Sequence[Tensor], labels: Sequence[int | dict | None]):
        self.images, self.labels = list(images), list(labels)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def label(self, index: int) -> int | dict | None:
        return self.labels[index]

    def read(self, index: int, channels: int = 3) -> Tensor:
        return self.images[index][:channels]


def ramps(count: int) -> LabelledImages:
    """Noisy ramps from left to right, and from top to bottom where the attribute Down is true: every other one."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(SIDE).expand(SIDE, SIDE) * 20
    images = [
        ((ramp.T if number % 2 else ramp) + torch.randint(0, 20, (3, SIDE, SIDE), generator=generator)).byte()
        for number in range(count)
    ]
    return LabelledImages(images, [{"Down": bool(number % 2)} for number in range(count)])


def plain_image(red: int, green: int, blue: int, side: int = SIDE) -> Tensor:
    """One color."""
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1).expand(3, side, side)
