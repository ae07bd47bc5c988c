"""Whether a denoiser trained on one autoencoder's latents still fits another: a codec against a reference.

    image --codec-------> latents --codec----------> PSNR of the codec
       |                       +------reference------> PSNR of its latents under the reference's decoder
       |                    drift
       |                       +------codec----------> PSNR of the reference's latents under the codec's decoder
       +-----reference----> latents --reference------> PSNR of the reference

Latents are posterior means, scaled and shifted as each codec's config says: what a denoiser sees.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from latent_codec import metrics
from latent_codec.codec import ImageLike, LatentCodec
from latent_codec.families import LatentSpace
from latent_codec.files import plain
from latent_codec.images.tensors import shrunk_by, to_image
from latent_codec.torch_settings import plain_state_dict

CLOSE = 0.03
"""Drift up to which a denoiser fits: the least noise that Stable Diffusion's schedule trains on is
sqrt(beta_1 / (1 - beta_1)) = 0.029 of the latents' spread (beta_1 = 0.00085), so that less looks like noise to it."""

RELATED = 0.5
"""Drift up to which a denoiser is worth fine-tuning: the difference then has a quarter of the latents' power. At 1 it
has as much as the latents themselves, and a constant would predict them as well."""

NOT_OF_THE_ENCODER = (
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size"),
    *("out_channels", "up_block_types", "use_post_quant_conv"),
    *("lookup_from_codebook", "beta", "legacy", "gradient"),
)
"""Config entries that leave raw latents as they are; likewise decoder_*, num_decoder_* and up_*."""

Fit = Literal["same", "rescaled", "close", "related", "another", "unknown"]


@dataclass(frozen=True, kw_only=True)
class WeightComparison:
    """One side of two autoencoders, tensor by tensor, as float32."""

    num_tensors: int
    """Names that either has."""
    num_equal: int
    """Equal to the bit."""
    differing: tuple[str, ...]
    """In shape or values."""
    missing: tuple[str, ...]
    """That only one of them has."""

    @property
    def are_equal(self) -> bool:
        return self.num_equal == self.num_tensors


@dataclass(frozen=True, kw_only=True)
class ChannelDrift:
    """One channel of the latents over all positions of all images."""

    mean: float
    std: float
    reference_mean: float
    reference_std: float
    mean_difference: float
    """The codec's mean less the reference's."""
    correlation: float | None
    """1 where the codec's latents are the reference's up to scale and shift; None where one of them is constant."""


@dataclass(frozen=True, kw_only=True)
class DropInAudit:
    """A codec compared with its reference; the figures are None, or absent, where there were no images."""

    codec: str
    reference: str
    fit: Fit
    verdict: str
    """`fit` in a sentence, with the figure that decided."""
    encoder: WeightComparison
    """Encoder, quant convolution and codebook: what makes latents."""
    decoder: WeightComparison
    config_differences: tuple[str, ...]
    """Entries of both configs, with both values, by which equal weights may encode differently."""
    space: LatentSpace
    reference_space: LatentSpace
    num_images: int = 0
    drift: float | None = None
    """Root mean square of the latents' difference over the reference's standard deviation, all channels together."""
    channels: tuple[ChannelDrift, ...] = ()
    psnr: float | None = None
    """dB, 8 bits per channel, mean over images: the codec's latents by its own decoder."""
    psnr_of_reference: float | None = None
    """The reference's latents by the reference's decoder."""
    psnr_by_reference: float | None = None
    """The codec's latents by the reference's decoder."""
    psnr_of_reference_by_codec: float | None = None
    """The reference's latents by the codec's decoder: what a denoiser's latents would look like."""

    def to_dict(self) -> dict:
        """Plain data for JSON, which knows no infinity: of images that came back identical the PSNR is None."""
        return plain(asdict(self))


def audit_drop_in(
    codec: LatentCodec, reference: LatentCodec, images: Iterable[ImageLike] | None = None
) -> DropInAudit:
    """Compare weights, space and, on images, latents and decodings of two codecs.

    Args:
        codec: the one that would take the place of `reference`.
        reference: what the denoiser was trained on.
        images: images, one by one, of any kind that `LatentCodec.encode` takes; None compares only weights.

    Raises:
        ValueError: if no denoiser could take both codecs' latents, or `images` is empty.
    """
    mine, theirs = codec.latent_space, reference.latent_space
    if (mine.channels, mine.downsampling_factor) != (theirs.channels, theirs.downsampling_factor):
        raise ValueError(
            f"no denoiser takes both: latents of {codec.name} have {mine.channels} channels, one position for "
            f"{mine.downsampling_factor}x{mine.downsampling_factor} pixels, and those of {reference.name} have "
            f"{theirs.channels}, one for {theirs.downsampling_factor}x{theirs.downsampling_factor}"
        )
    encoder, decoder = (_compare_weights(codec, reference, of_decoder=each) for each in (False, True))
    figures = {} if images is None else _measure(codec, reference, images)
    differences = _config_differences(codec, reference)
    fit, verdict = _verdict(encoder, bool(differences), mine == theirs, figures.get("drift"), reference.name)
    return DropInAudit(
        codec=codec.name,
        reference=reference.name,
        fit=fit,
        verdict=verdict,
        encoder=encoder,
        decoder=decoder,
        config_differences=differences,
        space=mine,
        reference_space=theirs,
        **figures,
    )


def _compare_weights(codec: LatentCodec, reference: LatentCodec, *, of_decoder: bool) -> WeightComparison:
    mine, theirs = (
        {
            key: tensor
            for key, tensor in plain_state_dict(each.autoencoder).items()
            if each.is_of_decoder(key) == of_decoder
        }
        for each in (codec, reference)
    )
    shared = mine.keys() & theirs.keys()
    differing = sorted(
        key for key in shared if not torch.equal(mine[key].cpu().float(), theirs[key].cpu().float())
    )
    return WeightComparison(
        num_tensors=len(mine.keys() | theirs.keys()),
        num_equal=len(shared) - len(differing),
        differing=tuple(differing),
        missing=tuple(sorted(mine.keys() ^ theirs.keys())),
    )


def _config_differences(codec: LatentCodec, reference: LatentCodec) -> tuple[str, ...]:
    mine, theirs = codec.autoencoder.config, reference.autoencoder.config
    return tuple(
        f"{key} {mine[key]} and {theirs[key]}"
        for key in sorted(mine.keys() & theirs.keys())
        if not key.startswith(("_", "decoder_", "num_decoder_", "up_"))
        and key not in NOT_OF_THE_ENCODER
        and plain(mine[key]) != plain(theirs[key])
    )


class _DriftMeter:
    """Sums over positions, per channel, of the codec's latents (0) and the reference's (1)."""

    def __init__(self, channels: int):
        self.num_images = self.num_positions = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.products = torch.zeros(2, 2, channels, dtype=torch.float64)
        self.squared_differences = torch.zeros(channels, dtype=torch.float64)

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Count in the latents of one image, (1, C, h, w) each."""
        pair = torch.stack([each[0].flatten(1).cpu().double() for each in (mine, theirs)])
        self.num_images += 1
        self.num_positions += pair.shape[2]
        self.sums += pair.sum(2)
        self.products += torch.einsum("acp,bcp->abc", pair, pair)
        self.squared_differences += (pair[0] - pair[1]).square().sum(1)

    def channels(self) -> tuple[ChannelDrift, ...]:
        means, covariance = self._moments()
        stds = covariance.diagonal().T.sqrt()  # (2, C)
        return tuple(
            ChannelDrift(
                mean=mean[0],
                std=std[0],
                reference_mean=mean[1],
                reference_std=std[1],
                mean_difference=mean[0] - mean[1],
                correlation=shared / (std[0] * std[1]) if std[0] * std[1] > 0 else None,
            )
            for mean, std, shared in zip(means.T.tolist(), stds.T.tolist(), covariance[0, 1].tolist())
        )

    def drift(self) -> float:
        _, covariance = self._moments()
        power = float(covariance[1, 1].sum())
        if power <= 0:
            raise ValueError(
                "the reference's latents are the same everywhere; give images with something on them"
            )
        return math.sqrt(float(self.squared_differences.sum()) / self.num_positions / power)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Means (2, C) and covariances (2, 2, C); those of a constant channel are 0 in spite of rounding."""
        means, products = self.sums / self.num_positions, self.products / self.num_positions
        covariance = products - means[:, None] * means[None]
        return means, covariance.where(covariance.abs() > 1e-12 * products.abs(), 0.0)


def _measure(codec: LatentCodec, reference: LatentCodec, images: Iterable[ImageLike]) -> dict[str, Any]:
    """The figures of a `DropInAudit`, by name."""
    meter, psnr = _DriftMeter(codec.latent_space.channels), defaultdict(list)
    for image in images:
        mine, theirs = codec.encode(image), reference.encode(image)
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{codec.name} pads an image to latents of shape {tuple(mine.shape)} and {reference.name} to "
                f"{tuple(theirs.shape)}; give images whose sides are multiples of 64"
            )
        meter.add(mine, theirs)
        psnr["psnr"].append(_psnr(codec, mine, image))
        psnr["psnr_of_reference"].append(_psnr(reference, theirs, image))
        psnr["psnr_by_reference"].append(_psnr(reference, mine, image))
        psnr["psnr_of_reference_by_codec"].append(_psnr(codec, theirs, image))
    if not meter.num_images:
        raise ValueError("expected at least one image, or None to compare only weights, got none")
    means = {name: fmean(figures) for name, figures in psnr.items()}
    return {"num_images": meter.num_images, "drift": meter.drift(), "channels": meter.channels()} | means


def _psnr(decoder: LatentCodec, latents: Tensor, image: ImageLike) -> float:
    original = to_image(image, channels=decoder.channels)[None]
    decoded = decoder.decode(latents, size=tuple(original.shape[-2:]), output_type="pt")
    decoded = shrunk_by(decoded, decoder.upscale)
    return float(metrics.psnr(metrics.round_to_8_bits(decoded.cpu()), original.cpu()))


def _verdict(
    encoder: WeightComparison, configs_differ: bool, is_same_space: bool, drift: float | None, name: str
) -> tuple[Fit, str]:
    """Whether a denoiser of the reference, called `name`, fits; and that in a sentence."""
    drifts = "" if drift is None else f"latents drift by {drift:.2g} of their spread"
    if encoder.are_equal and not configs_differ:
        if is_same_space:
            return "same", f"same latent space: encoder equal to the bit; a denoiser of {name} fits"
        return (
            "rescaled",
            f"same encoder, equal to the bit, but another scale: give it {name}'s, and its denoiser fits",
        )
    if drift is None:
        differing = encoder.num_tensors - encoder.num_equal
        what = f"{differing} of {encoder.num_tensors} tensors" if differing else "config"
        return "unknown", f"encoders differ in {what}; images would tell how far the latents drift"
    if drift <= CLOSE:
        return "close", f"close: {drifts}, at most {CLOSE}; a denoiser of {name} fits"
    if drift <= RELATED:
        return (
            "related",
            f"related: {drifts}, above {CLOSE} and at most {RELATED}; a denoiser of {name} must be fine-tuned",
        )
    return "another", f"another latent space: {drifts}, above {RELATED}; a denoiser must be trained anew"
