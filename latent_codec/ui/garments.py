"""Garments to try things on: `garments.png`, drawn by the shipped pipeline fashion-mnist, 28x28 px each, a row for every class.

python -m latent_codec.ui.garments      draws the file anew
"""

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latent_codec.images.image_source import ImageSource
from latent_codec.images.tensors import image_grid, read_pixels, write_image

PATH = Path(__file__).with_name("garments.png")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PER_CLASS = 8
SIDE = 28


@cache
def _sheet() -> Tensor:
    """(10, 8, 1, 28, 28), uint8."""
    rows = read_pixels(PATH, channels=1).unflatten(2, (PER_CLASS, SIDE)).unflatten(1, (len(CLASSES), SIDE))
    return rows.permute(1, 3, 0, 2, 4).contiguous()


def garment(label: str, number: int = 0) -> Tensor:
    """One of them, uint8 (1, 28, 28)."""
    return _sheet()[CLASSES.index(label), number]


class Garments(ImageSource):
    """All of them, with their classes as labels."""

    def __len__(self) -> int:
        return len(CLASSES) * PER_CLASS

    def name(self, index: int) -> str:
        return f"{CLASSES[self.label(index)]} {index % PER_CLASS}"

    def label(self, index: int) -> int:
        return index // PER_CLASS

    def read(self, index: int, channels: int = 3) -> Tensor:
        return _sheet().flatten(0, 1)[index].expand(channels, -1, -1)


def main() -> None:
    from latent_codec.pipelines.folders import load_pipeline

    pipeline = load_pipeline("fashion-mnist")
    generator = torch.Generator().manual_seed(0)
    drawn: list[Image.Image] = pipeline(
        list(CLASSES), num_images=4 * PER_CLASS, keep=PER_CLASS, generator=generator
    ).images
    write_image(image_grid(drawn, PER_CLASS, gap=0).convert("L"), PATH)


if __name__ == "__main__":
    main()
