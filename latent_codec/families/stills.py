"""Autoencoders of video that give one latent frame for one frame, used for still images."""

from typing import TYPE_CHECKING

from latent_codec.families.family import Encoded, Family

if TYPE_CHECKING:
    from torch import Tensor


class Stills(Family):
    """A video autoencoder with one frame: an axis of frames is added before it and taken away after it."""

    frames = 1

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        posterior, raw_latents = super().encode_raw(images.unsqueeze(2), tile)
        if posterior is None:
            return Encoded(None, _only_frame(raw_latents))
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return Encoded(DiagonalGaussianDistribution(_only_frame(posterior.parameters)), None)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        return _only_frame(super().decode_raw(raw_latents.unsqueeze(2), tile))


def _only_frame(video: "Tensor") -> "Tensor":
    if video.shape[2] != 1:
        raise ValueError(f"expected one frame for one frame, got {video.shape[2]}")
    return video[:, :, 0]
