"""What each group of a hierarchical codec's latents says of an image.

image --posterior--> e_1 ... e_k  (kept)     --+--> decode --> images that agree in what the top k groups say
              N(0, T^2) --> e_k+1 ... e_L    --+
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.reconstruction import BATCH_PIXELS
from latent_codec.images.batches import batch_by_shape, iter_images
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import pad_to_multiple, to_image
from latent_codec.torch_settings import ignoring_caller_settings


@dataclass(frozen=True, kw_only=True)
class GroupShare:
    """What a group says, mean over images."""

    group: int
    """1 is the top."""
    channels: int
    side: int
    """Pixels that one position stands for, per side."""
    kl: float
    """KL(q(z_l | x, z_<l) || p(z_l | z_<l)) in nats per image."""
    bits_per_dim: float
    """-ELBO where this group and those above it are inferred, and those below drawn from the prior."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "channels": self.channels,
            "side": self.side,
            "kl_nats": self.kl,
            "bits_per_dim": self.bits_per_dim,
        }


@dataclass(frozen=True, kw_only=True)
class GroupShares:
    """What `measure_groups` found."""

    groups: list[GroupShare]
    """Top first; the last one's `bits_per_dim` is that of the whole codec."""
    prior_bits_per_dim: float
    """-ELBO where no group is inferred: of images drawn from the prior, whatever the image is."""
    num_images: int


@ignoring_caller_settings()
def measure_groups(
    codec: LatentCodec,
    source: ImageSource,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> GroupShares:
    """Measure the divergence of each group, and -ELBO by the number of groups that are inferred.

    Images are rounded to 8 bits, and padded to the codec's multiple as `encode` pads them; the padding counts.

    Args:
        limit: at most N images of `source`, spread evenly.
        seed: of the draws of latents, one for each image and number of groups.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: for a codec without groups, or images none of which can be read.
    """
    check_groups(codec, "their shares")
    groups = codec.family.groups
    generator = torch.Generator(codec.device).manual_seed(seed)
    kl = torch.zeros(len(groups), dtype=torch.float64)
    bits = torch.zeros(len(groups) + 1, dtype=torch.float64)
    num_images = 0
    images = iter_images(source, limit, codec.channels, on_progress=on_progress)
    padded = ((index, pad_to_multiple(each, codec.family.side_multiple)) for index, each in images)
    for _, batch in batch_by_shape(padded, max_pixels=BATCH_PIXELS):
        for count in range(len(groups) + 1):
            found = codec.family.negative_elbo(batch.to(codec.device), count, generator)
            bits[count] += found.bits_per_dim.double().sum().cpu()
        kl += found.kl.double().sum(0).cpu()
        num_images += len(batch)
    if not num_images:
        raise ValueError("none of the images could be read")
    kl, bits = kl / num_images, bits / num_images
    return GroupShares(
        groups=[
            GroupShare(
                group=number,
                channels=group.channels,
                side=group.side,
                kl=float(kl[number - 1]),
                bits_per_dim=float(bits[number]),
            )
            for number, group in enumerate(groups, 1)
        ],
        prior_bits_per_dim=float(bits[0]),
        num_images=num_images,
    )


def redraw_groups(
    codec: LatentCodec,
    image: ImageLike,
    *,
    num: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """Keep an image's latents of the top k groups, and draw the others from the prior, for every k.

    Args:
        num: draws for each k.
        temperature: of the prior; 0: its means.
        seed: of the draws, which are the same ones for every k.

    Returns:
        For k = 0 to the number of groups, images (num, C, H, W) in [-1, 1], of the image's size.

    Raises:
        ValueError: for a codec without groups.
        SettingError: for a temperature below 0.
    """
    check_groups(codec, "redrawing them")
    if not temperature >= 0:
        raise SettingError("temperature", "a number of at least 0", temperature)
    image = to_image(image, channels=codec.channels)
    kept = codec.encode(image)
    drawn = torch.randn(num, *kept.shape[1:], generator=torch.Generator().manual_seed(seed))
    drawn = codec.latent_space.normalize(temperature * drawn.to(kept))
    rows, num_kept = [], 0
    for channels in [0, *(group.channels for group in codec.family.groups)]:
        num_kept += channels
        latents = torch.cat([kept[:, :num_kept].expand(num, -1, -1, -1), drawn[:, num_kept:]], 1)
        rows.append(codec.decode(latents, size=tuple(image.shape[1:]), output_type="pt").cpu())
    return rows


def check_groups(codec: LatentCodec, what: str) -> None:
    """Refuse a codec without groups of latents, for `what`.

    Raises:
        ValueError: naming codec and class.
    """
    if not codec.family.groups:
        raise ValueError(
            f"{what} needs a codec with groups of latents (HierarchicalKL), and {codec.name} is of the class "
            f"{type(codec.autoencoder).__name__}; `traverse` shows the dimensions of a latent vector"
        )
