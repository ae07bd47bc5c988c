"""Decoder sensitivity: the image error that an error in each channel of the latents causes."""

import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.torch_settings import ignoring_caller_settings

NOISE = 0.1
"""Of the noise, in standard deviations of a channel."""
COARSEST_PSNR = 20.0
"""Of an image with the quantization errors of the coarsest step sizes, in dB."""


@ignoring_caller_settings()
def decoder_sensitivity(codec: LatentCodec, latents: Tensor, seed: int = 0) -> Tensor:
    """Measure the mean squared error of images, in [0, 1], per squared error of each channel, by adding a little noise.

    Args:
        latents: (B, C, h, w), as from `encode`; a few crops are enough.

    Returns:
        float64 (C,), above 0.

    Raises:
        ValueError: for a channel that is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    deviations = latents.float().std((0, 2, 3))
    if not (deviations > 0).all():
        raise ValueError(f"channel {int(deviations.argmin())} of {codec.name} is constant over these images")
    decoded = codec.decode(latents, output_type="pt").float()
    found = []
    for channel, deviation in enumerate(deviations.tolist()):
        noise = NOISE * deviation * torch.randn(latents[:, channel].shape, generator=generator)
        noisy = latents.clone()
        noisy[:, channel] += noise.to(latents)
        error = (codec.decode(noisy, output_type="pt").float() - decoded).double().square().mean() / 4
        found.append(error.cpu() / noise.double().square().mean())
    return torch.stack(found).clamp_min(1e-12)


def coarsest_step_sizes(sensitivity: Tensor, psnr: float = COARSEST_PSNR) -> Tensor:
    """Step sizes whose rounding errors, s^2 / 12 each, add up to an image error of `psnr` dB, in equal parts: float64 (C,).

    Equal parts are best where every channel spends bits: by a Lagrange multiplier, as in reverse water-filling
    (Cover and Thomas, "Elements of Information Theory", section 10.3.3).
    """
    return (12 * 10 ** (-psnr / 10) / (len(sensitivity) * sensitivity)).sqrt()
