"""AutoencoderKL: a Gaussian posterior over continuous latents (Stable Diffusion, SDXL, SD3, FLUX.1)."""

from typing import TYPE_CHECKING, ClassVar

from latent_codec.families.family import (
    Encoded,
    Family,
    Trainable,
    decoder_head_of,
    encoder_tail_of,
    gaussian,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


class KL(Family):
    """An encoder, a decoder, and 1x1 convolutions between them and the latents, where it has them."""

    channels_last = True
    has_exact_tiles = True
    trainable: ClassVar[Trainable | None] = Trainable(encoder=("encoder", "quant_conv"), linear_start=True)

    @property
    def folds_statistics(self) -> bool:
        return self.autoencoder.quant_conv is not None and self.autoencoder.post_quant_conv is not None

    @property
    def decoder_head(self) -> "nn.Sequential":
        return decoder_head_of(self.autoencoder)

    @property
    def encoder_tail(self) -> "nn.Sequential":
        return encoder_tail_of(self.autoencoder)

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        if tile is None:
            return super().encode_raw(images)
        from latent_codec.models.tiling import encode_tiled

        return gaussian(encode_tiled(self.autoencoder.encoder, self.autoencoder.quant_conv, images, tile))

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        if tile is None:
            return super().decode_raw(raw_latents)
        from latent_codec.models.tiling import decode_tiled

        return decode_tiled(self.autoencoder.decoder, self.autoencoder.post_quant_conv, raw_latents, tile)
