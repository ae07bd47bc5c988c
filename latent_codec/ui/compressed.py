"""Compress: an image to a .lcf file of a chosen rate, and what a reader sees of it section by section."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from PIL import Image
from torch import Tensor

from latent_codec.bitstream import PartialWarning, decompress, prepare, unpack
from latent_codec.bitstream.compression import tile_for
from latent_codec.codec import LatentCodec
from latent_codec.images.tensors import to_image
from latent_codec.ui.round_trip import quality

MAX_OPENED = 2**23
"""Pixels of a .lcf file that the page opens."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A compressed image."""

    data: bytes
    image: Image.Image
    """Decoded from it."""
    figures: dict[str, str]


def compress_to(codec: LatentCodec, image: Tensor, bits_per_pixel: float) -> File:
    """Compress an image (C, H, W) to at most so many bits per pixel; a codec with one rate takes its own.

    Raises:
        SettingError: for a codec of latents without an entropy model, or fewer bits than the coarsest file takes.
    """
    image = to_image(image, channels=codec.channels)
    prepared = prepare(codec, image)
    bound = None
    if not codec.indices_suffice:
        bound = int(bits_per_pixel * image[0].numel() / 8)
    data, decoded = prepared.compress_and_read(target_bytes=bound)
    found = decoded.image()
    figures = _figures(data) | quality(to_image(found, channels=codec.channels), image)
    if codec.indices_suffice:
        figures["rate"] += " (indices have one rate)"
    return File(data=data, image=found, figures=figures)


def open_file(codec: LatentCodec, data: bytes) -> File:
    """Decode a .lcf file of this codec.

    Raises:
        BitstreamError: for another file, or a damaged one.
    """
    header = unpack(data).header
    return File(data=data, image=decompress(codec, data, tile=tile_for(header)), figures=_figures(data))


def space_of(data: bytes) -> str:
    """The space fingerprint of the codec that wrote a file.

    Raises:
        BitstreamError: for another file, a damaged one, or an image that is too large for the page.
        ValueError: for an image of more than MAX_OPENED pixels.
    """
    header = unpack(data).header
    if header.height * header.width > MAX_OPENED:
        raise ValueError(
            f"expected an image of at most {MAX_OPENED:,} pixels, got {header.width}x{header.height}; "
            "`latent-codec decompress` opens it"
        )
    return header.space_fingerprint


def stages(data: bytes) -> list[int]:
    """How many bytes there are once each section has arrived, the first sections of all tiles together."""
    container = unpack(data)
    ends = list(accumulate(container.lengths, initial=container.header_bytes))[1:]
    return ends[container.header.num_tiles - 1 :]


def arriving(codec: LatentCodec, data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """The image as each section arrives, and the bytes so far: the last is the whole file."""
    tile = tile_for(unpack(data).header)
    for num_bytes in stages(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PartialWarning)  # it is what is meant here
            yield decompress(codec, data[:num_bytes], partial=True, tile=tile), num_bytes


def _figures(data: bytes) -> dict[str, str]:
    header = unpack(data).header
    pixels = header.height * header.width
    return {
        "image": f"{header.width}x{header.height} px",
        "file": f"{len(data):,} bytes, {3 * pixels / len(data):.0f} times fewer than 8-bit RGB",
        "rate": f"{8 * len(data) / pixels:.3f} bits per pixel",
        "sections": str(header.num_sections),
    }
