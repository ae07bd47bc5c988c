"""Fit images into sizes that train together: a square, or buckets of aspect ratios.

    framing = Framing(size=512, step=64)
    frame = framing.frame(600, 900)         # resized to 529x793, of which the middle 448x768 is kept ... (height x width)
    cut(pixels, frame)                      # uint8 (C, h, w)

Buckets are those of kohya's scripts: sides are multiples of `step`, areas at most `size` squared.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from latent_codec.errors import SettingError

Size = tuple[int, int]
"""(height, width)."""

_MAX_ENLARGEMENT = 1.25
"""Of an image around a random window."""


@dataclass(frozen=True)
class Frame:
    """How an image is brought to its size: resized, then a window is cut out."""

    resized: Size
    window: tuple[int, int, int, int]
    """(top, left, height, width) in the resized image."""
    flipped: bool = False

    @property
    def size(self) -> Size:
        return self.window[2:]


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Which size an image is brought to.

    Args:
        size: side of a square with the area of the results, in pixels; None: images keep their own sizes.
        step: sides of buckets are multiples of it; None: all images become squares.
        multiple: what the sides are multiples of where a small image keeps its size.
        upscale: whether an image smaller than its bucket is enlarged; else it keeps its size, cut to multiples.

    Raises:
        SettingError: for numbers below 1, or buckets without a size that holds them.
    """

    size: int | None = None
    step: int | None = None
    multiple: int = 1
    upscale: bool = True

    def __post_init__(self):
        if self.size is None:
            if self.step is not None:
                raise SettingError("buckets", "a size of their area", advice="add `size=512`")
            return
        if self.size < 8:
            raise SettingError("size", "at least 8", self.size)
        if self.size % self.multiple:
            raise SettingError("size", f"a multiple of {self.multiple}, the codec's factor", self.size)
        if self.step is not None and (self.step < 1 or self.step > self.size or self.step % self.multiple):
            expected = f"a multiple of {self.multiple}, the codec's factor, of at most {self.size}"
            raise SettingError("bucket_step", expected, self.step)

    @cached_property
    def buckets(self) -> list[Size]:
        """All that there are, by their aspect ratio; sides are half of `size` to twice of it."""
        if self.size is None or self.step is None:
            return []
        step, area = self.step, self.size**2
        smallest, largest = max(self.size // 2 // step, 1) * step, self.size * 2 // step * step
        square = self.size // step * step
        found = {(square, square)}
        for width in range(smallest, largest + 1, step):
            height = min(largest, area // width // step * step)
            if height >= smallest:
                found |= {(height, width), (width, height)}
        return sorted(found, key=lambda each: (each[1] / each[0], each))

    def frame(self, height: int, width: int) -> Frame:
        """The middle of an image, as large as fits its square or the bucket of the nearest width / height."""
        if self.size is None:
            return Frame((height, width), (0, 0, height, width))
        target = (self.size, self.size)
        if self.step is not None:
            ratio = width / height
            target = min(self.buckets, key=lambda each: abs(each[1] / each[0] - ratio))
        if not self.upscale and (height < target[0] or width < target[1]):
            step = self.step or self.multiple
            sides = (height, width) if self.step else (min(height, width),) * 2
            low, high = (max(min(side, most) // step, 1) * step for side, most in zip(sides, target))
            target = low, high
        resized = _covering((height, width), target)
        top, left = ((side - kept) // 2 for side, kept in zip(resized, target))
        return Frame(resized, (top, left, *target))

    def random_frame(self, height: int, width: int, rng: np.random.Generator) -> Frame:
        """A window as large as `frame`'s, anywhere in the image up to 1.25 times as large, mirrored in half of all cases."""
        size = self.frame(height, width).size
        enlarged, down, across, mirror = rng.random(4)
        resized = _covering((height, width), size, _MAX_ENLARGEMENT**enlarged)
        top, left = (int(draw * (side - kept + 1)) for draw, side, kept in zip((down, across), resized, size))
        return Frame(resized, (top, left, *size), bool(mirror < 0.5))


def cut(pixels: Tensor, frame: Frame) -> Tensor:
    """Resize uint8 (C, H, W) by an antialiased bicubic filter, and cut out a frame's window, mirrored if it says so."""
    if tuple(pixels.shape[-2:]) != frame.resized:
        pixels = F.interpolate(pixels[None], frame.resized, mode="bicubic", antialias=True)[0]
    top, left, height, width = frame.window
    pixels = pixels[:, top : top + height, left : left + width]
    return pixels.flip(-1) if frame.flipped else pixels


def _covering(image: Size, target: Size, enlarged: float = 1.0) -> Size:
    """The size of an image that is resized until it just covers `target`, and then by `enlarged`."""
    scale = max(wanted / side for side, wanted in zip(image, target)) * enlarged
    height, width = (max(wanted, math.floor(side * scale + 0.5)) for side, wanted in zip(image, target))
    return height, width
