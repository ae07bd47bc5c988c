"""What engines encode: images, one of which cannot be read, and a small codec."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from latent_codec import LatentCodec


def write_photos(folder: Path, count: int, sizes: Sequence[tuple[int, int]], *, digits: int) -> None:
    """Noise in `folder`/photos; every third image has the first of two sizes (height, width), and number 7 is damaged."""
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (*sizes[number % 3 > 0], 3), np.uint8))
        pixels.save(folder / "photos" / f"{number:0{digits}d}.png")
    (folder / "photos" / f"{7:0{digits}d}.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")


def small_codec(*widths: int, name: str = "codec", **config) -> LatentCodec:
    """Factor 2, with random weights that are the same each time."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        **config,
    )
    return LatentCodec(model, name=name)
