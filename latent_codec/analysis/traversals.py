"""One dimension of a latent vector at a time: what each of them changes, and how much it says of an image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_codec.analysis.features import check_vector_side
from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.latents import LatentMeter
from latent_codec.evaluation.meters import Batch
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.evaluation.reconstruction import BATCH_PIXELS
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import to_image

VALUES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Dimension:
    """One dimension of the latents of a codec with one vector per image."""

    index: int
    images: Tensor
    """(number of values, C, H, W) in [-1, 1]: the others as they are, this one at each value."""
    change: float
    """Root mean square difference between the images at the lowest and the highest value, in units of [-1, 1]."""
    kl: float | None
    """KL(q(z | x) || N(0, 1)) in nats, mean over images: what it says of an image. None: not measured, or no posterior."""

    def to_dict(self) -> dict[str, Any]:
        return {"dimension": self.index, "kl_nats": self.kl, "change": self.change}


def traverse(
    codec: LatentCodec,
    source: ImageSource | None = None,
    *,
    image: ImageLike | None = None,
    values: Sequence[float] = VALUES,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Dimension]:
    """Set one dimension of a latent vector after another to each value, and decode.

    Values are those of z ~ N(0, 1), the prior of a VAE; of a codec without posterior, standard deviations of its latents from
    their mean.

    Args:
        source: images that the KL divergence is measured on (and, without posterior, mean and standard deviation).
        image: whose latents the other dimensions have; None: 0, the middle of the prior.
        limit: at most N images of `source`, spread evenly.
        on_progress: called with (images encoded, images in all).

    Returns:
        The dimensions by falling KL, or where there is none by falling change.

    Raises:
        SettingError: for a value that is not finite.
        ValueError: for a codec with a grid of latents, or images that cannot be read.
    """
    side = check_vector_side(codec, "a traversal")
    for value in values:
        if not math.isfinite(value):
            raise SettingError("values", "finite numbers", value)
    channels, measured = codec.latent_space.channels, None
    if source is not None:
        meter = LatentMeter(channels)
        images = iter_images(source, limit, codec.channels, on_progress=on_progress)
        squares = ((index, fit_image(each, codec)) for index, each in images)
        for _, batch in batch_by_shape(squares, max_pixels=BATCH_PIXELS):
            meter.add(Batch(originals=batch, encoding=codec.encode_all(batch)))
        if not meter.positions:
            raise ValueError("none of the images could be read")
        measured = meter.result()
    mean, std = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
    if codec.family.has_posterior:
        mean, std = (codec.latent_space.normalize(each) for each in (mean, mean + std))
        std = std - mean
    elif measured is not None:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (measured.mean, measured.std))
    start = mean
    if image is not None:
        start = codec.encode(fit_image(to_image(image, channels=codec.channels), codec)).float().cpu()

    found = []
    for index in range(channels):
        latents = start.repeat(len(values), 1, 1, 1)
        latents[:, index] = mean[:, index] + torch.tensor(values).view(-1, 1, 1) * std[:, index]
        images = codec.decode(latents, size=(side, side), output_type="pt").cpu()
        lowest, highest = (images[values.index(each(values))] for each in (min, max))
        found.append(
            Dimension(
                index=index,
                images=images,
                change=float((highest - lowest).square().mean().sqrt()),
                kl=measured.kl[index] if measured is not None and measured.kl else None,
            )
        )
    return sorted(found, key=lambda each: each.change if each.kl is None else each.kl, reverse=True)
