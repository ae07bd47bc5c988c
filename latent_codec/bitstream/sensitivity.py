"""How much a codec's decoder makes of an error in each channel of its latents."""

import torch
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.torch_settings import ignoring_caller_settings

NOISE = 0.1
"""Standard deviations of a channel."""
COARSEST_PSNR = 20.0
"""dB that the errors of the coarsest steps alone would leave of an image."""


@ignoring_caller_settings()
def decoder_sensitivity(codec: LatentCodec, latents: Tensor, seed: int = 0) -> Tensor:
    """Mean squared error of images, values in [0, 1], per squared error of each channel: what a little noise there does.

    Args:
        latents: (B, C, h, w), as `encode` gives them; a few crops are enough.

    Returns:
        float64 (C,), above 0.

    Raises:
        ValueError: for a channel that is the same everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    deviations = latents.float().std((0, 2, 3))
    if not (deviations > 0).all():
        raise ValueError(
            f"channel {int(deviations.argmin())} of {codec.name} is the same everywhere in these images"
        )
    decoded = codec.decode(latents, output_type="pt").float()
    found = []
    for channel, deviation in enumerate(deviations.tolist()):
        noise = NOISE * deviation * torch.randn(latents[:, channel].shape, generator=generator)
        noisy = latents.clone()
        noisy[:, channel] += noise.to(latents)
        error = (codec.decode(noisy, output_type="pt").float() - decoded).double().square().mean() / 4
        found.append(error.cpu() / noise.double().square().mean())
    return torch.stack(found).clamp_min(1e-12)


def coarsest_steps(sensitivity: Tensor, psnr: float = COARSEST_PSNR) -> Tensor:
    """Steps whose rounding errors, s^2 / 12 each, add up to an image's error of `psnr` dB, in equal parts: float64 (C,).

    Equal parts are best where every channel spends bits: by a Lagrange multiplier, as in reverse water-filling
    (Cover and Thomas, "Elements of Information Theory", section 10.3.3).
    """
    return (12 * 10 ** (-psnr / 10) / (len(sensitivity) * sensitivity)).sqrt()
