"""Latents: what an image becomes, channel by channel; and codecs of one vector per image, whose dimensions one can turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from latent_codec.analysis.attributes import AttributeDirection
from latent_codec.analysis.features import check_vector_side, fit_image
from latent_codec.analysis.morphs import Way, morph
from latent_codec.analysis.traversals import traverse
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.latents import LatentMeter, LatentStatistics, plot_latent_histograms
from latent_codec.evaluation.meters import Batch
from latent_codec.images.animations import write_animation
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import enlarged_to, read_image, to_image, to_pil

RANGE = 3.0
"""Standard deviations from black to white, and from a dimension's lowest value to its highest."""
MAX_CHANNELS = 32
SIDE = 192
"""Pixels that small images are enlarged to."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    images: list[tuple[Image.Image, str]]
    """Of each channel, -RANGE to RANGE in gray, and its mean and standard deviation."""
    histograms: Image.Image
    note: str


def channels(codec: LatentCodec, image: Tensor) -> Channels:
    """The latents of an image (C, H, W), each channel as an image, and their histograms."""
    fitted = fit_image(to_image(image, channels=codec.channels), codec)
    encoding = codec.encode_all(fitted)
    latents = encoding.latents[:, :MAX_CHANNELS].float().cpu()
    meter = LatentMeter(latents.shape[1])
    encoding = encoding._replace(latents=latents, posterior=None)
    meter.add(Batch(originals=fitted[None], encoding=encoding, reconstructions=fitted[None]))
    statistics = meter.result()
    images = [
        (enlarged_to(to_pil(each[None] / RANGE), SIDE), f"{number}: mean {mean:.2f}, std {std:.2f}")
        for number, (each, mean, std) in enumerate(zip(latents[0], statistics.mean, statistics.std))
    ]
    count, height, width = encoding.latents.shape[1:]
    note = f"{codec.name}: {fitted.shape[2]}x{fitted.shape[1]} px -> {count} channels of {width}x{height}"
    if codec.latent_space.channels > count:
        note += f", the first {count} of {codec.latent_space.channels}"
    return Channels(images=images, histograms=_histograms(statistics), note=note)


def _histograms(statistics: LatentStatistics) -> Image.Image:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "histograms.png"
        plot_latent_histograms(statistics, path)
        return to_pil(read_image(path))


@dataclass(frozen=True, kw_only=True)
class ShownMorph:
    strip: Image.Image
    animation: Path
    note: str


def morphed(
    codec: LatentCodec,
    first: Tensor,
    second: Tensor,
    animation: Path,
    *,
    steps: int = 8,
    way: Way = "linear",
    on_progress: Callable[[int, int], None] | None = None,
) -> ShownMorph:
    """Walk from one image to the other through latents: a strip, and an animation there and back, written at `animation`."""
    found = morph(codec, [first, second], steps=steps, way=way, on_progress=on_progress)
    shares = [f"{step / (steps - 1):.0%}" for step in range(steps)]
    frames = [enlarged_to(to_pil(frame), SIDE) for frame in found.frames]
    write_animation([*frames, *frames[-2:0:-1]], animation, last_milliseconds=100)
    note = (
        found.note or f"{codec.name} has one vector per image: what is between two of them is an image, too"
    )
    return ShownMorph(
        strip=to_pil(sheet(found.legs, column_titles=shares, side=96)), animation=animation, note=note
    )


def strongest_dimensions(codec: LatentCodec, image: Tensor, count: int) -> list[int]:
    """The dimensions of a codec's vector that change an image most.

    Raises:
        ValueError: for a codec with a grid of latents.
    """
    return [each.index for each in traverse(codec, image=image, values=(-RANGE, RANGE))[:count]]


def vector(codec: LatentCodec, image: Tensor) -> list[float]:
    """The numbers that stand for an image.

    Raises:
        ValueError: for a codec with a grid of latents.
    """
    check_vector_side(codec, "turning dimensions")
    return codec.encode(fit_image(to_image(image, channels=codec.channels), codec)).flatten().tolist()


def turned(
    codec: LatentCodec,
    start: list[float],
    values: Mapping[int, float],
    direction: AttributeDirection | None = None,
    amount: float = 0,
) -> Image.Image:
    """Decode a vector with some of its dimensions at other values, moved along the direction of an attribute.

    Raises:
        ValueError: for a codec with a grid of latents, or a direction of another codec.
    """
    side = check_vector_side(codec, "turning dimensions")
    latents = torch.tensor(start)
    for index, value in values.items():
        latents[index] = value
    latents = latents.view(1, -1, 1, 1)
    if direction is not None:
        direction.check(codec)
        latents = latents + amount * direction.direction
    return enlarged_to(codec.decode(latents, size=(side, side))[0], 2 * SIDE)
