"""Generated images of one shape each, whose factors of variation are their labels: `shapes:`.

    source = open_source("shapes:10000x64")     # 10,000 images of 64 px
    source.read(17)                             # uint8 (3, 64, 64)
    source.label(17)                            # {"shape": 2, "color": 0, "size": 3, "angle": 1, "x": 5, "y": 7}

Every factor is drawn alone and evenly, as in dSprites (Higgins et al., "beta-VAE", ICLR 2017, section 4.2), so that a latent
dimension that follows one of them, and no other, can be told from one that mixes them. Nothing is downloaded or stored: image i
is drawn from its number.
"""

import math
import re

import numpy as np
from PIL import Image, ImageDraw

from latent_codec.images.image_source import ImageSource

SHAPES = "shapes:"

FACTORS = {"shape": 3, "color": 5, "size": 4, "angle": 5, "x": 8, "y": 8}
"""Of each factor, how many values it takes, 0 up to this."""

_COLORS = ((215, 60, 50), (225, 170, 40), (90, 170, 70), (50, 130, 200), (140, 80, 180))  # red ... violet
_BACKGROUND = (24, 26, 30)
_RADII = (0.12, 0.155, 0.19, 0.225)  # of a shape, as a share of the image's side
_ANGLES = (-30, -15, 0, 15, 30)  # degrees, within the quarter turn that brings a square back onto itself
_CENTERS = (0.26, 0.74)  # of the first and the last position, as a share of the side
_OVERSAMPLING = 4

_UNIT_SHAPES = (
    [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],  # a square
    [(0.0, -1.0), (0.8, 0.6), (-0.8, 0.6)],  # a triangle
    [(math.cos(turn) * 0.55, math.sin(turn)) for turn in np.linspace(0, 2 * math.pi, 40, endpoint=False)],
)


class ShapeImages(ImageSource):
    """Colored squares, triangles and ellipses on a dark ground, uint8 (3, side, side), drawn when asked for.

    Args:
        count: how many images there are.
        side: their height and width in pixels.
        split: "train" or "test", which draw other factors.

    Raises:
        ValueError: for a count below 1, a side that is not 16 to 1024 px, or another split.
    """

    def __init__(self, count: int = 10_000, side: int = 64, split: str = "train"):
        if split not in ("train", "test"):
            raise ValueError(f"{SHAPES} has splits 'train' and 'test', not {split!r}")
        if count < 1 or not 16 <= side <= 1024:
            raise ValueError(
                f"{SHAPES}{count}x{side} asks for {count} images of {side} px; expected 1 or more of 16 to 1024 px"
            )
        self.count, self.side, self.split = count, side, split

    @classmethod
    def named(cls, name: str, split: str = "train") -> "ShapeImages":
        """Open "shapes:", "shapes:COUNT" or "shapes:COUNTxSIDE".

        Raises:
            ValueError: for anything else.
        """
        numbers = re.fullmatch(rf"{SHAPES}(?:(\d{{1,9}})(?:x(\d{{1,4}}))?)?", name)
        if numbers is None:
            raise ValueError(f"expected {SHAPES}, {SHAPES}COUNT or {SHAPES}COUNTxSIDE, got {name!r}")
        count, side = numbers.groups()
        return cls(int(count or 10_000), int(side or 64), split)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{SHAPES}{self.split}-{index:05d}"

    def label(self, index: int) -> dict[str, int]:
        """The factors of image `index`: of each of `FACTORS` an integer from 0."""
        if not 0 <= index < self.count:
            raise IndexError(f"{SHAPES} has images 0 to {self.count - 1}, not {index}")
        generator = np.random.default_rng((self.split == "test", index))
        return {name: int(generator.integers(values)) for name, values in FACTORS.items()}

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def _image(self, index: int) -> Image.Image:
        factors = self.label(index)
        side = self.side * _OVERSAMPLING
        angle = math.radians(_ANGLES[factors["angle"]])
        radius = _RADII[factors["size"]]
        first, last = _CENTERS
        center_x, center_y = (
            first + (last - first) * factors[axis] / (FACTORS[axis] - 1) for axis in ("x", "y")
        )
        corners = [
            (
                side * (center_x + radius * (x * math.cos(angle) - y * math.sin(angle))),
                side * (center_y + radius * (x * math.sin(angle) + y * math.cos(angle))),
            )
            for x, y in _UNIT_SHAPES[factors["shape"]]
        ]
        image = Image.new("RGB", (side, side), _BACKGROUND)
        ImageDraw.Draw(image).polygon(corners, fill=_COLORS[factors["color"]])
        return image.resize((self.side, self.side), Image.Resampling.BOX)
