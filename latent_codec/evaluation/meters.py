"""What all meters share: a batch of images that went through a codec once, and figures that may be missing.

images --codec.encode_all--> Encoding --codec.decode--> reconstructions
             Batch of all three --> meter.add(batch) ... meter.result()
"""

from dataclasses import dataclass

from torch import Tensor

from latent_codec.codec import Encoding
from latent_codec.images.origins import Origin


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one size, and what a codec made of them. A meter reads the fields that it measures."""

    originals: Tensor
    """(N, C, H, W) in [-1, 1]."""
    encoding: Encoding | None = None
    reconstructions: Tensor | None = None
    """Like `originals`, rounded as their files would be: to 8 bits per channel, or as their origins say."""
    names: list[str] | None = None
    indices: list[int] | None = None
    """Of the images in their source."""
    origins: list[Origin | None] | None = None
    """What each stands for; None: 8 bits in sRGB."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured number, or None and the reason why there is none."""

    value: float | None
    note: str = ""
    """How it was measured, or why it was not."""
