"""AutoencoderKLOtherDecoder: AutoencoderKL's latents, with a smaller decoder or one that enlarges."""

from typing import TYPE_CHECKING

from latent_codec.families.kl import KL

if TYPE_CHECKING:
    from torch import Tensor


class KLOtherDecoder(KL):
    """Only its decoder is trained: it exists because the latents are in use."""

    trainable = None

    @property
    def upscale(self) -> int:
        return self.autoencoder.config.upscale

    @property
    def folds_statistics(self) -> bool:
        return False  # which would change the latents

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        images = super().decode_raw(raw_latents, tile)
        if tile is None or self.upscale == 1:
            return images
        from torch.nn.functional import pixel_shuffle

        return pixel_shuffle(images, self.upscale)
